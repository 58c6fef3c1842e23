"""How fast memory is written: counted from a dirty log, or estimated from a sample of another process's pages."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pagecore._bitmap import Bitmap
from pagecore._mappings import PAGE_SIZE, mappings_of
from pagecore._sampling import UNKNOWN, page_checksums_of, zero_checksum
from pagecore.dirty_log import DirtyLog
from pagecore.errors import PeerGoneError, UnsupportedError

__all__ = ["DirtyRate", "Figure", "RateInterval", "measure_dirty_rate", "sample_dirty_rate"]

# Of a small process its share of pages would be next to nothing, of a very large mapping it would take seconds to read.
LEAST_SAMPLES: Final = 1024
MOST_SAMPLES: Final = 1 << 17
PAGES_PER_GIB: Final = (1 << 30) // PAGE_SIZE
# The quantile of the normal distribution of a 95 % interval.
Z: Final = 1.959964


class Figure(NamedTuple):
    """A number, and what it lies between.

    Attributes
    ----------
    value : float
    low, high : float
        The bounds of its 95 % confidence interval; all three are the same where it was counted.
    """

    value: float
    low: float
    high: float

    def per(self, seconds: float, unit: int = 1) -> Figure:
        """Divided by a time; 0 where there was none."""
        return Figure(*(number * unit / seconds if seconds > 0 else 0.0 for number in self))


@dataclass(frozen=True, slots=True)
class RateInterval:
    """What was written in one interval.

    Attributes
    ----------
    seconds : float
        From one look to the next, by the monotonic clock.
    pages : Figure
        Different pages that were written: one that is written often counts once.
    bytes_per_second : Figure
    """

    seconds: float
    pages: Figure
    page_size: int = PAGE_SIZE

    @property
    def bytes_per_second(self) -> Figure:
        """The rate."""
        return self.pages.per(self.seconds, self.page_size)


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """How fast memory is written.

    Attributes
    ----------
    method : str
        ``"log"`` or ``"sampling"``.
    npages, page_size : int
        The memory that was watched; bytes of a page.
    intervals : tuple of RateInterval
        One after the other, without a gap between them. At least one.
    working_set : Figure
        Different pages that were written in all intervals together.
    sampled : int
        Pages that were looked at: all of them by a log.
    unknown : int
        Those of the sample whose content was not known at any time: in no page table, and counted as not written.
    stopped : bool
        The wait asked for an early end.
    """

    method: str
    npages: int
    page_size: int
    intervals: tuple[RateInterval, ...]
    working_set: Figure
    sampled: int
    unknown: int
    stopped: bool

    @property
    def seconds(self) -> float:
        """Of all intervals."""
        return sum(interval.seconds for interval in self.intervals)

    @property
    def pages(self) -> Figure:
        """Pages written, summed over the intervals: one that is written in two of them counts twice.

        Where they are estimated, the bounds are the sums of the intervals' own: all intervals look at the same sample,
        and if they err together that is the width.
        """
        columns = zip(*(interval.pages for interval in self.intervals), strict=True)
        return Figure(*(math.fsum(column) for column in columns))

    @property
    def bytes_per_second(self) -> Figure:
        """The rate over all intervals: what a migration would have to send to stand still."""
        return self.pages.per(self.seconds, self.page_size)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest bytes a second of an interval."""
        rates = [interval.bytes_per_second.value for interval in self.intervals]
        return min(rates), max(rates)


def measure_dirty_rate(
    log: DirtyLog,
    *,
    seconds: float = 1.0,
    intervals: int = 1,
    page_size: int = PAGE_SIZE,
    wait: Callable[[float], object] = time.sleep,
    report: Callable[[RateInterval], object] | None = None,
) -> DirtyRate:
    """Count the pages that a dirty log reports, interval by interval.

    What was logged before is collected and dropped first. Then, for each interval: wait, collect, re-arm what was
    collected where the log does not do so by itself, count.

    What is collected here is gone for everyone else: measure before a migration begins, whose tracker then owes every
    page.

    Parameters
    ----------
    log : DirtyLog
        Ready: enabled, and collected by nobody else meanwhile.
    seconds : float
        Of an interval. A page that is written more than once in it counts once, so a longer one gives a lower rate.
    intervals : int
    page_size : int
        Bytes of a page of the log.
    wait : callable, optional
        Called with `seconds`; a true answer means that the measuring is to end with this interval, however long it was.
        ``threading.Event().wait`` is one that another thread can end.
    report : callable, optional
        Called with each `RateInterval` as it ends.

    Returns
    -------
    DirtyRate
        ``method`` is ``"log"``; nothing in it is estimated.

    Raises
    ------
    ValueError
        If a number is out of its bounds.
    PagecoreError
        What the log raises.

    Notes
    -----
    Releases the GIL while it waits and collects.
    Thread-safe with the writers; not with another collect of the log.
    Kernel: as the log. KVM's logs also report pages that a vCPU only read, if it did so for the first time: the first
    intervals of a guest that was just started are too high.
    """
    _check(seconds, intervals)
    if page_size < 1:
        raise ValueError(f"page size {page_size} is below 1")
    union = Bitmap(log.size)
    _collect(log)

    def look() -> Figure:
        seen = _collect(log)
        union.merge_owned(seen)
        return _counted(seen.count())

    measured, stopped = _measure(look, wait, seconds=seconds, intervals=intervals, report=report, page_size=page_size)
    return DirtyRate("log", log.size, page_size, measured, _counted(union.count()), log.size, 0, stopped)


