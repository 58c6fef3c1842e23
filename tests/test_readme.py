"""The README's example runs, and the files that it names exist."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.kernel
def test_the_example_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"102[34] pages placed, \d+ faults\n", done.stdout)


def test_the_first_two_commands_are_the_two():
    commands = re.findall(r"^\$ (.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    assert commands[:2] == ["make run", "make test"]


def test_every_test_file_and_link_that_it_names_exists():
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
