"""Precopy of scattered pages: many frames in a system call, and nothing taken that is another reader's."""

from __future__ import annotations

import contextlib
import mmap
import random
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PageState, PageTracker
from pagecore.errors import ProtocolError
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.precopy import barrier
from pagecore.migrate.progress import Stop
from pagecore.migrate.receiver import PrecopyReceiver
from pagecore.migrate.sender import Outgoing, Pacer
from pagecore.wire import FrameType, Hello, encode_frame, encode_header, stream_names

pytestmark = pytest.mark.timeout(60)

PAGE = 4096
NPAGES = 2048


def frame(first: int, count: int = 1, *, fill: int = 1, round: int = 1) -> bytes:
    header = encode_header(FrameType.PAGES, round=round, first=first, count=count, length=count * PAGE)
    return header + bytes([fill]) * (count * PAGE)


def zeros(first: int, count: int, *, round: int = 1) -> bytes:
    return encode_header(FrameType.ZEROS, round=round, first=first, count=count)


def mark(round: int) -> bytes:
    return encode_frame(FrameType.ROUND, round=round)


class Destination:
    """A receiver at work, and the peer's ends of its streams."""

    def __init__(self, stack: contextlib.ExitStack, streams: int) -> None:
        pairs = {name: socket.socketpair() for name in stream_names(streams)}
        for _, theirs in pairs.values():
            stack.callback(theirs.close)
        hello = Hello("control", "test", 0, PAGE, {0: NPAGES}, streams=streams)
        self.link = Link({name: Stream(ours, DEADLINE) for name, (ours, _) in pairs.items()}, hello, hello)
        stack.callback(self.link.close)
        self.peer = {name: theirs for name, (_, theirs) in pairs.items()}
        self.memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        stack.callback(self.memory.close)
        self.state = PageState(NPAGES)
        self.receiver = PrecopyReceiver(self.link, self.memory, self.state, DEADLINE, lambda _: None)
        self.stop = Stop(DEADLINE)
        self.worker = Worker(self.receiver.run, self.stop)
        stack.callback(self._end)

    def _end(self) -> None:
        self.stop.requested.set()
        assert self.worker.done(DEADLINE)

    def acknowledged(self, round: int) -> None:
        expected = encode_frame(FrameType.ROUND_ACK, round=round)
        self.peer["control"].settimeout(DEADLINE)
        assert self.peer["control"].recv(len(expected), socket.MSG_WAITALL) == expected

    def command(self) -> None:
        self.peer["control"].sendall(encode_frame(FrameType.STATE, b"state", round=2))
        header, _ = self.worker.value()
        assert header.type is FrameType.STATE


@pytest.fixture(params=[1])
def destination(request: pytest.FixtureRequest) -> Iterator[Destination]:
    with contextlib.ExitStack() as stack:
        yield Destination(stack, request.param)


def test_frames_of_all_sizes_arrive_however_the_stream_is_cut(destination: Destination) -> None:
    rng = random.Random(3)
    expected, data, pages, empty = bytearray(NPAGES * PAGE), bytearray(), 0, 0
    for number in range(400):
        # Small ones, with large ones in between, and sometimes one after the other.
        count = rng.choice([1, 1, 1, 1, 2, 3, 16, 17, 40, 150] if number % 50 < 10 else [1])
        first, fill = rng.randrange(NPAGES - count), 1 + number % 255
        if rng.random() < 0.1:
            data += zeros(first, count)
            fill, empty = 0, empty + count
        else:
            data += frame(first, count, fill=fill)
            pages += count
        expected[first * PAGE : (first + count) * PAGE] = bytes([fill]) * (count * PAGE)
    data += mark(1)
    while data:
        some = rng.choice([1, 39, 41, PAGE, PAGE + 40, 50000, 300000])
        destination.peer["bulk-0"].sendall(data[:some])
        del data[:some]
    destination.acknowledged(1)
    assert destination.memory[:] == expected
    assert (destination.receiver.pages, destination.receiver.zeros) == (pages, empty)
    destination.command()


