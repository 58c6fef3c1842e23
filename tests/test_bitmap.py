"""Bitmap, case by case: sizes at word edges, ranges over words, tail bits, errors and their text, buffers."""

from __future__ import annotations

import array
import gc
import inspect
import mmap
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

import pagecore._bitmap
from pagecore import Bitmap

SIZES = [0, 1, 63, 64, 65, 127, 128, 129, 1000]
New = Callable[[int], Bitmap]


def over_mmap(size: int) -> Bitmap:
    return Bitmap.from_buffer(mmap.mmap(-1, mmap.PAGESIZE), size)


@pytest.fixture(params=[Bitmap, over_mmap], ids=["owned", "mmap"])
def new(request: pytest.FixtureRequest) -> New:
    return request.param


def filled(new: New, size: int, pages: Iterable[int]) -> Bitmap:
    bitmap = new(size)
    bitmap.set_indices(list(pages))
    return bitmap


def pages_of(bitmap: Bitmap) -> list[int]:
    return bitmap.indices().tolist()


def words_of(bitmap: Bitmap) -> int:
    """All bits as one number, tail bits too."""
    return sum(word << (64 * i) for i, word in enumerate(np.frombuffer(bitmap, np.uint64).tolist()))


@pytest.mark.parametrize("size", SIZES)
def test_a_new_bitmap_is_clear(new: New, size: int) -> None:
    bitmap = new(size)
    assert (bitmap.size, len(bitmap), bitmap.count()) == (size, size, 0)
    assert not bitmap.any()
    assert bitmap.all() == (size == 0)
    assert bitmap.find_set() is None
    assert bitmap.find_last() is None
    assert bitmap.find_clear() == (0 if size else None)
    assert bitmap.runs().shape == (0, 2)
    assert bitmap.indices().shape == (0,)
    assert bitmap.take_runs().shape == (0, 2)
    assert list(bitmap.iter_runs()) == []
    assert bitmap.runs().dtype == bitmap.indices().dtype == bitmap.take_runs().dtype == np.int64


@pytest.mark.parametrize("size", SIZES)
def test_a_full_bitmap_keeps_its_tail_bits_clear(new: New, size: int) -> None:
    bitmap = new(size)
    bitmap.fill()
    assert bitmap.count() == size
    assert bitmap.all()
    assert bitmap.any() == (size > 0)
    assert words_of(bitmap) == (1 << size) - 1
    assert bitmap.find_clear() is None
    assert bitmap.find_last() == (size - 1 if size else None)
    assert bitmap.runs().tolist() == ([[0, size]] if size else [])
    assert pages_of(bitmap) == list(range(size))
    assert words_of(~bitmap) == 0
    bitmap.reset()
    assert words_of(bitmap) == 0
    assert words_of(~bitmap) == (1 << size) - 1


@pytest.mark.parametrize("size", [65, 200])
def test_single_bits(new: New, size: int) -> None:
    bitmap = new(size)
    for page in (0, 1, 63, 64, size - 1):
        assert not bitmap[page]
        bitmap[page] = True
        assert bitmap[page] is True
        assert page in bitmap
        assert bitmap.test(page) is True
        assert words_of(bitmap) == 1 << page
        assert bitmap.test_and_set(page) is True
        bitmap[page] = False
        assert bitmap.test_and_set(page) is False
        assert bitmap.test_and_clear(page) is True
        assert bitmap.test_and_clear(page) is False
        bitmap.set(page)
        bitmap.clear(page)
        assert page not in bitmap


def test_page_numbers_may_be_numpy_integers_and_nothing_else(new: New) -> None:
    bitmap = new(100)
    bitmap[np.int64(7)] = True
    assert np.uint32(7) in bitmap
    assert bitmap.set_range(np.int64(10), np.int32(5)) == 5
    for wrong in (1.0, "1", None, slice(0, 1)):
        with pytest.raises(TypeError):
            bitmap[wrong]


