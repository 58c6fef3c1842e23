"""Sessions with frames cut, flipped, repeated, moved or blown up, against a second reading of the same bytes.

A model reads each lane's bytes by the rules of the frame table. What it takes is what may be in memory; where it stops
is where the loop has to end with an error, and in time.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from dataclasses import dataclass, field

import pytest

from concurrency import DEADLINE, wait_until
from pagecore import PlacementLoop, ProtocolError, SourceError
from placement_rig import AGAIN, END, FILL, GONE, HEADER, PAGES, SENT, ZEROS, Peer, Served, header, pages_frame
from uffd_helpers import PAGE

pytestmark = pytest.mark.kernel

NPAGES = 8
MAX_PAGES = 4
GENERATION = 3
ROUND = 2
FIELDS = {"generation": GENERATION, "round": ROUND}
ANSWERS = {PAGES, ZEROS, FILL, SENT, GONE}
CHECKSUM = 0x80
CHANGES = ["flip", "blow up", "truncate", "repeat", "repeat all", "drop", "swap", "insert", "version"]


def content(page: int, version: int) -> bytes:
    return struct.pack("<QQ", page + 1, version + 1) * (PAGE // 16)


def plain_session(generator: random.Random) -> tuple[list[bytes], list[bytes]]:
    """The frames of both lanes: every page comes once, some of them over the urgent lane."""
    lanes: tuple[list[bytes], list[bytes]] = ([], [])
    page = 0
    while page < NPAGES:
        count = min(generator.randint(1, 3), NPAGES - page)
        lane = lanes[generator.random() < 0.3]
        kind = generator.choice([PAGES, PAGES, ZEROS, FILL, SENT, GONE])
        if kind == PAGES:
            lane.append(pages_frame(page, b"".join(content(page + at, 0) for at in range(count)), **FIELDS))
        else:
            lane.append(header(kind, page, count, **FIELDS))
        page += count
    for lane in lanes:
        lane.append(header(END, **FIELDS))
    return lanes


def flip(generator: random.Random, frame: bytes) -> bytes:
    if len(frame) < HEADER.size:
        return frame
    bit = generator.randrange(8 * (len(frame) if generator.random() < 0.3 else HEADER.size))
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def blow_up(generator: random.Random, frame: bytes) -> bytes:
    """A number that is far too large, where a length or a place stands."""
    offset, size = generator.choice([(16, 8), (24, 8), (32, 4), (8, 4), (12, 4), (6, 2)])
    value = generator.choice([1, 2, 1 << 8, 1 << 15, (1 << 8 * size) - 1, 1 << (8 * size - 1)]) % (1 << 8 * size)
    return frame[:offset] + value.to_bytes(size, "little") + frame[offset + size :]


def mutate(generator: random.Random, lane: list[bytes]) -> bytes:
    """The bytes of a lane after one to three changes."""
    frames = list(lane)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(frames))
        match generator.choice(CHANGES):
            case "flip":
                frames[at] = flip(generator, frames[at])
            case "blow up":
                frames[at] = blow_up(generator, frames[at])
            case "truncate":
                frames[at] = frames[at][: generator.randrange(len(frames[at]) + 1)]
                if generator.random() < 0.7:
                    del frames[at + 1 :]
            case "repeat":
                frames.insert(generator.randrange(len(frames)), frames[at])
            case "repeat all" if len(frames) < 16:  # both copies still fit the socket's buffer
                frames = [frame for frame in frames for _ in range(2)]
            case "drop":
                frames[at] = b""
            case "swap":
                other = generator.randrange(len(frames))
                frames[at], frames[other] = frames[other], frames[at]
            case "insert":
                frames.insert(at, generator.randbytes(generator.choice([1, 39, 40, 41, 100])))
            case "version":
                page = generator.randrange(NPAGES)
                frames.insert(at, pages_frame(page, content(page, 1), flags=generator.choice([0, AGAIN]), **FIELDS))
    return b"".join(frames)


@dataclass
class Model:
    """What the bytes of both lanes say, read by the frame table."""

    allowed: dict[int, set[bytes]] = field(default_factory=lambda: {page: set() for page in range(NPAGES)})
    wrong: bool = False

    def read(self, lane: bytes) -> None:
        at = 0
        while True:
            if len(lane) - at < HEADER.size:
                self.wrong = True  # the lane ends before its END
                return
            magic, kind, flags, region, generation, round_, first, count, length, _ = HEADER.unpack_from(lane, at)
            at += HEADER.size
            known = magic == b"PGC1" and generation == GENERATION and round_ >= ROUND
            if known and kind == END and flags in (0, CHECKSUM) and not length:
                return
            if not (known and kind in ANSWERS and flags in (0, AGAIN) and not region and count):
                self.wrong = True
                return
            if first + count > NPAGES or (count > MAX_PAGES and kind == PAGES):
                self.wrong = True
                return
            if length != (count * PAGE if kind == PAGES else 0) or len(lane) - at < length:
                self.wrong = True
                return
            for page in range(first, first + count):
                if kind == PAGES:
                    start = at + (page - first) * PAGE
                    self.allowed[page].add(lane[start : start + PAGE])
                elif kind in (ZEROS, FILL):
                    self.allowed[page].add(bytes(PAGE))
            at += length


def play(rig: Served, lanes: tuple[bytes, bytes], wrong: bool) -> dict[int, bytes | None]:
    """Put the bytes into a loop, which has to see what is wrong. The content of each page that it received."""
    peer = Peer(max_pages=MAX_PAGES, **FIELDS)
    loop = PlacementLoop([rig.region], peer.source)
    try:
        for sock, data in zip((peer.bulk[0], peer.urgent), lanes, strict=True):
            sock.sendall(data)
            sock.shutdown(1)
        loop.start()
        with contextlib.suppress(ProtocolError, SourceError):
            assert loop.wait_ended(DEADLINE), "the loop neither ended nor failed"
        if wrong:  # the urgent lane is read on after the END of the bulk
            wait_until(lambda: loop.error is not None, "the error")
    finally:
        loop.stop()
        peer.close()
    assert wrong == isinstance(loop.error, ProtocolError | SourceError), loop.error
    received = loop.states[0].received.indices().tolist()
    rig.close()  # from here on a missing page reads as zeros, and waits for nobody
    found: dict[int, bytes | None] = {}
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for page in range(NPAGES):
            try:
                data = os.pread(memory.fileno(), PAGE, rig.address(page))
            except OSError:
                data = None  # poison
            assert page in received or data in (None, bytes(PAGE)), f"page {page} holds what nobody placed"
            if page in received:
                found[page] = data
    return found


def check_sessions(seeds: range) -> None:
    failures = 0
    for seed in seeds:
        generator = random.Random(seed)
        plain = plain_session(generator)
        which = generator.randrange(3)
        lanes = tuple(
            b"".join(lane) if which == 1 - number else mutate(generator, lane) for number, lane in enumerate(plain)
        )
        model = Model()
        for lane in lanes:
            model.read(lane)
        for page, data in play(Served(NPAGES, seed=seed), lanes, model.wrong).items():
            assert data in model.allowed[page], f"seed {seed}: page {page} holds what no accepted frame brought"
        failures += model.wrong
    # Otherwise the mutations are too tame, or too wild, to say anything.
    assert 0.1 * len(seeds) < failures < 0.95 * len(seeds)


def test_mutated_sessions() -> None:
    check_sessions(range(300))


@pytest.mark.ci
def test_ten_thousand_mutated_sessions() -> None:
    check_sessions(range(1000, 11_000))
