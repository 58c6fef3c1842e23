"""Bitmap under threads and processes: no bit is lost, none is counted or handed out twice."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from concurrency import SEED, run_together
from pagecore import Bitmap

ROUNDS = int(os.environ.get("PAGECORE_STRESS_ROUNDS", "10"))
# Long enough that a call runs for milliseconds without the GIL, beside many calls of the other threads.
BATCH = 300_000
DEADLINE = 60.0

pytestmark = pytest.mark.stress


def batches_of(writer: int, size: int) -> np.ndarray:
    return np.random.default_rng([SEED, writer]).integers(0, size, (ROUNDS, BATCH))


# Few pages: every word is contended. Many pages: whole scans overlap with the writers.
@pytest.mark.parametrize("size", [70, 1000, 1 << 17])
def test_no_set_is_lost_between_writers_and_a_drain(size: int) -> None:
    """Every clear-to-set change is fetched exactly once: changes counted = bits fetched + bits left."""
    log, dirty, ever = Bitmap(size), Bitmap(size), Bitmap(size)
    batches = [batches_of(0, size), batches_of(1, size)]
    changed = [0, 0]
    writing = [2]
    lock = threading.Lock()
    fetched = 0

    def writer(number: int) -> None:
        for batch in batches[number]:
            changed[number] += log.set_indices(batch)
        with lock:
            writing[0] -= 1

    def drainer() -> None:
        nonlocal fetched
        while writing[0]:
            newly = log.drain_into(dirty)
            assert ever.merge(dirty) <= newly
            # Nobody else has `dirty`, and it was empty: what was newly set is what was fetched.
            assert dirty.take_runs()[:, 1].sum() == newly
            fetched += newly

    run_together(lambda: writer(0), lambda: writer(1), drainer)
    assert sum(changed) == fetched + log.count(), f"seed {SEED}"
    ever.merge(log)
    assert np.array_equal(ever.indices(), np.unique(batches)), f"seed {SEED}"


@pytest.mark.parametrize("size", [70, 1000, 1 << 15])
@pytest.mark.parametrize("limits", [{}, {"max_pages": 7}, {"max_runs": 3}], ids=["all", "pages", "runs"])
def test_no_set_is_lost_between_a_writer_and_takers(size: int, limits: dict[str, int]) -> None:
    bitmap = Bitmap(size)
    changed = 0
    taken = [0, 0]
    writing = True

    def writer() -> None:
        nonlocal changed, writing
        for batch in batches_of(7, size):
            changed += bitmap.set_indices(batch)
            changed += bitmap.set_range(size // 3, size // 3)
        writing = False

    def taker(number: int) -> None:
        while writing:
            runs = bitmap.take_runs(**limits)
            assert (runs[:, 1] > 0).all()
            assert (runs[1:, 0] > runs[:-1].sum(axis=1)).all()
            assert len(runs) <= limits.get("max_runs", size)
            assert runs[:, 1].sum() <= limits.get("max_pages", size)
            taken[number] += int(runs[:, 1].sum())

    run_together(writer, lambda: taker(0), lambda: taker(1))
    assert changed == sum(taken) + bitmap.count(), f"seed {SEED}"


def test_a_page_goes_to_one_taker() -> None:
    """Nobody sets: the two takers' pages are disjoint, and together they are all of them."""
    size = 1 << 16
    pages = np.unique(np.random.default_rng(SEED).integers(0, size, size // 2))
    for _ in range(2 * ROUNDS):
        bitmap = Bitmap(size)
        bitmap.set_indices(pages)
        got: list[list[int]] = [[], []]

        def taker(number: int, bitmap: Bitmap = bitmap, got: list[list[int]] = got) -> None:
            while len(runs := bitmap.take_runs(max_pages=64)):
                for first, count in runs.tolist():
                    got[number].extend(range(first, first + count))

        run_together(lambda: taker(0), lambda: taker(1))
        assert sorted(got[0] + got[1]) == pages.tolist(), f"seed {SEED}"


def test_of_many_who_claim_a_page_one_wins() -> None:
    size = 4096
    bitmap = Bitmap(size)
    rng = np.random.default_rng(SEED)
    orders = [rng.permutation(size) for _ in range(3)]
    won = [0, 0, 0]

    def claim(number: int) -> None:
        third = size // 3
        won[number] += bitmap.set_indices(orders[number][:third])
        won[number] += sum(not bitmap.test_and_set(page) for page in orders[number][third : 2 * third].tolist())
        won[number] += sum(bitmap.set_range(first, 33) for first in range(number, size - 33, 31))
        won[number] += bitmap.set_runs([(0, size)])

    run_together(*[lambda number=number: claim(number) for number in range(3)])
    assert sum(won) == size


def test_lists_are_safe_while_bits_change() -> None:
    """What was set all the time is always listed; nothing that never was is."""
    size = 1 << 16
    bitmap = Bitmap(size)
    always, sometimes = np.arange(0, size, 8), np.arange(3, size, 8)
    bitmap.set_indices(always)
    running = [True]

    def changer() -> None:
        for _ in range(10 * ROUNDS):
            bitmap.set_indices(sometimes)
            bitmap.clear_indices(sometimes)
        running[0] = False

    def reader() -> None:
        while running[0]:
            for pages in (bitmap.indices(), bitmap.runs()[:, 0], bitmap.copy().indices()):
                assert (np.diff(pages) > 0).all()
                assert np.isin(always, pages, assume_unique=True).all()
                assert set(np.unique(pages % 8).tolist()) <= {0, 3}
            assert size // 8 <= bitmap.count() <= size // 4

    run_together(changer, reader)


SPAWNED = """
    import mmap, sys
    import numpy as np
    from pagecore import Bitmap
    size, seed, rounds = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    bitmap = Bitmap.from_buffer(mmap.mmap(int(sys.argv[1]), 0), size)
    batches = np.random.default_rng([seed, 9]).integers(0, size, (rounds, 300_000))
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(bitmap.set_indices(batch) for batch in batches), flush=True)
"""


def test_a_spawned_process_shares_the_words() -> None:
    size = 50_000
    descriptor = os.memfd_create("bitmap")
    try:
        os.ftruncate(descriptor, 8 * ((size + 63) // 64))
        log, dirty = Bitmap.from_buffer(mmap.mmap(descriptor, 0), size), Bitmap(size)
        arguments = [str(descriptor), str(size), str(SEED), str(ROUNDS)]
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SPAWNED), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[descriptor],
        ) as child:
            killer = threading.Timer(DEADLINE, child.kill)
            killer.start()
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
                child.stdin.write("go\n")
                child.stdin.flush()
                newly = 0
                while child.poll() is None and newly < size:
                    newly += log.drain_into(dirty)
                changed = int(child.stdout.readline())
                assert child.wait(DEADLINE) == 0
            finally:
                killer.cancel()
                child.kill()
        newly += log.drain_into(dirty)
    finally:
        os.close(descriptor)
    expected = np.unique(np.random.default_rng([SEED, 9]).integers(0, size, (ROUNDS, 300_000)))
    assert np.array_equal(dirty.indices(), expected), f"seed {SEED}"
    assert newly == len(expected)
    assert changed >= newly


FORKED = """
    import mmap, os, signal, sys
    import numpy as np
    from pagecore import Bitmap
    signal.alarm(60)
    size, seed = int(sys.argv[1]), int(sys.argv[2])
    memory = mmap.mmap(-1, 1 << 16)
    bitmap = Bitmap.from_buffer(memory, size)
    ready = Bitmap.from_buffer(memoryview(memory)[1 << 15:], 2)
    private = Bitmap(size)
    child = os.fork()
    me = 0 if child else 1
    ready.set(me)
    while not ready.all():
        pass
    pages = np.random.default_rng([seed, me]).permutation(size)
    won = sum(bitmap.set_indices(part) for part in np.array_split(pages, 50))
    private.set_range(0, won)
    if not child:
        memory[1 << 14:(1 << 14) + 8] = won.to_bytes(8, "little")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bitmap.all()
    assert private.count() == won, "a bitmap of our own is not shared with the child"
    print(won + int.from_bytes(memory[1 << 14:(1 << 14) + 8], "little"))
"""


def test_a_forked_process_shares_the_words() -> None:
    size = 100_000
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED), str(size), str(SEED)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Each page was won by exactly one of the two processes.
    assert int(result.stdout) == size
