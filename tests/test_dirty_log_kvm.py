"""KVM's dirty log: exact for vCPUs, re-armed by the collect, blind to the machine, its buffer its own."""

from __future__ import annotations

import os

import pytest

from kvm_rig import CONTROL, NPAGES, SIZE, collect, open_kvm_guest, run_and_compare, run_steps, settle
from pagecore import Bitmap
from pagecore.dirty_log import KvmDirtyLog
from pagecore.errors import BusyError, ClosedError, UffdError, UnsupportedError
from pagecore.testing import page_checksums, verify_memory

pytestmark = pytest.mark.kernel


@pytest.fixture
def guest():
    with open_kvm_guest("get") as guest:
        yield guest


def test_reports_exactly_what_the_guest_wrote(guest):
    assert guest.dirty_log.enabled
    settle(guest)
    for steps in (1, 50, 2_000, 10_000):
        run_and_compare(guest, steps)
        assert collect(guest.dirty_log) == set()


def test_a_collect_rearms(guest):
    guest.dirty_log.collect_into(Bitmap(NPAGES))
    pages = []
    for _ in range(3):
        run_steps(guest, 200)
        pages.append(collect(guest.dirty_log))
    # The control pages are written in each of them, and reported in each of them.
    assert all(reported > CONTROL for reported in pages)


def test_the_machine_is_not_seen(guest):
    """S12: a log that claimed otherwise would let a VMM's write be lost."""
    log = guest.dirty_log
    assert log.misses == frozenset({"vmm"})
    assert log.rearms_at_collect
    run_steps(guest, 10)
    collect(guest.dirty_log)
    page = NPAGES - 1
    guest.memory[page * 4096] ^= 1
    assert page not in collect(guest.dirty_log)
    guest.memory[page * 4096] ^= 1
    told = []
    guest.on_vmm_write = lambda runs: told.extend(runs[:, 0].tolist())
    guest.announce("STOP", 1)
    assert not collect(guest.dirty_log)
    assert told == sorted(CONTROL)


def test_bits_are_added_never_taken(guest):
    """S11: KVM overwrites its buffer, the caller's bits stay; the count is of the newly set ones."""
    guest.dirty_log.collect_into(Bitmap(NPAGES))
    run_steps(guest, 300)
    mine = Bitmap(NPAGES)
    mine.set_range(0, NPAGES // 2)
    before = mine.count()
    newly = guest.dirty_log.collect_into(mine)
    assert mine.count() == before + newly
    assert mine.test_range(0, NPAGES // 2)
    assert guest.dirty_log.collect_into(mine) == 0
    assert mine.count() == before + newly


def test_copying_what_is_reported_while_the_guest_runs(guest):
    """Each round copies under a running guest; torn and stale copies must be repaired by a later round."""
    image = bytearray(SIZE)
    marked = Bitmap(NPAGES)
    guest.on_vmm_write = marked.set_runs
    owed = Bitmap(NPAGES)
    guest.run()
    log = guest.dirty_log
    owed.fill()
    for number in range(8):
        for first, count in owed.take_runs():
            copied = slice(int(first) * 4096, int(first + count) * 4096)
            image[copied] = guest.memory[copied]
        if number == 6:
            guest.pause()
        log.collect_into(owed)
        marked.drain_into(owed)
    found = verify_memory(image, guest.config)
    assert found.exact, str(found)
    assert found.steps[0] > 0
    assert (page_checksums(image) == page_checksums(guest.memory)).all()


def test_logging_is_off_until_the_log_is_asked_for(guest):
    machine = guest._machine
    with KvmLog(machine) as log:
        assert not log.enabled
        with pytest.raises(UnsupportedError, match="enable"):
            log.collect_into(Bitmap(NPAGES))
        log.enable()
        log.enable()
        run_steps(guest, 100)
        assert log.collect_into(Bitmap(NPAGES)) > 0
        run_steps(guest, 100)
        log.disable()
        assert not log.enabled
        log.enable()
        # What was logged before it was switched off is gone: all pages are owed when it comes on.
        assert log.collect_into(Bitmap(NPAGES)) == 0


class KvmLog:
    """A log of a guest's slot, closed at the end."""

    def __init__(self, machine):
        self.log = KvmDirtyLog(machine.vm_fd, NPAGES, host_address=machine.address)

    def __enter__(self):
        return self.log

    def __exit__(self, *_):
        self.log.close()


def test_stop_logging(guest):
    first = guest.dirty_log
    assert guest.dirty_log is first
    guest.stop_logging()
    assert first.closed
    second = guest.dirty_log
    assert second is not first
    run_steps(guest, 100)
    assert collect(guest.dirty_log)


def test_misuse(guest):
    log = guest.dirty_log
    with pytest.raises(ValueError, match=f"{NPAGES - 1} pages does not fit"):
        log.collect_into(Bitmap(NPAGES - 1))
    with pytest.raises(BusyError):
        log.__init__(0, 1, host_address=0)
    log.rearm(0, NPAGES)
    with pytest.raises(IndexError):
        log.rearm(0, NPAGES + 1)
    guest.stop_logging()
    for use in (lambda: log.collect_into(Bitmap(NPAGES)), log.disable, log.enable):
        with pytest.raises(ClosedError):
            use()
    log.close()
    with pytest.raises(ValueError, match="at least one page"):
        KvmDirtyLog(guest._machine.vm_fd, 0, host_address=0)
    with pytest.raises(UffdError, match="F_DUPFD_CLOEXEC"):
        KvmDirtyLog(-1, 1, host_address=0)
    with open(os.devnull) as other:
        log = KvmDirtyLog(other.fileno(), 1, host_address=0)
        with pytest.raises(UffdError, match="KVM_SET_USER_MEMORY_REGION"):
            log.enable()
        log.close()


def test_a_log_outlives_its_guest():
    """Its descriptor is its own: a number that was closed and used again is never asked (D13)."""
    with open_kvm_guest("get") as guest:
        log = KvmDirtyLog(guest._machine.vm_fd, NPAGES, host_address=guest._machine.address)
        log.enable()
    assert log.collect_into(Bitmap(NPAGES)) == 0
    log.close()
    log.close()
