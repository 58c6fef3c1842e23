"""Dirty logs: what a collect costs beside the bare kernel call and the naive ways, and what it costs the writers."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecore._bitmap import Bitmap
from pagecore.bench import _floor, _floor_dirty
from pagecore.bench.bitmap import Row, address
from pagecore.bench.rounds import Contender, measure, ratio
from pagecore.dirty_log import (
    DirtyLog,
    KvmDirtyLog,
    KvmDirtyRing,
    KvmManualDirtyLog,
    KvmRingDirtyLog,
    MemoryDirtyLog,
    PagemapDirtyLog,
    WriteProtectDirtyLog,
)
from pagecore.errors import UnsupportedError

__all__ = ["GROUPS", "SHARES", "DirtyLogSuite"]

PAGE = 4096
SHARES = (0.0, 0.01, 1.0)
GATED = 0.01
# Of a share of 1 a round takes seconds, and varies little.
ROUNDS_OF_ALL = 3
SCAN_RUNS = 8192
SCAN_MUST, KVM_MUST, RING_MUST = 1 / 1.10, 1 / 1.3, 1 / 1.5
READ_MUST, COMPARE_MUST = 2.0, 10.0
# Of a ring of the greatest size.
RING_BYTES = 1 << 20
ENTRY = 16
# So many pages fit into a ring, less what KVM keeps free; writing more of them than these, each with its fault, takes
# minutes. All pages are written of so much, and shares of the whole.
ALL_SIZE = 254 << 20


class Pages:
    """A list of pages to be written: a share of all of them, no two of them neighbours unless it is all."""

    def __init__(self, npages: int, share: float) -> None:
        self.share = share
        if share == 1:
            chosen = np.arange(npages)
        else:
            chosen = 2 * np.random.default_rng(1).permutation(npages // 2)[: round(npages * share)]
        self.numbers: npt.NDArray[np.uint32] = chosen.astype(np.uint32)
        self.address = address(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Peer:
    """Another way to do what a collect does, with the ratio that ours must have to it, and the writes it looks at.

    `marks`: it leaves a bit for each page in the words that all peers share.
    """

    call: Callable[[], object]
    must: float | None = None
    write: Callable[[Pages], object] | None = None
    marks: bool = True


class Words:
    """A plain bitmap for the peers, which begins each call empty."""

    def __init__(self, npages: int) -> None:
        self.array = np.zeros((npages + 63) // 64, np.uint64)
        self.address = address(self.array)

    def clear(self) -> None:
        """All zeros."""
        self.array[:] = 0

    def count(self) -> int:
        """Bits that are 1."""
        return Bitmap.from_buffer(self.array.data, 64 * len(self.array)).count()


class DirtyLogSuite:
    """All rows; `rounds` paired rounds each, of which the median counts. On one processor.

    Parameters
    ----------
    rounds : int
    size : int
        Bytes of the memory: at most 1 GiB. The gates are of 1 GiB.

    Raises
    ------
    ValueError
        If the size is no multiple of 2 MiB in [16 MiB, 1 GiB].
    """

    def __init__(self, rounds: int = 9, size: int = 1 << 30) -> None:
        if size % (2 << 20) or not 16 << 20 <= size <= 1 << 30:
            raise ValueError(f"size {size} is not a multiple of 2 MiB in [{16 << 20}, {1 << 30}]")
        self.rounds = rounds
        self.size = size
        self.npages = size // PAGE
        self.lists = {share: Pages(self.npages, share) for share in SHARES}
        self.words = Words(self.npages)
        self.skipped: dict[str, str] = {}

    def rows(self, only: str = "") -> Iterator[Row]:
        """The rows of the groups whose name contains `only`; what this machine cannot do is left in `skipped`."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            for name in GROUPS:
                if only in name:
                    try:
                        yield from getattr(self, name)()
                    except UnsupportedError as error:
                        self.skipped[name] = str(error)
        finally:
            os.sched_setaffinity(0, before)

    # ---- parts

    def _memory(self, stack: ExitStack) -> tuple[mmap.mmap, int]:
        """Anonymous memory in small pages, which the host of a virtual machine has backed before."""
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        stack.callback(memory.close)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        everything = self.lists[1.0]
        _floor_dirty.write(at, everything.address, len(everything))
        memory.madvise(mmap.MADV_DONTNEED)
        _floor_dirty.write(at, everything.address, len(everything))
        return memory, at

    def _case(self, share: float) -> str:
        size = f"{self.size >> 30} GiB" if self.size >= 1 << 30 else f"{self.size >> 20} MiB"
        return f"{size}, {share * 100:g} %"

    def _vm(self, stack: ExitStack, at: int, ring: int = 0) -> _floor_dirty.WriterVm:
        try:
            vm = _floor_dirty.WriterVm(at, self.size, ring)
        except OSError as error:
            raise UnsupportedError("KVM", f"{error.strerror}: see pagecore doctor") from error
        stack.callback(vm.close)
        return vm

    def _in_two(self, part: Callable[[DirtyLogSuite, tuple[float, ...]], Iterator[Row]]) -> Iterator[Row]:
        """All shares but the last, and that of less memory."""
        if self.size <= ALL_SIZE:
            yield from part(self, SHARES)
        else:
            yield from part(self, SHARES[:-1])
            yield from part(DirtyLogSuite(self.rounds, ALL_SIZE), SHARES[-1:])

    def _rounds(self, share: float) -> int:
        return min(self.rounds, ROUNDS_OF_ALL) if share == 1 else self.rounds

    def _collects(
        self,
        name: str,
        log: DirtyLog,
        write: Callable[[Pages], object],
        peers: dict[str, Peer],
        *,
        shares: tuple[float, ...] = SHARES,
        afterwards: Callable[[], object] = lambda: None,
    ) -> Iterator[Row]:
        """A collect with its re-arm, of each share; beside the peers, of which some arm nothing: `afterwards` does."""
        bitmap = Bitmap(self.npages)
        collect = collector(log, bitmap)
        write(self.lists[GATED])  # a ring does not know its place before
        collect()
        for share in shares:
            pages = self.lists[share]

            def prepare(write: Callable[[Pages], object], pages: Pages = pages) -> None:
                afterwards()
                bitmap.reset()
                self.words.clear()
                write(pages)

            # Pair by pair: one that goes through all of the memory would leave a cold cache to whoever comes next.
            alone: dict[str, Peer | None] = {"itself": None}
            for against, peer in (peers or alone).items():
                contenders = {"pagecore": Contender(collect, functools.partial(prepare, write))}
                if peer is not None:
                    contenders[against] = Contender(peer.call, functools.partial(prepare, peer.write or write))
                measure(contenders, self._rounds(share), None)
                prepare(write)
                collect()
                # A wrong answer is no result.
                assert bitmap.count() == len(pages), (name, share, bitmap.count(), len(pages))
                if peer is not None:
                    prepare(peer.write or write)
                    peer.call()
                    assert not peer.marks or self.words.count() == len(pages), (name, share, against)
                ours, theirs = contenders["pagecore"], list(contenders.values())[-1]
                must = peer.must if peer is not None and share == GATED else None
                yield Row(name, self._case(share), against, ratio(ours, theirs), must, must, ours.median, theirs.median)
        afterwards()

    def _writes(self, name: str, rearm: Callable[[], object], write: Callable[[Pages], object]) -> Row:
        """What the first write to a page costs after its re-arm, more than any other one."""
        pages = self.lists[GATED]
        return self._costs(f"first write, {name}", Contender(lambda: write(pages), rearm), lambda: write(pages))

    def _costs(self, name: str, logged: Contender, plain: Callable[[], object]) -> Row:
        """A row of nanoseconds a page; `plain` writes once before it is timed."""
        peer = Contender(plain, plain)
        measure({"logged": logged, "plain": peer}, self.rounds, None)
        mine, theirs = (contender.median / len(self.lists[GATED]) for contender in (logged, peer))
        return Row(name, self._case(GATED), "plain write", mine - theirs, None, None, mine, theirs, "ns more")

    # ---- logs

    def memory(self) -> Iterator[Row]:
        """The log in memory, whose writers set the bits."""
        with ExitStack() as stack:
            _, at = self._memory(stack)
            log = MemoryDirtyLog(self.npages)
            bits, pages = address(log.bitmap), self.lists[GATED]

            def write(pages: Pages) -> None:
                _floor_dirty.write_and_mark(at, pages.address, len(pages), bits)

            def drain() -> int:
                return _floor.drain(bits, self.words.address, self.npages // 64)

            def mark() -> None:
                write(pages)

            def plain() -> None:
                _floor_dirty.write(at, pages.address, len(pages))

            yield from self._collects("memory", log, write, {"drain in C": Peer(drain)})
            yield self._costs("each write, memory", Contender(mark, mark), plain)

    def kvm_get(self) -> Iterator[Row]:
        """KVM's dirty bitmap."""
        return self._in_two(DirtyLogSuite._kvm_get)

    def _kvm_get(self, shares: tuple[float, ...]) -> Iterator[Row]:
        with ExitStack() as stack:
            _, at = self._memory(stack)
            vm = self._vm(stack, at)
            write = writer(vm)
            write(self.lists[1.0])  # before it is logged: a fault for several pages
            log = KvmDirtyLog(vm.vm_fd, self.npages, host_address=at)
            stack.callback(log.close)
            log.enable()

            def get() -> int:
                return _floor_dirty.kvm_get(vm.vm_fd, 0, self.words.address)

            yield from self._collects("KVM get", log, write, {"KVM_GET_DIRTY_LOG": Peer(get, KVM_MUST)}, shares=shares)
            if GATED in shares:
                yield self._writes("KVM get", get, write)

    def kvm_clear(self) -> Iterator[Row]:
        """KVM's dirty bitmap with manual protection."""
        return self._in_two(DirtyLogSuite._kvm_clear)

    def _kvm_clear(self, shares: tuple[float, ...]) -> Iterator[Row]:
        with ExitStack() as stack:
            _, at = self._memory(stack)
            vm = self._vm(stack, at)
            write = writer(vm)
            write(self.lists[1.0])
            log = KvmManualDirtyLog(vm.vm_fd, self.npages, host_address=at)
            stack.callback(log.close)
            log.enable()

            def clear() -> int:
                return _floor_dirty.kvm_clear(vm.vm_fd, 0, self.words.address, self.npages)

            yield from self._collects("KVM clear", log, write, {"GET and CLEAR": Peer(clear)}, shares=shares)
            if GATED in shares:
                yield self._writes("KVM clear", clear, write)

    def kvm_ring(self) -> Iterator[Row]:
        """KVM's dirty ring."""
        yield from self._in_two(DirtyLogSuite._kvm_ring)
        yield self._ring_take()

    def _kvm_ring(self, shares: tuple[float, ...]) -> Iterator[Row]:
        with ExitStack() as stack:
            _, at = self._memory(stack)
            # Two machines over the same memory: each has a ring, and whoever reads it a place in it.
            mine, theirs = self._vm(stack, at, RING_BYTES), self._vm(stack, at, RING_BYTES)
            ring = KvmDirtyRing(mine.vm_fd, [mine.vcpu_fd], RING_BYTES)
            stack.callback(ring.close)
            write, write_theirs = writer(mine, ring.reap), writer(theirs)
            write(self.lists[1.0])
            write_theirs(self.lists[1.0])
            log = KvmRingDirtyLog(ring, self.npages, host_address=at)
            stack.callback(log.close)
            log.enable()
            switch = KvmDirtyLog(theirs.vm_fd, self.npages, host_address=at)
            stack.callback(switch.close)
            switch.enable()  # the pages go into the ring
            place = np.zeros(1, np.uint32)
            place_at = address(place)

            def reap() -> int:
                return _floor_dirty.ring(
                    theirs.ring_address, RING_BYTES // ENTRY - 1, place_at, self.words.address, theirs.vm_fd
                )

            peer = Peer(reap, RING_MUST, write_theirs)
            yield from self._collects("KVM ring", log, write, {"a loop and the reset": peer}, shares=shares)
            if GATED in shares:
                yield self._writes("KVM ring", collector(log, Bitmap(self.npages)), write)

    def _ring_take(self) -> Row:
        """The entries alone, without the kernel's part."""
        pages = (
            np.random.default_rng(2)
            .permutation(self.npages)[: min(ALL_SIZE // PAGE, self.npages // 2)]
            .astype(np.uint32)
        )
        entries = np.zeros((RING_BYTES // ENTRY, 2), np.uint64)
        place = np.zeros(1, np.uint32)
        at, mask, words = address(entries), RING_BYTES // ENTRY - 1, self.words.address

        def fill() -> None:
            place[0] = 0
            self.words.clear()
            _floor_dirty.ring_fill(at, address(pages), len(pages))

        place_at = address(place)
        ours = Contender(lambda: _floor_dirty.ring_take(at, mask, words, self.npages), fill)
        theirs = Contender(lambda: _floor_dirty.ring(at, mask, place_at, words, -1), fill)
        measure({"pagecore": ours, "loop": theirs}, self.rounds, None)
        assert ours.answer == theirs.answer == len(pages), (ours.answer, theirs.answer)
        case = f"{len(pages)} entries"
        return Row(
            "KVM ring, take", case, "a loop", ratio(ours, theirs), RING_MUST, RING_MUST, ours.median, theirs.median
        )

    def pagemap(self) -> Iterator[Row]:
        """PAGEMAP_SCAN, and the ways to find written pages without it."""
        with ExitStack() as stack:
            memory, at = self._memory(stack)
            log = stack.enter_context(PagemapDirtyLog(memory))
            number = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, number)
            runs = np.ones((SCAN_RUNS, 3), np.uint64)
            entries = np.ones(self.npages, np.uint64)
            _, copy = self._memory(stack)

            def write(pages: Pages) -> None:
                _floor_dirty.write(at, pages.address, len(pages))

            runs_at, entries_at = address(runs), address(entries)

            def scan() -> int:
                return _floor_dirty.scan(number, at, self.size, runs_at, SCAN_RUNS)

            def read() -> int:
                return _floor_dirty.read_pagemap(number, at, self.npages, entries_at, self.words.address)

            def compare() -> int:
                return _floor_dirty.compare(at, copy, self.npages, self.words.address)

            def arm() -> None:
                _floor_dirty.scan(number, at, self.size, 0, 0)

            peers = {
                "PAGEMAP_SCAN": Peer(scan, SCAN_MUST, marks=False),
                "read of pagemap": Peer(read, READ_MUST),
                "memcmp with a copy": Peer(compare, COMPARE_MUST),
            }
            compare()
            yield from self._collects("pagemap", log, write, peers, afterwards=arm)
            yield self._writes("pagemap", arm, write)
            yield self._writes("pagemap, KVM guest", arm, writer(self._vm(stack, at)))

    def write_protect(self) -> Iterator[Row]:
        """Writes that are stopped until a thread has noted them."""
        return self._in_two(DirtyLogSuite._write_protect)

    def _write_protect(self, shares: tuple[float, ...]) -> Iterator[Row]:
        with ExitStack() as stack:
            memory, at = self._memory(stack)
            log = stack.enter_context(WriteProtectDirtyLog(memory))

            def write(pages: Pages) -> None:
                _floor_dirty.write(at, pages.address, len(pages))

            yield from self._collects("write-protect", log, write, {}, shares=shares)
            if GATED in shares:
                yield self._writes("write-protect", collector(log, Bitmap(self.npages)), write)

    def trap(self) -> Iterator[Row]:
        """mprotect and a signal handler: no log of ours, for comparison."""
        with ExitStack() as stack:
            _, at = self._memory(stack)
            _floor_dirty.trap_on(at, self.size, self.words.address)
            stack.callback(_floor_dirty.trap_off)

            def write(pages: Pages) -> None:
                _floor_dirty.write(at, pages.address, len(pages))

            for share in SHARES:
                arm = Contender(_floor_dirty.trap_arm, functools.partial(write, self.lists[share]))
                measure({"arm": arm}, self._rounds(share), None)
                yield Row("mprotect", self._case(share), "itself", 1.0, None, None, arm.median, arm.median)
            yield self._writes("mprotect", _floor_dirty.trap_arm, write)


def collector(log: DirtyLog, bitmap: Bitmap) -> Callable[[], int]:
    """A collect and all of its re-arm."""
    if log.rearms_at_collect:
        return lambda: log.collect_into(bitmap)

    def both() -> int:
        newly = log.collect_into(bitmap)
        log.rearm_seen(0, log.size, bitmap)
        return newly

    return both


def writer(vm: _floor_dirty.WriterVm, ring_full: Callable[[], object] | None = None) -> Callable[[Pages], None]:
    """Writes by the guest of a virtual machine; a list that was written before needs not be loaded again."""
    loaded: list[Any] = [None]

    def write(pages: Pages) -> None:
        if not len(pages):
            return
        if loaded[0] is not pages:
            vm.load(pages.address, len(pages))
            loaded[0] = pages
        vm.run(ring_full)

    return write


GROUPS = ("memory", "kvm_get", "kvm_clear", "kvm_ring", "pagemap", "write_protect", "trap")