# Starts within two words, lengths over three: first word, middle words, last word, and their edges.
@pytest.mark.parametrize("start", [0, 1, 31, 62, 63, 64, 65, 100, 127, 128])
def test_ranges_of_every_length_from_every_edge(new: New, start: int) -> None:
    size = 300
    bitmap = new(size)
    for count in [*range(4), *range(60, 70), *range(124, 132), size - start]:
        mask = ((1 << count) - 1) << start
        assert bitmap.set_range(start, count) == count
        assert words_of(bitmap) == mask
        assert bitmap.set_range(start, count) == 0
        assert bitmap.count_range(start, count) == count
        assert bitmap.count_range(0, size) == count
        assert bitmap.test_range(start, count)
        assert bitmap.test_range(0, start) == (start == 0)
        assert bitmap.clear_range(start, count) == count
        assert words_of(bitmap) == 0
        assert bitmap.clear_range(start, count) == 0
        bitmap.fill()
        assert bitmap.clear_range(start, count) == count
        assert words_of(bitmap) == ((1 << size) - 1) ^ mask
        bitmap.reset()


def test_a_range_clear_over_several_words_counts_what_only_the_later_words_had(new: New) -> None:
    # QEMU's bitmap_test_and_clear forgets the middle and last word: start 60, 70 bits, only 128 and 129 set.
    bitmap = filled(new, 256, [128, 129, 130])
    assert bitmap.clear_range(60, 70) == 2
    assert pages_of(bitmap) == [130]


def test_changed_counts_only_what_changed(new: New) -> None:
    bitmap = filled(new, 200, [5, 64, 70, 199])
    assert bitmap.set_range(0, 200) == 196
    assert bitmap.clear_runs([(0, 10), (5, 10), (190, 10)]) == 25
    assert bitmap.set_runs([(0, 10), (5, 10), (50, 0)]) == 15
    assert bitmap.set_indices([195, 195, 3, 196]) == 2
    assert bitmap.clear_indices([195, 195, 3, 196]) == 3


def test_finding(new: New) -> None:
    bitmap = filled(new, 300, [3, 63, 64, 200, 298])
    assert [bitmap.find_set(start) for start in (0, 3, 4, 63, 64, 65, 201, 298, 299, 300)] == [
        *(3, 3, 63, 63, 64, 200, 298, 298, None, None),
    ]
    assert bitmap.find_last() == 298
    full = ~bitmap
    assert [full.find_clear(start) for start in (0, 4, 65, 299, 300)] == [3, 63, 200, None, None]
    assert full.find_last() == 299


def test_runs_cross_words_and_end_at_the_size(new: New) -> None:
    bitmap = new(260)
    runs = [[0, 1], [2, 62], [65, 63], [129, 130]]
    bitmap.set_runs(runs)
    assert bitmap.runs().tolist() == runs
    assert [list(run) for run in bitmap.iter_runs()] == runs
    bitmap.set(259)
    assert bitmap.runs().tolist()[-1] == [129, 131]
    bitmap.set_indices([1, 64, 128])
    assert bitmap.runs().tolist() == [[0, 260]]


def test_many_runs_come_in_several_chunks(new: New) -> None:
    size = 20000
    bitmap = filled(new, size, range(0, size, 2))
    expected = [[page, 1] for page in range(0, size, 2)]
    assert bitmap.runs().tolist() == expected
    assert [list(run) for run in bitmap.iter_runs()] == expected
    assert bitmap.take_runs().tolist() == expected
    assert not bitmap.any()


def test_find_clear_area(new: New) -> None:
    bitmap = filled(new, 300, [10, 100, 250])
    assert bitmap.find_clear_area(10) == 0
    assert bitmap.find_clear_area(11) == 11
    assert bitmap.find_clear_area(90) == 101
    assert bitmap.find_clear_area(64, align=64) == 128
    assert bitmap.find_clear_area(50, start=240) is None
    assert bitmap.find_clear_area(49, start=240) == 251
    assert bitmap.find_clear_area(150) is None
    assert bitmap.find_clear_area(1, start=300) is None
    with pytest.raises(ValueError, match="count 0 is less than 1"):
        bitmap.find_clear_area(0)
    with pytest.raises(ValueError, match="align 0 is less than 1"):
        bitmap.find_clear_area(1, align=0)


