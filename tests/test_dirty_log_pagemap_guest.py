"""The kernel's log of a test guest: exact for vCPUs and threads alike, and for the machine's own writes."""

from __future__ import annotations

import numpy as np
import pytest

from pagecore import Bitmap, PagemapDirtyLog, PageTracker, UnsupportedError
from pagecore.testing import open_guest, page_checksums, verify_memory

pytestmark = pytest.mark.kernel

SIZE = 16 << 20
DEADLINE = 20.0


@pytest.fixture(params=["kvm", "process"])
def guest(request):
    try:
        guest = open_guest(SIZE, kind=request.param, seed=29, vcpus=2, dirty_log="pagemap")
        with guest:
            guest.boot()
            assert isinstance(guest.dirty_log, PagemapDirtyLog)
            yield guest
    except UnsupportedError as error:
        pytest.skip(str(error))


def run_steps(guest, steps):
    guest.stop_after(steps)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    guest.pause()


def collect(guest):
    found = Bitmap(guest.npages)
    assert guest.dirty_log.collect_into(found) == found.count()
    return set(found.indices().tolist())


def test_reports_what_the_guest_wrote(guest):
    assert guest.dirty_log.rearms_at_collect
    assert collect(guest) <= set(range(guest.npages))
    for steps in (1, 50, 2_000):
        before = page_checksums(guest.memory)
        run_steps(guest, steps)
        changed = set(np.flatnonzero(before != page_checksums(guest.memory)).tolist())
        reported = collect(guest)
        assert changed <= reported
        # A step writes a page or two beside the pages that the guest keeps for itself: nothing that it only read.
        assert len(reported) <= 3 * steps + 64
        assert collect(guest) == set()


def test_the_machines_own_writes_are_seen(guest):
    """Unlike KVM's log, so that marking them does no harm and is not needed."""
    marked = []
    guest.on_vmm_write = marked.extend
    collect(guest)
    guest.announce("START", 1)
    assert marked
    assert {page for first, count in marked for page in range(first, first + count)} <= collect(guest)


def test_a_copy_made_while_it_runs_is_its_memory_in_the_end(guest):
    tracker = PageTracker(guest.npages, dirty_log=guest.dirty_log)
    guest.on_vmm_write = tracker.mark
    copy = bytearray(SIZE)
    guest.run()
    for number in range(6):
        if number == 5:
            guest.stop_after(0)
            assert guest.wait_stopped(DEADLINE)
            guest.pause()
        tracker.sync(last=number == 5)
        while len(runs := tracker.take(max_pages=512)):
            for first, count in (runs * 4096).tolist():
                copy[first : first + count] = guest.read(first, count)
    assert copy == guest.memory[:]
    verification = verify_memory(guest)
    assert (verification.wrong, guest.stats().self_check_errors) == (0, 0)


def test_logging_stops_and_starts_again(guest):
    log = guest.dirty_log
    guest.stop_logging()
    assert log.closed
    assert guest.dirty_log is not log
    run_steps(guest, 10)
    assert collect(guest)


def test_a_log_of_each_slot():
    try:
        guest = open_guest(SIZE, kind="kvm", seed=31, slots=3, dirty_log="pagemap")
    except UnsupportedError as error:
        pytest.skip(str(error))
    with guest:
        guest.boot()
        assert [log.size for log in guest.dirty_logs] == [pages for _, pages in guest.slots]
        before = page_checksums(guest.memory)
        run_steps(guest, 500)
        changed = np.flatnonzero(before != page_checksums(guest.memory)).tolist()
        reported = set()
        for (first, _), log in zip(guest.slots, guest.dirty_logs, strict=True):
            found = Bitmap(log.size)
            log.collect_into(found)
            reported |= {first + page for page in found.indices().tolist()}
        assert set(changed) <= reported
