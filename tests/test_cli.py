"""The command line, as a person and as a script meet it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pagecore
from concurrency import wait_until
from pagecore.cli import cli
from pagecore.migrate.report import load_report

pytestmark = pytest.mark.timeout(60)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pagecore.__file__).parent.parent), "COLUMNS": "100"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pagecore", *arguments]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    values = {"env": ENVIRONMENT, **options}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=50, check=False, **values)


def test_version() -> None:
    assert run("version").stdout == f"pagecore {pagecore.__version__}\n"
    assert json.loads(run("version", "--json").stdout) == {"version": pagecore.__version__}


def test_without_its_extra_it_names_the_command_that_installs_it() -> None:
    for missing in ("click", "rich"):
        script = f"import sys; sys.modules[{missing!r}] = None; from pagecore.__main__ import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", script, "doctor"],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
            env=ENVIRONMENT,
        )
        assert done.returncode == 2
        assert done.stderr == f"the pagecore command needs {missing}: python -m pip install 'pagecore[cli]'\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["migrate", "--size", "many"], "'many' is not a size"),
        (["migrate", "--size", "5000"], "size 5000 is not a multiple of 2M"),
        (["migrate", "--size", "8M"], "size 8388608 is not a multiple of 2M in [16M, 256G]"),
        (["migrate", "--size", "1T"], "size 1099511627776 is not a multiple of 2M in [16M, 256G]"),
        (["migrate", "--size", "2T"], "'2T' is more than 1T"),
        (["migrate", "--vcpus", "9"], "vcpus 9 is outside [1, 8]"),
        (["migrate", "--free-share", "2"], "free share 2.0 is outside [0, 0.9]"),
        (["migrate", "--emulate-qemu", "--no-hints"], "it needs both"),
        (["migrate", "--guest", "xen"], "'xen'"),
        (["migrate", "--dirty-log", "soft-dirty"], "'soft-dirty'"),
        (["migrate", "--dirty-log", "ring", "--guest", "process"], "a process guest has no dirty log 'ring'"),
        (["migrate", "--colour"], "--colour"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_usage_is_refused_with_the_bound(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_help_documents_every_exit_status() -> None:
    text = CliRunner().invoke(cli, ["migrate", "--help"]).output
    for status in ("0 ", "1 ", "2 ", "3 ", "130"):
        assert re.search(rf"^ +{status} ", text, re.MULTILINE), status


@pytest.mark.kernel
def test_a_migration_as_a_person_sees_it(tmp_path: Path) -> None:
    report, picture = tmp_path / "run.json", tmp_path / "run.png"
    done = run("migrate", "--size", "32M", "--report", str(report), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    # Progress goes to stderr, as plain lines where that is no terminal.
    assert re.search(r"^ +\d+\.\d\d s  guest: (kvm|process) \(.+\)$", done.stderr, re.MULTILINE)
    for said in ("precopy, round 1", "switch", "postcopy", "verifying", "the guest runs at the destination after"):
        assert said in done.stderr
    for row in (
        "guest",
        "memory",
        "pages sent",
        "pages hinted",
        "pages zero",
        "pages requested",
        "pages duplicate",
        "downtime",
        "total time",
        "throughput",
        "fault latency, owed",
        "fault latency, hinted",
        "how pages travelled",
    ):
        assert re.search(rf"^{row}  +\S", done.stdout, re.MULTILINE), row
    last = done.stdout.rstrip().splitlines()[-1]
    assert re.fullmatch(r"verified: \d+ pages right, 0 wrong, \d+ free", last)
    # The report shows the same, and knows of every page how it came.
    assert CliRunner().invoke(cli, ["inspect", str(report)]).output.split() == done.stdout.split()
    saved = load_report(report).report
    assert saved["map"]["counts"]["missing"] == 0
    assert sum(saved["map"]["counts"].values()) == 8192
    assert saved["switch"][1] - saved["switch"][0] == pytest.approx(saved["source"]["downtime"], abs=1e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.kernel
def test_a_migration_as_a_script_reads_it() -> None:
    done = run("migrate", "--size", "16M", "--json", "--no-postcopy", "--dirty-rate", "flat", "--precopy-rounds", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True
    assert report["exit_code"] == 0
    assert report["guest_at"] == "destination"
    assert report["options"]["dirty_rate"] is None
    assert report["source"]["pages_sent"] > 0
    assert report["destination"]["wrong"] == 0
    assert report["destination"]["placement"] is None
    assert len(report["rounds"]) == report["source"]["rounds"] > 0
    assert set(report["map"]["runs"]) <= set("0123456789pzh")
    assert all(report["series"][side]["at"] for side in ("source", "destination"))
    assert done.stderr.strip() == report["message"]


@pytest.mark.kernel
def test_settings_come_from_the_environment_too() -> None:
    environment = {**ENVIRONMENT, "PAGECORE_MIGRATE_SIZE": "16M", "PAGECORE_MIGRATE_GUEST": "process"}
    done = run("migrate", "--quiet", env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "16M in 4096 pages" in done.stdout


@pytest.mark.kernel
def test_on_a_terminal_the_progress_is_live() -> None:
    near, far = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    process = subprocess.Popen(
        command("migrate", "--size", "32M", "--bandwidth", "64M"), stdout=far, stderr=far, env=environment
    )
    os.close(far)
    shown = drain(near, 40)
    os.close(near)
    assert process.wait(10) == 0
    assert "\x1b[" in shown
    assert "guest: " in shown
    assert "pages sent" in shown
    assert "verified: " in shown


def drain(descriptor: int, timeout: float) -> str:
    """Read a terminal until the program on it has ended."""
    data = b""
    deadline = time.monotonic() + timeout
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            some = os.read(descriptor, 1 << 16)
        except OSError:
            # EIO: the last one who had the terminal open has closed it.
            break
        if not some:
            break
        data += some
    return data.decode(errors="replace")


@pytest.mark.kernel
@pytest.mark.parametrize(("times", "said"), [(1, "the guest was at the source"), (2, "the guest is gone")])
def test_ctrl_c_as_the_terminal_sends_it(times: int, said: str) -> None:
    process = subprocess.Popen(
        command("migrate", "--size", "64M", "--bandwidth", "4M"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    for seen in ["precopy", "ending; a second Ctrl-C"][:times]:
        for line in process.stderr:
            if seen in line:
                break
        # The terminal signals the whole foreground process group: the two sides must not be in it.
        os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("interrupted")
    assert said in last


@pytest.mark.kernel
def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("migrate", "--size", "64M", "--bandwidth", "4M"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A killed parent cleans nothing up.
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "precopy" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stderr.close()
    wait_until(lambda: not any(is_alive(int(pid)) for pid in children), "the end of both children", 30)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.kernel
def test_doctor() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert "userfaultfd" in done.stdout
    assert done.stdout.rstrip().endswith("everything that pagecore requires is there")
    report = json.loads(run("doctor", "--json").stdout)
    assert report["usable"] is True
    assert any(item["key"].startswith("userfaultfd") for item in report["items"])
    for item in report["items"]:
        # What is missing comes with the command that enables it, and that is shown.
        if not item["available"]:
            assert item["remedy"]
            assert " ".join(item["remedy"].split()[:2]) in done.stdout
