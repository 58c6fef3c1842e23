"""The frames of a migration: bytes in, bytes out, and no sockets.

Every frame is a header of 40 bytes, little-endian, and a payload:

====== ==== ======= ================================================================
offset size field   meaning
====== ==== ======= ================================================================
0      4    magic   ``PGC1``
4      1    type    `FrameType`
5      1    flags   `FrameFlags`
6      2    region  region id; 0 where the frame speaks of none
8      4    generation  of the session (W6)
12     4    round   barrier count (W5)
16     8    first   first page; the list id of a LISTS_ACK
24     8    count   pages; 0 where the frame speaks of none
32     4    length  of the payload, bytes
36     4    crc     CRC-32 of the payload; 0 unless CHECKSUM
====== ==== ======= ================================================================

What a peer sends is never trusted (W4, D14): every length is checked against what the session can need before
memory is taken for it, and what cannot be right raises `ProtocolError` naming the field.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from pagecore._wire_frames import encode_pages, store_pages
from pagecore._wire_hello import (
    MAX_HELLO_BYTES,
    MAX_REPORT_BYTES,
    MAX_STREAMS,
    VERSION,
    Capabilities,
    Hello,
    Session,
    decode_hello,
    decode_report,
    encode_hello,
    encode_report,
    stream_names,
)
from pagecore._wire_sets import (
    BLOCK_PAGES,
    Audit,
    Checksums,
    PageSet,
    Runs,
    decode_audit,
    decode_page_set,
    encode_audit,
    encode_page_set,
    max_audit,
    max_page_set,
)
from pagecore.errors import ProtocolError

__all__ = [
    "BLOCK_PAGES",
    "HEADER_BYTES",
    "MAX_DATA_BYTES",
    "MAX_STREAMS",
    "VERSION",
    "Audit",
    "Capabilities",
    "Checksums",
    "FrameFlags",
    "FrameType",
    "Header",
    "Hello",
    "PageSet",
    "Runs",
    "Session",
    "check_payload",
    "decode_audit",
    "decode_frame",
    "decode_header",
    "decode_hello",
    "decode_page_set",
    "decode_report",
    "encode_audit",
    "encode_frame",
    "encode_header",
    "encode_hello",
    "encode_page_set",
    "encode_pages",
    "encode_report",
    "max_payload",
    "store_pages",
    "stream_names",
]

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"PGC1"
_HEADER: Final = struct.Struct("<4sBBHIIQQII")
HEADER_BYTES: Final = _HEADER.size

# Registers, devices and the like, never memory.
MAX_STATE_BYTES: Final = 16 << 20
# One PAGES frame: 1 MiB, or one page where pages are larger.
MAX_DATA_BYTES: Final = 1 << 20


class FrameType(IntEnum):
    """What a frame is. The numbers are the protocol: they never change meaning."""

    HELLO = 1
    HELLO_ACK = 2
    PAGES = 10
    ZEROS = 11
    FILL = 12
    SENT = 13
    GONE = 14
    REQUEST = 15
    ROUND = 16
    ROUND_ACK = 17
    END = 18
    DISCARD = 20
    HINTED = 21
    LISTS_ACK = 22
    STATE = 23
    RUN = 24
    RUNNING = 25
    FINISH = 26
    COMPLETE = 27
    ABORT = 28
    ERROR = 29
    AUDIT = 30
    SETTLED = 31
    RETURN = 32
    RESUME = 33
    ALIVE = 34


class FrameFlags(IntFlag):
    """Bits of the header's flags byte."""

    AGAIN = 0x01
    CHECKSUM = 0x80


_GREETING: Final = frozenset({FrameType.HELLO, FrameType.HELLO_ACK})
# Frames that name a run of pages of one region.
_RUNS: Final = frozenset(
    {FrameType.PAGES, FrameType.ZEROS, FrameType.FILL, FrameType.SENT, FrameType.GONE, FrameType.REQUEST}
)
_PAGE_SETS: Final = frozenset({FrameType.DISCARD, FrameType.HINTED, FrameType.FINISH, FrameType.SETTLED})
_REPORTS: Final = frozenset(
    {
        FrameType.RUN,
        FrameType.RUNNING,
        FrameType.COMPLETE,
        FrameType.ABORT,
        FrameType.ERROR,
        FrameType.RETURN,
        FrameType.RESUME,
        FrameType.ALIVE,
    }
)
_NAMES_A_REGION: Final = _RUNS | _PAGE_SETS | {FrameType.AUDIT}
_MAY_SAY_AGAIN: Final = _RUNS - {FrameType.SENT}
_KNOWN_FLAGS: Final = int(FrameFlags.AGAIN | FrameFlags.CHECKSUM)


class Header(NamedTuple):
    """A header that passed every check."""

    type: FrameType
    flags: FrameFlags
    region: int
    generation: int
    round: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants here
    length: int
    crc: int


# ---------------------------------------------------------------------------------------------------- frames


def max_payload(kind: FrameType, session: Session | None, region: int = 0) -> int:
    """The most bytes that a payload of this kind can need; checked before memory is taken for it (W4).

    Parameters
    ----------
    kind : FrameType
    session : Session or None
        None before the HELLO.
    region : int
        Its id, for frames that carry a set of pages.
    """
    if kind in _GREETING:
        return MAX_HELLO_BYTES
    if kind in _REPORTS:
        return MAX_REPORT_BYTES
    if session is None:
        return 0
    if kind is FrameType.PAGES:
        return max(session.page_size, MAX_DATA_BYTES)
    if kind is FrameType.STATE:
        return MAX_STATE_BYTES
    if kind in _PAGE_SETS:
        return max_page_set(session.regions.get(region, 0))
    if kind is FrameType.AUDIT:
        return max_audit(session.regions.get(region, 0))
    return 0


