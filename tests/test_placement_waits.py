"""What waits in a loop, or for it, comes to an end, and hears a signal meanwhile."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable

import pytest

from concurrency import Worker
from pagecore import Mover, UffdError
from placement_rig import pushed, served
from uffd_helpers import PAGE, discard

pytestmark = pytest.mark.kernel

# Long enough to tell an interrupt from the time-out.
LONG = 6.0


class Rang(Exception):
    pass


def seconds_until_it_rang(wait: Callable[[], object]) -> float:
    """Set an alarm that rings soon, and wait."""

    def ring(*_: object) -> None:
        raise Rang

    before = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        wait()
    except Rang:
        return time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("the alarm did not ring")


@pytest.mark.parametrize("wait", ["wait_ended", "wait_settled", "wait_resident"])
def test_a_wait_for_pages_hears_a_signal(wait: str) -> None:
    with served(16) as rig, pushed(rig) as (loop, _):
        arguments = (1.0, LONG) if wait == "wait_resident" else (LONG,)
        assert seconds_until_it_rang(lambda: getattr(loop, wait)(*arguments)) < LONG / 2


def test_preparing_huge_pages_hears_a_signal() -> None:
    assert seconds_until_it_rang(lambda: Mover(1).prepare(LONG)) < LONG / 2


@pytest.mark.ci
def test_giving_up_where_nobody_reads_ends_with_an_error() -> None:
    """D7: while a discard is pending the kernel says "again" to everything; no thread of this loop will read it."""
    with served(16) as rig, pushed(rig, start=False) as (loop, _):
        discarding = Worker(lambda: discard(rig.region.address, PAGE))
        rig.wait_readable()
        Worker(lambda: loop.give_up([(3, 1)])).value()
        assert isinstance(loop.error, UffdError)
        assert loop.error.errno == errno.EAGAIN
        assert loop.unsettled().tolist() == [[0, 16]]
        rig.region.uffd.read_events()
        discarding.value()
