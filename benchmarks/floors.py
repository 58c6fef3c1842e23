"""What benchmarks share whether they run as programs or under pytest: floors in C, and memory for one round."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from pagecore import Feature, Region, Userfaultfd

HERE = pathlib.Path(__file__).parent


def compiler() -> str:
    return os.environ.get("CC") or shutil.which("cc") or "cc"


def compiled(name: str) -> ctypes.CDLL:
    """Build a C file that stands beside this one as a shared library of its own, and load it."""
    # POPCNT is what a tuned build of a peer would use; other processors count bits without being asked.
    popcount = ["-mpopcnt"] if platform.machine() == "x86_64" else []
    flags = ["-std=gnu11", "-O2", *popcount, "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread"]
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/{pathlib.Path(name).stem}.so"
        command = [compiler(), *flags, "-o", library, str(HERE / name)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
        # Loaded it needs its file no more.
        return ctypes.CDLL(library)


@contextlib.contextmanager
def registered(memory: mmap.mmap, features: Feature) -> Iterator[Region]:
    """Memory as a region of a new descriptor."""
    with Userfaultfd(features=features) as uffd:
        region = uffd.register(memory)
        yield region
        uffd.unregister(region)
