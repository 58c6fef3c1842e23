"""Several bulk streams of one session: barriers over all of them (W5), and senders that are quiet when they say so."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from concurrency import DEADLINE, Worker, wait_until
from link_rig import no_thread
from migrate_rig import Run
from pagecore import PageState, PageTracker
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.link import TICK, Link, Stream
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.receiver import PrecopyReceiver
from pagecore.migrate.sender import Outgoing, Pacer
from pagecore.testing import open_guest
from pagecore.wire import (
    HEADER_BYTES,
    FrameType,
    Hello,
    Session,
    decode_header,
    encode_frame,
    encode_header,
    stream_names,
)

pytestmark = pytest.mark.timeout(60)

PAGE = 4096
NPAGES = 256
SESSION = Session(PAGE, {0: NPAGES})


@dataclass
class Ends:
    """Our link, and the peer's ends of its streams."""

    link: Link
    peer: dict[str, socket.socket]

    def send(self, stream: str, first: int, count: int = 1, *, round: int = 1, fill: int = 1) -> None:
        header = encode_header(FrameType.PAGES, round=round, first=first, count=count, length=count * PAGE)
        self.peer[stream].sendall(header + bytes([fill]) * (count * PAGE))

    def mark(self, stream: str, round: int) -> None:
        self.peer[stream].sendall(encode_frame(FrameType.ROUND, round=round))

    def command(self) -> None:
        self.peer["control"].sendall(encode_frame(FrameType.STATE, b"state", round=2))

    def alive(self) -> None:
        self.peer["control"].sendall(encode_frame(FrameType.ALIVE, b"{}", round=1))

    def acknowledged(self) -> int | None:
        """The round of the next acknowledgement, None where there is none yet."""
        self.peer["control"].setblocking(False)
        try:
            raw = self.peer["control"].recv(HEADER_BYTES)
        except BlockingIOError:
            return None
        header = decode_header(raw, SESSION)
        assert header.type is FrameType.ROUND_ACK
        return header.round


@pytest.fixture(params=[2])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    pairs = {name: socket.socketpair() for name in stream_names(request.param)}
    hello = Hello("control", "test", 0, PAGE, {0: NPAGES}, streams=request.param)
    link = Link({name: Stream(ours, DEADLINE) for name, (ours, _) in pairs.items()}, hello, hello)
    yield Ends(link, {name: theirs for name, (_, theirs) in pairs.items()})
    link.close()
    for _, theirs in pairs.values():
        theirs.close()


@dataclass
class Receiving:
    ends: Ends
    memory: mmap.mmap
    state: PageState
    receiver: PrecopyReceiver
    worker: Worker
    # What was said instead of pages.
    heard: list[bytes]


@pytest.fixture
def receiving(ends: Ends) -> Iterator[Receiving]:
    memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    state = PageState(NPAGES)
    heard: list[bytes] = []
    receiver = PrecopyReceiver(ends.link, memory, state, DEADLINE, heard.append)
    stop = Stop(DEADLINE)
    worker = Worker(receiver.run, stop)
    yield Receiving(ends, memory, state, receiver, worker, heard)
    stop.requested.set()
    assert worker.done(DEADLINE)
    memory.close()


def test_a_round_is_acknowledged_when_every_stream_is_at_its_end(receiving: Receiving) -> None:
    ends = receiving.ends
    for round in (1, 2, 3):
        ends.send("bulk-0", 0, round=round, fill=round)
        ends.mark("bulk-0", round)
        wait_until(lambda round=round: receiving.receiver._arrived == 1, "the first stream is at the barrier")
        assert ends.acknowledged() is None
        # What is on its way on the other stream is stored before anybody may send the next copy of it.
        ends.send("bulk-1", 7, round=round, fill=10 * round)
        ends.mark("bulk-1", round)
        assert wait_until(ends.acknowledged, "the acknowledgement") == round
        assert receiving.memory[0] == round
        assert receiving.memory[7 * PAGE] == 10 * round
    ends.command()
    header, payload = receiving.worker.value()
    assert (header.type, payload) == (FrameType.STATE, b"state")
    assert (receiving.receiver.pages, receiving.receiver.zeros) == (6, 0)


def test_a_sign_of_life_ends_nothing_and_is_handed_on(receiving: Receiving) -> None:
    ends = receiving.ends
    # In the middle of a page of one stream: that stays as it is.
    header = encode_header(FrameType.PAGES, round=1, first=3, count=1, length=PAGE)
    ends.peer["bulk-0"].sendall(header + bytes([9]) * 1000)
    ends.alive()
    wait_until(lambda: receiving.heard == [b"{}"], "the sign of life")
    ends.peer["bulk-0"].sendall(bytes([9]) * (PAGE - 1000))
    for stream in ("bulk-0", "bulk-1"):
        ends.mark(stream, 1)
    assert wait_until(ends.acknowledged, "the acknowledgement") == 1
    ends.alive()
    ends.command()
    header_of_command, _ = receiving.worker.value()
    assert header_of_command.type is FrameType.STATE
    assert receiving.heard == [b"{}", b"{}"]
    assert receiving.memory[3 * PAGE : 4 * PAGE] == bytes([9]) * PAGE


