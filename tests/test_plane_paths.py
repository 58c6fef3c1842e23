"""Hints and takes against NumPy, of every shape that the loops tell apart, on each path of the processor."""

import os
import subprocess
import sys

import numpy as np
import pytest

from concurrency import run_together
from pagecore import Bitmap, PageTracker

NPAGES = 50_000 + 37  # the last word has a tail
LONGEST = {"single pages": 1, "short": 64, "just too short for two words": 65, "middles": 700, "parts": 9000}


def flags(bitmap):
    return np.unpackbits(np.asarray(bitmap).view(np.uint8), bitorder="little")[: bitmap.size].astype(bool)


def in_state(dirty, npages=NPAGES, **options):
    """A tracker that owes these pages, and an open session."""
    tracker = PageTracker(npages, all_dirty=False, **options)
    settled = Bitmap(npages)
    settled.set_indices(np.flatnonzero(~dirty))
    tracker.reload(settled)
    session = tracker.hint_session()
    session.start()
    return tracker, session


def hint_each(dirty, hinted, runs):
    taken = 0
    for first, count in runs.tolist():
        part = slice(max(first, 0), max(first + count, 0))
        taken += int(dirty[part].sum())
        hinted[part] |= dirty[part]
        dirty[part] = False
    return taken


def check(tracker, dirty, hinted):
    assert tracker.dirty_count == dirty.sum()
    assert tracker.hinted_count == hinted.sum()
    assert np.array_equal(flags(tracker.dirty), dirty)
    assert np.array_equal(flags(tracker.hinted), hinted)


@pytest.mark.parametrize("longest", LONGEST.values(), ids=LONGEST)
@pytest.mark.parametrize("density", [0.0, 0.002, 0.5, 1.0])
def test_a_list_of_hints(longest, density):
    rng = np.random.default_rng([longest, int(density * 1000)])
    dirty, hinted = rng.random(NPAGES) < density, np.zeros(NPAGES, bool)
    tracker, session = in_state(dirty)
    with session:
        for n in (1, 15, 16, 17, 700):
            count = rng.integers(0 if longest > 1 else 1, longest + 1, n)
            first = rng.integers(0, NPAGES - count + 1)
            # The ends of the region, and of words.
            first[: n // 4] = first[: n // 4] // 64 * 64
            first[-(n // 8) :] = NPAGES - count[-(n // 8) :]
            runs = np.stack([first, count], axis=1)
            assert session.clear_runs(runs, session.epoch) == hint_each(dirty, hinted, runs)
            check(tracker, dirty, hinted)
            tracker.owe_hinted()
            dirty |= hinted
            hinted[:] = False


def test_lists_of_mixed_runs():
    """Short runs, long ones, such that reach past an end and such that are empty, in turns."""
    rng = np.random.default_rng(7)
    for _ in range(30):
        dirty, hinted = rng.random(NPAGES) < 0.3, np.zeros(NPAGES, bool)
        tracker, session = in_state(dirty)
        with session:
            count = np.where(rng.random(300) < rng.random(), rng.integers(1, 65, 300), rng.integers(1, 5000, 300))
            first = rng.integers(0, NPAGES, 300)
            first[rng.random(300) < 0.02] = -3
            count[first < 0] += 3
            runs = np.stack([first, count], axis=1)
            outside = int(((first < 0) | (first + count > NPAGES)).sum())
            assert session.clear_runs(runs, session.epoch) == hint_each(dirty, hinted, runs)
            assert session.clipped == outside
            check(tracker, dirty, hinted)


@pytest.mark.parametrize("longest", [1, 64, 5000])
def test_pages_that_were_put_back_after_a_hint_are_counted_once(longest):
    rng = np.random.default_rng(longest)
    dirty, hinted = np.ones(NPAGES, bool), np.zeros(NPAGES, bool)
    tracker, session = in_state(dirty)
    with session:
        runs = np.stack([rng.integers(0, NPAGES - longest + 1, 900), rng.integers(1, longest + 1, 900)], axis=1)
        assert session.clear_runs(runs, session.epoch) == hint_each(dirty, hinted, runs)
        # Both bits are set now, until somebody settles them; nobody looks meanwhile.
        tracker.put_back(runs[::2])
        for first, count in runs[::2].tolist():
            dirty[first : first + count] = True
        assert session.clear_runs(runs, session.epoch) == hint_each(dirty, hinted, runs)
        check(tracker, dirty, hinted)


def test_wrong_numbers_are_found_wherever_they_stand():
    tracker, session = in_state(np.ones(NPAGES, bool))
    with session:
        for at in (0, 15, 63, 64, 130, 199):
            for bad, message in (
                ((0, -1), f"count -1 of run {at} is negative"),
                ((NPAGES, 1), rf"pages \[{NPAGES}, {NPAGES + 1}\) are outside"),
                ((-9, 9), r"pages \[-9, 0\) are outside"),
                ((2**62, 2**62), "are outside"),
                ((-(2**63), 5), "are outside"),
            ):
                runs = np.tile(np.array([[5, 3]]), (200, 1))
                runs[at] = bad
                with pytest.raises((IndexError, ValueError), match=message):
                    session.clear_runs(runs, session.epoch)
        assert tracker.dirty_count == NPAGES
        # What overlaps an end is clipped instead, and as much as there can be of it.
        assert session.clear_runs([(-5, 2**63 - 1)], session.epoch) == NPAGES


def runs_of(bits):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bits.astype(np.int8), [0]])))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)


