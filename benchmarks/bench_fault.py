"""Faults served by PlacementLoop against a minimal handler in C, in paired rounds on the same memory.

``pytest benchmarks/bench_fault.py`` runs each case once and checks what the guest read. As a program it measures::

    python benchmarks/bench_fault.py [--rounds 9] [--pages 2000] [--gate]

Each round discards the memory, opens and registers a new descriptor, starts the handler, touches the pages, and stops
it; the contenders take turns at being first. A latency is that of the touch, as its thread sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import mmap
import os
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from floors import compiled, registered
from pagecore import Feature, PlacementLoop, Region, UnsupportedError
from pagecore.page_source import BufferSource

PAGE = 4096
HERE = pathlib.Path(__file__).parent


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    number, size, word, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
    library.floor_start.argtypes, library.floor_start.restype = [number, word, word], pointer
    library.floor_stop.argtypes, library.floor_stop.restype = [pointer], None
    library.floor_touch.argtypes, library.floor_touch.restype = [word, pointer, size, pointer], None
    library.floor_touch_together.argtypes, library.floor_touch_together.restype = [word, pointer, size, size], word
    return library


class Rig:
    """Memory, its content, and the C functions."""

    def __init__(self, library: ctypes.CDLL, npages: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.floor, self.npages = typed(library), npages
        self.memory, self.source = mmap.mmap(-1, npages * PAGE, flags=flags), mmap.mmap(-1, npages * PAGE, flags=flags)
        for memory in (self.memory, self.source):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.source[:] = np.random.default_rng(1).integers(1, 256, npages * PAGE, dtype=np.uint8).tobytes()
        self.memory[:] = self.source[
            :
        ]  # touched once: memory that the host has not backed yet costs several times more
        self.order = np.random.default_rng(2).permutation(npages).astype(np.uint32)
        self.sequence = np.arange(npages, dtype=np.uint32)
        self.took = np.empty(npages, np.uint32)
        self.before = 0

    @contextlib.contextmanager
    def registered(self) -> Iterator[Region]:
        self.memory.madvise(mmap.MADV_DONTNEED)
        with registered(self.memory, Feature.EVENT_REMOVE) as region:
            yield region

    @contextlib.contextmanager
    def handler(self, region: Region) -> Iterator[None]:
        source = ctypes.addressof(ctypes.c_char.from_buffer(self.source))
        handle = self.floor.floor_start(region.uffd.fileno(), region.address, source)
        yield
        self.floor.floor_stop(handle)

    @contextlib.contextmanager
    def loop(self, region: Region, **options: Any) -> Iterator[None]:
        with PlacementLoop([region], BufferSource(self.source), **options) as loop:
            yield
            assert loop.error is None

    def touch(self, region: Region, order: np.ndarray) -> np.ndarray:
        self.floor.floor_touch(region.address, order.ctypes.data, len(order), self.took.ctypes.data)
        self.took[0] += self.before
        return self.took[: len(order)]

    def touch_together(self, region: Region, threads: int) -> int:
        return int(self.floor.floor_touch_together(region.address, self.order.ctypes.data, self.npages, threads))

    def right(self) -> bool:
        """Compared in place: copies would change which memory the next round is given."""
        one, two = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (self.memory, self.source))
        return (
            ctypes.CDLL(None).memcmp(ctypes.c_void_p(one), ctypes.c_void_p(two), ctypes.c_size_t(len(self.source))) == 0
        )


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    """Threads that are started in here stay on this processor too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """Python code that never lets go of the GIL by itself, on the other processors."""
    over = False
    others = os.sched_getaffinity(0) - {max(os.sched_getaffinity(0))} or os.sched_getaffinity(0)

    def spin() -> None:
        os.sched_setaffinity(0, others)
        while not over:
            sum(range(200))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        over = True
        thread.join()


def one_by_one(rig: Rig, serve: Callable[[Region], Any]) -> dict[str, float]:
    with on_one_cpu(), rig.registered() as region, serve(region):
        took = rig.touch(region, rig.order)
        return {"median": float(np.median(took)), "p99": float(np.percentile(took, 99))}


def beside_python(rig: Rig, serve: Callable[[Region], Any]) -> dict[str, float]:
    with busy_thread():
        return one_by_one(rig, serve)


def together(rig: Rig, serve: Callable[[Region], Any]) -> dict[str, float]:
    with rig.registered() as region, serve(region):
        return {"ns a page": rig.touch_together(region, 8) / rig.npages}


