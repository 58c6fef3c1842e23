"""FileSource, and BufferSource over a mapped file: what a file holds, its holes, and a file that is not what it was."""

from __future__ import annotations

import gc
import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from concurrency import DEADLINE, run_together, wait_until
from pagecore import PlacementLoop, SourceError
from pagecore.page_source import BufferSource, FileSource, PageSource
from placement_rig import Served, served
from uffd_helpers import PAGE

NPAGES = 96
HOLES = [(16, 32), (90, 6)]


def noise(npages: int, seed: int = 5) -> bytes:
    return np.random.default_rng(seed).integers(1, 256, npages * PAGE, dtype=np.uint8).tobytes()


@pytest.fixture
def content() -> bytes:
    data = bytearray(noise(NPAGES))
    for first, count in HOLES:
        data[first * PAGE : (first + count) * PAGE] = bytes(count * PAGE)
    return bytes(data)


@pytest.fixture
def file(tmp_path: pathlib.Path, content: bytes) -> pathlib.Path:
    """A sparse file: what is zero in `content` was never written."""
    path = tmp_path / "snapshot"
    with path.open("wb") as stream:
        stream.truncate(len(content))
        for first in range(NPAGES):
            if any(content[first * PAGE : (first + 1) * PAGE]):
                os.pwrite(stream.fileno(), content[first * PAGE : (first + 1) * PAGE], first * PAGE)
    return path


def joined(runs: list[tuple[int, int, bytes | None]]) -> bytes:
    return b"".join(bytes(count * PAGE) if data is None else data for _, count, data in runs)


def test_pages_are_those_of_the_file(file: pathlib.Path, content: bytes) -> None:
    source = FileSource(file)
    assert (source.lanes, source.page_size, source.slow, source.sparse) == (0, PAGE, True, True)
    assert source.extents == ((0, 0, NPAGES * PAGE),)
    assert joined(source.fetch(0, NPAGES)) == content
    for page in range(NPAGES):
        assert joined(source.fetch(page, 1)) == content[page * PAGE : (page + 1) * PAGE]
    assert source.fetch(NPAGES, 0) == []


def test_holes_are_zero_runs_and_nothing_else_is(file: pathlib.Path) -> None:
    runs = [(first, count, data is None) for first, count, data in FileSource(file).fetch(0, NPAGES)]
    assert runs == [(0, 16, False), (16, 32, True), (48, 42, False), (90, 6, True)]
    runs = [(first, count, data is None) for first, count, data in FileSource(file).fetch(20, 30)]
    assert runs == [(20, 28, True), (48, 2, False)]


def test_a_page_that_is_partly_a_hole_is_read(tmp_path: pathlib.Path) -> None:
    """With pages of 64 KiB the edges of holes lie within them."""
    path, big = tmp_path / "file", 16 * PAGE
    data = bytearray(4 * big)
    with path.open("wb") as stream:
        stream.truncate(len(data))
        for at in (3 * PAGE, 2 * big + 15 * PAGE):
            os.pwrite(stream.fileno(), b"x" * PAGE, at)
            data[at : at + PAGE] = b"x" * PAGE
    runs = FileSource(path, page_size=big).fetch(0, 4)
    assert [(first, count) for first, count, found in runs if found is None] == [(1, 1), (3, 1)]
    assert b"".join(bytes(count * big) if found is None else found for _, count, found in runs) == bytes(data)


def test_runs_that_are_known_end_where_they_end(file: pathlib.Path, content: bytes) -> None:
    """What was learnt of one run must not be taken for the next, in either direction, nor for half a page."""
    source = FileSource(file)
    for first in (0, 15, 48, 89, 47, 14, 16, 90, 20, 60, 0):
        runs = source.fetch(first, min(3, NPAGES - first))
        assert joined(runs) == content[first * PAGE : (first + 3) * PAGE]
        for start, count, data in runs:
            assert (data is None) == (not any(content[start * PAGE : (start + count) * PAGE]))
    shifted = FileSource(file, [(0, 512, 60 * PAGE)])
    for first in (46, 12, 46, 13, 30):
        assert joined(shifted.fetch(first, 6)) == content[512 + first * PAGE : 512 + (first + 6) * PAGE]


