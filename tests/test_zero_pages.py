"""Zero pages are told from the others, whatever the order of the runs."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from pagecore._zero_pages import split_zero


def expand(runs: np.ndarray) -> list[int]:
    return [page for first, count in runs.tolist() for page in range(first, first + count)]


def test_pages_are_split_and_keep_their_order() -> None:
    rng = random.Random(1)
    memory = mmap.mmap(-1, 64 * 4096)
    zero = [rng.random() < 0.5 for _ in range(64)]
    for page, is_zero in enumerate(zero):
        if not is_zero:
            # One bit anywhere, the last byte too, makes it no zero page.
            memory[page * 4096 + rng.choice((0, 4095, rng.randrange(4096)))] = 1 << rng.randrange(8)
    for runs in ([(0, 64)], [(40, 10), (0, 5), (5, 5)], [(3, 1), (9, 1)], [], [(7, 0), (64, 0)]):
        data, zeros = split_zero(memory, runs)
        given = expand(np.array(runs, np.int64).reshape(-1, 2))
        assert data.dtype == zeros.dtype == np.int64
        assert expand(data) == [page for page in given if not zero[page]]
        assert expand(zeros) == [page for page in given if zero[page]]
        assert (data[:, 1] > 0).all()
        assert (zeros[:, 1] > 0).all()
    whole, _ = split_zero(memory, [(0, 64)])
    assert len(whole) == sum(not z and (i == 0 or zero[i - 1]) for i, z in enumerate(zero))


def test_a_processor_without_wide_vectors_finds_the_same() -> None:
    script = "from test_zero_pages import test_pages_are_split_and_keep_their_order as test; test()"
    environment = {**os.environ, "PAGECORE_CPU": "plain", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("run", [(64, 1), (0, 65), (-1, 2), (1 << 62, 1 << 62)])
def test_runs_outside_are_refused_with_the_bound(run: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match=r"outside \[0, 64\)"):
        split_zero(bytes(64 * 4096), [run])


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count -1 of run 0 is negative"):
        split_zero(bytes(64 * 4096), [(5, -1)])


@pytest.mark.parametrize("skip", [1, 4, 7])
def test_memory_between_words_is_refused(skip: int) -> None:
    memory = memoryview(bytearray(3 * 4096))
    with pytest.raises(ValueError, match=r"the memory begins at 0x[0-9a-f]+, not a multiple of 8"):
        split_zero(memory[skip:], [(0, 1)])
    data, zeros = split_zero(memory[8:], [(0, 1)])
    assert (len(data), zeros.tolist()) == (0, [[0, 1]])


def test_a_page_size_of_no_whole_block_is_refused() -> None:
    with pytest.raises(ValueError, match="512"):
        split_zero(bytes(4096), [(0, 1)], 100)
