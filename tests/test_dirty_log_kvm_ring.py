"""KVM's dirty rings: all reaped together, re-armed before anything is handed on (S2), and nothing in them trusted."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading

import numpy as np
import pytest

from concurrency import Worker, run_together
from kvm_rig import (
    CONTROL,
    NPAGES,
    changed_by,
    collect,
    collect_all,
    open_kvm_guest,
    run_and_check,
    run_and_compare,
    run_steps,
    settle,
)
from pagecore import Bitmap, KvmDirtyLog, KvmDirtyRing, KvmManualDirtyLog, KvmRingDirtyLog
from pagecore.errors import BusyError, ClosedError, ProtocolError, UffdError, UnsupportedError
from pagecore.testing import page_checksums
from uffd_helpers import Child

pytestmark = pytest.mark.kernel

SMALLEST = 4096
ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41


@pytest.fixture
def guest():
    with open_kvm_guest("ring") as guest:
        assert guest.dirty_log.enabled
        yield guest


def written(guest, size=1 << 16):
    """The entries that wait in the rings, seen as whoever else has a vCPU's descriptor sees them; to be changed."""
    rings = [np.frombuffer(mmap.mmap(fd, size, offset=64 * 4096), dtype=ENTRY) for fd in guest._machine.vcpu_fds]
    return [ring[at : at + 1] for ring in rings for at in np.flatnonzero(ring["flags"] == 1).tolist()]