@pytest.mark.parametrize("round", [0, 1, 2, 3])
def test_a_page_past_the_barrier_that_others_have_not_reached_is_refused(receiving: Receiving, round: int) -> None:
    # W5: taken, it would be overwritten by the older copy that is still on its way on the other stream.
    ends = receiving.ends
    ends.mark("bulk-0", 1)
    wait_until(lambda: receiving.receiver._arrived == 1, "the first stream is at the barrier")
    ends.send("bulk-0", 3, round=round)
    with pytest.raises(ProtocolError, match="after barrier") as caught:
        receiving.worker.value()
    assert caught.value.field == "round"
    assert receiving.memory[3 * PAGE] == 0


def test_a_command_in_the_middle_of_a_frame_is_refused(receiving: Receiving) -> None:
    ends = receiving.ends
    ends.peer["bulk-1"].sendall(encode_header(FrameType.PAGES, round=1, first=0, count=1, length=PAGE))
    wait_until(lambda: not receiving.receiver._lanes[1].idle, "the header is read")
    ends.command()
    with pytest.raises(ProtocolError, match="middle of a round"):
        receiving.worker.value()


def test_one_stream_that_ends_ends_all(receiving: Receiving) -> None:
    # W6.
    receiving.ends.peer["bulk-1"].close()
    with pytest.raises(PeerGoneError):
        receiving.worker.value()


# -------------------------------------------------------------------------------------------------- senders


def owed(npages: int = NPAGES) -> tuple[mmap.mmap, PageTracker]:
    memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = np.repeat(np.arange(npages, dtype=np.uint8) | 1, PAGE).tobytes()
    return memory, PageTracker(npages)


def drain(sock: socket.socket) -> list[int]:
    """The pages that come until the stream ends."""
    pages: list[int] = []
    with sock.makefile("rb") as stream:
        while raw := stream.read(HEADER_BYTES):
            header = decode_header(raw, Session(PAGE, {0: 1 << 20}))
            assert len(stream.read(header.length)) == header.length
            pages += range(header.first, header.first + header.count)
    return pages


def test_every_owed_page_goes_once_over_all_streams(ends: Ends) -> None:
    npages = 4096
    memory, tracker = owed(npages)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    readers = [Worker(drain, ends.peer[name]) for name in ("bulk-0", "bulk-1")]
    assert outgoing.send_owed(None, lambda: None) == npages
    ends.link.hang_up()
    got = [reader.value() for reader in readers]
    assert all(got), "each stream carries a share"
    assert sorted(got[0] + got[1]) == list(range(npages))
    assert outgoing.wire_bytes > npages * PAGE
    assert not tracker.dirty_count


def test_no_more_goes_than_was_asked_for(ends: Ends) -> None:
    memory, tracker = owed()
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    readers = [Worker(drain, ends.peer[name]) for name in ("bulk-0", "bulk-1")]
    assert outgoing.send_owed(100, lambda: None) == 100
    assert tracker.dirty_count == NPAGES - 100
    # Nothing is owed in the end, though more may go.
    assert outgoing.send_owed(10 * NPAGES, lambda: None) == NPAGES - 100
    ends.link.hang_up()
    for reader in readers:
        reader.value()


def test_when_one_stream_fails_all_are_quiet_and_nothing_is_lost(ends: Ends) -> None:
    """S1, S8: whatever was taken and did not go is owed again, on every stream, when the error is raised."""
    npages = 16384
    memory, tracker = owed(npages)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    # The other one takes nothing: its sender sleeps with a batch in its hands.
    ends.peer["bulk-0"].close()
    with pytest.raises(PeerGoneError):
        outgoing.send_owed(None, lambda: None)
    # A batch that did not go whole is owed whole; the sockets hold less than one.
    assert tracker.dirty_count == npages


