"""The vhost log: another process writes guest memory, and sets bits after it wrote."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal

import pytest

from pagecore import Bitmap, ClosedError, PageTracker, VhostLog
from trap_rig import writers
from uffd_helpers import PAGE, Child, address_of

WORD = 64 * PAGE


def collect(log):
    bitmap = Bitmap(log.size)
    newly = log.collect_into(bitmap)
    assert newly == bitmap.count()
    return bitmap.indices().tolist()


def set_pages(log, *addresses):
    """What a device does, in another process that has the descriptor and no more."""

    def device():
        memory = mmap.mmap(log.fileno(), log.nbytes)
        for address in addresses:
            writers().log_page(address_of(memory), address)

    Child(device).value()


def test_bits_are_addressed_by_guest_physical_address():
    with VhostLog(5 << 30) as log:
        assert log.nbytes >= (5 << 30) // PAGE // 8
        low, high = log.region(0, 100), log.region(4 << 30, 70)
        assert (low.rearms_at_collect, low.misses) == (True, {"vcpus", "vmm"})
        set_pages(log, 0, 99 * PAGE + 4095, (4 << 30) + 69 * PAGE, (4 << 30) + PAGE, 2 << 30)
        assert collect(low) == [0, 99]
        assert collect(high) == [1, 69]
        assert collect(low) == collect(high) == []
        set_pages(log, 99 * PAGE)
        assert collect(low) == [99]
    # The hole between them is nobody's.
    assert bytes(log.memory) == bytes((2 << 30) // WORD * 8) + b"\1" + bytes(log.nbytes - (2 << 30) // WORD * 8 - 1)


def test_another_process_writes_and_logs():
    """Data first, then its bit; collect first, then read: what was copied is the memory in the end."""
    npages, base = 3000, 3 * WORD
    memory, shadow = mmap.mmap(-1, npages * PAGE), mmap.mmap(-1, npages * PAGE)
    stop = mmap.mmap(-1, PAGE)
    with VhostLog(128 << 20) as log:
        region = log.region(base, npages)

        def device():
            bits = mmap.mmap(log.fileno(), log.nbytes)
            return writers().hammer_and_log(
                address_of(memory), npages, os.getpid(), address_of(stop), address_of(bits), base
            )

        devices = [Child(device), Child(device)]
        collected = 0
        try:
            while collected < 60_000:
                dirty = Bitmap(npages)
                collected += region.collect_into(dirty)
                for first, count in dirty.iter_runs():
                    ctypes.memmove(address_of(shadow) + first * PAGE, address_of(memory) + first * PAGE, count * PAGE)
        finally:
            stop[0] = 1
        assert sum(child.value() for child in devices) >= collected
        for page in collect(region):
            shadow[page * PAGE : (page + 1) * PAGE] = memory[page * PAGE : (page + 1) * PAGE]
    assert memory[:] == shadow[:]


def test_a_device_that_is_killed_leaves_its_bits():
    with VhostLog(1 << 20) as log:
        region = log.region(0, 256)

        def device():
            writers().log_page(address_of(log.memory), 7 * PAGE)
            os.kill(os.getpid(), signal.SIGKILL)

        assert Child(device).ended() == -signal.SIGKILL
        assert collect(region) == [7]


def test_what_devices_wrote_is_marked_before_a_sync():
    with VhostLog(1 << 20) as log:
        region = log.region(0, 256)
        tracker = PageTracker(256, all_dirty=False)
        set_pages(log, 9 * PAGE, 10 * PAGE)
        written = Bitmap(256)
        region.collect_into(written)
        tracker.mark(written.runs())
        tracker.sync()
        assert tracker.take().tolist() == [[9, 2]]


@pytest.mark.parametrize(
    ("address", "npages", "message"),
    [
        (PAGE, 64, "0x1000 is not a multiple of 0x40000"),
        (WORD, 0, "is empty"),
        (-WORD, 64, "outside"),
        (0, 1 << 40, "outside"),
        (2 * WORD, 64, r"overlaps the region \[0x80000, 0xc0000\)"),
        (WORD, 65, "overlaps"),
    ],
)
def test_regions_that_are_refused(address, npages, message):
    with VhostLog(1 << 30) as log:
        log.region(2 * WORD, 64)
        with pytest.raises(ValueError, match=message):
            log.region(address, npages)


def test_life():
    with pytest.raises(ValueError, match="ends at 0"):
        VhostLog(0)
    log = VhostLog(1 << 20)
    region = log.region(0, 10)
    log.close()
    log.close()
    for use in (log.fileno, log.__enter__, lambda: log.region(WORD, 1)):
        with pytest.raises(ClosedError):
            use()
    writers().log_page(address_of(log.memory), 3 * PAGE)
    assert collect(region) == [3]
