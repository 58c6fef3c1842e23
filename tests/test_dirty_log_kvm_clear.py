"""KVM's dirty log with manual protection: cleared apart, only what was seen, each sighting once (S11)."""

from __future__ import annotations

import mmap

import pytest

from kvm_rig import (
    CONTROL,
    NPAGES,
    bits,
    collect,
    collect_all,
    open_kvm_guest,
    run_and_check,
    run_and_compare,
    run_steps,
    settle,
)
from pagecore import KvmDirtyLog, KvmManualDirtyLog
from pagecore.errors import ClosedError, UffdError, UnsupportedError
from pagecore.testing import _guest
from uffd_helpers import address_of, anonymous

pytestmark = pytest.mark.kernel


@pytest.fixture
def fresh():
    """A guest that never ran: where KVM can, all of its pages are reported."""
    with open_kvm_guest("clear") as guest:
        if not guest.dirty_log.initially_set:
            pytest.skip("KVM_DIRTY_LOG_INITIALLY_SET: Linux 5.7 or newer")
        yield guest


@pytest.fixture
def guest():
    with open_kvm_guest("clear") as guest:
        collect_all(guest)
        yield guest


def test_reports_exactly_what_the_guest_wrote(guest):
    settle(guest)
    assert not guest.dirty_log.rearms_at_collect
    assert guest.dirty_log.misses == frozenset({"vmm"})
    for steps in (1, 50, 2_000):
        run_and_compare(guest, steps)
        assert collect(guest.dirty_log) == set()


def test_a_collect_copies_and_a_clear_ends_the_report(guest):
    log = guest.dirty_log
    run_steps(guest, 300)
    reported = collect(log)
    assert collect(log) == reported > CONTROL
    log.rearm(0, NPAGES)
    assert collect(log) == set()


def test_what_was_not_seen_is_not_cleared(guest):
    """Written between the collect and the clear: the clear must leave it, or nobody ever hears of it."""
    log = guest.dirty_log
    run_steps(guest, 50)
    seen = collect(log)
    run_steps(guest, 500)
    log.rearm(0, NPAGES)
    later = collect(log)
    assert later
    assert not later & seen
    # Those in `seen` were written before they were re-armed, and are read after: nothing is lost there.


@pytest.mark.parametrize("again", ["rearm", "rearm_seen"])
def test_each_sighting_is_used_once(guest, again):
    log = guest.dirty_log
    run_steps(guest, 50)
    seen = collect(log)
    assert seen > CONTROL
    log.rearm_seen(0, NPAGES, bits(seen))
    run_steps(guest, 50)
    # Nobody has collected since: these are sightings of the first run, and they are used up.
    if again == "rearm":
        log.rearm(0, NPAGES)
    else:
        log.rearm_seen(0, NPAGES, bits(seen))
    assert collect(log) > CONTROL


def test_at_first_every_page_is_reported(fresh):
    assert collect(fresh.dirty_log) == set(range(NPAGES))


@pytest.mark.parametrize("run", [(100, 37), (0, 1), (63, 2), (64, 64), (4000, 96), (4095, 1), (1, 4094), (7, 0)])
def test_heads_and_tails_are_masked(fresh, run):
    first, count = run
    log = fresh.dirty_log
    collect(log)
    log.rearm(first, count)
    assert collect(log) == set(range(NPAGES)) - set(range(first, first + count))
    log.rearm(0, NPAGES)
    assert collect(log) == set()


def test_just_these_pages_are_cleared(fresh):
    log = fresh.dirty_log
    collect(log)
    wanted = {64, 70, 127, 128, 1000}
    # Bits outside of the range are not looked at.
    log.rearm_seen(64, 128, bits(wanted))
    left = set(range(NPAGES)) - {64, 70, 127, 128}
    assert collect(log) == left
    # KVM is told of no more than it takes: the first word of the range has nothing.
    log.rearm_seen(0, NPAGES, bits({1000, 1001, 3000}))
    assert collect(log) == left - {1000, 1001, 3000}


def test_a_slot_that_ends_within_a_word():
    """The range of the last word ends where the slot does, not at a multiple of 64: KVM takes nothing else."""
    with open_kvm_guest("clear", slots=3) as guest:
        for (_, count), log in zip(guest.slots, guest.dirty_logs, strict=True):
            assert count % 64
            assert collect(log) == set(range(count))
            log.rearm(count - 1, 1)
            assert collect(log) == set(range(count - 1))
            log.rearm(0, count)
            assert collect(log) == set()


def test_more_than_one_piece():
    """1 GiB and 2 MiB that nobody touches: a clear of all of it is two calls, and the border is inside a run."""
    npages = (1 << 18) + 512
    memory = mmap.mmap(-1, npages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    machine = _guest.Machine(memory, kvm_device="/dev/kvm")
    log = KvmManualDirtyLog(machine.vm_fd, npages, host_address=machine.address)
    log.enable()
    everything = collect(log)
    assert len(everything) == npages
    log.rearm((1 << 18) - 10, 30)
    left = everything - set(range((1 << 18) - 10, (1 << 18) + 20))
    assert collect(log) == left
    log.rearm(0, npages)
    assert collect(log) == set()
    log.close()
    machine.close()


def test_sightings_end_with_the_bitmap_that_they_are_of(fresh):
    """Switched off and on, KVM has a new bitmap: what was seen in the old one was not seen in this one."""
    log = fresh.dirty_log
    collect(log)
    log.disable()
    log.enable()
    log.rearm(0, NPAGES)
    assert collect(log) == set(range(NPAGES))


def test_a_log_that_rearms_at_collect_sees_to_it():
    """A VM that was under manual protection: a plain collect would re-arm nothing there."""
    with open_kvm_guest("get") as guest:
        manual = KvmManualDirtyLog(guest._machine.vm_fd, NPAGES, host_address=guest._machine.address)
        manual.enable()
        manual.disable()
        manual.close()
        assert guest.dirty_log.enabled
        run_and_check(guest, 100)
        assert collect(guest.dirty_log) == set()


def test_misuse(guest):
    log = guest.dirty_log
    with pytest.raises(IndexError):
        log.rearm(1, NPAGES)
    with pytest.raises(ValueError, match="does not fit"):
        log.rearm_seen(0, NPAGES, bits({1}, NPAGES + 64))
    log.disable()
    for use in (lambda: log.rearm(0, 1), lambda: log.rearm_seen(0, 64, bits({1})), lambda: collect(log)):
        with pytest.raises(UnsupportedError, match="enable"):
            use()
    log.close()
    for use in (lambda: log.rearm(0, 1), lambda: log.rearm_seen(0, 64, bits({1})), lambda: collect(log), log.enable):
        with pytest.raises(ClosedError):
            use()


def test_a_slot_of_another_size_is_refused(guest):
    """KVM would write its whole bitmap into a buffer for the pages that were claimed."""
    machine = guest._machine
    for kind in (KvmDirtyLog, KvmManualDirtyLog):
        log = kind(machine.vm_fd, NPAGES - 64, host_address=machine.address, slot=0)
        with pytest.raises(UffdError, match="KVM_SET_USER_MEMORY_REGION"):
            log.enable()
        assert not log.enabled
        log.close()
    other = anonymous(64)
    log = KvmManualDirtyLog(machine.vm_fd, NPAGES, host_address=address_of(other))
    with pytest.raises(UffdError):
        log.enable()
    log.close()
