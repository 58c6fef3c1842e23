"""What the fuzzer calls: one function for each parser of bytes that somebody else wrote.

A target hands any bytes to a parser. The parser returns something that passes its own invariants, or raises the error
that it promises; anything else (another exception, an answer that does not encode to the same again) is a finding.
Checksums would keep a fuzzer out: where a format has one, the bytes are tried as they came, and with it mended.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np

from pagecore import Bitmap, PageState, wire
from pagecore.errors import ProtocolError, UnsupportedError
from pagecore.firecracker import parse_handshake, receive_handshake
from pagecore.migrate import Options
from pagecore.migrate.agreement import learn
from pagecore.migrate.chunks import CHUNK, Unpacker
from pagecore.migrate.report import parse_report
from pagecore.saved_bitmap import SavedBitmap
from pagecore.testing import Guest, open_guest
from pagecore.working_set import WorkingSet

__all__ = ["TARGETS"]

PAGE: Final = 4096
NPAGES: Final = 1000
SESSION: Final = wire.Session(PAGE, {0: NPAGES, 3: 64}, generation=2)
FEW_PAGES: Final = 64
SMALL_SESSION: Final = wire.Session(PAGE, {0: FEW_PAGES}, generation=2)
GREETINGS: Final = (wire.FrameType.HELLO, wire.FrameType.HELLO_ACK)
SNAPSHOT_SIZE: Final = 1 << 30
# Up to and with its checksum: what stands before the registers.
STATE_BYTES: Final = 40


def mended(data: bytes, field: int, covered: int) -> bytes:
    """The bytes with the 32-bit word at `field` replaced by the CRC-32 of all from `covered` on."""
    if len(data) < covered:
        return data
    return data[:field] + struct.pack("<I", zlib.crc32(data[covered:])) + data[field + 4 :]


def frames(data: bytes) -> None:
    """A stream of frames, as a peer of a session sends them."""
    at = 0
    while at < len(data):
        try:
            header = wire.decode_header(data[at:], SESSION)
        except ProtocolError:
            return
        payload = data[at + wire.HEADER_BYTES : at + wire.HEADER_BYTES + header.length]
        assert header.length <= wire.max_payload(header.type, SESSION, header.region)
        assert header.generation == SESSION.generation or header.type in GREETINGS
        if header.count:
            assert header.first + header.count <= SESSION.regions[header.region]
        fields = header._asdict()
        kind, flags = fields.pop("type"), fields.pop("flags")
        assert wire.encode_header(kind, flags=flags, **fields) == data[at : at + wire.HEADER_BYTES]
        try:
            wire.check_payload(header, payload)
        except ProtocolError:
            return
        at += wire.HEADER_BYTES + header.length


def pages_at_once(data: bytes) -> None:
    """Frames of pages that precopy stores many of in one call: what it takes, the parser of single frames takes too."""
    memory, expected = bytearray(FEW_PAGES * PAGE), bytearray(FEW_PAGES * PAGE)
    state, named = PageState(FEW_PAGES), Bitmap(FEW_PAGES)
    taken, nframes, npages = wire.store_pages(data, memory, state, generation=SESSION.generation, round=1)
    at = 0
    while at < taken:
        header = wire.decode_header(data[at:], SMALL_SESSION)
        payload = data[at + wire.HEADER_BYTES : at + wire.HEADER_BYTES + header.length]
        wire.check_payload(header, payload)
        assert (header.type, header.round) == (wire.FrameType.PAGES, 1)
        expected[header.first * PAGE : (header.first + header.count) * PAGE] = payload
        named.set_range(header.first, header.count)
        at += wire.HEADER_BYTES + header.length
        nframes -= 1
        npages -= header.count
    assert (at, nframes, npages) == (taken, 0, 0)
    assert memory == expected
    assert state.received == named


def greeting(data: bytes) -> None:
    """The frame of somebody who has proved nothing."""
    for attempt in (data, mended(data, 36, wire.HEADER_BYTES)):
        try:
            header, payload = wire.decode_frame(attempt)
        except ProtocolError:
            continue
        assert header.type in GREETINGS or header.type is wire.FrameType.ERROR
        assert len(payload) <= 16 << 10
        hello(bytes(payload))


def hello(data: bytes) -> None:
    """The payload of a HELLO."""
    try:
        decoded = wire.decode_hello(data)
    except ProtocolError:
        return
    assert wire.decode_hello(wire.encode_hello(decoded)) == decoded
    decoded.session()


def report(data: bytes) -> None:
    """The payload of RUN, RUNNING, COMPLETE, ABORT and ERROR."""
    try:
        decoded = wire.decode_report(data)
    except ProtocolError:
        return
    assert all(value is None or isinstance(value, str | int | float | bool) for value in decoded.values())
    json.dumps(decoded, allow_nan=True)


def page_set(data: bytes) -> None:
    """A list of pages, as runs or as a bitmap."""
    for npages in (NPAGES, 64, 0):
        for attempt in (data, mended(data, 32, 36)):
            try:
                decoded = wire.decode_page_set(attempt, npages)
            except ProtocolError:
                continue
            check_runs(decoded.runs, npages)
            again = wire.encode_page_set(decoded.runs, npages, generation=decoded.generation, list_id=decoded.list_id)
            assert np.array_equal(wire.decode_page_set(again, npages).runs, decoded.runs)
            assert len(again) <= len(attempt)


def audit(data: bytes) -> None:
    """Pages of content, pages of zeros, and the sums."""
    for attempt in (data, mended_set(data)):
        try:
            found = wire.decode_audit(attempt, NPAGES)
        except ProtocolError:
            continue
        assert found.content.size == found.zeros.size == NPAGES
        again = wire.decode_audit(wire.encode_audit(*found), NPAGES)
        assert again[:2] == found[:2]
        assert np.array_equal(again.sums, found.sums)


def mended_set(data: bytes) -> bytes:
    """An audit whose page sets have the right checksums, as far as their own counts of entries reach."""
    whole, at = bytearray(data), 0
    for _ in range(2):
        if len(data) < at + 36:
            break
        entries = min(struct.unpack_from("<Q", data, at + 24)[0], 1 << 20)
        end = at + 36 + entries * (16 if data[at] == 1 else 8)
        struct.pack_into("<I", whole, at + 32, zlib.crc32(data[at + 36 : end]))
        at = end
    return bytes(whole)


def check_runs(runs: wire.Runs, npages: int) -> None:
    """Ascending, not empty, not touching, inside."""
    end = -1
    for first, count in runs.tolist():
        assert count > 0
        assert first > end
        end = first + count
    assert end <= npages


def working_set(data: bytes) -> None:
    """A file of pages that were touched first."""
    attempts = [data]
    if len(data) >= 28:
        body = zlib.crc32(data[28:], zlib.crc32(data[:24]))
        attempts.append(data[:24] + struct.pack("<I", body) + data[28:])
    for attempt in attempts:
        try:
            decoded = WorkingSet.from_bytes(attempt)
        except ProtocolError:
            continue
        assert decoded.to_bytes() == attempt
        assert sum(int(part[:, 1].sum()) for _, part in decoded.parts()) == decoded.pages


def handshake(data: bytes) -> None:
    """The message of a VMM that hands over its guest."""
    try:
        regions = parse_handshake(data, snapshot_size=SNAPSHOT_SIZE)
    except (ProtocolError, UnsupportedError):
        return
    assert regions
    for region in regions:
        assert 0 < region.size <= SNAPSHOT_SIZE - region.offset
        assert region.address % region.page_size == 0


def handshake_in_pieces(data: bytes) -> None:
    """The same from a socket: in two pieces, and without the descriptor that has to come with it."""
    near, far = socket.socketpair()
    with near, far:
        split = data[0] if data else 0
        for piece in (data[1 : 1 + split], data[1 + split :]):
            far.sendall(piece)
        far.shutdown(socket.SHUT_WR)
        try:
            receive_handshake(near, timeout=5.0)
        except ProtocolError:
            return
    raise AssertionError("a handshake without a descriptor was taken")


def saved_bitmap(data: bytes) -> None:
    """A file of a bitmap."""
    attempts = [data]
    if len(data) >= 32:
        checksum = zlib.crc32(data[32:], zlib.crc32(data[:28]))
        attempts.append(data[:28] + struct.pack("<I", checksum) + data[32:])
    for attempt in attempts:
        try:
            decoded = SavedBitmap.from_bytes(attempt)
        except ProtocolError:
            continue
        assert decoded.to_bytes() == attempt


def run_report(data: bytes) -> None:
    """A file of what happened in a run, with the checksum of whatever it says."""
    attempts = [data]
    with contextlib.suppress(ValueError, RecursionError):
        envelope = json.loads(data)
        if isinstance(envelope, dict) and isinstance(envelope.get("report"), dict):
            text = json.dumps(envelope["report"], sort_keys=True, separators=(",", ":"))
            envelope["checksum"] = f"{zlib.crc32(text.encode()):08x}"
            attempts.append(json.dumps(envelope).encode())
    for attempt in attempts:
        try:
            outcome = parse_report(attempt)
        except ProtocolError:
            continue
        json.dumps(outcome.to_json(), allow_nan=False)


def chunks(data: bytes) -> None:
    """What a link helper is sent, in pieces."""
    unpacker = Unpacker(zstd=True)
    pieces, start = [], 1
    while start < len(data):
        pieces.append(data[start : start + data[0] + 1])
        start += data[0] + 1
    for piece in pieces:
        try:
            plain = unpacker.feed(memoryview(piece))
        except ProtocolError:
            return
        # The bytes of raw chunks are in the piece; of packed ones, each makes one chunk at the most.
        assert sum(map(len, plain)) <= len(piece) + len(plain) * CHUNK


def agreement(data: bytes) -> None:
    """What a receiver makes of a sender's HELLO."""
    try:
        options = learn(Options(), wire.decode_hello(data), 1 << 30)
    except ProtocolError:
        return
    assert options.size <= 1 << 30


@functools.cache
def guest() -> Guest:
    """A guest to load states into, for the life of the process."""
    opened = open_guest(16 << 20, kind="process", role="destination", seed=5)
    atexit.register(opened.close)
    return opened


def guest_state(data: bytes) -> None:
    """What a destination is told of the vCPUs."""
    size = STATE_BYTES
    attempts = [data]
    if len(data) >= size:
        checksum = zlib.crc32(data[: size - 4] + bytes(4) + data[size:])
        attempts.append(data[: size - 4] + struct.pack("<I", checksum) + data[size:])
    for attempt in attempts:
        try:
            guest().load_state(attempt)
        except ProtocolError:
            continue
        assert guest().save_state() == attempt


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        frames,
        pages_at_once,
        greeting,
        hello,
        report,
        page_set,
        audit,
        working_set,
        handshake,
        handshake_in_pieces,
        guest_state,
        saved_bitmap,
        run_report,
        chunks,
        agreement,
    )
}
