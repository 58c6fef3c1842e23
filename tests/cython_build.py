"""Compile a Cython module of the tests against the installed pagecore."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType

import pagecore

_SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(
    name={name!r},
    ext_modules=cythonize(
        [Extension({name!r}, [{source!r}], include_dirs={headers!r})],
        include_path=[{root!r}],
        language_level=3,
    ),
)
"""


def build(source: pathlib.Path, directory: pathlib.Path, *, headers: bool = False) -> ModuleType:
    """Copy a ``.pyx`` into an empty directory, build it there and import it.

    A consumer has no include path but the package's parent, for cimports: it must not need our headers. What looks
    inside the package asks for `headers`.
    """
    package = pathlib.Path(pagecore.__file__).parent
    shutil.copy(source, directory)
    (directory / "setup.py").write_text(
        _SETUP.format(
            name=source.stem,
            source=source.name,
            headers=[str(package)] if headers else [],
            root=str(package.parent),
        )
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=directory,
        env={**os.environ, "CFLAGS": "-O1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob(f"{source.stem}*.so")
    spec = importlib.util.spec_from_file_location(source.stem, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
