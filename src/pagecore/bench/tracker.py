"""Hints and takes of a tracker beside their peers, with what each must reach: ``pagecore bench hints --peers``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagecore._bitmap import Bitmap
from pagecore._tracker import PageTracker
from pagecore.bench import _floor
from pagecore.bench.bitmap import Row, address
from pagecore.bench.hints import random_bits, random_runs
from pagecore.bench.rounds import Cache, Contender, measure, ratio

__all__ = ["CASES", "LISTS", "Case", "TrackerSuite"]


@dataclass(frozen=True)
class Case:
    """A guest of so many GiB with that share of its pages owed, at random; `cold`: its planes are out of the caches."""

    gib: int
    density: float
    cold: bool

    def __str__(self) -> str:
        return f"{self.gib} GiB, {self.density * 100:.4g} %{', cold' if self.cold else ''}"


FLOOR_MUST, FLOOR_AIM = 1 / 1.7, 1.0
QEMU_MUST, QEMU_AIM = 2.0, 3.0
SCAN_MUST, SCAN_AIM = 0.5, 0.75
# A list this short, out of the caches, is a call of Python code that is out of them, too: QEMU's loop has none.
SHORT, QEMU_MUST_SHORT_COLD = 1000, 1.25

CASES = [Case(8, density, False) for density in (0.0001, 0.01, 0.5)]
CASES += [Case(64, density, True) for density in (0.0001, 0.01, 0.5)]
CASES += [Case(1024, 0.01, True), Case(1024, 0.5, True)]
# Runs in a list, and the pages of the longest of them.
LISTS = [(SHORT, 1024), (100_000, 1), (100_000, 64), (1_000_000, 1), (1_000_000, 1024)]


class TrackerSuite:
    """All rows; `rounds` paired rounds each, of which the median counts.

    Parameters
    ----------
    rounds : int
    scale : int
        Guests and lists are 2 to this power smaller: for tests of the suite itself.
    """

    def __init__(self, rounds: int = 9, scale: int = 0) -> None:
        self.rounds = rounds
        self._scale = scale
        self._cache = Cache() if scale == 0 else Cache(1 << 20)

    def rows(self, only: str = "") -> Iterator[Row]:
        """The rows of the cases whose name contains `only`."""
        for case in CASES:
            if only in str(case):
                content = random_bits((case.gib << 18) >> self._scale, case.density, 1)
                for runs, longest in LISTS:
                    yield from self._hint(case, content, max(1, runs >> self._scale), longest)
                yield from self._take(case, content)

    def _compare(
        self, operation: str, case: Case, ours: Contender, **peers: tuple[Contender, float | None, float | None]
    ) -> Iterator[Row]:
        contenders = {"pagecore": ours, **{name: peer for name, (peer, _, _) in peers.items()}}
        measure(contenders, self.rounds, self._cache if case.cold else None)
        for name, (peer, must, aim) in peers.items():
            label = name.replace("_", " ")
            yield Row(operation, str(case), label, ratio(ours, peer), must, aim, ours.median, peer.median)

    def _hint(self, case: Case, content: Bitmap, runs: int, longest: int) -> Iterator[Row]:
        array = random_runs(content.size, runs, longest, 1)
        tracker = PageTracker(content.size, all_dirty=False)
        tracker.reload(~content)
        with tracker.hint_session() as session:
            epoch = session.start()
            # Hinted pages become owed again: the planes are what they were.
            ours = Contender(functools.partial(session.clear_runs, array, epoch), tracker.owe_hinted)
            floor = _peer(_floor.hint, content, array)
            qemu = _peer(_floor.qemu_hint, content, array)
            qemu_must = QEMU_MUST_SHORT_COLD if case.cold and runs <= SHORT else QEMU_MUST
            yield from self._compare(
                f"hint {runs} x 1..{longest}",
                case,
                ours,
                floor=(floor, FLOOR_MUST, FLOOR_AIM),
                QEMU_like_loop=(qemu, qemu_must, QEMU_AIM),
            )
            # A wrong answer is no result.
            assert ours.answer == floor.answer == qemu.answer, (ours.answer, floor.answer, qemu.answer)

    def _take(self, case: Case, content: Bitmap) -> Iterator[Row]:
        tracker = PageTracker(content.size, all_dirty=False)
        nothing = ~content

        def put_back() -> None:
            tracker.reload(nothing)

        ours = Contender(functools.partial(tracker.take, content.size), put_back)
        scan = Contender(content.runs)
        yield from self._compare("take all", case, ours, bare_scan=(scan, SCAN_MUST, SCAN_AIM))
        assert np.array_equal(ours.answer, scan.answer)


def _peer(hint: Callable[[int, int, int, int], int], content: Bitmap, runs: npt.NDArray[np.int64]) -> Contender:
    # Memory of the same kind as ours: words of bitmaps, which ask for huge pages.
    dirty, hinted = Bitmap(content.size), Bitmap(content.size)

    def put_back() -> None:
        ctypes.memmove(address(dirty), address(content), content.size // 8)
        ctypes.memset(address(hinted), 0, content.size // 8)

    return Contender(functools.partial(hint, address(dirty), address(hinted), address(runs), len(runs)), put_back)