@contextlib.contextmanager
def bare_vm():
    """A VM without vCPUs or memory."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    try:
        yield vm
    finally:
        os.close(vm)
        os.close(kvm)


def test_reports_exactly_what_the_guest_wrote(guest):
    settle(guest)
    assert guest.dirty_log.rearms_at_collect
    assert guest.dirty_log.misses == frozenset({"vmm"})
    for steps in (1, 50, 2_000, 10_000):
        run_and_compare(guest, steps)
        assert collect_all(guest) == set()
    ring = guest.dirty_log.ring
    assert (ring.vcpus, ring.entries, ring.foreign, ring.closed) == (2, 4096, 0, False)


def test_a_forked_child_takes_no_entries_of_its_parent(guest):
    """KVM refuses to reset the rings for it, but the entries it has looked at count as taken."""
    log = guest.dirty_log
    settle(guest)
    run_steps(guest, 100)

    def take():
        for call in (log.ring.reap, lambda: log.collect_into(Bitmap(log.size))):
            with pytest.raises(UnsupportedError, match="child"):
                call()

    Child(take).value()
    assert collect(log) > CONTROL


def test_the_child_of_a_process_that_reaps_does_not_wait_for_it(guest):
    """Whoever had the lock at the fork is not there to give it back."""
    log, ring = guest.dirty_log, guest.dirty_log.ring
    over = threading.Event()

    def reap():
        while not over.is_set():
            ring.reap()

    def leave():
        log.close()
        ring.close()
        return ring.closed, ring.foreign

    reapers = [Worker(reap) for _ in range(2)]
    try:
        for _ in range(8):
            assert Child(leave).value(5.0) == (True, 0)
    finally:
        over.set()
    for reaper in reapers:
        reaper.value()
    settle(guest)


def test_a_collect_rearms(guest):
    for _ in range(3):
        run_steps(guest, 100)
        assert collect(guest.dirty_log) > CONTROL


def test_a_ring_that_is_full_is_reaped_by_its_vcpu():
    """256 entries, of which KVM leaves some free: without a reap at that exit the guest never gets on."""
    with open_kvm_guest("ring", ring_size=SMALLEST, slots=2) as guest:
        assert len(guest.dirty_logs) == 2
        assert len(run_and_check(guest, 3_000)) > 2 * 256
        assert guest._machine.full_exits
        assert guest.dirty_logs[0].ring.foreign == 0


def test_reaps_beside_vcpus_that_run():
    """Collects, reaps and two vCPUs with full rings at once: each entry goes to one of them, and to its slot."""
    with open_kvm_guest("ring", ring_size=SMALLEST, slots=3) as guest:
        ring = guest.dirty_logs[0].ring
        before = page_checksums(guest.memory)
        found = [Bitmap(log.size) for log in guest.dirty_logs]
        guest.stop_after(5_000)
        guest.run()

        def reap():
            while not guest.wait_stopped(0.002):
                ring.reap()

        def collector(log, bitmap):
            def collect_in_turn():
                while not guest.wait_stopped(0.002):
                    log.collect_into(bitmap)

            return collect_in_turn

        run_together(reap, *map(collector, guest.dirty_logs, found))
        guest.pause()
        for log, bitmap in zip(guest.dirty_logs, found, strict=True):
            log.collect_into(bitmap)
        reported = {
            first + page for (first, _), bitmap in zip(guest.slots, found, strict=True) for page in bitmap.indices()
        }
        changed = set(np.flatnonzero(before != page_checksums(guest.memory)).tolist())
        assert len(changed) > 2 * 256
        assert changed - reported == set()
        assert collect_all(guest) == set()


def test_what_one_collect_finds_of_other_slots_waits_for_theirs():
    with open_kvm_guest("ring", slots=2) as guest:
        low, high = guest.dirty_logs
        changed = changed_by(guest, 300)
        mine = collect(low)
        assert not written(guest), "the first collect reaped all rings"
        theirs = collect(high)
        assert mine
        assert theirs
        first = guest.slots[1][0]
        assert changed - mine - {first + page for page in theirs} == set()


def test_nothing_is_handed_on_before_the_rings_are_reset(guest):
    """S2: published before it is protected again, a page could be sent, and written with nobody to see it."""
    log = guest.dirty_log
    changed = changed_by(guest, 200)
    ours = [int(name) for name in os.listdir("/proc/self/fd") if is_vm(name) and int(name) != guest._machine.vm_fd]
    keep = os.dup(ours[0])
    early = Bitmap(NPAGES)
    with open(os.devnull) as deaf:
        for fd in ours:
            os.dup2(deaf.fileno(), fd, inheritable=False)
        with pytest.raises(UffdError):
            log.collect_into(early)
        with pytest.raises(UffdError, match="KVM_RESET_DIRTY_RINGS"):
            log.ring.reap()
        for fd in ours:
            os.dup2(keep, fd, inheritable=False)
    os.close(keep)
    assert not early.any()
    # Nothing is lost either: the next one goes on with the reset.
    assert changed - collect(log) == set()
    run_and_check(guest, 200)


def is_vm(name):
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{name}") == "anon_inode:kvm-vm"
    return False


def test_an_entry_of_an_unknown_slot_is_dropped(guest):
    log = guest.dirty_log
    run_steps(guest, 100)
    entries = written(guest)
    dropped = int(entries[0]["offset"][0])
    for entry in entries:  # both vCPUs may have written the page
        if entry["offset"][0] == dropped:
            entry["slot"] = 77
    reported = collect(log)
    assert log.ring.foreign >= 1
    assert dropped not in reported
    assert reported


@pytest.mark.parametrize("offset", [NPAGES, 1 << 40, (1 << 64) - 1])
def test_an_entry_outside_its_slot_fails_the_log(guest, offset):
    """Nobody knows which page was meant, and it is not protected again: the log cannot be believed any more (D14)."""
    log = guest.dirty_log
    run_steps(guest, 100)
    written(guest)[0]["offset"] = offset
    found = Bitmap(NPAGES)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="outside its slot"):
            log.collect_into(found)
    assert log.ring.foreign == 1
    assert not found.any()
    log.disable()
    log.enable()
    for _ in range(2):
        run_and_check(guest, 100)


def test_a_log_of_a_ring_that_was_in_use(guest):
    """Somebody reaped before us, and the ring goes on where that ended."""
    machine = guest._machine
    run_steps(guest, 100)
    guest.stop_logging()
    assert not written(guest)
    second = KvmDirtyRing(machine.vm_fd, machine.vcpu_fds)
    log = KvmRingDirtyLog(second, NPAGES, host_address=machine.address)
    log.enable()
    for _ in range(2):
        assert changed_by(guest, 200) - collect(log) == set()
    log.close()
    second.close()


def test_what_was_logged_before_it_was_switched_off_is_gone(guest):
    log = guest.dirty_log
    run_steps(guest, 100)
    log.disable()
    log.enable()
    assert collect(log) == set()
    run_and_check(guest, 100)


def test_manual_protection_is_switched_off():
    """With all bits set at first nothing would be write-protected, and the rings would stay empty."""
    with open_kvm_guest("ring") as guest:
        machine = guest._machine
        manual = KvmManualDirtyLog(machine.vm_fd, NPAGES, host_address=machine.address)
        manual.enable()
        manual.disable()
        manual.close()
        assert guest.dirty_log.enabled
        for _ in range(2):
            run_and_check(guest, 100)


@pytest.mark.parametrize("kind", [KvmDirtyLog, KvmManualDirtyLog])
def test_a_vm_with_rings_has_no_bitmaps(guest, kind):
    guest.stop_logging()
    log = kind(guest._machine.vm_fd, NPAGES, host_address=guest._machine.address)
    log.enable()
    with pytest.raises(UnsupportedError, match="KvmRingDirtyLog"):
        collect(log)
    log.close()


def test_a_vm_with_bitmaps_has_no_rings():
    with open_kvm_guest("get") as guest, pytest.raises(UnsupportedError, match=r"vCPU 0.*switch_on"):
        KvmDirtyRing(guest._machine.vm_fd, guest._machine.vcpu_fds)


@pytest.mark.parametrize("size", [SMALLEST, 1 << 15, 1 << 17])
def test_a_ring_of_another_size_is_refused(guest, size):
    """Its entries would be looked for in the wrong places."""
    with pytest.raises(UnsupportedError, match=f"{size} bytes"):
        KvmDirtyRing(guest._machine.vm_fd, guest._machine.vcpu_fds, size)


def test_rings_are_switched_on_before_the_first_vcpu():
    with bare_vm() as vm:
        KvmDirtyRing.switch_on(vm, SMALLEST)
        with pytest.raises(UnsupportedError, match="once, before the first vCPU"):
            KvmDirtyRing.switch_on(vm, SMALLEST)
        vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        ring = KvmDirtyRing(vm, [vcpu], SMALLEST)
        os.close(vcpu)
        assert ring.reap() == 0
        ring.close()
    with bare_vm() as vm:
        vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        with pytest.raises(UnsupportedError, match="before the first vCPU"):
            KvmDirtyRing.switch_on(vm)
        os.close(vcpu)


@pytest.mark.parametrize("size", [0, 2048, 4097, 1 << 21, -4096])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=f"ring size {size} "):
        KvmDirtyRing.switch_on(0, size)
    with pytest.raises(ValueError, match=f"ring size {size} "):
        KvmDirtyRing(0, [0], size)


def test_misuse(guest):
    machine = guest._machine
    ring, log = guest.dirty_log.ring, guest.dirty_log
    with pytest.raises(BusyError):
        ring.__init__(machine.vm_fd, machine.vcpu_fds)
    with pytest.raises(BusyError):
        log.__init__(ring, NPAGES, host_address=machine.address)
    with pytest.raises(ValueError, match="there is none"):
        KvmDirtyRing(machine.vm_fd, [])
    with pytest.raises(UffdError, match="mmap"):
        KvmDirtyRing(machine.vm_fd, [-1])
    with pytest.raises(UffdError, match="F_DUPFD_CLOEXEC"):
        KvmDirtyRing(-1, machine.vcpu_fds)
    second = KvmRingDirtyLog(ring, NPAGES, host_address=machine.address)
    with pytest.raises(BusyError, match="slot 0 has another log"):
        second.enable()
    second.close()
    wrong = KvmRingDirtyLog(ring, NPAGES, host_address=machine.address, slot=5, guest_address=4096)
    with pytest.raises(UffdError, match="KVM_SET_USER_MEMORY_REGION"):
        wrong.enable()
    del wrong
    run_and_check(guest, 100)
    log.rearm(0, NPAGES)
    log.close()
    with pytest.raises(ClosedError):
        collect(log)


def test_a_log_that_was_closed_is_told_nothing(guest):
    """Its entries are reaped all the same: the guest goes on."""
    ring = guest.dirty_log.ring
    guest.dirty_log.close()
    run_steps(guest, 500)
    assert ring.reap() > 0
    assert ring.foreign > 0


def test_a_ring_that_was_closed_closes_its_logs(guest):
    ring, log = guest.dirty_log.ring, guest.dirty_log
    ring.close()
    ring.close()
    assert ring.closed
    with pytest.raises(ClosedError, match="ring"):
        ring.reap()
    with pytest.raises(ClosedError, match="ring"):
        collect(log)
    with pytest.raises(ClosedError, match="ring"):
        KvmRingDirtyLog(ring, NPAGES, host_address=guest._machine.address)
    log.disable()
    with pytest.raises(ClosedError, match="ring"):
        log.enable()


def test_a_ring_outlives_the_descriptors_that_it_was_made_of():
    """D13: a number that was closed and used again is never asked."""
    guest = open_kvm_guest("ring")
    with guest:
        machine = guest._machine
        ring = KvmDirtyRing(machine.vm_fd, machine.vcpu_fds)
        log = KvmRingDirtyLog(ring, NPAGES, host_address=machine.address)
        log.enable()
        run_steps(guest, 50)
    assert collect(log) > CONTROL
    log.close()
    ring.close()


def test_a_ring_that_was_never_opened_is_a_closed_one():
    ring = KvmDirtyRing.__new__(KvmDirtyRing)
    assert ring.closed
    assert (ring.vcpus, ring.entries, ring.foreign) == (0, 0, 0)
    with pytest.raises(ClosedError):
        ring.reap()
    with pytest.raises(ClosedError):
        KvmRingDirtyLog(ring, NPAGES, host_address=0)
    ring.close()
