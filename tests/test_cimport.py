"""The C faces of Bitmap and KvmDirtyRing: a consumer outside the package drives them without the GIL."""

from __future__ import annotations

import errno
import os
import pathlib
from types import ModuleType

import pytest

from concurrency import run_together
from cython_build import build
from kvm_rig import CONTROL, collect, open_kvm_guest, run_steps
from pagecore import Bitmap


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build(pathlib.Path(__file__).with_name("cimport_consumer.pyx"), tmp_path_factory.mktemp("consumer"))


def test_single_bits(consumer: ModuleType) -> None:
    for page in (0, 63, 64, 99):
        assert consumer.bits(Bitmap(100), page) == (False, True, True, True, True)


def test_ranges(consumer: ModuleType) -> None:
    assert consumer.ranges(Bitmap(300)) == (190, 70, 130, 60, 199, True, 120, 10)


def test_drain_and_merge(consumer: ModuleType) -> None:
    log, dirty = Bitmap(200), Bitmap(200)
    log.set_indices([1, 64, 199])
    dirty.set_indices([64, 100])
    assert consumer.drain(log, dirty) == (2, 4)
    assert dirty.count() == log.count() == 4


def test_algebra(consumer: ModuleType) -> None:
    a, b = Bitmap(200), Bitmap(200)
    a.set_range(0, 150)
    b.set_range(100, 100)
    cleared, removed, left = consumer.algebra(a, b)
    assert (cleared, removed, left.count()) == (100, 50, 0)


def test_take(consumer: ModuleType) -> None:
    bitmap = Bitmap(1000)
    bitmap.set_runs([(first, 5) for first in range(0, 1000, 100)])
    taken = consumer.take(bitmap, 12)
    assert taken[0] == [(0, 5), (100, 5), (200, 2)]
    assert [run for chunk in taken for run in chunk][3] == (202, 3)
    assert sum(count for chunk in taken for _, count in chunk) == 50
    assert not bitmap.any()


def test_lists(consumer: ModuleType) -> None:
    bitmap = Bitmap(200)
    bitmap.set_runs([(0, 3), (60, 10), (199, 1)])
    runs = [(0, 3), (60, 10), (199, 1)]
    assert consumer.lists(bitmap) == (runs, 200, [0, 1, 2, 60, 61], 62, (1, 2))


def test_runs_are_put_back(consumer: ModuleType) -> None:
    bitmap = Bitmap(200)
    assert consumer.put(bitmap, [(0, 100), (90, 20)]) == (110, 100)
    assert bitmap.runs().tolist() == [[100, 10]]


def test_claims_of_two_threads_without_the_gil(consumer: ModuleType) -> None:
    size = 100_001
    bitmap = Bitmap(size)
    assert sum(run_together(lambda: consumer.claim(bitmap), lambda: consumer.claim(bitmap))) == size
    assert bitmap.count() == size
    assert consumer.release(bitmap, 0, 0b1010) == 0b1010
    assert consumer.release(bitmap, 0, 0b1111) == 0b0101


@pytest.mark.stress
@pytest.mark.parametrize("size", [pytest.param(64, marks=pytest.mark.ci), 70, 5000])
@pytest.mark.parametrize("how", ["drain", "take"])
def test_each_set_is_fetched_exactly_once(consumer: ModuleType, size: int, how: str) -> None:
    bitmap, dirty, stop = Bitmap(size), Bitmap(size), Bitmap(1)
    sets = int(os.environ.get("PAGECORE_STRESS_SETS", "20000000"))

    def writer() -> int:
        won = consumer.storm_set(bitmap, sets, 0x9E3779B97F4A7C15)
        stop.set(0)
        return won

    def fetcher() -> int:
        if how == "drain":
            return consumer.storm_drain(bitmap, dirty, stop)
        return consumer.storm_take(bitmap, 5, stop)

    won, *fetched = run_together(writer, fetcher, *[fetcher] * (how == "take"))
    assert won == sum(fetched) + bitmap.count()


@pytest.mark.stress
@pytest.mark.parametrize("size", [70, 5000])
def test_ranges_and_takers_count_every_change_once(consumer: ModuleType, size: int) -> None:
    bitmap, stop = Bitmap(size), Bitmap(1)
    (newly, cleared), taken = run_together(
        lambda: consumer.storm_ranges(bitmap, 100_000_000 // (size + 400), stop),
        lambda: consumer.storm_take(bitmap, 9, stop),
    )
    assert newly == cleared + taken + bitmap.count()


@pytest.mark.kernel
def test_a_vcpu_thread_reaps_dirty_rings(consumer: ModuleType) -> None:
    with open_kvm_guest("ring") as guest:
        log = guest.dirty_log
        run_steps(guest, 100)
        assert consumer.reap(log.ring) > 0
        assert consumer.reap(log.ring) == 0
        assert collect(log) > CONTROL
        log.ring.close()
        assert consumer.reap(log.ring) == -errno.EBADF