@pytest.mark.parametrize("destination", [2], indirect=True)
@pytest.mark.parametrize("round", [1, 2])
def test_a_page_that_came_together_with_the_barrier_before_it_is_refused(destination: Destination, round: int) -> None:
    """W5: also where both were received at once."""
    destination.peer["bulk-0"].sendall(frame(0) + frame(1) + mark(1) + frame(1, fill=9, round=round) + frame(2))
    with pytest.raises(ProtocolError, match="after barrier") as caught:
        destination.worker.value()
    assert caught.value.field == "round"
    assert (destination.memory[0], destination.memory[PAGE], destination.memory[2 * PAGE]) == (1, 1, 0)


def test_a_bad_frame_among_good_ones_is_named_and_those_before_it_are_stored(destination: Destination) -> None:
    """W4."""
    bad = encode_header(FrameType.PAGES, round=1, first=NPAGES, count=1, length=PAGE) + bytes(PAGE)
    destination.peer["bulk-0"].sendall(frame(0) + frame(4) + frame(6) + bad + frame(8))
    with pytest.raises(ProtocolError, match=f"page {NPAGES} is outside") as caught:
        destination.worker.value()
    assert caught.value.field == "first"
    assert destination.state.received.indices().tolist() == [0, 4, 6]


def test_what_comes_after_the_switch_is_left_in_the_socket(destination: Destination) -> None:
    peer = destination.peer["bulk-0"]
    peer.sendall(b"".join(frame(page) for page in range(0, 40, 2)) + mark(1))
    destination.acknowledged(1)
    destination.command()
    rest = b"".join(frame(page, round=2) for page in range(1, 40, 2))
    peer.sendall(rest)
    ours = destination.link.bulk[0].socket
    assert ours.recv(len(rest), socket.MSG_WAITALL) == rest


def test_a_command_between_two_frames_of_a_round_is_refused(destination: Destination) -> None:
    # A part of the next header lies in the lane's hands.
    destination.peer["bulk-0"].sendall(frame(0) + frame(2) + frame(4)[:10])
    wait_until(lambda: destination.receiver.pages == 2, "the pages before it")
    destination.peer["control"].sendall(encode_frame(FrameType.STATE, b"state", round=2))
    with pytest.raises(ProtocolError, match="middle of a round"):
        destination.worker.value()


def test_a_peer_that_never_pauses_keeps_nobody_from_ending(destination: Destination) -> None:
    peer, flooding = destination.peer["bulk-0"], threading.Event()
    # Its end is never the end of a frame.
    flood = b"".join(frame(page) for page in range(0, 100, 2))
    turned = flood[100:] + flood[:100]

    def send() -> None:
        peer.sendall(flood[:100])
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(turned)
                flooding.set()

    flooder = Worker(send)
    assert flooding.wait(DEADLINE)
    destination.stop.requested.set()
    assert destination.worker.done(DEADLINE)
    destination.link.hang_up()
    flooder.value()


@pytest.mark.parametrize("destination", [1, 2], indirect=True)
def test_scattered_pages_of_several_rounds_arrive(destination: Destination) -> None:
    """Sender and receiver together: single pages, short and long runs, zeros between them."""
    pairs = {name: Stream(sock, DEADLINE) for name, sock in destination.peer.items()}
    link = Link(pairs, *2 * [Hello("control", "test", 0, PAGE, {0: NPAGES}, streams=len(destination.link.bulk))])
    memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = np.frombuffer(memory, np.uint64).reshape(NPAGES, -1)
    tracker, rng = PageTracker(NPAGES, all_dirty=False), np.random.default_rng(5)
    outgoing = Outgoing(link, memoryview(memory).toreadonly(), tracker, Pacer(None))
    sent = 0
    for number in range(1, 5):
        dirty = [(page, 1) for page in range(number, NPAGES // 2, number + 1)]
        dirty += [(NPAGES // 2, 3), (NPAGES // 2 + 5, 2), (NPAGES // 2 + 20, 400)]
        for first, count in dirty:
            words[first : first + count] = rng.integers(0, 3, (count, 1), np.uint64) * np.uint64(number)
            sent += count
        tracker.mark(np.array(dirty, np.int64))
        tracker.sync()
        outgoing.send_owed(None, lambda: None)
        barrier(link, outgoing)
        assert destination.memory[:] == memory[:]
    assert destination.receiver.pages + destination.receiver.zeros == sent
    assert sum(writer.counters.pages for writer in outgoing.bulk) == destination.receiver.pages
    destination.command()
