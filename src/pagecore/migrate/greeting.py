"""The HELLO that opens each stream, and what the two sides must agree on (W2)."""

from __future__ import annotations

import contextlib
import struct
import time
from typing import Final

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.link import Stream
from pagecore.wire import FrameType, Header, Hello, decode_hello, encode_frame, encode_hello, encode_report

__all__ = [
    "NO_WORD",
    "WORD",
    "check_agreement",
    "check_greeting",
    "expect_plain_bytes",
    "greet",
    "read_hello",
    "refuse",
    "seconds_left",
]

# The word of the link helper that goes before the plain bytes: its length, and why the link could not be made.
WORD: Final = struct.Struct("<H")
NO_WORD: Final = "the link could not be made: the link helper did not take it, or has ended"
REFUSAL_SECONDS: Final = 1.0


def greet(stream: Stream, kind: FrameType, hello: Hello) -> None:
    """Send a HELLO or HELLO_ACK."""
    stream.send([encode_frame(kind, encode_hello(hello), generation=hello.generation)])


def read_hello(stream: Stream, kind: FrameType) -> Hello:
    """Receive one; not a byte more than that is taken from the stream.

    Raises
    ------
    ProtocolError, PeerGoneError
    RemoteError
        If the peer refused, with its reason.
    """
    header, payload = stream.receive_frame(None)
    if header.type is not kind:
        raise ProtocolError("type", f"{header.type.name} came where {kind.name} was due")
    return check_greeting(header, payload)


def check_greeting(header: Header, payload: bytes) -> Hello:
    """What a HELLO or HELLO_ACK says, if it agrees with its header.

    Raises
    ------
    ProtocolError
    """
    hello = decode_hello(payload)
    if hello.generation != header.generation:
        raise ProtocolError("generation", f"{hello.generation} in the HELLO, {header.generation} before it")
    return hello


def check_agreement(ours: Hello, theirs: Hello) -> None:
    """Both sides speak of the same stream of the same session over the same memory.

    Raises
    ------
    ProtocolError
        Naming the first member that differs.
    """
    for name in ("stream", "session_id", "generation", "page_size", "regions"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            raise ProtocolError(name, f"the peer says {other!r}, this side {mine!r}")


def expect_plain_bytes(stream: Stream) -> None:
    """Read the helper's word on a stream that `Transport.wrap` made.

    Raises
    ------
    PeerGoneError
        With the reason why there is no link.
    """
    size = bytearray(WORD.size)
    try:
        stream.receive_into(memoryview(size))
    except PeerGoneError:
        if not stream.readable(0):
            # It is the peer that takes its time.
            raise
        raise PeerGoneError(NO_WORD) from None
    reason = bytearray(WORD.unpack(size)[0])
    stream.receive_into(memoryview(reason))
    if reason:
        raise PeerGoneError(f"the link could not be made: {reason.decode(errors='replace')}")


def refuse(stream: Stream, error: Exception) -> None:
    """Tell a peer why it is shown out, if it listens; close the stream."""
    stream.patience = REFUSAL_SECONDS
    with contextlib.suppress(PagecoreError, OSError):
        stream.send([encode_frame(FrameType.ERROR, encode_report({"reason": str(error)}))])
    stream.close()


def seconds_left(deadline: float) -> float:
    """Until a deadline; never nothing, so that what is there already is still taken."""
    return max(0.1, deadline - time.monotonic())