def test_a_sender_that_cannot_be_started_leaves_none_behind(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """S8: the others are quiet, and what they took is owed again, when the error is raised."""
    npages = 16384
    memory, tracker = owed(npages)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    monkeypatch.setattr(threading.Thread, "start", no_thread(f"bulk-{len(ends.link.bulk) - 1}"))
    with pytest.raises(PeerGoneError, match="can't start new thread"):
        outgoing.send_owed(None, lambda: None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bulk-")]
    assert tracker.dirty_count == npages


def test_what_follows_the_pages_waits_for_a_slow_peer_as_they_do(ends: Ends) -> None:
    """A round's end that finds the stream full is no part of the sending that has ended before it."""
    memory, tracker = owed(32)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    assert outgoing.send_owed(None, lambda: None) == 32
    for stream in ends.link.bulk:
        with contextlib.suppress(BlockingIOError):
            while stream.socket.send(bytes(1 << 16), socket.MSG_DONTWAIT):
                pass
    ended = Worker(lambda: outgoing.mark(FrameType.END))
    assert not ended.done(3 * TICK)
    for name in ("bulk-0", "bulk-1"):
        ends.peer[name].setblocking(True)
        Worker(lambda name=name: ends.peer[name].recv(1 << 20, socket.MSG_WAITALL))
    ended.value()
    ends.link.hang_up()


def test_all_streams_are_watched(ends: Ends) -> None:
    """The urgent one, too: after the switch it must not go on obeying what counted before it."""

    def check() -> None:
        pass

    ends.link.watch(check)
    assert {stream.check for stream in (ends.link.control, *ends.link.bulk, ends.link.urgent)} == {check}


def test_bulk_gives_way_to_answers(ends: Ends) -> None:
    memory, tracker = owed(16384)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    ours, seen = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), set()
    deadline = time.monotonic() + DEADLINE

    def watch() -> None:
        senders = [thread for thread in threading.enumerate() if thread.name.startswith("bulk-")]
        seen.update(os.getpriority(os.PRIO_PROCESS, thread.native_id) - ours for thread in senders if thread.native_id)
        if 10 in seen or time.monotonic() > deadline:
            raise Cancelled

    with pytest.raises(Cancelled):
        outgoing.send_owed(None, watch)  # nobody receives: both wait
    assert 10 in seen
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


def test_who_waits_for_the_senders_may_end_them(ends: Ends) -> None:
    memory, tracker = owed(16384)

    def watch() -> None:
        raise Cancelled

    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(None))
    began = time.monotonic()
    with pytest.raises(Cancelled):
        outgoing.send_owed(None, watch)
    assert time.monotonic() - began < DEADLINE / 2, "not the patience of a stream"
    assert tracker.dirty_count >= 16384 - 2 * 512


def test_the_cap_is_of_all_streams_together(ends: Ends) -> None:
    npages = 2048
    memory, tracker = owed(npages)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(40 << 20))
    readers = [Worker(drain, ends.peer[name]) for name in ("bulk-0", "bulk-1")]
    began = time.monotonic()
    outgoing.send_owed(None, lambda: None)
    # 8 MiB at 40 MiB a second, less one slice for each stream.
    assert time.monotonic() - began > 0.17
    ends.link.hang_up()
    for reader in readers:
        reader.value()


def test_who_gives_up_does_not_wait_for_the_pace(ends: Ends) -> None:
    memory, tracker = owed(16)
    outgoing = Outgoing(ends.link, memoryview(memory), tracker, Pacer(1))

    def watch() -> None:
        # Each stream has sent a page, and the second one sleeps for as long as the first takes at this pace: an hour.
        if outgoing.wire_bytes >= 2 * PAGE:
            raise Cancelled

    with pytest.raises(Cancelled):
        outgoing.send_owed(None, watch)


@pytest.mark.kernel
@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.ci), 5])
def test_a_guest_is_moved_over_any_number_of_streams(streams: int) -> None:
    run = Run(size=16 << 20, streams=streams, duplicates="strict", dirty_rate=None, precopy_rounds=3)
    assert run.outcome.verified, run.outcome.message
    assert run.placement["twice"] == 0


@pytest.mark.kernel
@pytest.mark.ci
def test_a_guest_that_outruns_the_link_is_slowed_down_until_it_fits() -> None:
    options: dict[str, Any] = {"postcopy": False, "dirty_rate": None, "downtime_limit": 0.05, "free_share": 0.0}
    # Flat out it writes 5 GB/s: the most throttling leaves 54 MB/s, which the link has to carry with room to spare.
    run = Run(size=16 << 20, guest="process", throttle=True, precopy_rounds=40, bandwidth=128 << 20, **options)
    assert run.outcome.verified, run.outcome.message
    shares = [event["share"] for event in run.named("throttle")]
    assert shares
    assert shares == sorted(shares)
    assert shares[-1] <= 0.99
    assert run.source["rounds"] < 40


@pytest.mark.kernel
@pytest.mark.timing
@pytest.mark.ci
@pytest.mark.parametrize("guest", ["kvm", "process"])
def test_a_throttled_guest_rests(guest: str) -> None:
    config: dict[str, Any] = {"role": "source", "seed": 3, "dirty_rate": None}
    with open_guest(16 << 20, kind=guest, **config) as machine:
        machine.boot()
        machine.run()

        def steps(seconds: float) -> int:
            before = machine.stats().steps
            time.sleep(seconds)
            return machine.stats().steps - before

        free = steps(0.2)
        machine.throttle(0.9)
        assert 0 < steps(0.2) < free / 3
        machine.throttle(0)
        assert steps(0.2) > free / 3
        with pytest.raises(ValueError, match="share 1"):
            machine.throttle(1)
