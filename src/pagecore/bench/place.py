"""The placement benchmark: each operation beside the bare ioctls on the same memory, with what it must reach."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pagecore._bitmap import Bitmap
from pagecore._move import Mover
from pagecore._uffd import Userfaultfd
from pagecore.bench import _floor_uffd
from pagecore.bench.bitmap import Row
from pagecore.bench.rounds import Contender, measure, ratio

PAGE = 4096
BLOCK = 2 << 20
CHUNKS = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "2 MiB": 2 << 20}


def aligned(length: int) -> tuple[mmap.mmap, int]:
    """Private anonymous memory, and where in it `length` bytes begin that huge pages fit into."""
    memory = mmap.mmap(-1, length + BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % BLOCK


class Suite:
    """All rows; `rounds` paired rounds each, of which the median counts. On one processor, the helper on another."""

    def __init__(self, rounds: int = 9, length: int = 64 << 20) -> None:
        self.rounds = rounds
        self.length = length
        self.pages = length // PAGE
        self.cpus = sorted(os.sched_getaffinity(0))
        source, _ = aligned(length)
        source.madvise(mmap.MADV_NOHUGEPAGE)
        self.source = memoryview(source)[:length]
        self.source[:] = os.urandom(PAGE) * self.pages
        self.memory, start = aligned(length)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        # What a virtual machine's host has not backed yet costs several times more: small pages and huge ones.
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE):
            self.memory.madvise(advice)
            self.memory[:] = bytes(len(self.memory))
            self.memory.madvise(mmap.MADV_DONTNEED)
        self.uffd = Userfaultfd()  # without events: the discards between the rounds wait for nobody
        self.region = self.uffd.register(memoryview(self.memory)[start : start + length])
        self.claimed, self.received = Bitmap(self.pages), Bitmap(self.pages)
        self.source_address = ctypes.addressof(ctypes.c_char.from_buffer(self.source))

    def close(self) -> None:
        """Close the descriptor."""
        self.uffd.close()

    def rows(self, only: str = "") -> Iterator[Row]:
        """The rows of the groups whose name contains `only`."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.cpus[0]})
        try:
            for name in GROUPS:
                if only in name:
                    yield from getattr(self, name)()
        finally:
            os.sched_setaffinity(0, before)

    def _clear(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.claimed.reset()
        self.received.reset()

    def _cut(self, chunk: int) -> list[tuple[int, memoryview]]:
        return [(at // PAGE, self.source[at : at + chunk]) for at in range(0, self.length, chunk)]

    def _contend(self, call: Callable[[], int]) -> Contender:
        return Contender(call, self._clear)

    def _compare(
        self, names: tuple[str, str, str], must: float | None, ours: Callable[[], int], floor: Callable[[], int]
    ) -> Row:
        mine, theirs = self._contend(ours), self._contend(floor)
        measure({"pagecore": mine, "floor": theirs}, self.rounds, None)
        assert mine.answer == theirs.answer, (mine.answer, theirs.answer)
        return Row(*names, ratio(mine, theirs), must, must, mine.median, theirs.median)

    def _floor_copy(self, chunk: int) -> Callable[[], int]:
        number, to = self.uffd.fileno(), self.region.address
        return lambda: _floor_uffd.copy(number, to, self.source_address, self.length, chunk) // PAGE

    def copy(self) -> Iterator[Row]:
        """Runs of missing pages by COPY, a call of Python each."""
        planes: dict[str, Any] = {"claimed": self.claimed, "received": self.received}
        for name, chunk in CHUNKS.items():
            if chunk == PAGE:
                continue
            pieces = self._cut(chunk)
            for case, keywords in ((name, {}), (f"{name}, with planes", planes)):

                def ours(pieces: Any = pieces, keywords: Any = keywords) -> int:
                    place = self.region.place
                    return sum(place(first, data, **keywords).placed for first, data in pieces)

                yield self._compare(("place", case, "UFFDIO_COPY"), 0.97, ours, self._floor_copy(chunk))

    def page(self) -> Iterator[Row]:
        """One page a call."""
        pieces = self._cut(PAGE)

        def ours() -> int:
            place = self.region.place
            total = 0
            for first, data in pieces:
                total += place(first, data).placed
            return total

        row = self._compare(("place", "4 KiB", "UFFDIO_COPY"), None, ours, self._floor_copy(PAGE))
        mine, theirs = row.nanoseconds / self.pages, row.peer_nanoseconds / self.pages
        yield Row("place", "4 KiB", "UFFDIO_COPY", mine - theirs, 500.0, 500.0, mine, theirs, "ns more")

    def zero(self) -> Iterator[Row]:
        """Runs of zeros."""
        number, to = self.uffd.fileno(), self.region.address
        count = BLOCK // PAGE

        def ours() -> int:
            place = self.region.place_zeros
            return sum(place(first, count).zeroed for first in range(0, self.pages, count))

        def floor() -> int:
            return _floor_uffd.zero(number, to, self.length, BLOCK) // PAGE

        yield self._compare(("place_zeros", "2 MiB", "UFFDIO_ZEROPAGE"), 0.95, ours, floor)

    def lose(self) -> Iterator[Row]:
        """Pages that are settled already, from C."""
        calls = 1 << 16
        self._clear()
        self.claimed.fill()
        arguments = (self.region, self.claimed, self.received, self.source_address, calls)
        ours = Contender(lambda: _floor_uffd.lose(*arguments))
        measure({"pagecore": ours}, self.rounds, None)
        assert ours.answer == calls
        each = ours.median / calls
        yield Row("c_place_run", "settled", "nothing", each, 100.0, 100.0, each, 0.0, "ns more")

    def move(self) -> Iterator[Row]:
        """Blocks by MOVE: all of the source, out of the cache, and one block of it again and again, which is in."""
        for prepared in (False, True):
            if prepared and len(self.cpus) < 2:
                continue
            for case, span in (("2 MiB", self.length), ("2 MiB, hot source", BLOCK)):
                yield self._move(case, span, prepared=prepared)

    def _move(self, case: str, span: int, *, prepared: bool) -> Row:
        mover = Mover(16 if prepared else 1)
        blocks = [(at // PAGE, self.source[at % span : at % span + BLOCK]) for at in range(0, self.length, BLOCK)]
        number, to = self.uffd.fileno(), self.region.address

        def ours() -> int:
            return sum(mover.place(self.region, first, data).moved for first, data in blocks)

        def floor() -> int:
            done = 0
            for first, _ in blocks:
                source = self.source_address + first * PAGE % span
                done += _floor_uffd.copy(number, to + first * PAGE, source, BLOCK, BLOCK)
            return done // PAGE

        helper = Helper(mover, self.cpus[-1]) if prepared else None
        try:
            label = f"{case}, prepared" if prepared else case
            row = self._compare(("Mover.place", label, "UFFDIO_COPY"), 2.2, ours, floor)
        finally:
            if helper is not None:
                helper.stop()
        assert mover.blocks_huge == mover.blocks_moved > 0, "the result is huge pages"
        return row


class Helper:
    """A thread on another processor that makes huge pages ahead of need."""

    def __init__(self, mover: Mover, cpu: int) -> None:
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(mover, cpu), daemon=True)
        self._thread.start()

    def _run(self, mover: Mover, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        while not self._ended:
            mover.prepare(0.1)

    def stop(self) -> None:
        """End it."""
        self._ended = True
        self._thread.join(10)


GROUPS = ("copy", "page", "zero", "lose", "move")
