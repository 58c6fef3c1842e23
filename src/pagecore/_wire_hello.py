"""What two peers tell one another as JSON: the HELLO that opens every stream, and short reports.

A HELLO is parsed before its sender has proved anything: it is bounded, and every member is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pagecore.errors import ProtocolError

__all__ = [
    "MAX_HELLO_BYTES",
    "MAX_REPORT_BYTES",
    "MAX_STREAMS",
    "VERSION",
    "Capabilities",
    "Hello",
    "Session",
    "decode_hello",
    "decode_report",
    "encode_hello",
    "encode_report",
    "stream_names",
]

Buffer = bytes | bytearray | memoryview

VERSION: Final = 1
MAX_HELLO_BYTES: Final = 16 << 10
MAX_REPORT_BYTES: Final = 4 << 10
# Of a text in a report: characters, and bytes of its JSON, so that there is room for more than it.
MAX_TEXT: Final = 1000
MAX_TEXT_BYTES: Final = 3 << 10
# Beyond it, and beyond all bounds, no number means anything.
MAX_NUMBER: Final = 1 << 63
MAX_REGIONS: Final = 256
MAX_REGION_PAGES: Final = 1 << 40
# Bulk streams of one session.
MAX_STREAMS: Final = 16


@dataclass(frozen=True, slots=True)
class Session:
    """What both sides agreed on in their HELLO; the bounds of everything after it.

    Attributes
    ----------
    page_size : int
        Bytes.
    regions : mapping of int to int
        Pages of each region, by its id.
    generation : int
        W6: frames of another one are refused.
    """

    page_size: int
    regions: Mapping[int, int]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """W2: what a side can do. The weaker side decides."""

    duplicates: str = "tolerant"
    hinted_runs: bool = True
    recovery: bool = False
    # Knows ALIVE, the sign of life of a source that holds pages back.
    pause: bool = False

    def weaker(self, other: Capabilities) -> Capabilities:
        """What both sides can do; strict where one of them is strict."""
        strict = "strict" in (self.duplicates, other.duplicates)
        return Capabilities(
            "strict" if strict else "tolerant",
            self.hinted_runs and other.hinted_runs,
            self.recovery and other.recovery,
            self.pause and other.pause,
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame on every stream, both ways.

    Attributes
    ----------
    stream : str
        ``control``, ``bulk-0`` and so on, or ``urgent``.
    session_id : str
        Names the session, so that its streams find together; 1 to 64 characters.
    generation : int
        0 for the first connection of a session; each later one has a larger number (W6).
    page_size : int
        Bytes; a power of two, 4096 or more.
    regions : mapping of int to int
        Pages of each region, by its id.
    capabilities : Capabilities
    details : mapping
        What the two controllers tell one another beyond the protocol: flat, of JSON scalars.
    streams : int
        Bulk streams that the side would use, 1 to 16. The weaker side decides.
    """

    stream: str
    session_id: str
    generation: int
    page_size: int
    regions: Mapping[int, int]
    capabilities: Capabilities = field(default_factory=Capabilities)
    details: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    streams: int = 1

    def session(self) -> Session:
        """The bounds that hold for every later frame."""
        return Session(self.page_size, dict(self.regions), self.generation)


def stream_names(streams: int) -> tuple[str, ...]:
    """The streams of a session with so many bulk streams, in the order in which they are opened."""
    return ("control", *(f"bulk-{number}" for number in range(streams)), "urgent")


_STREAMS: Final = stream_names(MAX_STREAMS)


def encode_report(report: Mapping[str, str | int | float | bool | None]) -> bytes:
    """The payload of RUN, RUNNING, COMPLETE, ABORT, ERROR and ALIVE: a flat JSON object; long texts are cut."""
    flat = {key: _cut(value) if isinstance(value, str) else value for key, value in report.items()}
    payload = json.dumps(flat, separators=(",", ":"), allow_nan=False).encode()
    if len(payload) > MAX_REPORT_BYTES:
        raise ValueError(f"report of {len(payload)} bytes; at most {MAX_REPORT_BYTES}")
    return payload