def sample_dirty_rate(
    pid: int,
    *,
    seconds: float = 1.0,
    intervals: int = 1,
    pages_per_gib: int = 512,
    seed: int = 0,
    wait: Callable[[float], object] = time.sleep,
    report: Callable[[RateInterval], object] | None = None,
) -> DirtyRate:
    """Estimate how fast a process writes, from a sample of its pages, without its help.

    The checksums of the sampled pages are compared from one look to the next. The sample is drawn from the writable
    mappings that the process has at the start: one random page from each of n equal stretches of them.

    Parameters
    ----------
    pid : int
        The process. It goes on running.
    seconds, intervals, wait, report
        As `measure_dirty_rate` has them.
    pages_per_gib : int
        Sampled pages in each GiB, as QEMU's ``calc-dirty-rate``; at least 1024 and at most 131,072 in all.
    seed : int
        The same seed and mappings give the same sample.

    Returns
    -------
    DirtyRate
        ``method`` is ``"sampling"``. Each figure is a share of the sample times the pages of the mappings. Its bounds
        are Wilson's score interval at 95 % (E. B. Wilson, Probable inference, the law of succession, and statistical
        inference, Journal of the American Statistical Association 22, 1927): for a share p of n pages
        ``(p + z*z/2n +- z * sqrt(p(1-p)/n + z*z/4n*n)) / (1 + z*z/n)`` with z = 1.96, and n enlarged by the correction
        for a finite population, (N - 1) / (N - n), so that it closes as the sample becomes the whole. A page from each
        of equal stretches varies no more than the simple random sample that the interval is for (W. G. Cochran,
        Sampling Techniques, 3rd edition, sections 2.6 and 5.6): it is rather too wide.

    Raises
    ------
    ValueError
        If a number is out of its bounds.
    UnsupportedError
        If this user may not read the process's memory; the message has the fix.
    PeerGoneError
        If there is no such process, or it ends meanwhile.

    Notes
    -----
    What it cannot see: a write of what stood there before; memory that was mapped after the start. A page that comes
    into the page tables (shared memory, a file, swap) counts as written unless it is all zeros, though it may only have
    been read; private memory that is discarded or unmapped counts as zeros. The process is not changed: pages that are
    not populated are not read, which would populate them. Those that it shares with a forked child are copied by the
    kernel as they are read.

    Releases the GIL while it waits and reads.
    Thread-safe with everything.
    Linux 4.2, and the right to trace the process: its user, or CAP_SYS_PTRACE.
    """
    _check(seconds, intervals)
    if not 1 <= pages_per_gib <= PAGES_PER_GIB:
        raise ValueError(f"{pages_per_gib} pages a GiB are outside [1, {PAGES_PER_GIB}]")
    if not 1 <= pid < 1 << 31:
        raise ValueError(f"process {pid} is outside [1, {1 << 31})")
    with _Process(pid) as process:
        addresses, anonymous, npages = _places(process, pages_per_gib, seed)
        sampled = len(addresses)
        known = process.checksums(addresses, anonymous)
        ever = np.zeros(sampled, dtype=np.bool_)

        def look() -> Figure:
            found = process.checksums(addresses, anonymous)
            changed = _changed(known, found)
            np.copyto(known, found, where=found != UNKNOWN)
            np.logical_or(ever, changed, out=ever)
            return estimate(int(changed.sum()), sampled, npages)

        measured, stopped = _measure(look, wait, seconds=seconds, intervals=intervals, report=report)
    unknown = int((known == UNKNOWN).sum())
    working_set = estimate(int(ever.sum()), sampled, npages)
    return DirtyRate("sampling", npages, PAGE_SIZE, measured, working_set, sampled, unknown, stopped)


