"""The stream between two helpers: chunks, when they are packed, and a pump that stores nothing."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import zstandard

from concurrency import Worker, wait_until
from pagecore.errors import ProtocolError
from pagecore.migrate import pump
from pagecore.migrate.chunks import CHUNK, HEADER, Packer, Unpacker
from pagecore.migrate.pays import FIRST_PAUSE, LAST_PAUSE, LinkPace, Pays
from pagecore.migrate.pump import Pump

pytestmark = pytest.mark.timeout(60)

TEXT = b"the same words over and over again " * 8000


IDLE: list[socket.socket] = []


@pytest.fixture(autouse=True, scope="module")
def idle() -> Iterator[None]:
    """A socket on which nothing happens."""
    IDLE.extend(socket.socketpair())
    yield
    for sock in IDLE:
        sock.close()


def pace(seconds_per_byte: float = 0.0) -> LinkPace:
    """A link of which that is known."""
    made = LinkPace(IDLE[0])
    made.seconds_per_byte = seconds_per_byte
    return made


def chunk(packer: Packer, data: bytes) -> bytes:
    packer.space[: len(data)] = data
    return bytes(packer.pack(len(data)))


# --------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("always", [False, True])
def test_what_is_packed_comes_back_in_whatever_pieces_it_comes(always: bool) -> None:
    seed = random.Random(3)
    packer = Packer(Pays(pace(), always=True) if always else None)
    parts = [os.urandom(CHUNK), TEXT[:CHUNK], b"x", TEXT[:20000], os.urandom(5000) + TEXT[:100000]]
    stream = b"".join(chunk(packer, part) for part in parts) + bytes(packer.end())
    assert (len(stream) < len(b"".join(parts)) - 100000) == always
    unpacker, plain, at = Unpacker(zstd=True), b"", 0
    while at < len(stream):
        size = seed.choice((1, 5, 12, 100, 70000, 400000))
        plain += b"".join(unpacker.feed(memoryview(stream[at : at + size])))
        at += size
    assert plain == b"".join(parts)
    assert unpacker.ended


def packed_frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


BOMB = packed_frame(bytes(64 << 20))
SMALL = packed_frame(TEXT[:1000])


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (HEADER.pack(0, CHUNK + 1, CHUNK + 1), "of kind 0"),
        (HEADER.pack(0, 0, 0), "of kind 0"),
        (HEADER.pack(0, 5, 6), "of kind 0"),
        (HEADER.pack(0, 1 << 31, 1 << 31), "of kind 0"),
        (HEADER.pack(1, 5, CHUNK + 1), "of kind 1"),
        (HEADER.pack(1, CHUNK, CHUNK), "of kind 1"),
        (HEADER.pack(2, 0, 1), "of kind 2"),
        (HEADER.pack(3, 1, 1), "of kind 3"),
        (struct.pack("<II I", 0x01000000, 5, 5), "bits set"),
        (HEADER.pack(2, 0, 0) + b"x", "comes after the end"),
        (HEADER.pack(1, len(BOMB), CHUNK) + BOMB, "does not unpack to 262144 bytes"),
        (HEADER.pack(1, len(SMALL), 999) + SMALL, "does not unpack to 999 bytes"),
        (HEADER.pack(1, len(SMALL) + 3, 1000) + SMALL + b"xyz", "cannot be unpacked"),
        (HEADER.pack(1, len(SMALL) - 1, 1000) + SMALL[:-1], "cannot be unpacked"),
        (HEADER.pack(1, 20, 1000) + bytes(20), "cannot be unpacked"),
    ],
)
def test_a_chunk_that_cannot_be_right_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        Unpacker(zstd=True).feed(memoryview(data))


def test_whoever_has_no_zstd_takes_none() -> None:
    with pytest.raises(ProtocolError, match="of kind 1"):
        Unpacker(zstd=False).feed(memoryview(HEADER.pack(1, len(SMALL), 1000) + SMALL))


# --------------------------------------------------------------------------------------------- whether it pays

# Seconds a byte: a link of 1 Gbit/s, packing at 400 MB/s.
LINK, PACKING = 1 / 125e6, 1 / 400e6


def decide(link: float, packing: float, ratio: float) -> bool:
    """What is decided once all of it was measured."""
    pays = Pays(pace(link))
    pays.packed(CHUNK, int(ratio * CHUNK), packing * CHUNK)
    return pays.pays


def test_it_pays_where_the_link_is_slow_and_the_pages_give_way() -> None:
    assert decide(LINK, PACKING, 0.3)
    # Pages that do not give way, packing slower than the link, a link that was never seen to be full.
    assert not decide(LINK, PACKING, 0.95)
    assert not decide(LINK, PACKING, 0.8)
    assert not decide(LINK, 1 / 100e6, 0.3)
    assert not decide(PACKING / 4, PACKING, 0.1)
    assert not decide(0.0, PACKING, 0.1)


def test_what_does_not_pay_is_tried_less_and_less_and_what_pays_is_always_done() -> None:
    given = pace(0.0)
    pays = Pays(given)
    tried = []
    for number in range(2000):
        if pays.worth_packing(CHUNK):
            tried.append(number)
            assert not pays.packed(CHUNK, CHUNK - 1, PACKING * CHUNK)
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert tried[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[0] <= FIRST_PAUSE + 1
    assert pauses[-1] > LAST_PAUSE
    assert len(tried) < 20
    # The link turns out to be slow, and the pages of a kind that gives way.
    given.seconds_per_byte = LINK
    for _ in range(4 * LAST_PAUSE):
        if pays.worth_packing(CHUNK):
            pays.packed(CHUNK, CHUNK // 4, PACKING * CHUNK)
    assert all(pays.worth_packing(CHUNK) and pays.packed(CHUNK, CHUNK // 4, PACKING * CHUNK) for _ in range(50))
    # And back: what no longer gives way is no longer packed, after a few chunks that went as they are.
    went = [pays.worth_packing(CHUNK) and pays.packed(CHUNK, CHUNK, PACKING * CHUNK) for _ in range(50)]
    assert not any(went)
    assert not pays.pays


def test_only_a_queue_that_stays_full_tells_the_pace_of_a_link() -> None:
    given = pace()
    # Idle before: nothing is known. Then 1 MB drains in 10 ms; then the queue runs dry, at a lower pace: no news.
    given.measured(0.010, 0, 1 << 20, 1 << 19)
    assert given.seconds_per_byte == 0
    given.measured(0.010, 2_000_000, 0, 1_000_000)
    assert given.seconds_per_byte == pytest.approx(1e-8)
    given.measured(1.0, 1000, 0, 0)
    assert given.seconds_per_byte == pytest.approx(1e-8)
    # Dry, but faster than anything seen before: it is at least so fast.
    given.measured(0.001, 1_000_000, 0, 0)
    assert given.seconds_per_byte < 1e-8


def test_a_slow_reader_is_seen_in_the_queue() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        given = LinkPace(near)
        stop = threading.Event()

        def read() -> None:
            while not stop.wait(0.004):
                far.recv(40000)

        reader = Worker(read)
        deadline = time.monotonic() + 10
        while not given.seconds_per_byte and time.monotonic() < deadline:
            try:
                given.wrote(near.send(bytes(8192)))
            except BlockingIOError:
                time.sleep(0.001)
            given.look()
        stop.set()
        near.setblocking(True)
        reader.value()
        # At most 10 MB/s, however late the reader wakes.
        assert given.seconds_per_byte > 5e-8


# ----------------------------------------------------------------------------------------------------- pump


class Way:
    """Two pumps with a wire between them: `left` and `right` are where controllers would be."""

    def __init__(self, *, compress: bool = False) -> None:
        self.left, left = socket.socketpair()
        self.right, right = socket.socketpair()
        self.wire, wire = socket.socketpair()
        self.pumps = [self._pump(left, self.wire, compress), self._pump(right, wire, compress)]
        self._ends = (left, right, self.wire, wire)
        for sock in (self.left, self.right):
            sock.settimeout(10)
        self.workers = [Worker(one.run) for one in self.pumps]

    @staticmethod
    def _pump(near: socket.socket, far: socket.socket, compress: bool) -> Pump:
        near.setblocking(False)
        far.setblocking(False)
        given = LinkPace(far)
        return Pump(near, far, Packer(Pays(given, always=True) if compress else None), Unpacker(zstd=True), given)

    def end(self, number: int) -> None:
        """As the helper does when a pump has ended."""
        self.workers[number].value()
        self._ends[number].close()
        self._ends[2 + number].close()

    def close(self) -> None:
        for sock in (self.left, self.right, *self._ends):
            sock.close()


@pytest.fixture
def way() -> Iterator[Way]:
    made = Way()
    yield made
    made.close()


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while some := sock.recv(1 << 16):
        data += some
    return bytes(data)


@pytest.mark.parametrize("compress", [False, True])
def test_both_ways_at_once_with_an_end_each(compress: bool) -> None:
    way = Way(compress=compress)
    data = [os.urandom(3 << 20) + TEXT * 4, TEXT * 10 + os.urandom(1 << 20)]

    def speak(sock: socket.socket, said: bytes) -> None:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)

    speakers = [Worker(speak, sock, said) for sock, said in zip((way.left, way.right), data, strict=True)]
    readers = [Worker(read_all, sock) for sock in (way.right, way.left)]
    for worker in speakers:
        worker.value()
    assert [reader.value() for reader in readers] == data
    for number in (0, 1):
        way.end(number)
        assert way.pumps[number].lost is None
    way.close()


def test_an_end_on_one_way_leaves_the_other_open(way: Way) -> None:
    way.left.shutdown(socket.SHUT_WR)
    assert way.right.recv(1) == b""
    way.right.sendall(b"still here")
    assert way.left.recv(100) == b"still here"


def test_whoever_takes_nothing_holds_up_whoever_sends(way: Way) -> None:
    way.left.setblocking(False)
    sent, quiet_since = 0, time.monotonic()
    while time.monotonic() < quiet_since + 0.2:
        try:
            sent += way.left.send(bytes(1 << 16))
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.001)
        assert sent < 16 << 20, "something stores what nobody takes"
    # All of it is there once somebody takes it.
    way.left.settimeout(10)
    way.left.shutdown(socket.SHUT_WR)
    assert read_all(way.right) == bytes(sent)


def test_what_was_sent_before_the_controller_left_still_arrives(way: Way) -> None:
    said = os.urandom(300000)
    sender = Worker(way.left.sendall, said)
    got = way.right.recv(10, socket.MSG_WAITALL)
    while len(got) < 200000:
        got += way.right.recv(200000 - len(got))
    sender.value()
    way.left.close()
    assert got + read_all(way.right) == said
    way.right.close()
    for number in (0, 1):
        way.end(number)


def test_a_peer_that_takes_nothing_more_keeps_no_pump(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "LINGER", 0.2)
    way.left.setblocking(False)
    with pytest.raises(BlockingIOError):
        fill(way.left)
    way.left.close()
    assert way.workers[0].done(5)


def fill(sock: socket.socket) -> None:
    """Send until nothing has been taken for a while."""
    until = time.monotonic() + 0.2
    while True:
        try:
            sock.send(bytes(1 << 16))
            until = time.monotonic() + 0.2
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)


def test_a_wire_that_is_cut_ends_both_sides_after_what_had_come(way: Way) -> None:
    way.left.sendall(b"before")
    assert way.right.recv(6, socket.MSG_WAITALL) == b"before"
    way.wire.shutdown(socket.SHUT_RDWR)
    for number, sock in enumerate((way.left, way.right)):
        way.end(number)
        assert way.pumps[number].lost is not None
        assert sock.recv(1) == b""


def test_a_chunk_that_lies_ends_the_stream() -> None:
    near, controller = socket.socketpair()
    wire, peer = socket.socketpair()
    with near, controller, wire, peer:
        near.setblocking(False)
        wire.setblocking(False)
        given = LinkPace(wire)
        made = Pump(near, wire, Packer(None), Unpacker(zstd=True), given)
        worker = Worker(made.run)
        peer.sendall(HEADER.pack(0, 3, 3) + b"abc")
        assert controller.recv(3, socket.MSG_WAITALL) == b"abc"
        peer.sendall(HEADER.pack(0, CHUNK * 2, CHUNK * 2))
        worker.value()
        assert isinstance(made.lost, ProtocolError)
        wait_until(lambda: made.lost, "the loss")