def _cut(text: str) -> str:
    """As much of a text as may travel. What is no ASCII takes up to twelve bytes a character."""
    text = text[:MAX_TEXT]
    while len(json.dumps(text)) > MAX_TEXT_BYTES:
        text = text[: len(text) * 7 // 8]
    return text


def decode_report(payload: Buffer) -> dict[str, str | int | float | bool | None]:
    """The flat JSON object of a report.

    Raises
    ------
    ProtocolError
    """
    return _flat(_json_object(payload, "report", MAX_REPORT_BYTES), "report")


def encode_hello(hello: Hello) -> bytes:
    """The payload of HELLO and HELLO_ACK."""
    capabilities = hello.capabilities
    text = json.dumps(
        {
            "version": VERSION,
            "stream": hello.stream,
            "session": hello.session_id,
            "generation": hello.generation,
            "streams": hello.streams,
            "page_size": hello.page_size,
            "regions": [{"id": number, "pages": pages} for number, pages in sorted(hello.regions.items())],
            "capabilities": {
                "duplicates": capabilities.duplicates,
                "hinted-runs": capabilities.hinted_runs,
                "recovery": capabilities.recovery,
                "pause": capabilities.pause,
            },
            "details": dict(hello.details),
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    return text.encode()


def decode_hello(payload: Buffer) -> Hello:
    """The HELLO of a peer that has proved nothing yet. Unknown keys are ignored: a newer peer may have more.

    Raises
    ------
    ProtocolError
        Naming the field.
    """
    top = _json_object(payload, "hello", MAX_HELLO_BYTES)
    version = _integer(top, "version", 0, 1 << 31)
    if version != VERSION:
        raise ProtocolError("version", f"{version}; this side speaks {VERSION}")
    stream = _text(top, "stream")
    if stream not in _STREAMS:
        raise ProtocolError("stream", f"{stream!r} is neither control, urgent nor bulk-0 to bulk-{MAX_STREAMS - 1}")
    page_size = _integer(top, "page_size", 4096, 1 << 30)
    if page_size & (page_size - 1):
        raise ProtocolError("page_size", f"{page_size} is not a power of two")
    given = _member(top, "capabilities", dict)
    duplicates = _text(given, "duplicates")
    if duplicates not in ("tolerant", "strict"):
        raise ProtocolError("duplicates", f"{duplicates!r} is neither tolerant nor strict")
    return Hello(
        stream=stream,
        session_id=_text(top, "session"),
        generation=_integer(top, "generation", 0, (1 << 32) - 1),
        page_size=page_size,
        regions=_regions(top),
        capabilities=Capabilities(
            duplicates,
            _member(given, "hinted-runs", bool),
            _member(given, "recovery", bool),
            # Whoever does not know the word cannot do it.
            "pause" in given and _member(given, "pause", bool),
        ),
        details=_flat(_member(top, "details", dict), "details"),
        streams=_integer(top, "streams", 1, MAX_STREAMS),
    )


def _regions(top: dict[str, Any]) -> dict[int, int]:
    listed = _member(top, "regions", list)
    if not 0 < len(listed) <= MAX_REGIONS:
        raise ProtocolError("regions", f"{len(listed)} of them; 1 to {MAX_REGIONS}")
    regions: dict[int, int] = {}
    for entry in listed:
        if not isinstance(entry, dict):
            raise ProtocolError("regions", "an entry is not an object")
        number = _integer(entry, "id", 0, 0xFFFF)
        if number in regions:
            raise ProtocolError("regions", f"id {number} comes twice")
        regions[number] = _integer(entry, "pages", 0, MAX_REGION_PAGES)
    return regions


def _json_object(payload: Buffer, name: str, bound: int) -> dict[str, Any]:
    if len(payload) > bound:
        raise ProtocolError(name, f"{len(payload)} bytes; at most {bound}")
    try:
        value = json.loads(bytes(payload).decode("utf-8"), parse_constant=_refuse_constant)
    # RecursionError: a few thousand brackets fit into the bound.
    except (ValueError, RecursionError) as error:
        raise ProtocolError(name, f"is not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ProtocolError(name, "is not a JSON object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _flat(given: dict[str, Any], name: str) -> dict[str, str | int | float | bool | None]:
    for key, value in given.items():
        if value is not None and not isinstance(value, str | int | float | bool):
            raise ProtocolError(name, f"{key[:64]!r} is not a plain value")
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise ProtocolError(name, f"{key[:64]!r} is beyond {MAX_NUMBER}")
    return given


def _member(given: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = given.get(key)
    if not isinstance(value, kind):
        raise ProtocolError(key, f"is not of type {kind.__name__}" if key in given else "is missing")
    return value


def _text(given: dict[str, Any], key: str) -> str:
    value: str = _member(given, key, str)
    if not 0 < len(value) <= 64:
        raise ProtocolError(key, f"{len(value)} characters; 1 to 64")
    try:
        # JSON can name half of a surrogate pair, which no text has.
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError(key, "is not text") from None
    return value


def _integer(given: dict[str, Any], key: str, low: int, high: int) -> int:
    value: int = _member(given, key, int)
    # JSON's true is an int to Python, and none to the protocol.
    if isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(key, f"{value if abs(value) < 1 << 64 else 'a huge number'} is outside [{low}, {high}]")
    return value
