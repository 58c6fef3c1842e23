"""What the fuzzer starts from and what it once found, replayed; and in CI the fuzzer itself."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

import pagecore

FUZZ = pathlib.Path(__file__).resolve().parent.parent / "fuzz"


def load_targets() -> dict[str, Callable[[bytes], None]]:
    spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ / "targets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TARGETS


TARGETS = load_targets()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    inputs = sorted((FUZZ / "corpus" / name).iterdir())
    assert inputs, f"no input of {name}: python fuzz/make_corpus.py"
    for path in inputs:
        data = path.read_bytes()
        TARGETS[name](data)
        for end in range(0, len(data), max(1, len(data) // 50)):
            TARGETS[name](data[:end])


@pytest.mark.ci
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="no atheris: pip install 'pagecore[dev]'")
def test_the_fuzzer_finds_nothing_new(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), "--seconds", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(pagecore.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": Done ") == len(TARGETS), done.stdout
