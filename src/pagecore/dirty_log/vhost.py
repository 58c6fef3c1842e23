"""VhostLog: the memory in which vhost devices note what they wrote.

A device outside the VMM (vhost-user, or the kernel's vhost) writes guest memory through a mapping of its own, which no
log of page tables sees. It is given memory instead (VHOST_USER_SET_LOG_BASE, VHOST_SET_LOG_BASE) where it sets the bit
of each page of 4096 bytes, counted from guest physical address 0, after it wrote the page: an atomic OR of a byte, or
of more. Little-endian, that is a bitmap of words, and each region of guest memory is a slice of it.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Final, Self

from pagecore._bitmap import Bitmap
from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.errors import ClosedError, UnsupportedError

__all__ = ["VhostLog"]

PAGE: Final = 4096
WORD_PAGES: Final = 64
WORD_BYTES: Final = WORD_PAGES * PAGE  # of guest memory, that one word of the log stands for
BYTE_BYTES: Final = 8 * PAGE


class VhostLog:
    """The log of all vhost devices of one guest, in shared memory of its own.

    One for all regions, because the devices address it by guest physical address. Hand ``fileno()``, ``nbytes`` and the
    offset 0 to a vhost-user backend; the kernel's vhost takes the address of ``memory``. Switch logging on
    (VHOST_F_LOG_ALL) before the first copy, and stop the devices before the last collect.

    Parameters
    ----------
    top : int
        Where guest physical memory ends, in bytes.

    Attributes
    ----------
    memory : mmap.mmap
        The log itself, ``nbytes`` long.
    nbytes : int

    Raises
    ------
    ValueError
        If `top` is not positive.
    UnsupportedError
        On a machine that is not little-endian.

    Notes
    -----
    Holds the GIL. Thread-safe with the devices. Linux 3.17 (memfd_create).
    """

    def __init__(self, top: int) -> None:
        if top <= 0:
            raise ValueError(f"guest memory ends at {top}, which is not positive")
        if sys.byteorder != "little":
            raise UnsupportedError("a vhost log on this machine", "its bits are in little-endian order")
        self.nbytes = -(-top // (BYTE_BYTES * PAGE)) * PAGE  # whole pages of the log
        self._fd = os.memfd_create("vhost-log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self.nbytes)
            self.memory = mmap.mmap(self._fd, self.nbytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._regions: list[tuple[int, int]] = []

    def fileno(self) -> int:
        """The memfd, for VHOST_USER_SET_LOG_BASE.

        Raises
        ------
        ClosedError
            After close().
        """
        if self._fd < 0:
            raise ClosedError("the vhost log is closed")
        return self._fd

    def region(self, address: int, npages: int) -> MemoryDirtyLog:
        """The slice of one region, as a dirty log.

        It says what devices wrote and nothing else (``misses == {"vcpus", "vmm"}``). Beside a log of what the vCPUs
        wrote it is one of the writers that call ``PageTracker.mark`` (S12), before each sync, the last one too::

            written = Bitmap(log.size)
            log.collect_into(written)
            tracker.mark(written.runs())
            tracker.sync()

        Parameters
        ----------
        address : int
            The region's guest physical address, a multiple of 256 KiB.
        npages : int
            Its length, in pages of 4096 bytes.

        Returns
        -------
        MemoryDirtyLog
            Re-arms at collect; as ``MemoryDirtyLog`` otherwise. It stays good after :meth:`close`.

        Raises
        ------
        ValueError
            The address is no such multiple: collects of two regions would share a word and take one another's bits. The
            region reaches beyond the log, or overlaps another one.
        ClosedError
            After close().
        """
        self.fileno()
        end = address + npages * PAGE
        if address % WORD_BYTES:
            raise ValueError(f"guest physical address {address:#x} is not a multiple of {WORD_BYTES:#x}")
        if npages <= 0 or not 0 <= address < end <= self.nbytes * BYTE_BYTES:
            raise ValueError(f"[{address:#x}, {end:#x}) is empty, or outside [0, {self.nbytes * BYTE_BYTES:#x})")
        for first, last in self._regions:
            if address < last and first < end:
                raise ValueError(f"[{address:#x}, {end:#x}) overlaps the region [{first:#x}, {last:#x})")
        first = address // BYTE_BYTES
        bits = Bitmap.from_buffer(memoryview(self.memory)[first : first + -(-npages // WORD_PAGES) * 8], npages)
        self._regions.append((address, end))
        return MemoryDirtyLog(npages, bits, misses=("vcpus", "vmm"))

    def close(self) -> None:
        """Close the descriptor. Devices and regions keep the memory for as long as they use it. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
