"""KVM's logs of two steps as bare calls, without what pagecore's own know about their order: for wrong orders."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import signal
import struct

import numpy as np

from kvm_poker import NPAGES, PAGE, Poker
from pagecore import Bitmap, DirtyLog

GET_DIRTY_LOG, CLEAR_DIRTY_LOG, RESET_DIRTY_RINGS = 0x4010AE42, 0xC018AEC0, 0xAEC7
CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
RING_OFFSET = 64 * PAGE
DIRTY, RESET = 1, 2


class RawClear(DirtyLog):
    """KVM_GET_DIRTY_LOG of a VM with manual protect, and KVM_CLEAR_DIRTY_LOG of whatever it is told."""

    def __init__(self, machine: Poker) -> None:
        super().__init__(NPAGES, rearms_at_collect=False, misses=("vmm",))
        self._machine = machine
        machine.enable_cap(CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
        machine.log_dirty_pages()
        self._words = (ctypes.c_uint64 * (-(-NPAGES // 64)))()

    def collect_into(self, bitmap: Bitmap) -> int:
        fcntl.ioctl(self._machine.vm_fd, GET_DIRTY_LOG, struct.pack("<IIQ", 0, 0, ctypes.addressof(self._words)))
        return bitmap.set_indices(Bitmap.from_bytes(bytes(self._words), NPAGES).indices())

    def rearm(self, first: int, count: int) -> None:
        """Of what the last collect has handed over."""
        self._clear(first, count, self._words)

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        words = type(self._words)(*np.frombuffer(seen, np.uint64).tolist())
        self._clear(first, count, words)

    def _clear(self, first: int, count: int, words: ctypes.Array[ctypes.c_uint64]) -> None:
        where = ctypes.addressof(words) + first // 8
        fcntl.ioctl(self._machine.vm_fd, CLEAR_DIRTY_LOG, struct.pack("<IIQQ", 0, count, first, where))


class RawRing(DirtyLog):
    """The entries of the one vCPU's dirty ring, and KVM_RESET_DIRTY_RINGS as a step of its own."""

    def __init__(self, machine: Poker) -> None:
        super().__init__(NPAGES, rearms_at_collect=False, misses=("vmm",))
        self._machine = machine
        self._ring = mmap.mmap(machine.vcpu_fd, machine.ring_bytes, offset=RING_OFFSET)
        self._next = 0
        self._taken = 0
        machine.log_dirty_pages()

    def collect_into(self, bitmap: Bitmap) -> int:
        pages = []
        while True:
            at = self._next * 16 % len(self._ring)
            flags, _, offset = struct.unpack_from("<IIQ", self._ring, at)
            if not flags & DIRTY:
                return bitmap.set_indices(np.array(pages, np.int64))
            pages.append(offset)
            struct.pack_into("<I", self._ring, at, RESET)
            self._next += 1
            self._taken += 1

    def rearm(self, first: int, count: int) -> None:
        # From Linux 6.16 on a signal that is pending cuts it short, and leaves pages writable that count as reset.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            done = fcntl.ioctl(self._machine.vm_fd, RESET_DIRTY_RINGS, 0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if done != self._taken:
            raise AssertionError(f"{done} of {self._taken} entries were reset: what this run shows is worth nothing")
        self._taken = 0
