"""Free-page hints against the bitmap sync: what a hint costs, what it saves, and where that breaks even."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pagecore._bitmap import Bitmap
from pagecore._tracker import PageTracker
from pagecore.dirty_log import MemoryDirtyLog
from pagecore.files import save_figure
from pagecore.hints import HintSession

__all__ = [
    "DENSITIES",
    "GUESTS",
    "LISTS",
    "HintRow",
    "HintsReport",
    "SyncRow",
    "draw",
    "measure_hints",
    "random_bits",
    "random_runs",
]

PAGE: Final = 4096
GUESTS: Final = (8 << 30, 64 << 30, 1 << 40)
DENSITIES: Final = (0.0001, 0.01, 0.5)
# Runs in a list, and the pages of the longest of them.
LISTS: Final = (
    (10, 1024),
    (1000, 1),
    (1000, 1024),
    (100_000, 1),
    (100_000, 64),
    (1_000_000, 1),
    (1_000_000, 1024),
)


@dataclass(frozen=True, slots=True)
class HintRow:
    """One list of hints, processed in one call.

    Attributes
    ----------
    guest, density
        Bytes of the guest, and the share of its pages that is owed, at random.
    runs, longest
        Runs of 1 to `longest` pages, anywhere.
    named, taken : int
        Pages in the list, and those of them that were owed: taken off the debt.
    seconds : float
        Of the call, the least of all rounds.
    saved_seconds : float
        Of the link: what it would take to send the pages that were taken off.
    """

    guest: int
    density: float
    runs: int
    longest: int
    named: int
    taken: int
    seconds: float
    bandwidth: float

    @property
    def per_run(self) -> float:
        """Seconds a run."""
        return self.seconds / self.runs

    @property
    def per_named(self) -> float:
        """Seconds a page of the list."""
        return self.seconds / self.named

    @property
    def per_taken(self) -> float:
        """Seconds a page taken off the debt; infinite where none was."""
        return self.seconds / self.taken if self.taken else math.inf

    @property
    def saved_seconds(self) -> float:
        """Seconds of the link that the call saves."""
        return self.taken * PAGE / self.bandwidth

    @property
    def gain(self) -> float:
        """Seconds saved for each second spent; below 1 hinting costs more than it saves."""
        return self.saved_seconds / self.seconds

    @property
    def break_even_share(self) -> float:
        """The share of the list's pages that must have been owed for the call to pay, at this bandwidth."""
        return self.seconds * self.bandwidth / PAGE / self.named

    @property
    def break_even_bandwidth(self) -> float:
        """Bytes a second from which on sending these pages is quicker than taking them off."""
        return self.taken * PAGE / self.seconds