@pytest.mark.parametrize("density", [0.002, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("first", [0, 7, 64 * 131])
def test_taking_all_gives_the_runs(density, first):
    rng = np.random.default_rng([int(density * 1000), first])
    dirty = rng.random(NPAGES) < density
    dirty[:first] = False
    # Runs that go on over the border of what is taken together.
    dirty[first + 64 * 120 : first + 64 * 140] = True
    tracker, session = in_state(dirty)
    runs = tracker.take(NPAGES)
    assert np.array_equal(runs, runs_of(dirty))
    assert tracker.dirty_count == 0
    assert tracker.take(NPAGES).shape == (0, 2)
    session.finish()


@pytest.mark.parametrize("max_pages", [1, 63, 700, 9000, 20_000])
@pytest.mark.parametrize("max_runs", [None, 1, 40, 3000])
def test_limits_of_a_take(max_pages, max_runs):
    rng = np.random.default_rng(max_pages)
    dirty = rng.random(NPAGES) < 0.4
    dirty[10_000:30_000] = True
    tracker, session = in_state(dirty)
    left, at = dirty.copy(), 0
    while left.any() and at < 60:
        runs = tracker.take(max_pages, max_runs)
        expected = runs_of(left)[: max_runs if max_runs else len(left)]
        before = np.concatenate([[0], np.cumsum(expected[:, 1])])
        n = int(np.searchsorted(before[1:], max_pages))
        # As many whole runs as fit, and what is left of the limit of the next.
        expected = expected[: n + 1].copy()
        if n < len(expected):
            expected[n, 1] = min(expected[n, 1], max_pages - before[n])
        assert np.array_equal(runs, expected)
        for page, count in runs.tolist():
            left[page : page + count] = False
        assert tracker.dirty_count == left.sum()
        at += 1
    assert np.array_equal(flags(tracker.dirty), left)
    session.finish()


@pytest.mark.stress
@pytest.mark.parametrize("longest", [1, 64, 700, 9000])
def test_hints_and_takers_share_the_pages_out(longest):
    """Whatever way a hint changes the planes: a page that was owed ends free or taken, and never both or neither.

    They go through the pages in opposite directions, so that they meet wherever that is.
    """
    npages, rounds = 1 << 17, 30
    tracker, session = in_state(np.ones(npages, bool), npages)
    first = np.arange(0, npages, longest)
    runs = np.stack([first, np.minimum(longest, npages - first)], axis=1)[::-1].copy()
    taken = []

    def take():
        while not taken or len(taken[-1]):
            taken.append(tracker.take(npages // 100))

    with session:
        for _ in range(rounds):
            taken.clear()
            tracker.resolve(npages - 1)  # the next take starts at the first page
            tracker.put_back([(npages - 1, 1)])
            run_together(lambda: session.clear_runs(runs, session.epoch), take)
            got = np.zeros(npages, np.int64)
            for first, count in np.concatenate(taken).tolist():
                got[first : first + count] += 1
            free = flags(tracker.hinted)
            assert tracker.dirty_count == 0
            assert tracker.hinted_count == free.sum()
            assert np.array_equal(got + free, np.ones(npages))
            tracker.owe_hinted()
            tracker.put_back(np.concatenate(taken))


@pytest.mark.ci
@pytest.mark.parametrize("cpu", ["plain", "cx16"])
def test_every_path(cpu):
    """The path is chosen when the module is loaded: all of the above again, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not every_path"]
    done = subprocess.run(
        command, env={**os.environ, "PAGECORE_CPU": cpu}, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