def test_take_runs_clears_exactly_what_it_returns(new: New) -> None:
    bitmap = new(400)
    bitmap.set_runs([(10, 100), (200, 5), (300, 100)])
    assert bitmap.take_runs(max_pages=60).tolist() == [[10, 60]]
    assert bitmap.runs().tolist() == [[70, 40], [200, 5], [300, 100]]
    assert bitmap.take_runs(100, max_runs=1).tolist() == [[100, 10]]
    assert bitmap.take_runs(max_pages=33).tolist() == [[70, 30], [200, 3]]
    assert bitmap.take_runs(max_pages=0).tolist() == []
    assert bitmap.take_runs(max_runs=0).tolist() == []
    assert bitmap.take_runs(400).tolist() == []
    assert bitmap.take_runs(350, max_pages=1000, max_runs=1000).tolist() == [[350, 50]]
    assert bitmap.take_runs(max_runs=2).tolist() == [[203, 2], [300, 50]]
    assert not bitmap.any()


def test_take_runs_puts_back_what_it_took_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = filled(Bitmap, 20000, range(0, 20000, 2))
    before = bitmap.copy()

    class FailsLater:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def empty(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise MemoryError("on purpose")
            return np.empty(*args, **kwargs)

    monkeypatch.setattr(pagecore._runs, "np", FailsLater())
    with pytest.raises(MemoryError, match="on purpose"):
        bitmap.take_runs()
    assert bitmap == before


def test_drain_and_merge_count_the_newly_set(new: New) -> None:
    log, dirty = filled(new, 200, [1, 64, 65, 199]), filled(new, 200, [64, 100])
    assert dirty.merge(log) == 3
    assert log.count() == 4
    assert log.drain_into(dirty) == 0
    assert not log.any()
    log.set_indices([2, 64])
    assert log.drain_into(dirty) == 1
    assert pages_of(dirty) == [1, 2, 64, 65, 100, 199]
    assert dirty.merge(dirty) == 0


@pytest.mark.parametrize("size", SIZES)
def test_algebra(new: New, size: int) -> None:
    a, b = filled(new, size, range(0, size, 2)), filled(new, size, range(0, size, 3))
    left, right = set(range(0, size, 2)), set(range(0, size, 3))
    assert pages_of(a | b) == sorted(left | right)
    assert pages_of(a & b) == sorted(left & right)
    assert pages_of(a ^ b) == sorted(left ^ right)
    assert pages_of(~a) == sorted(set(range(size)) - left)
    assert a.intersects(b) == bool(left & right)
    assert pages_of(a) == sorted(left)
    copy = a.copy()
    same = copy
    copy |= b
    copy &= a
    copy ^= b
    assert copy is same
    assert pages_of(copy) == sorted(left ^ right)
    assert a.andnot(b) == len(left & right)
    assert pages_of(a) == sorted(left - right)
    a ^= a
    assert not a.any()


def test_intersects_and_equality_ignore_nothing_and_invent_nothing(new: New) -> None:
    # Size 0, and QEMU's garbage tail: 0xf0 against 0xf0 with 4 bits must not meet.
    assert not new(0).intersects(new(0))
    assert new(0) == new(0)
    a, b = filled(new, 65, [64]), filled(new, 65, [63])
    assert not a.intersects(b)
    assert a != b
    assert a == filled(Bitmap, 65, [64])
    assert new(64) != new(65)
    assert a != {64}


def test_copies_are_independent(new: New) -> None:
    bitmap = filled(new, 100, [1, 99])
    copy = bitmap.copy()
    bitmap.clear(1)
    assert pages_of(copy) == [1, 99]
    assert pages_of(copy.resized(50)) == [1]
    grown = copy.resized(500)
    assert (grown.size, pages_of(grown)) == (500, [1, 99])
    grown.fill()
    assert words_of(grown.resized(70)) == (1 << 70) - 1


@pytest.mark.parametrize(("source_first", "first"), [(0, 0), (3, 70), (70, 3), (64, 0), (63, 65), (1, 0), (0, 1)])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_copy_range_changes_nothing_outside(new: New, source_first: int, first: int, count: int) -> None:
    source = filled(new, 256, [page for page in range(256) if page % 7 in (0, 3, 4)])
    wanted = {page - source_first + first for page in pages_of(source) if 0 <= page - source_first < count}
    for before in (set(), set(range(300)), set(range(0, 300, 2))):
        bitmap = filled(new, 300, before)
        after = {page for page in before if not 0 <= page - first < count} | wanted
        assert bitmap.copy_range(source, source_first, first, count) == len(before ^ after)
        assert pages_of(bitmap) == sorted(after)
    overlapping = source.copy()
    source.copy_range(source, source_first, first, count)
    overlapping.copy_range(overlapping.copy(), source_first, first, count)
    assert source == overlapping


@pytest.mark.parametrize("size", SIZES)
def test_bytes_both_ways(new: New, size: int) -> None:
    bitmap = filled(new, size, range(0, size, 5))
    data = bitmap.to_bytes()
    assert len(data) == 8 * ((size + 63) // 64)
    assert data == sum(1 << page for page in range(0, size, 5)).to_bytes(len(data), "little")
    assert Bitmap.from_bytes(data, size) == bitmap
    assert Bitmap.from_bytes(memoryview(bytearray(data)), size) == bitmap


def test_from_bytes_refuses_another_length_and_a_foreign_tail() -> None:
    with pytest.raises(ValueError, match="a bitmap of 65 pages is 16 bytes, not 8"):
        Bitmap.from_bytes(bytes(8), 65)
    with pytest.raises(ValueError, match="a bitmap of 64 pages is 8 bytes, not 16"):
        Bitmap.from_bytes(bytes(16), 64)
    with pytest.raises(ValueError, match=r"bits past page 65 are set in the last word: 0x0000000000000002"):
        Bitmap.from_bytes(struct.pack("<QQ", 0, 3), 65)
    with pytest.raises(ValueError, match="size -1 is negative"):
        Bitmap.from_bytes(b"", -1)


def test_from_buffer_shares_the_memory() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    one, two = Bitmap.from_buffer(memory, 100), Bitmap.from_buffer(memory, 100)
    one.set(99)
    assert 99 in two
    assert memory[:16] == struct.pack("=QQ", 0, 1 << 35)
    memory[0] = 7
    assert pages_of(two) == [0, 1, 2, 99]
    assert one == two
    assert one.copy_range(two, 0, 1, 50) == 1
    assert pages_of(two) == [0, 1, 2, 3, 99]


def test_from_buffer_holds_the_exporter() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    bitmap = Bitmap.from_buffer(memory, 100)
    with pytest.raises(BufferError):
        memory.close()
    view = memoryview(bitmap)
    del bitmap
    gc.collect()
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    gc.collect()
    memory.close()


def test_from_buffer_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="a bitmap of 65 pages needs 16 bytes, not 15"):
        Bitmap.from_buffer(bytearray(15), 65)
    with pytest.raises(BufferError):
        Bitmap.from_buffer(bytes(16), 65)
    with pytest.raises(BufferError):
        Bitmap.from_buffer(memoryview(bytearray(64))[::2], 65)
    with pytest.raises(ValueError, match=r"the buffer begins at 0x[0-9a-f]+1, not a multiple of 8"):
        Bitmap.from_buffer(memoryview(mmap.mmap(-1, mmap.PAGESIZE))[1:], 65)
    with pytest.raises(ValueError, match="size -5 is negative"):
        Bitmap.from_buffer(bytearray(16), -5)
    with pytest.raises(TypeError):
        Bitmap.from_buffer([1, 2], 65)
    assert Bitmap.from_buffer(bytearray(), 0).size == 0


def test_a_foreign_tail_is_refused_and_left_alone() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory[8] = 0xFF
    with pytest.raises(ValueError, match=r"bits past page 70 are set in the last word: 0x00000000000000c0"):
        Bitmap.from_buffer(memory, 70)
    assert memory[8] == 0xFF
    assert Bitmap.from_buffer(memory, 72).count() == 8


def test_a_tail_that_another_process_writes_later_is_never_seen() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    bitmap = Bitmap.from_buffer(memory, 70)
    memory[8:16] = b"\xff" * 8
    assert bitmap.count() == bitmap.count_range(0, 70) == 6
    assert pages_of(bitmap) == list(range(64, 70))
    assert bitmap.runs().tolist() == [[64, 6]]
    assert bitmap.find_last() == 69
    assert bitmap.find_clear(64) is None
    assert bitmap.find_set(70) is None
    owned = bitmap.copy()
    assert words_of(owned) == 0x3F << 64
    assert owned == bitmap
    assert words_of(~bitmap) == (1 << 64) - 1
    assert bitmap.to_bytes() == owned.to_bytes()
    assert words_of(bitmap | bitmap) == 0x3F << 64
    dest = Bitmap(70)
    assert dest.merge(bitmap) == 6
    assert words_of(dest) == 0x3F << 64
    assert bitmap.take_runs(max_pages=2).tolist() == [[64, 2]]
    assert memory[8:16] == b"\xfc" + b"\xff" * 7
    dest.reset()
    assert bitmap.drain_into(dest) == 4
    assert words_of(dest) == 0x3C << 64
    empty = filled(Bitmap, 70, [])
    memory[9] = 1
    assert bitmap == empty
    assert not bitmap.any()
    assert not bitmap.intersects(bitmap)


def test_views_of_the_words() -> None:
    bitmap = filled(Bitmap, 130, [0, 65, 129])
    words = np.frombuffer(bitmap, np.uint64)
    assert words.tolist() == [1, 2, 2]
    assert not words.flags.writeable
    view = memoryview(bitmap)
    assert (view.format, view.itemsize, view.shape, view.strides, view.readonly) == ("Q", 8, (3,), (8,), True)
    bitmap.set(64)
    assert words[1] == 3
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
        words.flags.writeable = True
    with pytest.raises(BufferError, match="exports its words read-only"):
        Bitmap.from_buffer(bitmap, 130)
    del bitmap
    gc.collect()
    assert words.tolist() == [1, 3, 2]
    assert np.frombuffer(Bitmap(64), np.uint64).ctypes.data % 64 == 0
    assert np.asarray(memoryview(Bitmap(0))).shape == (0,)


OUTSIDE = [
    (lambda b: b[100], "page 100 is outside [0, 100)"),
    (lambda b: b[-1], "page -1 is outside [0, 100)"),
    (lambda b: b.__setitem__(100, True), "page 100 is outside [0, 100)"),
    (lambda b: 100 in b, "page 100 is outside [0, 100)"),
    (lambda b: b.test(2**70), f"page {2**70} is outside [0, 100)"),
    (lambda b: b.set(-(2**70)), f"page {-(2**70)} is outside [0, 100)"),
    (lambda b: b.clear(100), "page 100 is outside [0, 100)"),
    (lambda b: b.test_and_set(100), "page 100 is outside [0, 100)"),
    (lambda b: b.test_and_clear(-3), "page -3 is outside [0, 100)"),
    (lambda b: b.set_range(99, 2), "pages [99, 101) are outside [0, 100)"),
    (lambda b: b.clear_range(101, 0), "pages [101, 101) are outside [0, 100)"),
    (lambda b: b.test_range(-1, 1), "pages [-1, 0) are outside [0, 100)"),
    (lambda b: b.count_range(1, 2**64), f"pages [1, {1 + 2**64}) are outside [0, 100)"),
    (lambda b: b.set_runs([(0, 5), (90, 11)]), "pages [90, 101) are outside [0, 100)"),
    (lambda b: b.clear_runs([(0, 5), (-1, 1)]), "pages [-1, 0) are outside [0, 100)"),
    (lambda b: b.set_runs([(1, 2**63 - 1)]), f"pages [1, {2**63}) are outside [0, 100)"),
    (lambda b: b.set_indices([5, 100]), "page 100 is outside [0, 100)"),
    (lambda b: b.clear_indices([5, -1]), "page -1 is outside [0, 100)"),
    (lambda b: b.test_indices([5, 1000]), "page 1000 is outside [0, 100)"),
    (lambda b: b.set_indices(np.array([5, 2**63], np.uint64)), f"page {2**63} is outside [0, 100)"),
    (lambda b: b.find_set(101), "page 101 is outside [0, 100]"),
    (lambda b: b.find_clear(-1), "page -1 is outside [0, 100]"),
    (lambda b: b.find_clear_area(1, 101), "page 101 is outside [0, 100]"),
    (lambda b: b.take_runs(101), "page 101 is outside [0, 100]"),
    (lambda b: b.copy_range(Bitmap(10), 8, 0, 3), "pages [8, 11) are outside [0, 10)"),
    (lambda b: b.copy_range(Bitmap(10), 0, 98, 3), "pages [98, 101) are outside [0, 100)"),
]


@pytest.mark.parametrize(("call", "message"), OUTSIDE, ids=[message for _, message in OUTSIDE])
def test_outside_raises_with_the_number_and_the_bound_and_changes_nothing(
    new: New, call: Callable[[Bitmap], object], message: str
) -> None:
    bitmap = filled(new, 100, [0, 5, 99])
    with pytest.raises(IndexError) as error:
        call(bitmap)
    assert str(error.value) == message
    assert pages_of(bitmap) == [0, 5, 99]


MISUSE = [
    (lambda b: Bitmap(-1), ValueError, "size -1 is negative"),
    (lambda b: Bitmap(2**62), MemoryError, f"no memory for a bitmap of {2**62} pages"),
    (lambda b: Bitmap(2**80), MemoryError, f"no memory for a bitmap of {2**80} pages"),
    (lambda b: Bitmap(1.5), TypeError, "'float' object cannot be interpreted as an integer"),
    (lambda b: b.resized(-1), ValueError, "size -1 is negative"),
    (lambda b: b.set_range(0, -1), ValueError, "count -1 is negative"),
    (lambda b: b.set_runs([(0, 1), (5, -2)]), ValueError, "count -2 of run 1 is negative"),
    (lambda b: b.take_runs(max_pages=-1), ValueError, "max_pages -1 is negative"),
    (lambda b: b.take_runs(max_runs=-1), ValueError, "max_runs -1 is negative"),
    (lambda b: b.set_runs([1, 2]), ValueError, "runs must have the shape (n, 2), not (2,)"),
    (lambda b: b.set_runs([(1, 2, 3)]), ValueError, "runs must have the shape (n, 2), not (1, 3)"),
    (lambda b: b.set_indices([[1, 2]]), ValueError, "pages must have the shape (n,), not (1, 2)"),
    (lambda b: b.set_indices([1.0]), TypeError, "pages must be integers, not float64"),
    (lambda b: b.set_indices([True]), TypeError, "pages must be integers, not bool"),
    (lambda b: b.merge(Bitmap(99)), ValueError, "the bitmaps differ in size: 100 and 99 pages"),
    (lambda b: b.drain_into(Bitmap(101)), ValueError, "the bitmaps differ in size: 100 and 101 pages"),
    (lambda b: b.drain_into(b), ValueError, "a bitmap cannot be drained into itself"),
    (lambda b: b.andnot(Bitmap(0)), ValueError, "the bitmaps differ in size: 100 and 0 pages"),
    (lambda b: b.intersects(Bitmap(0)), ValueError, "the bitmaps differ in size: 100 and 0 pages"),
    (lambda b: b | Bitmap(99), ValueError, "the bitmaps differ in size: 100 and 99 pages"),
    (lambda b: b & Bitmap(99), ValueError, "the bitmaps differ in size: 100 and 99 pages"),
    (lambda b: b ^ Bitmap(99), ValueError, "the bitmaps differ in size: 100 and 99 pages"),
    (
        iter,
        TypeError,
        "a Bitmap is not iterated bit by bit: use iter_runs(), runs() or indices()",
    ),
    (hash, TypeError, "unhashable type: 'pagecore._bitmap.Bitmap'"),
]


@pytest.mark.parametrize(("call", "kind", "message"), MISUSE, ids=[message for _, _, message in MISUSE])
def test_misuse_is_refused_and_changes_nothing(
    new: New, call: Callable[[Bitmap], object], kind: type[Exception], message: str
) -> None:
    bitmap = filled(new, 100, [0, 5, 99])
    with pytest.raises(kind) as error:
        call(bitmap)
    assert str(error.value) == message
    assert pages_of(bitmap) == [0, 5, 99]


@pytest.mark.parametrize("other", [None, 5, {1}, b"12345678"])
def test_operands_must_be_bitmaps(other: object) -> None:
    bitmap = Bitmap(10)
    for name in ("merge", "drain_into", "andnot", "intersects", "__or__", "__and__", "__xor__", "__ior__"):
        with pytest.raises(TypeError):
            getattr(bitmap, name)(other)


def test_arrays_of_any_integer_type_and_layout(new: New) -> None:
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i8"):
        bitmap = new(200)
        assert bitmap.set_indices(np.array([1, 100, 64], dtype)) == 3
        assert bitmap.test_indices(np.arange(0, 101, dtype=dtype)).nonzero()[0].tolist() == [1, 64, 100]
        assert bitmap.set_runs(np.array([(2, 4), (100, 2)], dtype)) == 5
    columns = np.asfortranarray(np.array([(2, 4), (100, 2)]))
    assert new(200).set_runs(columns) == 6
    assert new(200).set_indices(np.arange(100)[::-7]) == 15
    read_only = np.arange(5)
    read_only.flags.writeable = False
    assert new(200).set_indices(read_only) == 5
    assert new(200).set_runs([]) == 0
    assert new(200).set_indices(()) == 0
    assert new(200).test_indices([]).dtype == np.bool_
    assert new(200).set_runs(new(200).runs()) == 0


def test_int64_in_a_row_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, runs = np.arange(5), np.array([(10, 2), (20, 3)])
    runs.flags.writeable = False
    misaligned = np.frombuffer(bytes(1) + bytes(np.arange(3)), np.int64, offset=1)
    bitmap = Bitmap(100)

    def refuse(*_: object) -> None:
        raise AssertionError("converted")

    with monkeypatch.context() as patched:
        patched.setattr(np, "asarray", refuse)
        assert bitmap.set_indices(pages) == 5
        assert bitmap.set_indices(array.array("q", [50, 51])) == 2
        assert bitmap.set_indices(memoryview(pages.tobytes()).cast("l")) == 0
        assert bitmap.set_runs(runs) == 5
        assert bitmap.set_runs(np.empty((0, 2), np.int64)) == 0
        for other in ([5], pages[::2], pages.astype(np.uint64), pages.astype("M8[s]"), misaligned, np.float64(1)):
            with pytest.raises(AssertionError, match="converted"):
                bitmap.set_indices(other)
    assert bitmap.set_indices(misaligned) == 0
    with pytest.raises(TypeError, match=r"pages must be integers, not datetime64\[s\]"):
        bitmap.set_indices(pages.astype("M8[s]"))
    with pytest.raises(IndexError, match=r"^page 100 is outside \[0, 100\)$"):
        bitmap.set_indices(array.array("q", [1, 100]))
    with pytest.raises(IndexError, match=r"^pages \[99, 101\) are outside \[0, 100\)$"):
        bitmap.set_runs(memoryview(np.array([(0, 1), (99, 2)])))


def test_what_a_reader_sees() -> None:
    assert repr(filled(Bitmap, 100, [1, 2])) == "<pagecore.Bitmap size=100 count=2>"
    assert str(inspect.signature(Bitmap)) == "(npages, *, summary=None)"
    assert str(inspect.signature(Bitmap(1).set)) == "(page, /)"
    assert str(inspect.signature(Bitmap.take_runs)) == "(self, first=0, max_pages=None, max_runs=None)"
    with pytest.raises(AttributeError):
        Bitmap(5).size = 6  # type: ignore[misc]
    with pytest.raises(TypeError):
        pickle.dumps(Bitmap(5))
    for name, member in vars(Bitmap).items():
        if not name.startswith("_"):
            assert member.__doc__, name
