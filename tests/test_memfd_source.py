"""MemfdSource: shared memory whose page cache has the content, served by mapping it (CONTINUE)."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from concurrency import DEADLINE, wait_until
from memory_kinds import Memory, huge_pool, make, write_other
from pagecore import Feature, PageState, PlacementLoop, Region, RegisterMode, SourceError, UffdError, Userfaultfd
from pagecore.page_source import BufferSource, MemfdSource
from uffd_helpers import PAGE, Child, Toucher, discard, page, read_bytes

pytestmark = pytest.mark.kernel

BOTH = RegisterMode.MISSING | RegisterMode.MINOR
NPAGES = 16
HOLES = (5, 6, 15)


def filled(kind: str = "shared", npages: int = NPAGES) -> Memory:
    """Shared memory whose pages are there already, full of their number and 1, but for the holes."""
    memory = make(kind, npages)
    for index in range(npages):
        if index not in HOLES:
            write_other(memory, index, bytes([index + 1]) * memory.page_size)
    return memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = filled()
    yield memory
    memory.close()


@pytest.fixture
def region(uffd: Userfaultfd, memory: Memory) -> Region:
    return uffd.register(memory.mapping, mode=BOTH)


def touch(region: Region, index: int) -> bytes:
    """A whole page, read by a thread that waits for it without the GIL."""
    toucher = Toucher(region.address + index * region.page_size)
    toucher.value()
    return read_bytes(region.address + index * region.page_size, region.page_size)


def expected(index: int) -> bytes:
    return bytes(PAGE) if index in HOLES else bytes([index + 1]) * PAGE


def test_what_it_has_and_where_the_holes_are(memory: Memory) -> None:
    source = MemfdSource(memory.fd)
    assert (source.lanes, source.slow, source.page_size) == (0, False, PAGE)
    runs = source.fetch(0, NPAGES)
    assert [(first, count, data is None) for first, count, data in runs] == [
        (0, 5, False),
        (5, 2, True),
        (7, 8, False),
        (15, 1, True),
    ]
    assert b"".join(bytes(count * PAGE) if data is None else data for _, count, data in runs) == b"".join(
        expected(index) for index in range(NPAGES)
    )


def test_faults_map_the_pages_that_are_there(region: Region, memory: Memory) -> None:
    with PlacementLoop([region], MemfdSource(memory.fd)) as loop:
        for index in range(NPAGES):
            assert touch(region, index) == expected(index)
        wait_until(lambda: (loop.stats().placed, loop.stats().zeroed) == (13, 3), "the counters")
        # Not a copy: what the guest writes is in the memfd.
        memory.mapping[3 * PAGE] = 0xAB
        assert os.pread(memory.fd, 1, 3 * PAGE) == b"\xab"


def test_a_prefetch_maps_all_of_it(region: Region, memory: Memory) -> None:
    with PlacementLoop([region], MemfdSource(memory.fd), threads=2) as loop:
        loop.prefetch([(0, NPAGES)])
        assert loop.wait_settled(DEADLINE)
        assert bytes(memory.mapping[:]) == b"".join(expected(index) for index in range(NPAGES))


def test_an_observer_sees_the_content(region: Region, memory: Memory, door: ModuleType) -> None:
    observer = door.RecordingObserver()
    with PlacementLoop([region], MemfdSource(memory.fd), observer=observer) as loop:
        loop.prefetch([(2, 1), (6, 1)])
        wait_until(lambda: loop.stats().placed + loop.stats().zeroed == 2, "both pages")
    assert sorted(observer.calls()) == [(2, 1, 3), (6, 1, -1)]


def test_several_regions_of_one_memfd(uffd: Userfaultfd, memory: Memory) -> None:
    mappings = [mmap.mmap(memory.fd, 4 * PAGE, offset=offset * PAGE) for offset in (8, 0)]
    regions = [uffd.register(mapping, mode=BOTH, region_id=number) for number, mapping in enumerate(mappings)]
    extents = [(0, 8 * PAGE, 4 * PAGE), (1, 0, 4 * PAGE)]
    with PlacementLoop(regions, MemfdSource(memory.fd, extents)):
        assert touch(regions[0], 1) == expected(9)
        assert touch(regions[1], 1) == expected(1)


def test_a_discard_keeps_what_the_page_cache_has(region: Region, memory: Memory) -> None:
    """Shared memory keeps its content under MADV_DONTNEED: zeros over it would be EEXIST, woken for ever."""
    with PlacementLoop([region], MemfdSource(memory.fd)) as loop:
        for index in (1, 2):
            assert touch(region, index) == expected(index)
        discard(region.address + PAGE, PAGE)
        discard(region.address + 9 * PAGE, PAGE)
        wait_until(lambda: loop.stats().removed == 2, "both discards")
        assert touch(region, 1) == expected(1)
        assert touch(region, 9) == expected(9)
        assert loop.error is None


def test_a_hole_that_is_punched_reads_as_zeros(region: Region, memory: Memory) -> None:
    with PlacementLoop([region], MemfdSource(memory.fd)) as loop:
        assert touch(region, 1) == expected(1)
        loop.forget([(1, 1), (8, 1)])
        for index in (1, 8):
            punch(memory, index)
        assert touch(region, 1) == bytes(PAGE)
        assert touch(region, 8) == bytes(PAGE)
        assert loop.error is None


def punch(memory: Memory, index: int) -> None:
    """A hole in the file behind a page; nobody is told."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    assert libc.fallocate(memory.fd, 3, index * memory.page_size, memory.page_size) == 0, ctypes.get_errno()


