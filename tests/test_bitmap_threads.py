"""Bitmap under threads and processes: no bit is lost, none is counted or handed out twice."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable

import numpy as np
import pytest

from pagecore import Bitmap

SEED = int(os.environ.get("PAGECORE_STRESS_SEED", "20261"))
ROUNDS = int(os.environ.get("PAGECORE_STRESS_ROUNDS", "150"))
DEADLINE = 60.0

pytestmark = pytest.mark.stress


def run_threads(*workers: Callable[[], None]) -> None:
    """Start them all at one barrier; fail with the tracebacks of what was raised, or the names of the stuck."""
    barrier = threading.Barrier(len(workers))
    failures: list[str] = []

    def body(worker: Callable[[], None]) -> None:
        try:
            barrier.wait(DEADLINE)
            worker()
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [
        threading.Thread(target=body, args=(worker,), name=str(worker), daemon=True) for worker in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    stuck = [thread.name for thread in threads if thread.is_alive()]
    assert not failures, f"seed {SEED}:\n" + "\n".join(failures)
    assert not stuck, f"seed {SEED}: still running after {DEADLINE} s: {stuck}"


# Few pages: words are contended. Many pages: whole scans overlap with writers.
@pytest.mark.parametrize("size", [70, 1000, 1 << 17])
def test_no_set_is_lost_between_writers_and_a_drain(size: int) -> None:
    log, dirty = Bitmap(size), Bitmap(size)
    batches = [
        np.random.default_rng([SEED, writer]).integers(0, size, (ROUNDS, 20_000)) for writer in range(2)
    ]
    writing = [len(batches)]
    counted = {"set": 0, "newly": 0}
    lock = threading.Lock()

    def writer(number: int) -> None:
        changed = sum(log.set_indices(batch) for batch in batches[number])
        with lock:
            counted["set"] += changed
            writing[0] -= 1

    def drainer() -> None:
        while writing[0]:
            counted["newly"] += log.drain_into(dirty)

    run_threads(lambda: writer(0), lambda: writer(1), drainer)
    counted["newly"] += log.drain_into(dirty)
    assert not log.any()
    expected = np.unique(np.concatenate([batch.ravel() for batch in batches]))
    assert np.array_equal(dirty.indices(), expected), f"seed {SEED}"
    assert counted["newly"] == dirty.count() == len(expected)
    assert counted["set"] >= len(expected)


@pytest.mark.parametrize("size", [70, 1000, 1 << 15])
@pytest.mark.parametrize("limits", [{}, {"max_pages": 7}, {"max_runs": 3}], ids=["all", "pages", "runs"])
def test_two_takers_never_get_one_page_twice(size: int, limits: dict[str, int]) -> None:
    """Every clear-to-set change is taken exactly once: sets counted = pages taken + pages left."""
    bitmap = Bitmap(size)
    batches = np.random.default_rng([SEED, 7]).integers(0, size, (ROUNDS, 2_000))
    writing = [True]
    set_count = [0]
    taken = [0, 0]

    def writer() -> None:
        for batch in batches:
            set_count[0] += bitmap.set_indices(batch)
            set_count[0] += bitmap.set_range(size // 3, size // 3)
        writing[0] = False

    def taker(number: int) -> None:
        while writing[0]:
            runs = bitmap.take_runs(**limits)
            assert (runs[:, 1] > 0).all()
            assert (runs[1:, 0] > runs[:-1].sum(axis=1)).all()
            assert len(runs) <= limits.get("max_runs", size)
            assert runs[:, 1].sum() <= limits.get("max_pages", size)
            taken[number] += int(runs[:, 1].sum())

    run_threads(writer, lambda: taker(0), lambda: taker(1))
    assert set_count[0] == sum(taken) + bitmap.count(), f"seed {SEED}"


def test_a_page_goes_to_one_taker() -> None:
    """Nobody sets: the two takers' pages are disjoint, and together they are all of them."""
    size = 1 << 16
    pages = np.unique(np.random.default_rng(SEED).integers(0, size, size // 2))
    for _ in range(ROUNDS // 4):
        bitmap = Bitmap(size)
        bitmap.set_indices(pages)
        got: list[list[int]] = [[], []]

        def taker(number: int, bitmap: Bitmap = bitmap, got: list[list[int]] = got) -> None:
            while len(runs := bitmap.take_runs(max_pages=64)):
                for first, count in runs.tolist():
                    got[number].extend(range(first, first + count))

        run_threads(lambda: taker(0), lambda: taker(1))
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
        won[number] += sum(
            not bitmap.test_and_set(page) for page in orders[number][third : 2 * third].tolist()
        )
        won[number] += sum(bitmap.set_range(first, 33) for first in range(number, size - 33, 31))
        won[number] += bitmap.set_runs([(0, size)])

    run_threads(*[lambda number=number: claim(number) for number in range(3)])
    assert sum(won) == size


def test_lists_are_safe_while_bits_change() -> None:
    """What was set all the time is always listed; nothing that never was is."""
    size = 1 << 16
    bitmap = Bitmap(size)
    always, sometimes = np.arange(0, size, 8), np.arange(3, size, 8)
    bitmap.set_indices(always)
    running = [True]

    def changer() -> None:
        for _ in range(ROUNDS):
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

    run_threads(changer, reader)


SPAWNED = """
    import mmap, sys
    import numpy as np
    from pagecore import Bitmap
    size, seed, rounds = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    bitmap = Bitmap.from_buffer(mmap.mmap(int(sys.argv[1]), 0), size)
    batches = np.random.default_rng([seed, 9]).integers(0, size, (rounds, 20_000))
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
    expected = np.unique(np.random.default_rng([SEED, 9]).integers(0, size, (ROUNDS, 20_000)))
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