@dataclass(frozen=True, slots=True)
class SyncRow:
    """One sync of a log in which a share of the pages is, into planes that owe nothing."""

    guest: int
    density: float
    newly: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HintsReport:
    """All rows of a run."""

    bandwidth: float
    hints: tuple[HintRow, ...]
    syncs: tuple[SyncRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, in seconds and bytes; what is infinite is None."""
        derived = ("per_run", "per_named", "per_taken", "saved_seconds", "gain", "break_even_share")
        hints = [
            {
                **dataclasses.asdict(row),
                **{name: _finite(getattr(row, name)) for name in (*derived, "break_even_bandwidth")},
                "hints_a_sync": _finite(self.sync_of(row) / row.seconds),
            }
            for row in self.hints
        ]
        return {"bandwidth": self.bandwidth, "hints": hints, "syncs": [dataclasses.asdict(row) for row in self.syncs]}

    def sync_of(self, row: HintRow) -> float:
        """Seconds of the sync of the same guest and density."""
        return next(sync.seconds for sync in self.syncs if (sync.guest, sync.density) == (row.guest, row.density))


def measure_hints(
    *,
    guests: Sequence[int] = GUESTS,
    densities: Sequence[float] = DENSITIES,
    lists: Sequence[tuple[int, int]] = LISTS,
    bandwidth: float = 1.25e9,
    rounds: int = 5,
    seed: int = 1,
    report: Callable[[str], object] | None = None,
) -> HintsReport:
    """Measure hints and syncs on bitmaps of these sizes; the guests themselves need no memory.

    Parameters
    ----------
    guests : sequence of int
        Bytes; at least one page.
    densities : sequence of float
        Shares of pages that are owed, or in the log, above 0 and up to 1.
    lists : sequence of (int, int)
        Runs in a list, and pages of its longest run.
    bandwidth : float
        Of the link, bytes a second; 10 Gbit/s by default.
    rounds : int
        Each figure is the least of so many.
    seed : int
    report : callable, optional
        Called with each case before it is measured.

    Returns
    -------
    HintsReport

    Raises
    ------
    ValueError
        If a number is out of its bounds.
    """
    if min(guests, default=0) < PAGE:
        raise ValueError(f"guests {list(guests)}: each has at least a page of {PAGE} bytes")
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities {list(densities)} are not in (0, 1]")
    if not all(runs >= 1 and longest >= 1 for runs, longest in lists):
        raise ValueError(f"lists {list(lists)}: runs and pages are at least 1")
    if not 0 < bandwidth < math.inf or rounds < 1:
        raise ValueError(f"bandwidth {bandwidth} and rounds {rounds} have to be above 0")
    hints: list[HintRow] = []
    syncs: list[SyncRow] = []
    for guest in guests:
        for density in densities:
            case = f"{guest >> 30} GiB, {density:.2%} dirty"
            content = random_bits(guest // PAGE, density, seed)
            if report is not None:
                report(f"{case}: sync")
            syncs.append(SyncRow(guest, density, content.count(), _time_syncs(content, rounds)))
            tracker = PageTracker(content.size, all_dirty=False)
            tracker.reload(~content)
            with tracker.hint_session() as session:
                session.start()
                for runs, longest in lists:
                    if report is not None:
                        report(f"{case}: {runs} runs of 1 to {longest} pages")
                    array = random_runs(content.size, runs, longest, seed)
                    named = Bitmap(content.size)
                    named.set_runs(array)
                    taken = (named & content).count()
                    seconds = _time_hint(session, array, rounds, taken)
                    hints.append(HintRow(guest, density, runs, longest, named.count(), taken, seconds, bandwidth))
    return HintsReport(bandwidth, tuple(hints), tuple(syncs))


def random_bits(npages: int, density: float, seed: int) -> Bitmap:
    """Each page with this probability."""
    bitmap, rng = Bitmap(npages), np.random.default_rng([seed, npages])
    # Piece by piece: the numbers of 1 TiB at once would be 2 GiB.
    for first in range(0, npages, 1 << 22):
        count = min(1 << 22, npages - first)
        bitmap.set_indices(first + np.flatnonzero(rng.random(count, dtype=np.float32) < density))
    return bitmap


def _time_syncs(content: Bitmap, rounds: int) -> float:
    log = MemoryDirtyLog(content.size)
    tracker = PageTracker(content.size, dirty_log=log, all_dirty=False)
    clean = Bitmap(content.size)
    clean.fill()

    def put_back() -> None:
        tracker.reload(clean)
        log.bitmap.merge(content)

    return _least(tracker.sync, put_back, rounds, content.count())


def _time_hint(session: HintSession, runs: npt.NDArray[np.int64], rounds: int, expected: int) -> float:
    # Hinted pages become owed again: the planes are what they were.
    return _least(lambda: session.clear_runs(runs, session.epoch), session.tracker.owe_hinted, rounds, expected)


def random_runs(npages: int, runs: int, longest: int, seed: int) -> npt.NDArray[np.int64]:
    """Runs of 1 to `longest` pages, anywhere."""
    rng = np.random.default_rng([seed, runs, longest])
    longest = min(longest, npages)
    first = rng.integers(0, npages - longest + 1, runs)
    return np.stack([first, rng.integers(1, longest + 1, runs)], axis=1)


def _least(call: Callable[[], int], put_back: Callable[[], object], rounds: int, expected: int) -> float:
    """The least of the rounds: whatever else runs on the machine only ever adds."""
    least = math.inf
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds + 1):
            put_back()
            began = time.perf_counter()
            got = call()
            least = min(least, time.perf_counter() - began)
            # A wrong answer is no result.
            if got != expected:
                raise AssertionError(f"{got} pages instead of {expected}")
    finally:
        if enabled:
            gc.enable()
    put_back()
    return least


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def draw(report: HintsReport, path: str) -> None:
    """Draw the report; PNG, SVG or PDF, as the name says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for guest in dict.fromkeys(row.guest for row in report.hints):
        for density in dict.fromkeys(row.density for row in report.hints):
            rows = [row for row in report.hints if (row.guest, row.density) == (guest, density)]
            name = f"{guest >> 30} GiB, {density:.2%} dirty"
            left.loglog([row.named for row in rows], [row.seconds for row in rows], "o", label=name)
            left.axhline(report.sync_of(rows[0]), color=left.lines[-1].get_color(), linewidth=0.6)
            right.loglog([row.named for row in rows], [max(row.gain, 1e-6) for row in rows], "o", label=name)
    left.set(xlabel="pages in the list", ylabel="seconds a call", title="a list of hints (dots), a sync (lines)")
    right.axhline(1, color="black", linewidth=1)
    right.set(
        xlabel="pages in the list",
        ylabel="seconds saved for each second spent",
        title=f"what a list saves at {report.bandwidth / 1e9:.3g} GB/s (1: break-even)",
    )
    right.legend(fontsize="small")
    save_figure(figure, path, dpi=120)