def in_sequence(rig: Rig, serve: Callable[[Region], Any]) -> dict[str, float]:
    with rig.registered() as region, serve(region):
        return {"ns a page": float(rig.touch(region, rig.sequence).sum()) / rig.npages}


def in_sequence_on_one_cpu(rig: Rig, serve: Callable[[Region], Any]) -> dict[str, float]:
    with on_one_cpu():
        return in_sequence(rig, serve)


@contextlib.contextmanager
def placed_before(rig: Rig, region: Region) -> Iterator[None]:
    """The limit: all pages by COPY of 64 KiB, as the loop does it, and no fault; adds its time to the first touch."""
    view, step = memoryview(rig.source), 16
    before = time.perf_counter_ns()
    for first in range(0, rig.npages, step):
        region.place(first, view[first * PAGE : (first + step) * PAGE])
    rig.before = time.perf_counter_ns() - before
    yield
    rig.before = 0


@dataclass
class Case:
    """What is measured, whose numbers are divided by whose, and the bound of each."""

    measure: Callable[[Rig, Callable[[Region], Any]], dict[str, float]]
    contenders: dict[str, Callable[[Rig], Callable[[Region], Any]]]
    bounds: dict[str, float]
    numbers: dict[str, list[dict[str, float]]] = field(default_factory=dict)


def handler(rig: Rig) -> Callable[[Region], Any]:
    return rig.handler


def loop(rig: Rig) -> Callable[[Region], Any]:
    return rig.loop


def loop_without_guesses(rig: Rig) -> Callable[[Region], Any]:
    return lambda region: rig.loop(region, around=1)


def limit(rig: Rig) -> Callable[[Region], Any]:
    return lambda region: placed_before(rig, region)


def cases() -> dict[str, Case]:
    against_floor = {"loop": loop, "floor": handler}
    return {
        "one fault at a time": Case(one_by_one, against_floor, {"median": 1.10, "p99": 1.25}),
        "beside a busy Python thread": Case(beside_python, against_floor, {"median": 1.15, "p99": 1.5}),
        "8 faulting threads": Case(together, against_floor, {"ns a page": 1.0}),
        "in sequence, against page by page": Case(
            in_sequence, {"loop": loop, "page by page": loop_without_guesses}, {"ns a page": 1 / 5}
        ),
        "the same on one CPU": Case(
            in_sequence_on_one_cpu, {"loop": loop, "page by page": loop_without_guesses}, {"ns a page": 1 / 5}
        ),
        "its limit: no faults at all": Case(
            in_sequence_on_one_cpu, {"limit": limit, "page by page": loop_without_guesses}, {"ns a page": 1 / 5}
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_fault(compile_floor: Callable[[str], ctypes.CDLL], benchmark: Any, name: str) -> None:
    try:
        rig = Rig(compile_floor("floor_fault.c"), 512)
        case = cases()[name]
        for contender in case.contenders.values():
            numbers = case.measure(rig, contender(rig))
            assert numbers.keys() == case.bounds.keys()
            assert rig.right()
        benchmark.pedantic(lambda: case.measure(rig, next(iter(case.contenders.values()))(rig)), rounds=3)
    except UnsupportedError as error:
        pytest.skip(str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pages", type=int, default=2000, help="faults a round")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--gate", action="store_true", help="exit with 1 where a ratio is above its bound")
    options = parser.parse_args()
    rig = Rig(compiled("floor_fault.c"), options.pages)
    missed = 0
    print("| case | what | loop | floor | ratio | at most |\n| --- | --- | --- | --- | --- | --- |")
    for name, case in cases().items():
        if options.only not in name:
            continue
        names = list(case.contenders)
        case.numbers = {each: [] for each in names}
        for number in range(options.rounds + 1):
            gc.collect()
            for each in names if number % 2 else names[::-1]:
                measured = case.measure(rig, case.contenders[each](rig))
                assert rig.right(), f"{name}: {each} served wrong bytes"
                if number:  # the first round warms up
                    case.numbers[each].append(measured)
        for what, bound in case.bounds.items():
            ours, peer = ([each[what] for each in case.numbers[who]] for who in names)
            ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
            missed += ratio > bound
            mark = "" if ratio <= bound else " **missed**"
            values = f"{statistics.median(ours):.0f} ns | {statistics.median(peer):.0f} ns"
            print(f"| {name} | {what} | {values} | {ratio:.3f}{mark} | {bound:.2f} |", flush=True)
    return 1 if options.gate and missed else 0


if __name__ == "__main__":
    sys.exit(main())
