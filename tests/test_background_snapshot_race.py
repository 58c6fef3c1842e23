"""A background snapshot whose two threads fail at once: whoever hears that it failed hears why."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from single_step import Stepped

pytestmark = [pytest.mark.ci, pytest.mark.kernel, pytest.mark.timeout(60)]

PWRITE = {"x86_64": 18, "aarch64": 67}.get(platform.machine(), -1)

SNAPSHOT = """
import json, sys
from pagecore import PagecoreError, UffdError, background_snapshot
from test_background_snapshot import filled
from uffd_helpers import PAGE, Writer, address_of

kind = background_snapshot.SnapshotTraps

def made():
    traps = kind()
    print(id(traps), kind.__basicsize__, flush=True)
    return traps

background_snapshot.SnapshotTraps = made
memory = filled(1024 * PAGE)
with open(sys.argv[1], "w+b") as file:
    print("ready", flush=True)
    sys.stdin.readline()
    snapshot = background_snapshot.BackgroundSnapshot(memory, file)
sys.stdin.readline()
# Saved by the other thread, which fails as well; and nobody knows yet what the first one has met.
Writer(address_of(memory) + 1000 * PAGE, 7).value()
try:
    early = snapshot.wait(0.5)
except PagecoreError as error:
    early = str(error)
print(json.dumps([early, snapshot.state]), flush=True)
try:
    snapshot.wait(20)
except UffdError as error:
    print(json.dumps([error.errno, str(error), snapshot.state]), flush=True)
snapshot.close()
"""


def test_a_thread_that_fails_second_waits_for_the_reason_of_the_first(tmp_path: Path) -> None:
    """The first is stopped between "I am the one who failed" and the error: an instant, held as long as it takes."""
    command = [sys.executable, "-c", SNAPSHOT, str(tmp_path / "image")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as process:
        try:
            check_second(process)
        finally:
            process.kill()


def check_second(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    assert stdout.readline() == "ready\n"
    try:
        # The reader comes first, then the thread that saves all.
        saver = Stepped(process.pid, 2, lambda: stdin.write("\n"))
    except PermissionError as error:
        pytest.skip(f"{error}; fix: --cap-add SYS_PTRACE, or a root that may")
    with saver:
        address, size = map(int, stdout.readline().split())
        saver.run_to_call(lambda number: number == PWRITE)
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
        assert saver.run_to_return() == -errno.EFBIG
        before = saver.words(address, size // 8)
        # What becomes 1 is who fails; the error is not there yet.
        saver.step_until(lambda: (0, 1) in zip(before, saver.words(address, size // 8), strict=True))
        assert saver.words(address, size // 8).count(errno.EFBIG) == before.count(errno.EFBIG)
        stdin.write("\n")
        assert json.loads(stdout.readline()) == [False, "running"]
    number, text, state = json.loads(stdout.readline())
    assert (number, state) == (errno.EFBIG, "failed")
    assert "writing the snapshot" in text
    assert process.wait(20) == 0
