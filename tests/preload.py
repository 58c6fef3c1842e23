"""Libraries in C that a test compiles for itself, and programs in which one stands before the C library."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def compiled(source: str | pathlib.Path, directory: str | os.PathLike[str]) -> str:
    """The path of the shared library that a file of this directory, or any other, makes in `directory`."""
    source = HERE / source
    library = os.path.join(directory, f"{source.stem}.so")
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    command = ["cc", *flags, "-o", library, str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return library


def preload(library: str | os.PathLike[str]) -> str:
    """LD_PRELOAD with a library behind what stands in it already: the runtime of a sanitizer has to come first."""
    return " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)])


def environment(library: str, **settings: str) -> dict[str, str]:
    """That of a process in which the library is preloaded, and which imports what a test does."""
    paths = [str(HERE), *[entry for entry in sys.path if entry]]
    return {**os.environ, "LD_PRELOAD": preload(library), "PYTHONPATH": os.pathsep.join(paths), **settings}


def run_with(library: str, program: str, *arguments: str, timeout: float = 60, **settings: str) -> str:
    """What the program prints; it has to end well, and without a warning."""
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(
        command, env=environment(library, **settings), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
