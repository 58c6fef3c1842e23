"""Bitmap operations against plain C (the floor) and NumPy, on the same words in the same run.

One group for each operation and case, with a row for each contender. What changes the words is timed one call at a
time, with the words put back between calls; the answer of the last call is checked after the timed part.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pagecore import Bitmap

ROUNDS = 40


@dataclass(frozen=True)
class Case:
    """A bitmap of 2**bits pages: so many of them set, at random, or in runs of 64 to 4096 pages."""

    bits: int
    density: float
    clustered: bool = False

    def __str__(self) -> str:
        size = f"{self.pages >> 20}M" if self.bits >= 20 else f"{self.pages >> 10}K"
        return f"pages={size}-{'clustered' if self.clustered else 'uniform'}={self.density:.2%}"

    @property
    def pages(self) -> int:
        return 1 << self.bits

    @functools.cache  # noqa: B019 (a case lives as long as the module)
    def words(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, self.bits, int(self.density * 1e6)])
        if not self.clustered:
            flags = rng.random(self.pages, dtype=np.float32) < self.density
            return np.packbits(flags, bitorder="little").view(np.uint64)
        # Runs and the gaps between them, laid end to end until the bitmap is full.
        most = self.pages // 64
        lengths = rng.integers(64, 4097, most)
        gaps = rng.exponential(2080 * (1 - self.density) / self.density, most).astype(np.int64) + 1
        ends = np.cumsum(lengths + gaps)
        inside = ends <= self.pages
        bitmap = Bitmap(self.pages)
        bitmap.set_runs(np.stack([(ends - lengths)[inside], lengths[inside]], axis=1))
        return np.frombuffer(bitmap, np.uint64)


CASES = [
    Case(20, 0.0001),
    Case(20, 0.01),
    Case(20, 0.5),
    Case(24, 0.0001),
    Case(24, 0.01),
    Case(24, 0.5),
    Case(24, 0.01, clustered=True),
    Case(24, 0.5, clustered=True),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def contenders(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("who", names)


class Words:
    """Words in memory of their own, seen by all contenders: as an array, as an address and as a Bitmap."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content
        memory = mmap.mmap(-1, max(content.nbytes, mmap.PAGESIZE))
        self.array = np.frombuffer(memory, np.uint64, len(content))
        self.address = ctypes.c_void_p(self.array.ctypes.data)
        self.bitmap = Bitmap.from_buffer(memory, 64 * len(content))
        self.put_back()

    def put_back(self) -> None:
        self.array[:] = self.content


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def popcount(words: np.ndarray) -> int:
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return int(np.bitwise_count(words).sum())
    return int(np.unpackbits(words.view(np.uint8)).sum())


