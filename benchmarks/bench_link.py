"""The reference controllers' link against plain C over the same kind of socket: bulk, and pages on demand.

``pytest benchmarks/bench_link.py`` runs each case once, small, and checks what arrived. As a program it measures::

    python benchmarks/bench_link.py [--rounds 7] [--size 512] [--link tcp] [--gate]

The source is a process of its own, on another processor where there are two. Contenders take turns at being first.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from floors import compiled, registered
from pagecore import Feature, PageState, PageTracker, PlacementLoop, Region, UnsupportedError, give_way, split_zero
from pagecore.migrate.answers import AnswerCounters, Answers
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.precopy import barrier
from pagecore.migrate.progress import Stop
from pagecore.migrate.receiver import PrecopyReceiver
from pagecore.migrate.sender import Outgoing, Pacer
from pagecore.migrate.tcp import tune_tcp
from pagecore.page_source import SocketSource
from pagecore.wire import FrameType, Hello

PAGE = 4096
HUGE = 2 << 20
# Huge pages to receive in, beyond those of the guest.
SPARE = 192 << 20
FRAME = 64 * PAGE
BATCH = 512 * PAGE
STREAMS = 2
PATIENCE = 20.0
SEED = 5
HERE = pathlib.Path(__file__).parent


def typed(link: ctypes.CDLL, fault: ctypes.CDLL) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    number, size, word, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
    for name, arguments in {
        "floor_send": [number, pointer, size, size, size],
        "floor_receive": [number, pointer, size, size],
        "floor_receive_and_place": [number, number, word, pointer, size, size],
        "floor_receive_and_move": [number, number, word, pointer, size, size],
        "floor_place": [number, word, pointer, size, size],
        "floor_answer": [number, pointer],
        "floor_ask": [number, number, word, pointer, size, pointer],
        "floor_read": [pointer, size],
    }.items():
        getattr(link, name).argtypes, getattr(link, name).restype = arguments, size
    fault.floor_touch.argtypes, fault.floor_touch.restype = [word, pointer, size, pointer], None
    return link, fault


def guest_memory(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def warm_up(nbytes: int) -> None:
    """Have the host back as many free huge pages: it takes free ones away again after two seconds (page_reporting)."""
    with mmap.mmap(-1, nbytes + SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), HUGE):
            memory[at] = 1


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def fill(memory: mmap.mmap) -> None:
    """Every page another content, none of it zeros."""
    words = np.frombuffer(memory, np.uint64)
    words[:] = np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def link_of(socks: list[socket.socket], npages: int) -> Link:
    """A link whose handshake is behind it."""
    names = ["control", *(f"bulk-{number}" for number in range(len(socks) - 2)), "urgent"]
    hello = Hello("control", "benchmark", 0, PAGE, {0: npages})
    return Link({name: Stream(sock, PATIENCE) for name, sock in zip(names, socks, strict=True)}, hello, hello)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Each call on a thread of its own; what they returned."""
    answers: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        answers[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# ------------------------------------------------------------------------------------------------- the source


class SourceProcess:
    """Runs in the child: one case after another, each over sockets of its own."""

    def __init__(self, floor: ctypes.CDLL, nbytes: int) -> None:
        self.floor, self.nbytes = floor, nbytes
        self.memory = guest_memory(nbytes)
        fill(self.memory)
        self.address = address_of(self.memory)
        self.cpus = sorted(os.sched_getaffinity(0))

    def serve(self, listener: socket.socket) -> None:
        while True:
            control, _ = listener.accept()
            with control:
                case = json.loads(control.recv(1 << 10))
                if case["name"] == "end":
                    return
                # A page on demand: each side on a processor of its own. In bulk: as the scheduler likes.
                os.sched_setaffinity(0, {self.cpus[0]} if "demand" in case["name"] else set(self.cpus))
                control.sendall(b"!")
                socks = [listener.accept()[0] for _ in range(case["streams"])]
                for sock in socks:
                    tune_tcp(sock)
                getattr(self, case["name"])(control, socks)
                for sock in socks:
                    sock.close()

    def floor_bulk(self, control: socket.socket, socks: list[socket.socket]) -> None:
        self._floor_send(control, socks, self.nbytes, FRAME)

    def _floor_send(self, control: socket.socket, socks: list[socket.socket], nbytes: int, frame: int) -> None:
        part = nbytes // len(socks)
        go(control)
        together(
            *(
                lambda number=number, sock=sock: self.floor.floor_send(
                    sock.fileno(), self.address + number * part, part, frame, BATCH
                )
                for number, sock in enumerate(socks)
            )
        )
        control.recv(1)

    def bulk(self, control: socket.socket, socks: list[socket.socket]) -> None:
        npages = self.nbytes // PAGE
        link = link_of([control, *socks], npages)
        outgoing = Outgoing(link, memoryview(self.memory).toreadonly(), PageTracker(npages), Pacer(None))
        control.settimeout(PATIENCE)
        go(control)
        assert outgoing.send_owed(None, lambda: None) == npages
        outgoing.mark(FrameType.END)
        control.sendall(b"e")
        control.recv(1)

    def floor_scattered(self, control: socket.socket, socks: list[socket.socket]) -> None:
        self._floor_send(control, socks, self.nbytes // 2, PAGE)

    def scattered(self, control: socket.socket, socks: list[socket.socket]) -> None:
        npages = self.nbytes // PAGE
        link = link_of([control, *socks], npages)
        tracker = PageTracker(npages, all_dirty=False)
        tracker.mark(np.array([(page, 1) for page in range(0, npages, 2)], np.int64))
        tracker.sync()
        outgoing = Outgoing(link, memoryview(self.memory).toreadonly(), tracker, Pacer(None))
        control.settimeout(PATIENCE)
        go(control)
        assert outgoing.send_owed(None, lambda: None) == npages // 2
        barrier(link, outgoing)
        link.send(FrameType.STATE)
        control.recv(1)

    def floor_demand(self, control: socket.socket, socks: list[socket.socket]) -> None:
        go(control)
        self.floor.floor_answer(socks[0].fileno(), self.address)

    def demand(self, control: socket.socket, socks: list[socket.socket], *, saturated: bool = False) -> None:
        npages = self.nbytes // PAGE
        link = link_of([control, *socks], npages)
        view = memoryview(self.memory).toreadonly()
        tracker = PageTracker(npages)
        outgoing = Outgoing(link, view, tracker, Pacer(None))
        answers = Answers(link, tracker, outgoing.urgent, AnswerCounters())
        control.settimeout(PATIENCE)
        answers.start()
        go(control)
        ended = threading.Event()

        def push(writer: Any, first: int) -> None:
            # The upper half, again and again: the destination drops what it has, at full speed.
            give_way()
            with contextlib.suppress(Exception):
                while not ended.is_set():
                    for page in range(npages // 2 + first * 512, npages, 512 * len(outgoing.bulk)):
                        writer.pages(np.array([(page, min(512, npages - page))], np.int64))

        pushers = [
            threading.Thread(target=push, args=(writer, number))
            for number, writer in enumerate(outgoing.bulk)
            if saturated
        ]
        for pusher in pushers:
            pusher.start()
        control.recv(1)
        ended.set()
        link.hang_up()
        for pusher in pushers:
            pusher.join()
        answers.close()

    def demand_beside_bulk(self, control: socket.socket, socks: list[socket.socket]) -> None:
        self.demand(control, socks, saturated=True)


def go(control: socket.socket) -> None:
    """Tell the destination that all is prepared, and start with it."""
    control.sendall(b"r")
    assert control.recv(1) == b"g"


# -------------------------------------------------------------------------------------------- the destination


class Rig:
    """The destination's memory, and the source in its process."""

    def __init__(self, link: ctypes.CDLL, fault: ctypes.CDLL, nbytes: int, family: str = "tcp") -> None:
        self.floor, self.fault = typed(link, fault)
        self.nbytes, self.npages = nbytes, nbytes // PAGE
        self.memory = guest_memory(nbytes)
        fill(self.memory)  # touched once: what the host has not backed yet costs several times more
        self.expected = np.frombuffer(self.memory, np.uint64)[:: PAGE // 8].copy()
        self.buffers = [guest_memory(BATCH) for _ in range(STREAMS)]
        for buffer in self.buffers:
            fill(buffer)
        self.stages = [mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(STREAMS)]
        for stage in self.stages:
            stage.madvise(mmap.MADV_HUGEPAGE)
        self.order = np.random.default_rng(SEED).permutation(self.npages // 2).astype(np.uint32)[:2000]
        self.took = np.empty(len(self.order), np.uint32)
        if family == "tcp":
            self.listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        else:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind("\0" + f"pagecore-bench-{os.getpid()}")
            self.listener.listen(16)
        self.child = os.fork()
        if self.child == 0:
            status = 1
            try:
                SourceProcess(self.floor, nbytes).serve(self.listener)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def close(self) -> None:
        with self._connected() as control:
            control.sendall(json.dumps({"name": "end"}).encode())
        _, status = os.waitpid(self.child, 0)
        assert status == 0
        self.listener.close()

    def _connected(self) -> socket.socket:
        sock = socket.socket(self.listener.family)
        sock.settimeout(PATIENCE)
        sock.connect(self.listener.getsockname())
        tune_tcp(sock)
        return sock

    @contextlib.contextmanager
    def case(self, name: str, streams: int) -> Iterator[tuple[socket.socket, list[socket.socket]]]:
        """The source stands ready for this case; (control, streams)."""
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(self._connected())
            control.sendall(json.dumps({"name": name, "streams": streams}).encode())
            assert control.recv(1) == b"!"
            socks = [stack.enter_context(self._connected()) for _ in range(streams)]
            for sock in socks:
                sock.setblocking(True)
            assert control.recv(1) == b"r"
            yield control, socks

    @contextlib.contextmanager
    def registered(self) -> Iterator[Region]:
        self.memory.madvise(mmap.MADV_DONTNEED)
        warm_up(self.nbytes)
        with registered(self.memory, Feature.EVENT_REMOVE | Feature.MOVE) as region:
            yield region

    def check(self, pages: Any = slice(None)) -> None:
        found = np.frombuffer(self.memory, np.uint64)[:: PAGE // 8]
        assert np.array_equal(found[pages], self.expected[pages]), "wrong bytes arrived"

    # ---- bulk: seconds for all of the memory

    def bulk(self) -> float:
        with self.registered() as region, self.case("bulk", STREAMS + 1) as (control, socks):
            source = SocketSource(socks[:-1], socks[-1], round=1)
            with PlacementLoop([region], source) as loop:
                before = time.perf_counter()
                control.sendall(b"g")
                assert loop.wait_settled(PATIENCE)
                took = time.perf_counter() - before
                assert loop.error is None
                # The last frame comes after all pages: its sender must not find the stream closed.
                assert control.recv(1) == b"e"
                control.sendall(b"e")
        self.check()
        return took

    def bare_link(self) -> float:
        return self._floor_receive("floor_bulk", self.nbytes, FRAME)

    def _floor_receive(self, case: str, nbytes: int, frame: int) -> float:
        part = nbytes // STREAMS
        with self.case(case, STREAMS) as (control, socks):
            calls = [
                lambda sock=sock, buffer=buffer: self.floor.floor_receive(
                    sock.fileno(), address_of(buffer), part, frame
                )
                for sock, buffer in zip(socks, self.buffers, strict=True)
            ]
            before = time.perf_counter()
            control.sendall(b"g")
            assert together(*calls) == [part] * STREAMS
            took = time.perf_counter() - before
            control.sendall(b"e")
        return took

    def bare_placement(self) -> float:
        with self.registered() as region:
            before = time.perf_counter()
            number, buffer = region.uffd.fileno(), address_of(self.buffers[0])
            assert self.floor.floor_place(number, region.address, buffer, self.nbytes, FRAME) == self.nbytes
            return time.perf_counter() - before

    def bare_both(self) -> float:
        return self._placed(self.floor.floor_receive_and_place, [address_of(buffer) for buffer in self.buffers])

    def bare_moves(self) -> float:
        return self._placed(
            self.floor.floor_receive_and_move, [-(-address_of(stage) // HUGE) * HUGE for stage in self.stages]
        )

    def _placed(self, receive: Callable[..., int], buffers: list[int]) -> float:
        part = self.nbytes // STREAMS
        with self.registered() as region, self.case("floor_bulk", STREAMS) as (control, socks):
            calls = [
                lambda at=region.address + number * part, sock=sock, buffer=buffer: receive(
                    sock.fileno(), region.uffd.fileno(), at, buffer, part, FRAME
                )
                for number, (sock, buffer) in enumerate(zip(socks, buffers, strict=True))
            ]
            before = time.perf_counter()
            control.sendall(b"g")
            assert together(*calls) == [part] * STREAMS
            took = time.perf_counter() - before
            control.sendall(b"e")
        self.check()
        return took

    # ---- precopy of every second page: seconds for all of them

    def scattered(self) -> float:
        # In memory that is there already, as in all rounds but the first.
        np.frombuffer(self.memory, np.uint64)[:: PAGE // 8] = 0
        with self.case("scattered", STREAMS + 1) as (control, socks):
            link = link_of([control, *socks], self.npages)
            receiver = PrecopyReceiver(link, self.memory, PageState(self.npages), PATIENCE, lambda _: None)
            before = time.perf_counter()
            control.sendall(b"g")
            receiver.run(Stop(PATIENCE))
            took = time.perf_counter() - before
            control.sendall(b"e")
        self.check(slice(None, None, 2))
        return took

    def bare_scattered(self) -> float:
        return self._floor_receive("floor_scattered", self.nbytes // 2, PAGE)

    # ---- on demand: microseconds a page, (median, p99)

    def bare_demand(self) -> tuple[float, float]:
        with self.registered() as region, self.case("floor_demand", 1) as (control, socks):
            control.sendall(b"g")
            arguments = (region.address, self.order.ctypes.data, len(self.order), self.took.ctypes.data)
            assert self.floor.floor_ask(socks[0].fileno(), region.uffd.fileno(), *arguments) == len(self.order)
        self.check(self.order)
        return self._percentiles()

    def demand(self, name: str = "demand") -> tuple[float, float]:
        with self.registered() as region, self.case(name, STREAMS + 1) as (control, socks):
            source = SocketSource(socks[:-1], socks[-1], round=1)
            with PlacementLoop([region], source, around=1) as loop:
                control.sendall(b"g")
                if name == "demand_beside_bulk":
                    assert loop.wait_resident(0.02, PATIENCE), "the bulk is under way"
                self.fault.floor_touch(region.address, self.order.ctypes.data, len(self.order), self.took.ctypes.data)
                assert loop.error is None
                control.sendall(b"e")
        self.check(self.order)
        return self._percentiles()

    def demand_beside_bulk(self) -> tuple[float, float]:
        return self.demand("demand_beside_bulk")

    def _percentiles(self) -> tuple[float, float]:
        return float(np.median(self.took)) / 1e3, float(np.percentile(self.took, 99)) / 1e3

    # ---- looking for zeros: seconds

    def zeros(self) -> tuple[float, float]:
        """split_zero over memory that is all zeros, and one read of it in C."""
        self.memory.madvise(mmap.MADV_DONTNEED)
        np.frombuffer(self.memory, np.uint64)[:] = 0
        runs = np.array([(0, self.npages)], np.int64)
        before = time.perf_counter()
        data, zeros = split_zero(memoryview(self.memory), runs, PAGE)
        between = time.perf_counter()
        assert self.floor.floor_read(address_of(self.memory), self.nbytes // 8) == 0
        after = time.perf_counter()
        assert len(data) == 0
        assert zeros.tolist() == [[0, self.npages]]
        return between - before, after - between


SMALL = 8 << 20
BULK = ("bulk", "bare_link", "bare_placement", "bare_both", "bare_moves")
CASES = (*BULK, "scattered", "bare_scattered", "bare_demand", "demand", "demand_beside_bulk", "zeros")


@pytest.mark.parametrize("name", CASES)
def test_link(compile_floor: Callable[[str], ctypes.CDLL], benchmark: Any, name: str) -> None:
    try:
        rig = Rig(compile_floor("floor_link.c"), compile_floor("floor_fault.c"), SMALL)
        try:
            getattr(rig, name)()
            benchmark.pedantic(getattr(rig, name), rounds=3)
        finally:
            rig.close()
    except UnsupportedError as error:
        pytest.skip(str(error))


class Table:
    """Ratios of rounds, as rows of Markdown."""

    def __init__(self) -> None:
        self.missed = 0
        print("| what | pagecore | against | its figure | ratio | bound |\n| --- | --- | --- | --- | --- | --- |")

    def row(
        self, what: str, peer: str, ours: list[float], theirs: list[float], show: Callable[[float], str], *,
        least: float | None = None, most: float | None = None,
    ) -> None:  # fmt: skip
        """One row; the figures are such that less is better where `most` bounds them, and more where `least` does."""
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        missed = (least is not None and ratio < least) or (most is not None and ratio > most)
        self.missed += missed
        bound = f"at least {least}" if least is not None else f"at most {most}" if most is not None else ""
        figures = f"{show(statistics.median(ours))} | {peer} | {show(statistics.median(theirs))}"
        print(f"| {what} | {figures} | {ratio:.2f}{' **missed**' if missed else ''} | {bound} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=512, help="MiB of guest memory")
    parser.add_argument("--link", choices=["tcp", "unix"], default="tcp")
    parser.add_argument("--gate", action="store_true", help="exit with 1 where a ratio misses its bound")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    rig = Rig(compiled("floor_link.c"), compiled("floor_fault.c"), options.size << 20, options.link)
    figures: dict[str, list[Any]] = {name: [] for name in CASES}
    try:
        for number in range(options.rounds + 1):
            for name in CASES if number % 2 else CASES[::-1]:
                os.sched_setaffinity(0, {cpus[-1]} if "demand" in name else set(cpus))
                figure = getattr(rig, name)()
                if number:  # the first round warms up
                    figures[name].append(figure)
    finally:
        rig.close()
    table = Table()
    speed = {name: [rig.nbytes / seconds / 1e9 for seconds in figures[name]] for name in BULK}
    best = {name: [max(each)] for name, each in speed.items()}
    slower = min("bare_link", "bare_placement", key=lambda name: best[name])
    gigabytes = "{:.2f} GB/s".format
    table.row(
        "bulk, two streams, best round", slower.replace("_", " "), best["bulk"], best[slower], gigabytes, least=0.8
    )
    table.row("the same, median", "link and COPY in C", speed["bulk"], speed["bare_both"], gigabytes)
    # On two processors no program that does both reaches the slower of the two: this one tells what can be asked for.
    table.row(
        "the same, median", "link, huge pages and MOVE in C", speed["bulk"], speed["bare_moves"], gigabytes, least=0.8
    )
    scattered = [
        [rig.nbytes / 2 / seconds / 1e9 for seconds in figures[name]] for name in ("scattered", "bare_scattered")
    ]
    table.row("precopy of every second page, median", "the same frames in C, two calls each", *scattered, gigabytes)
    zeros = [[rig.nbytes / each[side] / 1e9 for each in figures["zeros"]] for side in (0, 1)]
    table.row("zero pages found", "one read of the memory", *zeros, "{:.2f} GB/s".format, least=0.8)
    (ours, ours99), (bare, _), (_, beside99) = (
        ([each[0] for each in figures[name]], [each[1] for each in figures[name]])
        for name in ("demand", "bare_demand", "demand_beside_bulk")
    )
    table.row("a page on demand, median", "request, answer and COPY in C", ours, bare, "{:.0f} µs".format, most=2.0)
    table.row("beside a saturated bulk, p99", "idle, p99", beside99, ours99, "{:.0f} µs".format, most=4.0)
    return 1 if options.gate and table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