def encode_header(
    kind: FrameType,
    *,
    flags: int = 0,
    region: int = 0,
    generation: int = 0,
    round: int = 0,
    first: int = 0,
    count: int = 0,
    length: int = 0,
    crc: int = 0,
) -> bytes:
    """The 40 bytes before a payload."""
    return _HEADER.pack(MAGIC, kind, flags, region, generation, round, first, count, length, crc)


def encode_frame(
    kind: FrameType,
    payload: Buffer = b"",
    *,
    flags: int = 0,
    region: int = 0,
    generation: int = 0,
    round: int = 0,
    first: int = 0,
    count: int = 0,
) -> bytes:
    """A whole control frame, its payload covered by a checksum."""
    crc = 0
    if kind not in _RUNS:
        flags |= FrameFlags.CHECKSUM
        crc = zlib.crc32(payload)
    header = encode_header(
        kind,
        flags=flags,
        region=region,
        generation=generation,
        round=round,
        first=first,
        count=count,
        length=len(payload),
        crc=crc,
    )
    return header + bytes(payload)


def decode_header(data: Buffer, session: Session | None = None) -> Header:
    """Check a header against everything that is known, before a byte of its payload is read.

    Parameters
    ----------
    data : bytes-like
        At least `HEADER_BYTES` bytes; what follows them is not looked at.
    session : Session, optional
        What the HELLO agreed on. Without it only HELLO, HELLO_ACK and ERROR are accepted.

    Raises
    ------
    ProtocolError
        Naming the first field that cannot be right.
    """
    if len(data) < HEADER_BYTES:
        raise ProtocolError("header", f"{len(data)} bytes are fewer than {HEADER_BYTES}")
    magic, number, flags, region, generation, round_, first, count, length, crc = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError("magic", f"{magic!r} is not {MAGIC!r}")
    try:
        kind = FrameType(number)
    except ValueError:
        raise ProtocolError("type", f"{number} is not a known frame") from None
    header = Header(kind, FrameFlags(flags), region, generation, round_, first, count, length, crc)
    _check_flags(header)
    _check_place(header, session)
    _check_length(header, session)
    return header


def check_payload(header: Header, payload: Buffer) -> None:
    """Raise `ProtocolError` unless the payload is what its header says."""
    if len(payload) != header.length:
        raise ProtocolError("payload", f"{len(payload)} bytes; the header says {header.length}")
    if FrameFlags.CHECKSUM in header.flags:
        crc = zlib.crc32(payload)
        if crc != header.crc:
            raise ProtocolError("crc", f"payload of {header.type.name} has {crc:#010x}, not {header.crc:#010x}")


def decode_frame(data: Buffer, session: Session | None = None) -> tuple[Header, memoryview]:
    """A whole frame that lies in memory: its header and its payload, both checked.

    Raises
    ------
    ProtocolError
        Also where bytes are missing or left over.
    """
    header = decode_header(data, session)
    payload = memoryview(data)[HEADER_BYTES:]
    check_payload(header, payload)
    return header, payload


def _check_flags(header: Header) -> None:
    unknown = header.flags & ~_KNOWN_FLAGS
    if unknown:
        raise ProtocolError("flags", f"{unknown:#04x} is not known")
    if FrameFlags.AGAIN in header.flags and header.type not in _MAY_SAY_AGAIN:
        raise ProtocolError("flags", f"AGAIN has no meaning on {header.type.name}")
    if FrameFlags.CHECKSUM in header.flags:
        return
    if header.type not in _RUNS:
        raise ProtocolError("flags", f"{header.type.name} comes without a checksum")
    if header.crc:
        raise ProtocolError("crc", f"{header.crc:#010x} without the CHECKSUM flag")


def _check_place(header: Header, session: Session | None) -> None:
    kind = header.type
    if session is None:
        if kind not in _GREETING and kind is not FrameType.ERROR:
            raise ProtocolError("type", f"{kind.name} before the HELLO")
        return
    if header.generation != session.generation and kind not in _GREETING:
        raise ProtocolError("generation", f"{header.generation} is not the session's {session.generation}")
    if kind in _NAMES_A_REGION:
        if header.region not in session.regions:
            raise ProtocolError("region", f"{header.region} is not one of {sorted(session.regions)}")
    elif header.region:
        raise ProtocolError("region", f"{header.region} on {kind.name}, which names none")
    if kind in _RUNS:
        npages = session.regions[header.region]
        if header.first >= npages:
            raise ProtocolError("first", f"page {header.first} is outside [0, {npages})")
        if not 0 < header.count <= npages - header.first:
            raise ProtocolError("count", f"{header.count} pages at {header.first} are outside [0, {npages})")
        return
    if header.count:
        raise ProtocolError("count", f"{header.count} on {kind.name}, which names no pages")
    if header.first and kind is not FrameType.LISTS_ACK:
        raise ProtocolError("first", f"{header.first} on {kind.name}, which names no pages")


def _check_length(header: Header, session: Session | None) -> None:
    bound = max_payload(header.type, session, header.region)
    if header.length > bound:
        raise ProtocolError("length", f"{header.length} bytes for {header.type.name}; at most {bound}")
    if header.type is FrameType.PAGES and session is not None:
        need = header.count * session.page_size
        if header.length != need:
            raise ProtocolError("length", f"{header.length} bytes for {header.count} pages; need {need}")
