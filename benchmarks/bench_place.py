"""place() and place_zeros() against the bare ioctls in C, on the same region in the same run.

Each round places a whole region that was discarded before it, `chunk` bytes a call; what is timed is the placing
alone. The calls of pagecore come from Python, one a chunk, as a program would make them; "claims" also keeps the
planes of a migration. The counts are checked after the timed part.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import pytest

from pagecore import Bitmap, Mover, UnsupportedError, Userfaultfd

PAGE = 4096
NPAGES = 4096
NBYTES = NPAGES * PAGE
ROUNDS = 20
SIZES = {"4K": 4 << 10, "64K": 64 << 10, "2M": 2 << 20}

over_sizes = pytest.mark.parametrize("size", SIZES)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Rig:
    """A registered region, a source that is resident, and the floor's functions bound to both."""

    def __init__(self, floor: ctypes.CDLL) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.source, self.memory = mmap.mmap(-1, NBYTES, flags=flags), mmap.mmap(-1, NBYTES + (2 << 20), flags=flags)
        for memory in (self.source, self.memory):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        # Both are touched once: pages that a virtual machine's host has not backed yet cost several times more.
        self.source[:] = os.urandom(PAGE) * NPAGES
        self.memory[:NBYTES] = self.source[:]
        start = -address_of(self.memory) % (2 << 20)  # blocks of 2 MiB are aligned, so that they can be moved
        try:
            self.uffd = Userfaultfd()  # without EVENT_REMOVE: the discards between the rounds wait for nobody
        except UnsupportedError as error:
            pytest.skip(str(error))
        self.placed = memoryview(self.memory)[start : start + NBYTES]
        self.region = self.uffd.register(self.placed)
        self.claimed, self.received = Bitmap(NPAGES), Bitmap(NPAGES)
        self.floor = floor
        self.view = memoryview(self.source)
        self.chunks: list[tuple[int, memoryview]] = []

    def cut(self, chunk: int) -> None:
        """The source in pieces, cut outside the timed part."""
        self.chunks = [(at // PAGE, self.view[at : at + chunk]) for at in range(0, NBYTES, chunk)]

    def reset(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.claimed.reset()
        self.received.reset()

    def close(self) -> None:
        self.uffd.close()


@pytest.fixture(scope="module")
def rig(compile_floor):
    library = compile_floor("floor_uffd.c")
    number, size, address = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64
    library.floor_copy.argtypes = [number, address, address, size, size]
    library.floor_zero.argtypes = [number, address, size, size]
    library.floor_lose.argtypes = [number, address, address, size, size]
    for function in (library.floor_copy, library.floor_zero, library.floor_lose):
        function.restype = size
    rig = Rig(library)
    yield rig
    rig.close()


def measure(benchmark: Any, rig: Rig, call: Callable[[], int], setup: Callable[[], None], **facts: Any) -> None:
    """Time rounds of `call`, each after `setup`; it returns how many pages it dealt with, which must be all."""
    benchmark.extra_info.update(pages=NPAGES, bytes=NBYTES, **facts)
    dealt: list[int] = []
    benchmark.pedantic(lambda: dealt.append(call()), setup=setup, rounds=ROUNDS, warmup_rounds=2)
    assert set(dealt) == {NPAGES}


@over_sizes
@pytest.mark.parametrize("who", ["floor", "pagecore", "claims"])
def test_copy(benchmark: Any, rig: Rig, size: str, who: str) -> None:
    benchmark.group = f"place-copy {size}"
    chunk = SIZES[size]
    rig.cut(chunk)
    region, chunks = rig.region, rig.chunks

    def floor() -> int:
        arguments = (rig.uffd.fileno(), region.address, address_of(rig.source), NBYTES, chunk)
        return rig.floor.floor_copy(*arguments) // PAGE

    def pagecore() -> int:
        place = region.place
        return sum(place(first, data).placed for first, data in chunks)

    def claims() -> int:
        place, claimed, received = region.place, rig.claimed, rig.received
        return sum(place(first, data, claimed=claimed, received=received).placed for first, data in chunks)

    call = {"floor": floor, "pagecore": pagecore, "claims": claims}[who]
    measure(benchmark, rig, call, rig.reset, chunk=chunk)
    assert rig.placed == rig.source[:]


@over_sizes
@pytest.mark.parametrize("who", ["floor", "pagecore", "claims"])
def test_zero(benchmark: Any, rig: Rig, size: str, who: str) -> None:
    benchmark.group = f"place-zero {size}"
    chunk = SIZES[size]
    region, count = rig.region, chunk // PAGE
    firsts = range(0, NPAGES, count)

    def floor() -> int:
        return rig.floor.floor_zero(rig.uffd.fileno(), region.address, NBYTES, chunk) // PAGE

    def pagecore() -> int:
        place = region.place_zeros
        return sum(place(first, count).zeroed for first in firsts)

    def claims() -> int:
        place, claimed, received = region.place_zeros, rig.claimed, rig.received
        return sum(place(first, count, claimed=claimed, received=received).zeroed for first in firsts)

    call = {"floor": floor, "pagecore": pagecore, "claims": claims}[who]
    measure(benchmark, rig, call, rig.reset, chunk=chunk)
    assert not any(rig.placed[:: PAGE // 2])


@pytest.mark.parametrize("who", ["floor", "pagecore"])
def test_move(benchmark: Any, rig: Rig, who: str) -> None:
    """Aligned blocks of 2 MiB: by COPY, and by MOVE of a huge page that was filled before."""
    benchmark.group = "place-move 2M"
    rig.cut(SIZES["2M"])
    region, chunks, mover = rig.region, rig.chunks, Mover()

    def floor() -> int:
        arguments = (rig.uffd.fileno(), region.address, address_of(rig.source), NBYTES, SIZES["2M"])
        return rig.floor.floor_copy(*arguments) // PAGE

    def pagecore() -> int:
        return sum(mover.place(region, first, data).placed for first, data in chunks)

    measure(benchmark, rig, {"floor": floor, "pagecore": pagecore}[who], rig.reset, chunk=SIZES["2M"])
    assert rig.placed == rig.source[:]


@pytest.mark.parametrize("who", ["floor", "kernel", "claims"])
def test_lose(benchmark: Any, rig: Rig, who: str) -> None:
    """A placement of a page that is there already: found out by the kernel, with its wake, or by a bit."""
    benchmark.group = "place-lose 4K"
    rig.cut(PAGE)
    region, chunks = rig.region, rig.chunks
    rig.reset()
    assert region.place(0, rig.source, claimed=rig.claimed).placed == NPAGES

    def floor() -> int:
        return rig.floor.floor_lose(rig.uffd.fileno(), region.address, address_of(rig.source), NBYTES, PAGE) // PAGE

    def kernel() -> int:
        place = region.place
        return sum(place(first, data).present for first, data in chunks)

    def claims() -> int:
        place, claimed = region.place, rig.claimed
        return sum(place(first, data, claimed=claimed).present for first, data in chunks)

    call = {"floor": floor, "kernel": kernel, "claims": claims}[who]
    measure(benchmark, rig, call, lambda: None, chunk=PAGE)
