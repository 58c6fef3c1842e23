"""What every benchmark shares: the facts of the machine, and the floor in plain C."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from floors import compiled, compiler


def first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return "unknown"


def machine_facts() -> dict[str, str]:
    """What a figure depends on and pytest-benchmark does not record."""
    models = [line for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    caches = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    sizes = {f"L{read(str(c / 'level'))}{read(str(c / 'type'))[0].lower()}": read(str(c / "size")) for c in caches}
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "caches": " ".join(f"{name}={size}" for name, size in sorted(sizes.items())) or "unknown",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "kernel": platform.release(),
        "huge pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "compiler": first_line([compiler(), "--version"]),
        "numpy": np.__version__,
    }


def pytest_report_header() -> list[str]:
    return [f"machine: {', '.join(f'{name}: {value}' for name, value in machine_facts().items())}"]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pagecore"] = machine_facts()


@pytest.fixture(scope="session")
def compile_floor() -> Callable[[str], ctypes.CDLL]:
    """Build a C file that stands beside this one, and load it; once in a session."""
    return functools.cache(compiled)


@pytest.fixture(scope="session")
def floor(compile_floor: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """The functions of floor.c; pass arrays through `address`."""
    library = compile_floor("floor.c")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, arguments in {
        "floor_count": [pointer, size],
        "floor_drain": [pointer, pointer, size],
        "floor_clear_runs": [pointer, pointer, size],
        "floor_runs": [pointer, size, pointer],
        "floor_indices": [pointer, size, pointer],
        "floor_set_indices": [pointer, size, pointer, size],
    }.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = size
    return library