def measure(
    benchmark: Any, group: str, case: Case, call: Callable[[], Any], put_back: Callable[[], None], **extra: int
) -> Any:
    """Time `call`, alone; `put_back` runs before each round. Returns the answer of the last round."""
    benchmark.group = f"{group}, {case}"
    benchmark.extra_info.update(pages=case.pages, bytes=case.pages // 8, **extra)
    return benchmark.pedantic(call, setup=put_back, rounds=ROUNDS, warmup_rounds=2)


def nothing() -> None:
    """What only looks has nothing to put back."""


@over_cases
@contenders("pagecore", "floor", "numpy")
def test_count(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    words = Words(case.words(1))
    call = {
        "pagecore": words.bitmap.count,
        "floor": lambda: floor.floor_count(words.address, len(words.array)),
        "numpy": lambda: popcount(words.array),
    }[who]
    assert measure(benchmark, "count", case, call, nothing) == popcount(words.content)


@over_cases
@contenders("pagecore", "floor", "numpy")
def test_drain(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    log, dirty = Words(case.words(1)), Words(case.words(2))

    def put_back() -> None:
        log.put_back()
        dirty.put_back()

    def with_numpy() -> int:
        # Not atomic: what is set between the passes is lost.
        count = popcount(log.array & ~dirty.array)
        dirty.array |= log.array
        log.array[:] = 0
        return count

    newly = popcount(log.content & ~dirty.content)
    call = {
        "pagecore": lambda: log.bitmap.drain_into(dirty.bitmap),
        "floor": lambda: floor.floor_drain(log.address, dirty.address, len(log.array)),
        "numpy": with_numpy,
    }[who]
    assert measure(benchmark, "drain", case, call, put_back, newly_set=newly) == newly
    assert not log.array.any()
    assert np.array_equal(dirty.array, log.content | dirty.content)


@over_cases
@contenders("pagecore", "floor")
def test_clear_runs(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    """Free-page hints: 4096 runs of 1 to 1024 pages, anywhere."""
    words = Words(case.words(1))
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 1025, 4096)
    runs = np.stack([rng.integers(0, case.pages - 1024, 4096), lengths], axis=1)
    where = address(runs)
    call = {
        "pagecore": lambda: words.bitmap.clear_runs(runs),
        "floor": lambda: floor.floor_clear_runs(words.address, where, len(runs)),
    }[who]
    cleared = measure(benchmark, "clear_runs", case, call, words.put_back, runs=len(runs))
    assert cleared == popcount(words.content) - popcount(words.array)
    assert not words.bitmap.intersects(hinted(runs, case))


def hinted(runs: np.ndarray, case: Case) -> Bitmap:
    bitmap = Bitmap(case.pages)
    bitmap.set_runs(runs)
    return bitmap


@over_cases
@contenders("pagecore", "floor", "numpy")
def test_indices(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    words = Words(case.words(1))
    expected = np.flatnonzero(np.unpackbits(words.content.view(np.uint8), bitorder="little"))

    def with_floor() -> np.ndarray:
        # As pagecore must: count, make the array, fill it.
        result = np.empty(floor.floor_count(words.address, len(words.array)), np.int64)
        floor.floor_indices(words.address, len(words.array), address(result))
        return result

    call = {
        "pagecore": words.bitmap.indices,
        "floor": with_floor,
        "numpy": lambda: np.flatnonzero(np.unpackbits(words.array.view(np.uint8), bitorder="little")),
    }[who]
    answer = measure(benchmark, "indices", case, call, nothing, indices=len(expected))
    assert np.array_equal(answer, expected)


@over_cases
@contenders("pagecore", "floor")
def test_runs(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    words = Words(case.words(1))
    flags = np.unpackbits(words.content.view(np.uint8), bitorder="little").astype(np.int8)
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0))
    expected = np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)
    # The floor is given an array that is large enough, and so need not count.
    room = np.empty((case.pages // 2 + 1, 2), np.int64)
    where = address(room)
    call = {
        "pagecore": words.bitmap.runs,
        "floor": lambda: room[: floor.floor_runs(words.address, case.pages, where)],
    }[who]
    answer = measure(benchmark, "runs", case, call, nothing, runs=len(expected))
    assert np.array_equal(answer, expected)


@pytest.mark.parametrize("case", [Case(20, 0.01), Case(24, 0.01)], ids=str)
@contenders("pagecore", "floor")
def test_set_indices(benchmark: Any, floor: ctypes.CDLL, case: Case, who: str) -> None:
    """100,000 random pages; the floor is not atomic."""
    words = Words(case.words(1))
    pages = np.random.default_rng(4).integers(0, case.pages, 100_000)
    where = address(pages)
    call = {
        "pagecore": lambda: words.bitmap.set_indices(pages),
        "floor": lambda: floor.floor_set_indices(words.address, case.pages, where, len(pages)),
    }[who]
    newly = measure(benchmark, "set_indices", case, call, words.put_back, indices=len(pages))
    assert newly == popcount(words.array) - popcount(words.content)
    assert words.bitmap.test_indices(pages).all()


@contenders("pagecore", "floor")
@pytest.mark.parametrize("what", ["get", "set", "in"])
def test_single_bits(benchmark: Any, what: str, who: str) -> None:
    """1,000 calls from Python; the floor is the same loop over a list, the cheapest item access that Python has."""
    case = Case(16, 0.0)
    pages = np.random.default_rng(5).integers(0, case.pages, 1000).tolist()
    table: Any = Bitmap(case.pages) if who == "pagecore" else [False] * case.pages

    def get() -> None:
        for page in pages:
            table[page]

    def put() -> None:
        for page in pages:
            table[page] = True

    def contains() -> None:
        # `in` would search a list: there the floor is a set.
        for page in pages:
            page in members  # noqa: B015

    members = table if who == "pagecore" else set(pages)
    benchmark.group = f"single bits, {what}, 1000 calls"
    benchmark.extra_info.update(pages=len(pages), bytes=0)
    benchmark({"get": get, "set": put, "in": contains}[what])
    if what == "set":
        assert all(table[page] for page in pages)
