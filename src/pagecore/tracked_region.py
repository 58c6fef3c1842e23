"""TrackedRegion: what a tracker has to know of one region of guest memory."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Final

from pagecore.dirty_log import DirtyLog

__all__ = ["TrackedRegion"]

SMALLEST_PAGE: Final = 4096
LARGEST_PAGE: Final = 1 << 30
# QEMU's bounds and default of a chunk that is re-armed at once: 64 pages of the log at least, so that a chunk is made
# of whole words, and 1 GiB by default.
SMALLEST_CHUNK: Final = 6
LARGEST_CHUNK: Final = 31
DEFAULT_CHUNK_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRegion:
    """One region of a ``PageTracker``.

    Parameters
    ----------
    id : int
        What the link calls it, 0 to 65535.
    npages : int
        Pages of `page_size` bytes; whole host pages.
    page_size : int
        The unit of tracking in bytes, a power of two from 4096 (4 KiB) to 2^30 (1 GiB). With the size of the host's
        pages a page is dirty as a whole if any part of it is (S10).
    host_page_size : int, optional
        The unit of placing in bytes: `page_size`, or more where the memory is made of larger pages that are
        nevertheless tracked in smaller ones, so that precopy sends what was written and no more. Hints are rounded
        inward to it; once the lists of the switch are made, a unit is owed, free or sent as a whole (S10).
    dirty_log : DirtyLog, optional
        What records writes: as many pages as the region, or as there are pages of 4096 bytes in it. Without one, every
        writer calls ``mark``.
    all_dirty : bool
        Whether every page is owed at the start.
    rearm : {"sync", "lazy"}
        When a log that does not re-arm at collect is re-armed: whole with each sync, or a chunk at a time, right
        before the first page of it is taken. Lazy needs hint sessions that promise ``held`` (S3), and a log that goes
        on reporting a page until it is re-armed, as KVM's does with manual protect: not the ring.
    chunk_shift : int, optional
        A chunk is 2 to this power pages of the log, 6 to 31; by default 1 GiB.

    Raises
    ------
    ValueError
        If a number is out of its bounds, or sizes do not fit one another.
    TypeError
        If a number is none, or the log is no DirtyLog.
    """

    id: int = 0
    npages: int
    page_size: int = SMALLEST_PAGE
    host_page_size: int | None = None
    dirty_log: DirtyLog | None = None
    all_dirty: bool = True
    rearm: str = "sync"
    chunk_shift: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= index(self.id) < 1 << 16:
            raise ValueError(f"region id {self.id} is outside [0, 65536)")
        if index(self.npages) < 0:
            raise ValueError(f"npages {self.npages} is negative")
        _check_page_size("page_size", self.page_size)
        if self.host_page_size is None:
            object.__setattr__(self, "host_page_size", self.page_size)
        host = self.unit * self.page_size
        if self.npages % self.unit:
            raise ValueError(f"npages {self.npages} is not a multiple of {self.unit}, the pages in {host} bytes")
        if self.npages * self.page_size >= 1 << 63:
            raise ValueError(f"npages {self.npages} of {self.page_size} bytes are 2^63 bytes or more")
        self._check_log()

    def _check_log(self) -> None:
        log = self.dirty_log
        if log is not None:
            if not isinstance(log, DirtyLog):
                raise TypeError(f"dirty_log is a DirtyLog or None, not {type(log).__name__}")
            if log.size not in (self.npages, self.nbytes // SMALLEST_PAGE):
                raise ValueError(f"a dirty log of {log.size} pages does not fit a region of {self.npages} pages")
        if self.rearm not in ("sync", "lazy"):
            raise ValueError(f"rearm {self.rearm!r} is neither 'sync' nor 'lazy'")
        if self.rearm == "lazy" and (log is None or log.rearms_at_collect):
            raise ValueError(f"rearm 'lazy' is for a dirty log that is re-armed apart; this one is {log!r}")
        if self.chunk_shift is None:
            default = (DEFAULT_CHUNK_BYTES // self.log_page_size).bit_length() - 1
            object.__setattr__(self, "chunk_shift", max(SMALLEST_CHUNK, default))
        elif not SMALLEST_CHUNK <= index(self.chunk_shift) <= LARGEST_CHUNK:
            raise ValueError(f"chunk_shift {self.chunk_shift} is outside [{SMALLEST_CHUNK}, {LARGEST_CHUNK}]")

    @property
    def nbytes(self) -> int:
        """Bytes of the region."""
        return self.npages * self.page_size

    @property
    def unit(self) -> int:
        """Pages of one placing unit.

        Raises
        ------
        ValueError
            If the host's page size is none, or smaller than the page size.
        """
        host = self.page_size if self.host_page_size is None else self.host_page_size
        _check_page_size("host_page_size", host)
        if host < self.page_size:
            raise ValueError(f"host_page_size {host} is less than page_size {self.page_size}")
        return host // self.page_size

    @property
    def log_page_size(self) -> int:
        """Bytes in a page of the dirty log."""
        if self.dirty_log is None or self.dirty_log.size == self.npages:
            return self.page_size
        return SMALLEST_PAGE


def _check_page_size(name: str, size: int) -> None:
    if not SMALLEST_PAGE <= index(size) <= LARGEST_PAGE or size & (size - 1):
        raise ValueError(f"{name} {size} is no power of two in [{SMALLEST_PAGE}, {LARGEST_PAGE}]")