def estimate(written: int, sampled: int, npages: int) -> Figure:
    """How many of `npages` were written if `written` of `sampled` were; the interval is `sample_dirty_rate`'s.

    Parameters
    ----------
    written, sampled, npages : int
        Pages; ``0 <= written <= sampled <= npages``, and `sampled` above 0.

    Returns
    -------
    Figure
    """
    share = written / sampled
    if sampled == npages:
        return _counted(written)
    size = sampled * (npages - 1) / (npages - sampled)
    centre = share + Z * Z / (2 * size)
    half = Z * math.sqrt(share * (1 - share) / size + Z * Z / (4 * size * size))
    low, high = ((centre + sign * half) / (1 + Z * Z / size) * npages for sign in (-1, 1))
    # What was seen is certain: so many were written, and so many were not.
    return Figure(share * npages, max(low, written), min(high, npages - (sampled - written)))


def draw(npages: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """One random page from each of `wanted` equal stretches of `npages`, in order."""
    edges = np.arange(wanted + 1, dtype=np.int64) * npages // wanted
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


class _Process:
    """A process whose memory is read; the descriptor keeps it the same one although process ids are used again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pagemap = -1
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self.writable = [mapping for mapping in mappings_of(pid) if mapping.permissions[1] == "w"]
            if not self.writable:
                raise ProcessLookupError(errno.ESRCH, "nothing is mapped")
        except OSError as error:
            self.close()
            raise self._meant(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self._pagemap = -1

    def checksums(self, addresses: NDArray[np.int64], anonymous: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """As `page_checksums_of`; all of them of this process."""
        try:
            return page_checksums_of(self.pid, self._pagemap, addresses, anonymous)
        except OSError as error:
            raise self._meant(error) from error

    def _meant(self, error: OSError) -> Exception:
        """The error that says what the kernel's answer means here."""
        if error.errno in {errno.ESRCH, errno.ENOENT}:
            return PeerGoneError(f"there is no process {self.pid} with memory of its own, or it has ended")
        if error.errno in {errno.EACCES, errno.EPERM}:
            remedy = (
                "it takes the right to trace it: be its user where kernel.yama.ptrace_scope is 0"
                " (sudo sysctl kernel.yama.ptrace_scope=0), or have CAP_SYS_PTRACE (sudo)"
            )
            return UnsupportedError(f"reading the memory of process {self.pid}", remedy)
        return error


def _places(process: _Process, pages_per_gib: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], int]:
    """The sample: addresses, which of them are private anonymous memory, and the pages that it was drawn from."""
    firsts = np.array([mapping.first for mapping in process.writable], dtype=np.int64)
    sizes = np.array([(mapping.last - mapping.first) // PAGE_SIZE for mapping in process.writable], dtype=np.int64)
    kinds = np.array([mapping.anonymous for mapping in process.writable], dtype=np.uint8)
    ends = np.cumsum(sizes)
    npages = int(ends[-1])
    wanted = min(max(npages * pages_per_gib // PAGES_PER_GIB, LEAST_SAMPLES), MOST_SAMPLES, npages)
    pages = draw(npages, wanted, seed)
    at = np.searchsorted(ends, pages, side="right")
    return firsts[at] + (pages - (ends - sizes)[at]) * PAGE_SIZE, kinds[at], npages


def _changed(known: NDArray[np.uint64], found: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pages hold something else; what was not known before counts unless it is zeros, what is not known now does
    not."""
    appeared_empty = (known == UNKNOWN) & (found == zero_checksum())
    changed: NDArray[np.bool_] = (found != known) & (found != UNKNOWN) & ~appeared_empty
    return changed


def _measure(
    look: Callable[[], Figure],
    wait: Callable[[float], object],
    *,
    seconds: float,
    intervals: int,
    report: Callable[[RateInterval], object] | None,
    page_size: int = PAGE_SIZE,
) -> tuple[tuple[RateInterval, ...], bool]:
    """Wait and look, interval by interval; also whether the wait asked for an end."""
    measured: list[RateInterval] = []
    stopped = False
    began = time.monotonic()
    while len(measured) < intervals and not stopped:
        stopped = bool(wait(seconds))
        pages = look()
        now = time.monotonic()
        measured.append(RateInterval(now - began, pages, page_size))
        began = now
        if report is not None:
            report(measured[-1])
    return tuple(measured), stopped


def _collect(log: DirtyLog) -> Bitmap:
    """What the log has, in a bitmap of its own (S11); all of it is re-armed once this returns."""
    seen = Bitmap(log.size)
    log.collect_into(seen)
    if not log.rearms_at_collect:
        log.rearm_seen(0, log.size, seen)
    return seen


def _counted(pages: int) -> Figure:
    return Figure(float(pages), float(pages), float(pages))


def _check(seconds: float, intervals: int) -> None:
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds {seconds} are outside (0, inf)")
    if intervals < 1:
        raise ValueError(f"intervals {intervals} are below 1")
