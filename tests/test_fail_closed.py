"""What nobody can supply any more where the kernel has no poison (before Linux 6.6): whoever wants it waits, until its
process has ended, and never reads zeros (D12)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate_rig import Event, Run, at
from pagecore.testing.guest import JOIN_SECONDS

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

HERE = Path(__file__).parent

PROLOGUE = """
import os
from concurrency import Worker, wait_until
from pagecore import Feature, PeerGoneError, PlacementLoop, UnsupportedError, Userfaultfd
from pagecore.page_source import BufferSource
from postcopy_rig import PAGE, postcopy_rig

def asleep():
    "How many threads sleep on pages of a descriptor that is still open here."
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[userfaultfd]":
                continue
            with open(f"/proc/self/fdinfo/{name}") as lines:
                found = max(found, *(int(line.split()[1]) for line in lines if line.startswith("total:")))
        except FileNotFoundError:
            pass        # the one that listed them
    return found

try:
    Userfaultfd(Feature.POISON)
    raise SystemExit("this kernel has poison")
except UnsupportedError:
    pass
"""

LOST = """
with postcopy_rig() as rig:
    touched = [rig.touch(page) for page in (40, 50)]
    wait_until(lambda: rig.state.requested.count() == 2, "the requests")
    rig.hang_up()
    try:
        rig.postcopy.run()
    except PeerGoneError:
        rig.postcopy.fail_closed()
    assert rig.postcopy.missing() == 32
# Whoever opened the descriptor has closed it.
assert rig.region.uffd.closed
wait_until(lambda: asleep() == 2 or any(touch.done() for touch in touched), "the waiters")
assert not any(touch.done() for touch in touched)
"""

FORKED = """
from test_uffd_events import ForkingPeer
forking = ForkingPeer()
with Userfaultfd.adopt(forking.fd) as uffd:
    region = uffd.region_at(forking.address, 8 * PAGE)
    with PlacementLoop([region], BufferSource(bytes(8 * PAGE))) as loop:
        forking.fork()
        wait_until(lambda: loop.stats().forks == 1, "the event")
touch = Worker(lambda: forking.touch(5, child=True))
wait_until(lambda: asleep() == 1 or touch.done(), "the child's fault")
assert not touch.done()
"""


@pytest.mark.parametrize("program", [LOST, FORKED], ids=["lost", "forked"])
def test_whoever_wants_what_is_lost_waits(program: str, ioctl_shim: str) -> None:
    paths = os.pathsep.join([*[entry for entry in sys.path if entry], str(HERE)])
    environment = {**os.environ, "LD_PRELOAD": ioctl_shim, "WITHOUT_POISON": "1", "PYTHONPATH": paths}
    # Threads that sleep in a fault do not let the interpreter end.
    command = [sys.executable, "-c", f"{PROLOGUE}{program}\nos._exit(0)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.ci
def test_a_source_that_dies_is_the_error_whatever_the_kernel_lacks(
    ioctl_shim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", ioctl_shim)
    monkeypatch.setenv("WITHOUT_POISON", "1")

    ended: list[float] = []

    def act(run: Run, event: Event) -> None:
        if at("postcopy", "destination")(event) and run.once("kill"):
            run.signal("source", signal.SIGKILL)
        elif event["event"] == "ended" and event["role"] == "destination":
            ended.append(time.monotonic())

    run = Run(act, bandwidth=24 << 20, dirty_rate=64 << 20, precopy_rounds=1)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert run.outcome.message.startswith("failed: the source process was ended by SIGKILL; ")
    assert run.named("failed", "destination")[0]["kind"] == "PeerGoneError"
    # No page ended it, and it did not wait for a guest that sleeps as long as it lives.
    assert [event["status"] for event in run.named("ended", "destination")] == [1]
    assert ended[0] - run.named("failed", "destination")[0]["at"] < JOIN_SECONDS
