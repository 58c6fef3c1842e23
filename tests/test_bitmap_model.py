"""Bitmap against a Python set: a state machine of every method, on memory of our own and on shared memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pagecore import Bitmap

SIZES = st.one_of(
    st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513]),
    st.integers(min_value=0, max_value=700),
)
FRACTION = st.floats(min_value=0, max_value=1)
LIMIT = st.one_of(st.none(), st.integers(min_value=0, max_value=5), st.integers(min_value=0, max_value=200))
SIDE = st.sampled_from([0, 1])
EXAMPLES = int(os.environ.get("PAGECORE_EXAMPLES", "80"))


def over_mmap(size: int) -> Bitmap:
    return Bitmap.from_buffer(mmap.mmap(-1, mmap.PAGESIZE), size)


def over_memfd(size: int) -> Bitmap:
    descriptor = os.memfd_create("bitmap")
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return Bitmap.from_buffer(mmap.mmap(descriptor, 0), size)
    finally:
        os.close(descriptor)


def with_summary(size: int) -> Bitmap:
    return Bitmap(size, summary=True)


def from_bytes(size: int) -> Bitmap:
    return Bitmap.from_bytes(bytes(8 * ((size + 63) // 64)), size)


def runs_of(pages: set[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


class Machine(RuleBasedStateMachine):
    """Two bitmaps of one size and two sets: `side` picks the one that a rule acts on."""

    new: Callable[[int], Bitmap]

    @initialize(size=SIZES)
    def start(self, size: int) -> None:
        self.size = size
        self.bitmaps = [type(self).new(size), type(self).new(size)]
        self.sets: list[set[int]] = [set(), set()]

    def span(self, low: float, high: float) -> tuple[int, int]:
        first, end = sorted((round(low * self.size), round(high * self.size)))
        return first, end - first

    def pages(self, fractions: list[float]) -> list[int]:
        return [min(int(fraction * self.size), self.size - 1) for fraction in fractions] if self.size else []

    @rule(
        side=SIDE,
        at=FRACTION,
        what=st.sampled_from(["set", "clear", "test_and_set", "test_and_clear", "item"]),
    )
    def single(self, side: int, at: float, what: str) -> None:
        for page in self.pages([at]):
            bitmap, model = self.bitmaps[side], self.sets[side]
            before = page in model
            assert (page in bitmap) == bitmap[page] == bitmap.test(page) == before
            if what == "item":
                bitmap[page] = not before
                model ^= {page}
                continue
            answer = getattr(bitmap, what)(page)
            assert answer == (before if what.startswith("test") else None)
            model.add(page) if what.endswith("set") else model.discard(page)

    @rule(side=SIDE, low=FRACTION, high=FRACTION, set_them=st.booleans())
    def one_range(self, side: int, low: float, high: float, set_them: bool) -> None:
        first, count = self.span(low, high)
        bitmap, model, span = self.bitmaps[side], self.sets[side], set(range(first, first + count))
        assert bitmap.count_range(first, count) == len(model & span)
        assert bitmap.test_range(first, count) == (span <= model)
        if set_them:
            assert bitmap.set_range(first, count) == len(span - model)
            model |= span
        else:
            assert bitmap.clear_range(first, count) == len(span & model)
            model -= span

    @rule(side=SIDE, spans=st.lists(st.tuples(FRACTION, FRACTION), max_size=6), set_them=st.booleans())
    def several_runs(self, side: int, spans: list[tuple[float, float]], set_them: bool) -> None:
        runs = [self.span(low, high) for low, high in spans]
        model = self.sets[side]
        pages = {page for first, count in runs for page in range(first, first + count)}
        if set_them:
            assert self.bitmaps[side].set_runs(runs) == len(pages - model)
            model |= pages
        else:
            assert self.bitmaps[side].clear_runs(runs) == len(pages & model)
            model -= pages

    @rule(side=SIDE, fractions=st.lists(FRACTION, max_size=30), set_them=st.booleans())
    def several_indices(self, side: int, fractions: list[float], set_them: bool) -> None:
        pages = self.pages(fractions)
        bitmap, model = self.bitmaps[side], self.sets[side]
        assert bitmap.test_indices(pages).tolist() == [page in model for page in pages]
        if set_them:
            assert bitmap.set_indices(pages) == len(set(pages) - model)
            model.update(pages)
        else:
            assert bitmap.clear_indices(pages) == len(set(pages) & model)
            model.difference_update(pages)

    @rule(side=SIDE, full=st.booleans())
    def all_of_it(self, side: int, full: bool) -> None:
        self.bitmaps[side].fill() if full else self.bitmaps[side].reset()
        self.sets[side] = set(range(self.size)) if full else set()

    @rule(side=SIDE, at=FRACTION)
    def find(self, side: int, at: float) -> None:
        start = round(at * self.size)
        bitmap, model = self.bitmaps[side], self.sets[side]
        assert bitmap.find_set(start) == min((page for page in model if page >= start), default=None)
        clear = set(range(start, self.size)) - model
        assert bitmap.find_clear(start) == min(clear, default=None)
        assert bitmap.find_last() == max(model, default=None)

    @rule(side=SIDE, at=FRACTION, count=st.integers(1, 200), align=st.sampled_from([1, 2, 3, 8, 64]))
    def find_area(self, side: int, at: float, count: int, align: int) -> None:
        start = round(at * self.size)
        aligned = range(-(-start // align) * align, self.size - count + 1, align)
        free = (page for page in aligned if self.sets[side].isdisjoint(range(page, page + count)))
        assert self.bitmaps[side].find_clear_area(count, start, align) == next(free, None)

    @rule(side=SIDE, at=FRACTION, max_pages=LIMIT, max_runs=LIMIT)
    def take(self, side: int, at: float, max_pages: int | None, max_runs: int | None) -> None:
        start = round(at * self.size)
        pages = self.size if max_pages is None else max_pages
        expected = []
        for first, count in runs_of({page for page in self.sets[side] if page >= start})[:max_runs]:
            if pages:
                expected.append([first, min(count, pages)])
                pages -= expected[-1][1]
        taken = self.bitmaps[side].take_runs(start, max_pages=max_pages, max_runs=max_runs)
        assert taken.tolist() == expected
        for first, count in expected:
            self.sets[side].difference_update(range(first, first + count))

    @rule(side=SIDE, how=st.sampled_from(["drain_into", "drain_into_owned", "drain_owned_into_owned"]))
    def drain(self, side: int, how: str) -> None:
        newly = getattr(self.bitmaps[side], how)(self.bitmaps[1 - side])
        assert newly == len(self.sets[side] - self.sets[1 - side])
        self.sets[1 - side] |= self.sets[side]
        self.sets[side] = set()

    @rule(side=SIDE, what=st.sampled_from(["merge", "merge_owned", "andnot", "|", "&", "^"]))
    def combine(self, side: int, what: str) -> None:
        bitmap, other = self.bitmaps[side], self.bitmaps[1 - side]
        model, others = self.sets[side], self.sets[1 - side]
        assert bitmap.intersects(other) == (not model.isdisjoint(others))
        assert (bitmap == other) == (model == others)
        assert (bitmap | other).indices().tolist() == sorted(model | others)
        assert (bitmap & other).indices().tolist() == sorted(model & others)
        assert (bitmap ^ other).indices().tolist() == sorted(model ^ others)
        assert (~bitmap).indices().tolist() == sorted(set(range(self.size)) - model)
        if what.startswith("merge"):
            assert getattr(bitmap, what)(other) == len(others - model)
            model |= others
        elif what == "andnot":
            assert bitmap.andnot(other) == len(others & model)
            model -= others
        elif what == "|":
            bitmap |= other
            model |= others
        elif what == "&":
            bitmap &= other
            model &= others
        else:
            bitmap ^= other
            model ^= others
        self.bitmaps[side], self.sets[side] = bitmap, model

    @rule(side=SIDE, own=st.booleans(), low=FRACTION, high=FRACTION, at=FRACTION)
    def shifted_copy(self, side: int, own: bool, low: float, high: float, at: float) -> None:
        first, count = self.span(low, high)
        source_first = round(at * (self.size - count))
        source = side if own else 1 - side
        moved = {page - source_first + first for page in self.sets[source] if 0 <= page - source_first < count}
        after = {page for page in self.sets[side] if not 0 <= page - first < count} | moved
        changed = self.bitmaps[side].copy_range(self.bitmaps[source], source_first, first, count)
        assert changed == len(after ^ self.sets[side])
        self.sets[side] = after

    @rule(side=SIDE, npages=st.integers(0, 800))
    def copies(self, side: int, npages: int) -> None:
        bitmap, model = self.bitmaps[side], self.sets[side]
        assert bitmap.copy() == bitmap == Bitmap.from_bytes(bitmap.to_bytes(), self.size)
        assert bitmap.resized(npages).indices().tolist() == sorted(page for page in model if page < npages)

    @invariant()
    def same(self) -> None:
        for bitmap, model in zip(getattr(self, "bitmaps", []), getattr(self, "sets", []), strict=True):
            assert bitmap.count() == len(model)
            assert bitmap.any() == bool(model)
            assert bitmap.all() == (len(model) == self.size)
            assert bitmap.indices().tolist() == sorted(model)
            assert bitmap.runs().tolist() == runs_of(model) == [list(run) for run in bitmap.iter_runs()]
            # The words themselves: no bit past the size is ever set.
            words = np.frombuffer(bitmap, np.uint64).tolist()
            assert sum(word << (64 * i) for i, word in enumerate(words)) == sum(1 << page for page in model)


NEW = {"owned": Bitmap, "summary": with_summary, "mmap": over_mmap, "memfd": over_memfd, "bytes": from_bytes}


# What is in memory of others is so for every one of them.
SAME = {"memfd", "bytes"}
CASES = [pytest.param(new, id=name, marks=[pytest.mark.ci] * (name in SAME)) for name, new in NEW.items()]


@pytest.mark.parametrize("new", CASES)
def test_every_method_agrees_with_a_set(new: Callable[[int], Bitmap]) -> None:
    machine = type("MachineOf", (Machine,), {"new": staticmethod(new)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("cpu", ["plain", "avx2", "cx16"])
def test_every_path_agrees_with_a_set(cpu: str) -> None:
    """The path is chosen when the module is loaded: the machine again, in a process of its own."""
    environment = {**os.environ, "PAGECORE_CPU": cpu, "PAGECORE_EXAMPLES": "25"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "every_method or large", "-m", ""],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size", [1 << 19, (1 << 20) + 1])
@pytest.mark.parametrize("summary", [False, True])
def test_large_bitmaps_agree_with_arrays(size: int, summary: bool) -> None:
    """Sizes with whole blocks, where the vector paths work, against NumPy."""
    rng = np.random.default_rng([size, summary])
    for density in (0.0, 1e-4, 0.01, 0.5, 1.0):
        left, right = (rng.random(size) < share for share in (density, 0.02))
        log, dirty = Bitmap(size, summary=summary), Bitmap(size, summary=summary)
        assert log.set_indices(np.flatnonzero(left)) == left.sum() == log.count()
        dirty.set_indices(rng.permutation(np.flatnonzero(right)))
        runs = np.stack([rng.integers(0, size - 3000, 200), rng.integers(0, 3000, 200)], axis=1)
        inside = np.zeros(size + 1, np.int64)
        np.add.at(inside, runs[:, 0], 1)
        np.add.at(inside, runs.sum(axis=1), -1)
        covered = np.cumsum(inside[:-1]) > 0
        assert log.clear_runs(runs) == (left & covered).sum()
        left &= ~covered
        assert np.array_equal(log.indices(), np.flatnonzero(left))
        assert dirty.set_runs(runs) == (covered & ~right).sum()
        right |= covered
        edges = np.flatnonzero(np.diff(right, prepend=False, append=False))
        assert np.array_equal(dirty.runs(), np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1))
        copy = log.copy()
        for how in ("drain_into", "drain_into_owned", "drain_owned_into_owned"):
            target = dirty.copy()
            assert getattr(log, how)(target) == (left & ~right).sum()
            assert not log.any()
            assert log.count() == 0
            assert target.count() == (left | right).sum()
            assert np.array_equal(target.indices(), np.flatnonzero(left | right))
            log.merge(copy)
        assert (log | dirty).count() == (left | right).sum()
        assert log.merge_owned(dirty) == (right & ~left).sum()
        assert log.count() == (left | right).sum()
        log.reset()
        assert log.find_set() is None
        log.set(size - 1)
        assert (log.find_set(), log.find_last(), log.count()) == (size - 1, size - 1, 1)
