"""The README's example runs, what the documents name exists, and every public name is in them."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import pagecore

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.kernel
def test_the_example_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"102[34] pages placed, \d+ faults\n", done.stdout)


@pytest.mark.kernel
@pytest.mark.ci
def test_the_example_of_asyncio_and_metrics_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "seeing.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "the guest stood still for" in done.stdout
    assert 'pagecore_migration_finished_total{result="verified"} 1.0' in done.stdout


def test_every_metric_has_a_line():
    metrics = (ROOT / "src" / "pagecore" / "metrics.py").read_text()
    page = (ROOT / "docs" / "seeing.md").read_text()
    for name in set(re.findall(r'"(pagecore_[a-z_]+)"', metrics)):
        short = name.removeprefix("pagecore_migration")
        assert name in page or f"`{short}" in page, name


def test_the_first_two_commands_are_the_two():
    commands = re.findall(r"^\$ (.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    assert commands[:2] == ["make run", "make test"]


@pytest.mark.parametrize("arguments", ["--size 64M --plot run.png", "--size 64M"])
def test_make_run_installs_what_draws_for_who_asks_for_a_picture(arguments, tmp_path):
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "run",
        f"PYTHON={sys.executable}",
        f"VENV={tmp_path}/venv",
        f"ARGS={arguments}",
    ]
    # As somebody types it, and not as a part of the make that runs this test.
    typed = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=typed, capture_output=True, text=True, timeout=60, check=True)
    assert (' "pagecore[plot]"\n' in done.stdout) == ("--plot" in arguments)
    assert done.stdout.endswith(f"pagecore migrate {arguments}\n")


def test_every_test_file_that_it_names_exists():
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        "docs/names.md",
        "docs/rules.md",
        "docs/seeing.md",
        "docs/traps.md",
        "spec/README.md",
    ],
)
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


def test_every_public_name_has_a_line():
    first_cells = "".join(re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "names.md").read_text(), re.MULTILINE))
    assert set(pagecore.__all__) <= set(re.findall(r"`(\w+)`", first_cells))
