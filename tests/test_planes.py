"""The steps of _planes.h interleaved with a sender's, one by one (see planes_interleaved.c)."""

import os
import pathlib
import shlex
import subprocess

import pagecore

HERE = pathlib.Path(__file__).parent
HEADERS = pathlib.Path(pagecore.__file__).parent


def test_interleavings(tmp_path):
    program = tmp_path / "planes"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    subprocess.run([*command, f"-I{HEADERS}", "-o", program, HERE / "planes_interleaved.c"], check=True, timeout=60)
    result = subprocess.run([program], capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 0, result.stdout
