"""Free-page hints against the bitmap sync: what a hint costs, and what the sync that ends its epoch costs.

Both work on the two planes of a PageTracker. The floor is plain C doing the same, not atomic; ``qemu`` is QEMU's way
through a hint (a mutex and a pass for each step), extended to the second plane. A row's ``extra_info`` has the pages
of the guest, the bytes of one of its planes, and what the call changed: from these the JSON gives the time of a hint
for each run and for each page it saves, and of a sync for each page it finds. ``pagecore bench hints`` goes up to
1 TiB, without the other contenders.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pagecore import Bitmap, MemoryDirtyLog, PageTracker
from pagecore.wire import decode_page_set, encode_page_set

ROUNDS = 15


@dataclass(frozen=True)
class Guest:
    """A guest of so many GiB, with that share of its pages dirty, at random."""

    gib: int
    density: float

    def __str__(self) -> str:
        return f"guest={self.gib}G-dirty={self.density:.2%}"

    @property
    def pages(self) -> int:
        return self.gib << 18

    def words(self, seed: int, density: float | None = None) -> np.ndarray:
        share = self.density if density is None else density
        flags = np.random.default_rng([seed, self.gib]).random(self.pages, dtype=np.float32) < share
        return np.packbits(flags, bitorder="little").view(np.uint64)


GUESTS = [Guest(8, 0.0001), Guest(8, 0.01), Guest(8, 0.5), Guest(64, 0.01), Guest(64, 0.5)]
over_guests = pytest.mark.parametrize("guest", GUESTS, ids=str)


@dataclass(frozen=True)
class HintList:
    """So many runs of 1 to `longest` pages, anywhere; they may overlap, as a careless guest's do."""

    runs: int
    longest: int

    def __str__(self) -> str:
        return f"runs={self.runs}x1..{self.longest}"

    def array(self, guest: Guest) -> np.ndarray:
        rng = np.random.default_rng([self.runs, self.longest])
        first = rng.integers(0, guest.pages - self.longest, self.runs)
        return np.stack([first, rng.integers(1, self.longest + 1, self.runs)], axis=1)


LISTS = [
    HintList(10, 1024),
    HintList(1000, 1024),
    HintList(100_000, 1),
    HintList(100_000, 64),
    HintList(1_000_000, 1),
    HintList(1_000_000, 1024),
]


class Planes:
    """The planes of a tracker for all contenders: a tracker, and plain words."""

    def __init__(self, guest: Guest, dirty: np.ndarray) -> None:
        self.content = dirty
        self.dirty, self.hinted = dirty.copy(), np.zeros_like(dirty)
        self.log = MemoryDirtyLog(guest.pages)
        self.tracker = PageTracker(guest.pages, dirty_log=self.log)
        self.session = self.tracker.hint_session()
        self.settled = Bitmap.from_bytes((~dirty).tobytes(), guest.pages)

    def put_back(self) -> None:
        self.dirty[:] = self.content
        self.hinted[:] = 0
        self.tracker.owe_all()
        self.tracker.reload(self.settled)
        self.session.start()


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def popcount(words: np.ndarray) -> int:
    return Bitmap.from_bytes(words.tobytes(), 64 * len(words)).count()


def as_words(bitmap: Bitmap) -> np.ndarray:
    return np.frombuffer(bitmap, np.uint64)


