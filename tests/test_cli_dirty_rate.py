"""``pagecore dirty-rate``, as a person and as a script meet it."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from concurrency import DEADLINE, wait_until
from pagecore.cli import cli
from test_cli import ENVIRONMENT, command, run

pytestmark = [pytest.mark.timeout(60), pytest.mark.kernel]

# In the package the name is that of the command.
module = importlib.import_module("pagecore.cli.dirty_rate")
QUICK = ["--seconds", "0.01", "--intervals", "2"]


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate(timeout=DEADLINE)


def test_a_process_in_plain_lines(sleeper):
    done = run("dirty-rate", "--pid", str(sleeper.pid), *QUICK)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    for line in (first, second):
        assert re.match(r"0\.\d\d s  \S+/s.* pages", line)
    assert re.match(r"dirty rate \S+/s.*; working set .* in \d\.\d\d s; estimated from \d+ pages of ", last)


def test_json_has_every_figure(sleeper):
    found = json.loads(run("dirty-rate", "--pid", str(sleeper.pid), "--json", *QUICK).stdout)
    assert found["method"] == "sampling"
    assert len(found["intervals"]) == 2
    assert found["seconds"] == sum(interval["seconds"] for interval in found["intervals"])
    for figure in (found["working_set"], found["pages"], found["bytes_per_second"], found["intervals"][0]["pages"]):
        assert figure["low"] <= figure["value"] <= figure["high"]
    low, high = found["spread"]
    assert low <= found["bytes_per_second"]["value"] <= high


@pytest.mark.parametrize(
    ("kind", "log"), [("kvm", None), ("kvm", "clear"), ("kvm", "ring"), ("process", None), ("process", "pagemap")]
)
def test_the_demo_guest(kind, log):
    options = ["--size", "16M", "--rate", "flat", "--json", *QUICK, *(["--log", log] if log else [])]
    done = CliRunner().invoke(cli, ["dirty-rate", f"--{kind}", *options])
    if done.exit_code == 3:
        pytest.skip(done.stderr)
    found = json.loads(done.stdout)
    assert (found["method"], found["npages"]) == ("log", 4096)
    # The control page of the vCPU at least, whenever it left the guest.
    assert found["working_set"]["value"] > 0
    assert found["working_set"]["low"] == found["working_set"]["high"]


def test_a_terminal_gets_a_table(sleeper):
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command("dirty-rate", "--pid", str(sleeper.pid), *QUICK), stdout=terminal, stderr=terminal, env=ENVIRONMENT
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # EIO: nobody has the other end any more
        pass
    os.close(master)
    assert process.wait(DEADLINE) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"interval +seconds +rate +written", text)
    assert re.search(r"^ +2 +0\.\d\d ", text, re.MULTILINE)
    assert "dirty rate" in text


def test_an_interrupt_ends_the_interval_and_reports_it(sleeper):
    arguments = command("dirty-rate", "--pid", str(sleeper.pid), "--seconds", "3600")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def caught():
        with open(f"/proc/{process.pid}/status") as lines:
            mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
        return mask >> (signal.SIGTERM - 1) & 1

    wait_until(caught, "its handlers")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    interval, last = output.splitlines()
    assert interval.endswith(" pages") or "pages (" in interval
    assert last.endswith("; interrupted")


def test_the_second_interrupt_does_what_it_did_before():
    stop = threading.Event()
    # Ignored, where the tests run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with module._until_interrupted(stop):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(DEADLINE)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of --pid, --kvm and --process is needed"),
        (["--pid", "1", "--kvm"], "one of --pid, --kvm and --process is needed"),
        (["--pid", "1", "--size", "16M"], "--size does not go with --pid"),
        (["--kvm", "--pages-per-gib", "5"], "--pages-per-gib does not go with --kvm"),
        (["--pid", "1", "--pages-per-gib", "0"], "0 pages a GiB are outside [1, 262144]"),
        (["--pid", "1", "--seconds", "0"], "seconds 0.0 are outside (0, inf)"),
        (["--pid", "1", "--log", "get"], "--log does not go with --pid"),
        (["--process", "--log", "ring"], "dirty_log 'ring' is not for a process guest: it has marks, pagemap"),
        (["--process", "--size", "1M"], "size 1048576 is not a multiple"),
        (["--process", "--seed", "-1"], "seed -1 is outside"),
        (["--pid", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_is_refused_with_the_bound(arguments, said):
    result = CliRunner().invoke(cli, ["dirty-rate", *arguments])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_a_process_that_is_not_there():
    process = subprocess.Popen(["true"])
    process.wait(DEADLINE)
    done = run("dirty-rate", "--pid", str(process.pid))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no process {process.pid}" in done.stderr


def test_without_the_right_the_fix_is_named():
    script = """
import os
from pagecore.cli import cli
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
cli(["dirty-rate", "--pid", "1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 3
    assert re.match("reading the memory of process 1 is not available: .*\nsee: pagecore doctor\n$", done.stderr)
