"""A pagecore whose userfaultfd calls are answered by a script first, for tests; nobody else's build can do that.

Only the one module that issues ioctls is built anew, with -DPAGECORE_INJECT; the rest of the package is linked to.
Tests run what they want to see in a process of its own (``run``), which arms the script through ``Injector``.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from preload import compiled

HERE = pathlib.Path(__file__).parent
KEEP = -(2**63)
_SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(
    name="injected",
    ext_modules=cythonize(
        [Extension("pagecore._uffd_ioctl", [{source!r}], include_dirs=[{root!r} + "/pagecore"],
                   extra_compile_args=["-O1", "-DPAGECORE_INJECT"])],
        include_path=[{root!r}], build_dir="cython", language_level=3,
    ),
)
"""


def build_overlay(directory: pathlib.Path) -> pathlib.Path:
    """Build the package into `directory`; what to put before everything else on the path."""
    import pagecore

    package = pathlib.Path(pagecore.__file__).parent
    overlay = directory / "overlay"
    (overlay / "pagecore").mkdir(parents=True)
    for entry in package.iterdir():
        if not (entry.name.startswith("_uffd_ioctl.") and entry.suffix == ".so"):
            (overlay / "pagecore" / entry.name).symlink_to(entry)
    (directory / "setup.py").write_text(
        _SETUP.format(source=str(package / "_uffd_ioctl.pyx"), root=str(package.parent))
    )
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={overlay}"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled("injected_ioctl.c", directory)
    return overlay


def run(overlay: pathlib.Path, program: str, *arguments: Any, timeout: float = 60) -> Any:
    """Run a program in the other build; what it printed, as JSON."""
    paths = [str(overlay), str(HERE), *[entry for entry in sys.path if entry]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PAGECORE_ANSWERS": str(overlay.parent / "injected_ioctl.so"),
    }
    command = [sys.executable, "-c", program, *[str(argument) for argument in arguments]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Injector:
    """In the process that runs the other build: arms the script."""

    def __init__(self) -> None:
        import pagecore._uffd_ioctl as module

        assert module.__file__ is not None
        self._answers = ctypes.CDLL(os.environ["PAGECORE_ANSWERS"])
        self._answers.count_calls.restype = self._answers.count_injected.restype = ctypes.c_uint64
        self._answers.generate.argtypes = [ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64]
        hook = ctypes.c_void_p.in_dll(ctypes.CDLL(module.__file__), "pagecore_injected_ioctl")
        hook.value = ctypes.cast(self._answers.answer, ctypes.c_void_p).value
        self._script: Any = None

    def script(self, *answers: tuple[int, int, int]) -> None:
        """(errno, pages that are really done, what the last field says) of each call that places; then the kernel's."""
        self._script = (ctypes.c_int64 * (3 * len(answers)))(*[number for answer in answers for number in answer])
        self._answers.script(self._script, ctypes.c_size_t(len(answers)))

    def generate(self, seed: int, per_thousand: int, page_size: int = 4096) -> None:
        """Answers at random, for so many calls of a thousand."""
        self._answers.generate(seed, per_thousand, page_size)

    @property
    def calls(self) -> int:
        """Calls that place, so far."""
        return self._answers.count_calls()

    @property
    def injected(self) -> int:
        """Those that were answered by the script."""
        return self._answers.count_injected()