@pytest.fixture(scope="session")
def floor_hints(compile_floor: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    library = compile_floor("floor_hints.c")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, arguments in {
        "floor_hint": [pointer, pointer, pointer, size],
        "qemu_hint": [pointer, pointer, pointer, pointer, size],
        "floor_sync": [pointer, pointer, pointer, size],
    }.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = size
    return library


@over_guests
@pytest.mark.parametrize("hints", LISTS, ids=str)
@pytest.mark.parametrize("who", ["pagecore", "floor", "qemu"])
def test_hint(benchmark: Any, floor_hints: ctypes.CDLL, guest: Guest, hints: HintList, who: str) -> None:
    planes = Planes(guest, guest.words(1))
    runs = hints.array(guest)
    dirty, hinted, where = address(planes.dirty), address(planes.hinted), address(runs)
    chunks = np.zeros((guest.pages >> 24) + 1, np.uint64)
    call = {
        "pagecore": lambda: planes.session.clear_runs(runs, planes.session.epoch),
        "floor": lambda: floor_hints.floor_hint(dirty, hinted, where, len(runs)),
        "qemu": lambda: floor_hints.qemu_hint(dirty, hinted, address(chunks), where, len(runs)),
    }[who]
    named = Bitmap(guest.pages)
    named.set_runs(runs)
    free = planes.content & as_words(named)
    expected = popcount(free)
    benchmark.group = f"hint, {guest}, {hints}"
    benchmark.extra_info.update(
        pages=guest.pages, bytes=guest.pages // 8, runs=len(runs), hinted=named.count(), taken=expected
    )
    assert benchmark.pedantic(call, setup=planes.put_back, rounds=ROUNDS, warmup_rounds=2) == expected
    after = (
        (as_words(planes.tracker.dirty), as_words(planes.tracker.hinted))
        if who == "pagecore"
        else (planes.dirty, planes.hinted)
    )
    assert np.array_equal(after[0], planes.content & ~free)
    assert np.array_equal(after[1], free)
    planes.session.finish()


@over_guests
@pytest.mark.parametrize("who", ["pagecore", "floor"])
def test_sync(benchmark: Any, floor_hints: ctypes.CDLL, guest: Guest, who: str) -> None:
    """The log has the share of pages in its case; a quarter of the pages is dirty, and half of those free."""
    planes = Planes(guest, guest.words(2, 0.25))
    logged = guest.words(1)
    log, dirty, hinted = logged.copy(), address(planes.dirty), address(planes.hinted)
    half = np.array([[0, guest.pages // 2]])
    content = Bitmap.from_bytes(logged.tobytes(), guest.pages)

    def put_back() -> None:
        planes.put_back()
        planes.session.clear_runs(half, planes.session.epoch)
        planes.session.stop()
        planes.hinted[: len(log) // 2] = planes.dirty[: len(log) // 2]
        planes.dirty[: len(log) // 2] = 0
        log[:] = logged
        planes.log.bitmap.merge(content)

    call = {
        "pagecore": planes.tracker.sync,
        "floor": lambda: floor_hints.floor_sync(address(log), dirty, hinted, len(log)),
    }[who]
    owed, free = planes.content.copy(), planes.content.copy()
    owed[: len(log) // 2] = 0
    free[len(log) // 2 :] = 0
    expected = popcount(logged & ~owed)
    benchmark.group = f"sync, {guest}"
    benchmark.extra_info.update(pages=guest.pages, bytes=guest.pages // 8, newly_dirty=expected)
    assert benchmark.pedantic(call, setup=put_back, rounds=ROUNDS, warmup_rounds=2) == expected
    after = (
        (as_words(planes.tracker.dirty), as_words(planes.tracker.hinted))
        if who == "pagecore"
        else (planes.dirty, planes.hinted)
    )
    assert np.array_equal(after[0], owed | logged)
    assert np.array_equal(after[1], free & ~logged)
    planes.session.finish()


@over_guests
@pytest.mark.parametrize("who", ["take", "bare scan"])
def test_take(benchmark: Any, guest: Guest, who: str) -> None:
    """Everything that is owed, in one call; the bare scan lists the same runs and clears nothing."""
    planes = Planes(guest, guest.words(1))
    owed = Bitmap.from_bytes(planes.content.tobytes(), guest.pages)
    call = {"take": lambda: planes.tracker.take(guest.pages), "bare scan": owed.runs}[who]
    benchmark.group = f"take, {guest}"
    benchmark.extra_info.update(pages=guest.pages, bytes=guest.pages // 8, owed=owed.count())
    runs = benchmark.pedantic(call, setup=planes.put_back, rounds=ROUNDS // 4, warmup_rounds=1)
    taken = Bitmap(guest.pages)
    taken.set_runs(runs)
    assert taken == owed
    assert planes.tracker.dirty_count == (0 if who == "take" else owed.count())
    planes.session.finish()


@pytest.mark.parametrize("pattern", ["every other page", "one run", "1% at random"])
@pytest.mark.parametrize("who", ["pagecore", "bitmap"])
def test_list(benchmark: Any, pattern: str, who: str) -> None:
    """The discard list of 64 GiB, made while the guest is stopped; the bitmap is the planes, copied and packed."""
    guest = Guest(64, 0.01)
    dirty = {
        "every other page": np.full(guest.pages // 64, 0x5555_5555_5555_5555, np.uint64),
        "one run": np.full(guest.pages // 64, 0xFFFF_FFFF_FFFF_FFFF, np.uint64),
        "1% at random": guest.words(1),
    }[pattern]
    tracker = PageTracker(guest.pages, all_dirty=False)
    tracker.reload(Bitmap.from_bytes((~dirty).tobytes(), guest.pages))

    def as_bitmap() -> bytes:
        body = tracker.discard_pages().to_bytes()
        return b"".join((bytes(36), zlib.crc32(body).to_bytes(4, "little"), body))

    call = {"pagecore": lambda: encode_page_set(tracker.discard_pages()), "bitmap": as_bitmap}[who]
    benchmark.group = f"list, 64G, {pattern}"
    data = benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info.update(pages=guest.pages, bytes=len(data))
    assert len(data) <= guest.pages // 8 + 64
    if who == "pagecore":
        runs = decode_page_set(data, guest.pages).runs
        assert int(runs[:, 1].sum()) == popcount(dirty)
