"""The steps of _planes.h interleaved with a sender's, one by one (see planes_interleaved.c)."""

import os
import pathlib
import shlex
import subprocess

import pytest

import pagecore

HERE = pathlib.Path(__file__).parent
HEADERS = pathlib.Path(pagecore.__file__).parent


@pytest.mark.parametrize("cpu", ["plain", "cx16", "best"])
def test_interleavings(tmp_path, cpu):
    """On the paths with locked operations: nothing comes between the steps of a memory transaction."""
    program = tmp_path / "planes"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    subprocess.run([*command, f"-I{HEADERS}", "-o", program, HERE / "planes_interleaved.c"], check=True, timeout=60)
    environment = {**os.environ, "PAGECORE_CPU": cpu}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 0, result.stdout