def test_a_page_that_was_lost_fails_closed() -> None:
    """D15: a hole was punched and nobody said so. The page was received: it must not read as zeros."""

    def lose() -> int:
        memory = filled()
        with Userfaultfd(Feature.EVENT_REMOVE) as uffd:
            region = uffd.register(memory.mapping, mode=BOTH)
            with PlacementLoop([region], MemfdSource(memory.fd)):
                assert touch(region, 1) == expected(1)
                punch(memory, 1)
                return touch(region, 1)[0]

    assert Child(lose).ended() == -signal.SIGBUS


def test_a_page_that_is_in_the_page_cache_is_not_lost() -> None:
    """D15: it was received and faults again. POISON takes an empty entry over cached content for a missing page."""

    def serve() -> tuple[bytes, int]:
        memory, state = filled(), PageState(NPAGES)
        for plane in (state.claimed, state.received):
            plane.set(3)
        with Userfaultfd(Feature.EVENT_REMOVE) as uffd:
            region = uffd.register(memory.mapping, mode=BOTH)
            with PlacementLoop([region], MemfdSource(memory.fd), states=[state]) as loop:
                return touch(region, 3), loop.stats().lost

    assert Child(serve).value() == (expected(3), 0)


def test_what_the_page_cache_has_wins_over_what_comes(region: Region, memory: Memory) -> None:
    """D2: in minor-registered memory CONTINUE comes first. A COPY would be EEXIST, and nobody would be let go."""
    with PlacementLoop([region], BufferSource(page(100, NPAGES))) as loop:
        assert touch(region, 2) == expected(2)
        assert touch(region, 5) == bytes([105]) * PAGE
        loop.prefetch([(0, NPAGES)])
        assert loop.wait_settled(DEADLINE)
        assert (loop.stats().foreign, loop.error) == (0, None)
    assert [memory.mapping[index * PAGE] for index in range(NPAGES)] == [
        100 + index if index in HOLES else index + 1 for index in range(NPAGES)
    ]


