"""The native face of page sources: implemented by other Cython code through the .pxd alone, and driven by it."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PlacementLoop, SourceError
from pagecore.page_source import CallableSource, PageSource
from placement_rig import Served, served
from uffd_helpers import PAGE

NPAGES = 40


@pytest.fixture
def rig() -> Iterator[Served]:
    with served(NPAGES) as rig:
        yield rig


def pulled(page: int) -> bytes:
    return bytes(PAGE) if page % 5 == 4 else struct.pack("<Q", page + 1) * (PAGE // 8)


def test_it_is_fetched_from_python(native_sources: ModuleType) -> None:
    source = native_sources.PulledSource(NPAGES)
    assert isinstance(source, PageSource)
    assert (source.lanes, source.slow, source.page_size) == (0, False, PAGE)
    runs = source.fetch(2, 9)
    assert [(first, count, data is None) for first, count, data in runs] == [
        (2, 2, False),
        (4, 1, True),
        (5, 4, False),
        (9, 1, True),
        (10, 1, False),
    ]
    assert runs[2][2] == b"".join(pulled(page) for page in range(5, 9))
    source.broken = 7
    with pytest.raises(SourceError, match=r"pages \[7, 8\): the consumer's source: Input/output error"):
        source.fetch(7, 1)


@pytest.mark.kernel
def test_a_loop_pulls_from_it(native_sources: ModuleType, rig: Served) -> None:
    """A source that answers for parts of a run is asked for the rest."""
    source = native_sources.PulledSource(NPAGES)
    with PlacementLoop([rig.region], source) as loop:
        assert rig.touch(3).value() == pulled(3)
        assert rig.touch(4).value() == pulled(4)
        loop.prefetch([(0, NPAGES)])
        assert loop.wait_settled(DEADLINE)
        wait_until(lambda: (loop.stats().placed, loop.stats().zeroed) == (32, 8), "the counters")
    assert bytes(rig.memory[:]) == b"".join(pulled(page) for page in range(NPAGES))


@pytest.mark.kernel
def test_what_it_cannot_give_is_named(native_sources: ModuleType, rig: Served) -> None:
    source = native_sources.PulledSource(NPAGES)
    source.broken = 10
    with PlacementLoop([rig.region], source) as loop:
        loop.prefetch([(8, 8)])
        with pytest.raises(SourceError, match="page 10: the consumer's source: Input/output error") as caught:
            loop.wait_settled(DEADLINE)
        assert caught.value.first_page == 10
        assert not loop.states[0].claimed.test(10)


@pytest.mark.kernel
def test_it_is_refused_for_a_region_that_it_does_not_have(native_sources: ModuleType, rig: Served) -> None:
    with pytest.raises(ValueError, match="the source has 39 pages for region 0, which has 40"):
        PlacementLoop([rig.region], native_sources.PulledSource(NPAGES - 1))


@pytest.mark.kernel
def test_a_loop_is_pushed_from_it(native_sources: ModuleType, rig: Served) -> None:
    with PlacementLoop([rig.region], native_sources.PushedSource()) as loop:
        assert rig.touch(9).value() == bytes([64]) * PAGE
        loop.prefetch([(0, 9), (10, 30)])
        assert loop.wait_settled(DEADLINE)
        wait_until(lambda: loop.stats().placed == NPAGES, "the counter")
    assert bytes(rig.memory[:]) == b"".join(bytes([(7 * page + 1) % 256]) * PAGE for page in range(NPAGES))


# The lane of a CallableSource, step by step ---------------------------------------------------------------------------

PAGES, END, STOPPED, FAILED = 1, 6, 7, 8


def test_an_answer_stays_until_the_lane_comes_back(native_sources: ModuleType) -> None:
    """There is one buffer: the function is not called again while somebody reads it."""
    calls = []

    def pages(region: int, first: int, count: int) -> bytes:
        calls.append(first)
        return bytes([first]) * (count * PAGE)

    with CallableSource(pages, timeout=DEADLINE, max_pages=2) as source:
        lane = native_sources.Lane(source)
        assert [lane.ask(1, 1), lane.ask(2, 3)] == [0, 0]
        assert lane.next() == (PAGES, 1, 1, 0)
        assert lane.ask(9, 1) == 0  # which wakes the thread, too
        assert not Worker(wait_until, lambda: len(calls) > 1, "a call too early", DEADLINE).done(0.05)
        assert lane.data() == bytes([1]) * PAGE
        assert lane.next() == (PAGES, 2, 2, 0)
        assert lane.data() == bytes([2]) * (2 * PAGE)
        assert [lane.next()[1:3] for _ in range(2)] == [(4, 1), (9, 1)]
        assert calls == [1, 2, 4, 9]


def test_a_lane_ends_when_it_is_told_and_when_the_source_is_closed(native_sources: ModuleType) -> None:
    with CallableSource(lambda *_: None, timeout=DEADLINE) as source:
        lane = native_sources.Lane(source)
        waiting = Worker(lane.next)
        assert not waiting.done(0.02)
        lane.stop()
        assert waiting.value()[0] == STOPPED
        other = native_sources.Lane(source)
        waiting = Worker(other.next)
    assert waiting.value()[0] == END
    assert other.ask(1, 1) == -errno.ESHUTDOWN


def test_what_waits_behind_a_hanging_call_fails_in_turn(native_sources: ModuleType) -> None:
    hang = threading.Event()
    with CallableSource(lambda *_: hang.wait(DEADLINE) and None, timeout=0.03) as source:
        lane = native_sources.Lane(source)
        assert [lane.ask(page, 1) for page in (5, 6, 7)] == [0, 0, 0]
        assert [lane.next() for _ in range(3)] == [(FAILED, page, 1, errno.ETIMEDOUT) for page in (5, 6, 7)]
        hang.set()
