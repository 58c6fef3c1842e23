"""KVM's dirty log with manual protection: cleared apart, only what was seen, each sighting once (S11)."""

from __future__ import annotations

import numpy as np
import pytest

from pagecore import Bitmap
from pagecore.errors import UnsupportedError
from pagecore.testing import _machine_state, open_guest, page_checksums

pytestmark = pytest.mark.kernel

SIZE = 16 << 20
NPAGES = SIZE // 4096
DEADLINE = 20.0
CONTROL = _machine_state.layout(NPAGES, 2)["vcpu_first"]


def open_one(dirty_log="clear", **options):
    try:
        guest = open_guest(SIZE, kind="kvm", dirty_log=dirty_log, vcpus=2, **{"seed": 41, **options})
    except UnsupportedError as error:
        pytest.skip(str(error))
    return guest


@pytest.fixture
def guest():
    """Every page is mapped, and what was logged for that is cleared."""
    with open_one() as guest:
        guest.boot()
        settle(guest)
        yield guest


def settle(guest):
    """KVM reports a page that a vCPU merely reads for the first time, since it maps it writable then and there."""
    logs = guest.dirty_logs
    run_steps(guest, 60_000)
    for log in logs:
        collect(log)
        log.rearm(0, log.size)


def run_steps(guest, steps):
    """Whatever was written before, this writes again: each vCPU its control page."""
    guest.stop_after(steps)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    guest.pause()


def collect(log):
    found = Bitmap(log.size)
    newly = log.collect_into(found)
    assert newly == found.count()
    return set(found.indices().tolist())


def changed_pages(before, after):
    return set(np.flatnonzero(before != after).tolist())


def bits(pages, size=NPAGES):
    bitmap = Bitmap(size)
    bitmap.set_indices(np.array(sorted(pages), dtype=np.int64))
    return bitmap


def private_pages():
    """The stacks: a vCPU may write there what stood there before."""
    return {CONTROL + 5, CONTROL + 11}


def test_reports_exactly_what_the_guest_wrote(guest):
    log = guest.dirty_log
    assert not log.rearms_at_collect
    assert log.misses == frozenset({"vmm"})
    for steps in (1, 50, 2_000):
        before = page_checksums(guest.memory)
        run_steps(guest, steps)
        changed = changed_pages(before, page_checksums(guest.memory))
        reported = collect(log)
        assert changed - reported == set()
        unchanged = reported - changed - private_pages()
        assert all(not any(guest.memory[page * 4096 : (page + 1) * 4096]) for page in unchanged)
        # A collect copies; it is the clear that ends a report.
        assert collect(log) == reported
        log.rearm(0, NPAGES)
        assert collect(log) == set()