def test_a_page_that_vanished_is_an_error_and_never_zeros(
    region: Region,
    native_sources: ModuleType,
) -> None:
    """Between the answer and the CONTINUE: the source was sure, the page cache has nothing."""
    with PlacementLoop([region], native_sources.BoldSource(), on_lost="stall") as loop:
        assert touch(region, 4) == expected(4)
        waiter = Toucher(region.address + 15 * PAGE)
        with pytest.raises(UffdError, match="UFFDIO_CONTINUE") as caught:
            loop.wait_settled(DEADLINE)
        assert caught.value.errno == errno.ENODATA
        assert not waiter.done(0.02)
        assert not loop.states[0].received.test(15)
    region.place_zeros(15, 1)
    assert waiter.value() == 0


def test_a_page_that_vanished_after_the_source_looked_is_no_zeros_either(region: Region, memory: Memory) -> None:
    """The source's own view of the file would bring the page back, empty."""
    with PlacementLoop([region], MemfdSource(memory.fd), on_lost="stall", around=1) as loop:
        assert touch(region, 1) == expected(1)
        punch(memory, 3)
        waiter = Toucher(region.address + 3 * PAGE)
        with pytest.raises(UffdError, match="UFFDIO_CONTINUE") as caught:
            loop.wait_settled(DEADLINE)
        assert caught.value.errno == errno.ENODATA
        assert (loop.stats().foreign, loop.states[0].received.runs().tolist()) == (0, [[1, 1]])
    region.place_zeros(3, 1)
    assert waiter.value() == 0


def test_a_pushing_source_may_say_so_too(
    region: Region,
    native_sources: ModuleType,
) -> None:
    source = native_sources.PushedSource()
    source.mapped = True
    with PlacementLoop([region], source) as loop:
        assert touch(region, 4) == expected(4)
        loop.prefetch([(0, 4), (7, 8)])
        wait_until(lambda: loop.stats().placed == 13, "all that is there")
        assert loop.error is None


def test_a_memfd_that_was_cut_is_an_error(memory: Memory) -> None:
    source = MemfdSource(memory.fd)
    os.ftruncate(memory.fd, 8 * PAGE)
    assert source.fetch(7, 1) == [(7, 1, expected(7))]
    for first in (8, 15):
        with pytest.raises(SourceError, match=rf"pages \[{first}, {first + 1}\): the memfd is shorter than it was"):
            source.fetch(first, 1)


@pytest.mark.parametrize(
    ("kind", "mode", "said"),
    [
        ("shared", RegisterMode.MISSING, "region 0 reports no minor faults"),
        ("anonymous", RegisterMode.MISSING, "region 0 is not shared memory"),
    ],
)
def test_regions_that_cannot_be_served_so_are_refused(
    open_uffd: Callable[..., Userfaultfd], memory: Memory, kind: str, mode: Any, said: str
) -> None:
    other = make(kind, NPAGES)
    region = open_uffd(Feature.EVENT_REMOVE).register(other.mapping, mode=mode)
    with pytest.raises(ValueError, match=said):
        PlacementLoop([region], MemfdSource(memory.fd))
    other.close()


def test_a_region_larger_than_the_memfd_is_refused(region: Region, memory: Memory) -> None:
    with pytest.raises(ValueError, match="the source has 8 pages for region 0, which has 16"):
        PlacementLoop([region], MemfdSource(memory.fd, [(0, 0, 8 * PAGE)]))


def test_huge_pages(uffd: Userfaultfd) -> None:
    with huge_pool(4):
        memory = make("huge_shared", 4)
        for index in range(4):
            write_other(memory, index, bytes([index + 1]) * memory.page_size)
        region = uffd.register(memory.mapping, page_size=memory.page_size, mode=BOTH)
        with PlacementLoop([region], MemfdSource(memory.fd, page_size=memory.page_size)) as loop:
            assert touch(region, 2) == bytes([3]) * memory.page_size
            loop.prefetch([(0, 4)])
            assert loop.wait_settled(DEADLINE)
        assert [memory.mapping[index * memory.page_size] for index in range(4)] == [1, 2, 3, 4]
        uffd.unregister(region)
        memory.close()
        memory.mapping.close()
        assert memory.other is not None
        memory.other.close()
