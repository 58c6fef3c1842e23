"""The bitmap headers by themselves: the self-test in C (bitmap_selftest.c), on every path and compiler here."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

import pagecore

SOURCE = pathlib.Path(__file__).with_name("bitmap_selftest.c")
HEADERS = pathlib.Path(pagecore.__file__).parent
SEED = os.environ.get("PAGECORE_STRESS_SEED", "20261")
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-pthread", f"-I{HEADERS}"]
HOST = shlex.split(os.environ.get("CC", "cc"))


def build(tmp_path: pathlib.Path, compiler: list[str], *flags: str) -> str:
    program = tmp_path / "selftest"
    command = [*compiler, *FLAGS, *flags, "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return str(program)


def run(*command: str, cpu: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PAGECORE_CPU"}
    if cpu is not None:
        environment["PAGECORE_CPU"] = cpu
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needed(*names: str) -> None:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing} not installed: tools/ensure-other-compilers.sh does it as root on Debian")


@pytest.mark.parametrize("level", [pytest.param(level, marks=pytest.mark.ci) for level in ("-O3", "-O1")])
def test_every_path_agrees_with_plain_loops(tmp_path: pathlib.Path, level: str) -> None:
    assert "agree with plain loops" in run(build(tmp_path, HOST, level), SEED)


@pytest.mark.ci
def test_no_undefined_behaviour(tmp_path: pathlib.Path) -> None:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(build(tmp_path, HOST, *flags), SEED, cpu="plain")
    run(build(tmp_path, HOST, *flags), SEED, cpu="cx16")


@pytest.mark.stress
@pytest.mark.parametrize("cpu", [pytest.param(cpu, marks=pytest.mark.ci) for cpu in (None, "plain", "avx2", "cx16")])
def test_threads_lose_no_bit_and_hide_none(tmp_path: pathlib.Path, cpu: str | None) -> None:
    """20 million sets beside drains of all kinds, counted exactly; then pages that must be found beside a cleaner."""
    assert "none lost" in run(build(tmp_path, HOST, "-O2"), "stress", SEED, "20", cpu=cpu)


@pytest.mark.ci
@pytest.mark.stress
def test_threads_under_threadsanitizer(tmp_path: pathlib.Path) -> None:
    # The fences order atomic words alone, so that ThreadSanitizer, which does not see fences, loses nothing.
    warnings = [] if "clang" in HOST[0] else ["-Wno-tsan"]
    run(build(tmp_path, HOST, "-O1", "-fsanitize=thread", *warnings), "stress", SEED, "2")


@pytest.mark.ci
def test_on_aarch64(tmp_path: pathlib.Path) -> None:
    needed("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
    program = build(tmp_path, ["aarch64-linux-gnu-gcc"], "-O2", "-static")
    run("qemu-aarch64-static", program, SEED)
    run("qemu-aarch64-static", program, "stress", SEED, "1")


@pytest.mark.ci
def test_with_musl(tmp_path: pathlib.Path) -> None:
    needed("musl-gcc")
    program = build(tmp_path, ["musl-gcc"], "-O2", "-static")
    run(program, SEED)
    run(program, "stress", SEED, "4")