def test_a_dense_file_is_known_as_such(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "dense"
    path.write_bytes(noise(4))
    source = FileSource(path)
    assert not source.sparse
    assert source.fetch(0, 4) == [(0, 4, noise(4))]


def test_extents_map_regions_to_the_file(file: pathlib.Path, content: bytes) -> None:
    source = FileSource(file, [(7, 64 * PAGE, 8 * PAGE), (2, 512, 2 * PAGE)])
    assert joined(source.fetch(1, 7, region_id=7)) == content[65 * PAGE : 72 * PAGE]
    assert joined(source.fetch(0, 2, region_id=2)) == content[512 : 512 + 2 * PAGE]
    with pytest.raises(IndexError, match=r"pages \[0, 1\) are outside \[0, 0\)"):
        source.fetch(0, 1, region_id=0)
    with pytest.raises(IndexError, match=r"pages \[1, 9\) are outside \[0, 8\)"):
        source.fetch(1, 8, region_id=7)
    with pytest.raises(IndexError):
        source.fetch(-1, 1, region_id=7)


@pytest.mark.parametrize(
    ("extents", "said"),
    [
        ([(0, 0, (NPAGES + 1) * PAGE)], r"region 0 is \[0, 397312\) of a file of 393216 bytes"),
        ([(0, NPAGES * PAGE, PAGE)], "of a file of 393216 bytes"),
        ([(3, -4096, PAGE)], "offset -4096 of region 3 is negative"),
        ([(3, 0, 0)], "length 0 of region 3"),
        ([(3, 0, -PAGE)], "length -4096 of region 3"),
        ([(3, 0, PAGE + 1)], "length 4097 of region 3 is not a positive multiple of page size 4096"),
        ([(-1, 0, PAGE)], r"region -1 is outside \[0, 4294967296\)"),
        ([(1, 0, PAGE), (1, PAGE, PAGE)], "region 1 has two extents"),
        ([(0, 2**64, PAGE)], "of a file of 393216 bytes"),
        ([], "no extents"),
    ],
)
def test_extents_that_cannot_be_are_refused(file: pathlib.Path, extents: list[tuple[int, int, int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FileSource(file, extents)


@pytest.mark.parametrize("page_size", [0, -4096, 1000])
def test_page_sizes_that_cannot_be_are_refused(file: pathlib.Path, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"page size {page_size}"):
        FileSource(file, page_size=page_size)


@pytest.mark.parametrize("size", [0, PAGE - 1, PAGE + 1])
def test_a_file_that_is_no_whole_pages_is_refused(tmp_path: pathlib.Path, size: int) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"the file has {size} bytes"):
        FileSource(path)


def test_what_is_no_file_is_refused(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is no regular file"):
            FileSource(name)
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "nothing")
    with pytest.raises(ValueError, match="descriptor -1 is negative"):
        FileSource(-1)
    with pytest.raises(FileNotFoundError):
        FileSource(1_000_000)
    with pytest.raises((TypeError, AttributeError)):
        FileSource(3.5)  # type: ignore[arg-type]


def test_a_descriptor_is_opened_anew(file: pathlib.Path, content: bytes) -> None:
    """Its position is not ours to move, and its owner may close it."""
    with file.open("rb") as stream:
        os.lseek(stream.fileno(), 1234, os.SEEK_SET)
        sources = [FileSource(stream), FileSource(stream.fileno())]
        assert joined(sources[0].fetch(0, NPAGES)) == content
        assert os.lseek(stream.fileno(), 0, os.SEEK_CUR) == 1234
    assert joined(sources[1].fetch(0, NPAGES)) == content


def test_a_memfd_is_a_file(content: bytes) -> None:
    descriptor = os.memfd_create("pages")
    try:
        os.ftruncate(descriptor, len(content))
        os.pwrite(descriptor, content[: 16 * PAGE], 0)
        source = FileSource(descriptor)
    finally:
        os.close(descriptor)
    assert [(first, count, data is None) for first, count, data in source.fetch(0, 20)] == [
        (0, 16, False),
        (16, 4, True),
    ]


def test_descriptors_are_given_back(file: pathlib.Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    sources = [FileSource(file) for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 10
    for _ in range(10):
        with pytest.raises(ValueError, match="negative"):
            FileSource(file, [(0, -1, PAGE)])
    del sources
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_larger_than_the_staging_buffer_comes_in_parts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(noise(1000))
    runs = FileSource(path).fetch(0, 1000)
    assert [(first, count) for first, count, _ in runs] == [(0, 512), (512, 488)]
    assert joined(runs) == noise(1000)


def test_each_thread_has_its_own_staging_buffer(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(64))
    source = FileSource(path)

    def fetch(shift: int) -> bool:
        return all(
            joined(source.fetch(page, 8)) == noise(64)[page * PAGE : (page + 8) * PAGE]
            for turn in range(50)
            for page in [(turn * 5 + shift) % 56]
        )

    assert run_together(lambda: fetch(0), lambda: fetch(23), lambda: fetch(41)) == [True] * 3


@pytest.mark.parametrize(("left", "first"), [(0, 2), (3 * PAGE, 3), (3 * PAGE + 100, 3)])
def test_a_file_that_was_cut_is_an_error_and_never_zeros(file: pathlib.Path, left: int, first: int) -> None:
    source = FileSource(file)
    os.truncate(file, left)
    with pytest.raises(SourceError, match=rf"pages \[{first}, 6\): the file is shorter than it was: No data") as caught:
        source.fetch(2, 4)
    assert (caught.value.first_page, caught.value.page_count) == (first, 6 - first)
    # Where a hole was there is no end of file in the way; it must be an error all the same.
    with pytest.raises(SourceError, match="the file is shorter"):
        source.fetch(20, 4)


def test_a_dense_file_that_was_cut_is_an_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "dense"
    path.write_bytes(noise(4))
    source = FileSource(path)
    os.truncate(path, 2 * PAGE)
    assert joined(source.fetch(0, 2)) == noise(4)[: 2 * PAGE]
    with pytest.raises(SourceError, match=r"pages \[2, 4\): the file"):
        source.fetch(1, 3)


# In a placement loop --------------------------------------------------------------------------------------------------


@pytest.fixture
def rig() -> Iterator[Served]:
    with served(NPAGES) as rig:
        yield rig


def counts(loop: PlacementLoop) -> tuple[int, int]:
    """Counters follow a moment after the page."""
    stats = loop.stats()
    return stats.placed, stats.zeroed


@pytest.mark.kernel
def test_a_loop_serves_faults_from_a_file(rig: Served, file: pathlib.Path, content: bytes) -> None:
    with PlacementLoop([rig.region], FileSource(file)) as loop:
        for page in (0, 17, 95, 50):
            assert rig.touch(page).value() == content[page * PAGE : (page + 1) * PAGE]
        wait_until(lambda: counts(loop) == (2, 2), "the counters")


@pytest.mark.kernel
def test_a_prefetch_copies_no_hole(rig: Served, file: pathlib.Path, content: bytes) -> None:
    """D11, also where the edge of a hole lies within a chunk."""
    with PlacementLoop([rig.region], FileSource(file), threads=2) as loop:
        loop.prefetch([(3, 13), (16, 40), (56, 40), (0, 3)])
        assert loop.wait_settled(DEADLINE)
        wait_until(lambda: counts(loop) == (NPAGES - 38, 38), "the counters")
    assert bytes(rig.memory[:]) == content


@pytest.mark.kernel
def test_a_region_that_is_larger_than_the_file_is_refused(rig: Served, file: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="the source has 8 pages for region 0, which has 96"):
        PlacementLoop([rig.region], FileSource(file, [(0, 0, 8 * PAGE)]))
    with pytest.raises(ValueError, match="the source has 0 pages for region 0, which has 96"):
        PlacementLoop([rig.region], FileSource(file, [(1, 0, NPAGES * PAGE)]))


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["fault", "prefetch"])
def test_a_file_cut_under_way_leaves_its_pages_missing(rig: Served, file: pathlib.Path, how: str) -> None:
    """D12: the error names the page and why; nobody reads zeros."""
    with PlacementLoop([rig.region], FileSource(file), on_lost="stall") as loop:
        assert any(rig.touch(1).value())
        os.truncate(file, 4 * PAGE)
        waiter = rig.touch(60)
        if how == "prefetch":
            loop.prefetch([(56, 8)])
        with pytest.raises(SourceError, match=r"page (60|56): the file is shorter than it was: No data"):
            loop.wait_settled(DEADLINE)
        assert not waiter.done()
        assert not loop.states[0].received.test(60)
        assert rig.touch(2).value() != bytes(PAGE), "what is still there is still served"
    rig.region.place(60, rig.page(60))
    assert waiter.value() == rig.page(60)


# BufferSource over a file ---------------------------------------------------------------------------------------------


def test_plain_memory_is_not_staged() -> None:
    for buffer in (noise(2), bytearray(noise(2)), np.frombuffer(noise(2), np.uint8)):
        source = BufferSource(buffer)
        assert (source.staged, source.slow) == (False, False)
        assert source.fetch(1, 1) == [(1, 1, noise(2)[PAGE:])]


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_a_mapped_file_is_staged(file: pathlib.Path, content: bytes, flags: int) -> None:
    """D5: the buffer that the ioctl reads is never a mapping of a file."""
    with file.open("r+b") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, flags=flags)
    mapping[0:5] = b"hello"
    source = BufferSource(mapping)
    assert source.staged
    assert source.slow
    assert joined(source.fetch(0, NPAGES)) == b"hello" + content[5:]


def test_a_mapped_file_that_was_cut_is_an_error_and_no_signal(file: pathlib.Path) -> None:
    """Trap 31: a memcpy of it would be a SIGBUS."""
    with file.open("r+b") as stream:
        source = BufferSource(mmap.mmap(stream.fileno(), 0))
    os.truncate(file, 2 * PAGE)
    with pytest.raises(SourceError, match=r"pages \[1, 4\): the mapped file: Bad address"):
        source.fetch(1, 3)


@pytest.mark.kernel
@pytest.mark.parametrize(("first", "count"), [(0, NPAGES), (10, 1), (NPAGES - 1, 1)])
def test_the_memory_that_is_served_is_no_source(rig: Served, first: int, count: int) -> None:
    """D5: the placement would wait for the page that it is to place."""
    own = memoryview(rig.memory)[first * PAGE : (first + count) * PAGE]
    with pytest.raises(ValueError, match="the buffer overlaps region 0, which it is to fill"):
        PlacementLoop([rig.region], BufferSource(own))


def test_pages_outside_a_buffer_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"pages \[1, 3\)"):
        BufferSource(noise(2)).fetch(1, 2)
    with pytest.raises(SourceError, match=r"pages \[0, 1\)"):
        BufferSource(noise(2)).fetch(0, 1, region_id=1)


def test_a_source_that_implements_nothing_says_so() -> None:
    with pytest.raises(SourceError, match="Function not implemented"):
        PageSource().fetch(0, 1)
