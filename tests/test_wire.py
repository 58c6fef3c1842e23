"""Frames: what goes in comes out, and nothing else than ProtocolError comes of a bad one."""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagecore import Bitmap, wire
from pagecore._run_count import run_count
from pagecore.errors import ProtocolError
from pagecore.wire import Capabilities, FrameFlags, FrameType, Hello, Session

SESSION = Session(page_size=4096, regions={0: 1000, 3: 64}, generation=2)
HEADER = struct.Struct("<4sBBHIIQQII")


def header(**fields: Any) -> bytes:
    """A valid REQUEST header with some fields replaced."""
    values = {
        "magic": b"PGC1",
        "type": 15,
        "flags": 0,
        "region": 0,
        "generation": 2,
        "round": 5,
        "first": 10,
        "count": 4,
        "length": 0,
        "crc": 0,
    }
    values.update(fields)
    return HEADER.pack(*values.values())


def control(kind: FrameType, payload: bytes = b"", **fields: Any) -> bytes:
    """A valid control header with some fields replaced."""
    values = {"type": kind, "flags": 0x80, "first": 0, "count": 0, "length": len(payload)}
    return header(**{**values, "crc": zlib.crc32(payload), **fields})


def hello(**changes: Any) -> bytes:
    top: dict[str, Any] = {
        "version": 1,
        "stream": "bulk-0",
        "streams": 2,
        "session": "abc",
        "generation": 2,
        "page_size": 4096,
        "regions": [{"id": 0, "pages": 1000}],
        "capabilities": {"duplicates": "tolerant", "hinted-runs": True, "recovery": False},
        "details": {"guest": "kvm"},
    }
    top.update(changes)
    return json.dumps(top).encode()


def field_of(data: bytes, session: Session | None = SESSION) -> str:
    with pytest.raises(ProtocolError) as caught:
        wire.decode_header(data, session)
    assert str(caught.value).startswith(caught.value.field)
    return caught.value.field


# ---------------------------------------------------------------------------------------------------- header


def test_a_header_is_40_bytes_and_comes_back() -> None:
    data = wire.encode_header(FrameType.PAGES, region=3, generation=2, round=7, first=60, count=4, length=4 * 4096)
    assert len(data) == wire.HEADER_BYTES == 40
    decoded = wire.decode_header(data, SESSION)
    assert decoded == (FrameType.PAGES, 0, 3, 2, 7, 60, 4, 16384, 0)


def test_the_layout_is_the_protocol() -> None:
    # Bytes written out by hand: a change of the struct would still round-trip.
    data = wire.encode_header(
        FrameType.REQUEST, flags=1, region=2, generation=3, round=4, first=5, count=6, length=7, crc=8
    )
    assert data.hex() == ("504743310f0102000300000004000000050000000000000006000000000000000700000008000000")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"magic": b"PGC2"}, "magic"),
        ({"type": 0}, "type"),
        ({"type": 99}, "type"),
        ({"flags": 0x02}, "flags"),
        ({"flags": 0x40}, "flags"),
        ({"type": 13, "flags": 0x01}, "flags"),  # SENT | AGAIN
        ({"region": 1}, "region"),
        ({"generation": 1}, "generation"),
        ({"generation": 3}, "generation"),
        ({"first": 1000}, "first"),
        ({"first": 1 << 63}, "first"),
        ({"count": 0}, "count"),
        ({"count": 991}, "count"),
        ({"count": (1 << 64) - 1}, "count"),
        ({"first": 63, "count": 2, "region": 3}, "count"),
        ({"length": 1}, "length"),
        ({"crc": 1}, "crc"),
    ],
)
def test_each_bad_field_of_a_run_is_named(fields: dict[str, Any], named: str) -> None:
    assert field_of(header(**fields)) == named


@pytest.mark.parametrize(
    ("count", "length"),
    [(1, 4095), (1, 4097), (2, 4096), (1, 0), (1, 0xFFFFFFFF), (257, 257 * 4096)],
)
def test_the_length_of_pages_is_checked_before_memory_is_taken(count: int, length: int) -> None:
    assert field_of(header(type=FrameType.PAGES, count=count, length=length)) == "length"


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (FrameType.ROUND, {"flags": 0}, "flags"),
        (FrameType.ROUND, {"region": 3}, "region"),
        (FrameType.ROUND, {"first": 1}, "first"),
        (FrameType.ROUND, {"count": 1}, "count"),
        (FrameType.ROUND, {"length": 1}, "length"),
        (FrameType.END, {"length": 4096}, "length"),
        (FrameType.STATE, {"length": (16 << 20) + 1}, "length"),
        (FrameType.RUN, {"length": (4 << 10) + 1}, "length"),
        (FrameType.HELLO, {"length": (16 << 10) + 1}, "length"),
        (FrameType.DISCARD, {"length": 37 + 8 * 16}, "length"),
        (FrameType.DISCARD, {"region": 9}, "region"),
        (FrameType.AUDIT, {"length": 2 * (36 + 8 * 16) + 8 * 16 + 1}, "length"),
        (FrameType.ROUND, {"flags": 0x81}, "flags"),
    ],
)
def test_each_bad_field_of_a_control_frame_is_named(kind: FrameType, fields: dict[str, Any], named: str) -> None:
    assert field_of(control(kind, **fields)) == named


def test_nothing_but_a_greeting_is_accepted_before_the_hello() -> None:
    for kind in FrameType:
        data = control(kind, length=0)
        if kind in (FrameType.HELLO, FrameType.HELLO_ACK, FrameType.ERROR):
            assert wire.decode_header(data).type is kind
        else:
            assert field_of(data, None) == "type"


def test_a_list_id_travels_in_lists_ack() -> None:
    decoded, _ = wire.decode_frame(wire.encode_frame(FrameType.LISTS_ACK, generation=2, first=77), SESSION)
    assert decoded.first == 77


def test_a_truncated_header_and_payload_are_refused() -> None:
    frame = wire.encode_frame(FrameType.STATE, b"registers", generation=2)
    for cut in range(len(frame)):
        with pytest.raises(ProtocolError):
            wire.decode_frame(frame[:cut], SESSION)
    with pytest.raises(ProtocolError, match="payload"):
        wire.decode_frame(frame + b"x", SESSION)


def test_control_payloads_are_covered_by_a_checksum() -> None:
    frame = bytearray(wire.encode_frame(FrameType.STATE, b"registers", generation=2))
    decoded, payload = wire.decode_frame(frame, SESSION)
    assert FrameFlags.CHECKSUM in decoded.flags
    assert bytes(payload) == b"registers"
    frame[-1] ^= 1
    with pytest.raises(ProtocolError, match="crc"):
        wire.decode_frame(frame, SESSION)


# ------------------------------------------------------------------------------------------------- page sets


@pytest.mark.parametrize(
    "runs",
    [[], [(0, 1)], [(0, 1000)], [(5, 3), (9, 1), (999, 1)], [(i, 1) for i in range(0, 1000, 2)]],
)
def test_a_page_set_comes_back_as_runs_or_bitmap_whichever_is_smaller(runs: list[tuple[int, int]]) -> None:
    data = wire.encode_page_set(np.array(runs, np.int64).reshape(-1, 2), 1000, generation=2, list_id=1 << 40)
    assert len(data) <= 36 + 8 * 16
    decoded = wire.decode_page_set(data, 1000, generation=2)
    assert decoded.list_id == 1 << 40
    assert decoded.npages == 1000
    assert decoded.runs.dtype == np.int64
    assert decoded.runs.tolist() == [list(run) for run in runs]


@pytest.mark.parametrize("npages", [0, 1, 64, 1000, 100_000])
@pytest.mark.parametrize("step", [1, 2, 3, 64, 129, 1 << 30])
def test_a_bitmap_is_encoded_like_its_runs(npages: int, step: int) -> None:
    bitmap = Bitmap(npages)
    bitmap.set_indices(np.arange(0, npages, step))
    data = wire.encode_page_set(bitmap, generation=2, list_id=7)
    assert data == wire.encode_page_set(bitmap.runs(), npages, generation=2, list_id=7)
    assert np.array_equal(wire.decode_page_set(data, npages, generation=2).runs, bitmap.runs())


def test_a_bitmap_knows_its_size() -> None:
    with pytest.raises(ValueError, match="a bitmap of 10 pages for a region of 11"):
        wire.encode_page_set(Bitmap(10), 11)
    with pytest.raises(TypeError, match="npages"):
        wire.encode_page_set([(0, 1)])


def test_runs_are_counted_over_the_borders_of_the_pieces() -> None:
    bitmap = Bitmap(200_000)
    bitmap.fill()
    assert run_count(bitmap, 10) == 1
    bitmap.clear_indices([1 << 15, (1 << 16) - 1, 199_999])
    assert run_count(bitmap, 10) == len(bitmap.runs()) == 3
    bitmap.clear_indices(np.arange(0, 200_000, 2))
    assert run_count(bitmap, 200_000) == len(bitmap.runs())
    assert 100 < run_count(bitmap, 100) < 20_000


def test_the_smaller_form_is_taken() -> None:
    assert wire.encode_page_set([(0, 1)], 1000)[0] == 1
    assert wire.encode_page_set([(i, 1) for i in range(0, 1000, 2)], 1000)[0] == 2
    assert len(wire.encode_page_set([], 0)) == 36
    assert wire.decode_page_set(wire.encode_page_set([], 0), 0).runs.shape == (0, 2)


@pytest.mark.parametrize(
    "runs", [[(0, 0)], [(-1, 2)], [(999, 2)], [(5, 3), (7, 1)], [(5, 3), (8, 1)], [(9, 1), (5, 1)], [(0, -3)]]
)
def test_runs_that_are_no_set_of_pages_are_refused_at_the_sender(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="run"):
        wire.encode_page_set(runs, 1000)


PAGE_SET = struct.Struct("<B3xIQQQI")


def page_set(body: bytes, **fields: Any) -> bytes:
    values = {"kind": 1, "generation": 2, "list": 1, "npages": 1000, "entries": len(body) // 16}
    values.update(fields)
    values.setdefault("crc", zlib.crc32(body))
    return PAGE_SET.pack(*values.values()) + body


def runs_body(*runs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *run) for run in runs)


BITMAP_BODY = bytes(128)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "page set"),
        (page_set(b"")[:-1], "page set"),
        (page_set(b"", kind=0), "page set kind"),
        (page_set(b"", kind=3), "page set kind"),
        (page_set(b"", generation=1), "page set generation"),
        (page_set(b"", npages=999), "page set size"),
        (page_set(b"", entries=1), "page set"),
        (page_set(b"", entries=9), "page set entries"),
        (page_set(b"", entries=1 << 60), "page set entries"),
        (page_set(b"", kind=2, entries=15), "page set entries"),
        (page_set(BITMAP_BODY, kind=2, entries=17), "page set entries"),
        (page_set(b"\0" + bytes(15)) + b"x", "page set runs"),
        (page_set(runs_body((0, 1)), crc=0), "page set crc"),
        (page_set(runs_body((0, 1)) + b"x", entries=1, crc=zlib.crc32(runs_body((0, 1)))), "page set"),
        (page_set(runs_body((0, 0))), "page set runs"),
        (page_set(runs_body((1000, 1))), "page set runs"),
        (page_set(runs_body((999, 2))), "page set runs"),
        (page_set(runs_body(((1 << 64) - 1, 2))), "page set runs"),
        (page_set(runs_body((1, (1 << 64) - 1))), "page set runs"),
        (page_set(runs_body((1 << 63, 1 << 63))), "page set runs"),
        (page_set(runs_body((5, 1), (5, 1))), "page set runs"),
        (page_set(runs_body((5, 1), (6, 1))), "page set runs"),
        (page_set(BITMAP_BODY[:-1] + b"\x80", kind=2, entries=16), "page set tail"),
        (b"\1\1" + page_set(b"")[2:], "page set reserved"),
    ],
)
def test_each_bad_field_of_a_page_set_is_named(data: bytes, named: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.decode_page_set(data, 1000, generation=2)
    assert caught.value.field == named


def bits(npages: int, *pages: int) -> Bitmap:
    bitmap = Bitmap(npages)
    bitmap.set_indices(list(pages))
    return bitmap


@pytest.mark.parametrize("npages", [0, 1, 64, 65, 1000])
def test_an_audit_comes_back_and_its_length_is_checked(npages: int) -> None:
    content, zeros = bits(npages, *range(0, npages, 2)), bits(npages, *range(1, npages, 3))
    sums = np.arange(1 << 63, (1 << 63) + -(-npages // 64), dtype=np.uint64)
    data = wire.encode_audit(content, zeros, sums, generation=2)
    found = wire.decode_audit(data, npages, generation=2)
    assert found.content == content
    assert found.zeros == zeros
    assert np.array_equal(found.sums, sums)
    for bad in (data[:-1], data[:-8], data + bytes(8)):
        with pytest.raises(ProtocolError, match=r"audit|page set"):
            wire.decode_audit(bad, npages, generation=2)
    assert len(data) <= wire.max_payload(FrameType.AUDIT, replace(SESSION, regions={0: npages}))


def test_an_audit_is_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"checksums of shape \(3,\), need \(2,\)"):
        wire.encode_audit(Bitmap(65), Bitmap(65), np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match="zeros of 64 pages, content of 65"):
        wire.encode_audit(Bitmap(65), Bitmap(64), np.zeros(2, np.uint64))


# ------------------------------------------------------------------------------------------- HELLO, reports


def test_a_hello_comes_back() -> None:
    given = Hello(
        "urgent",
        "s" * 64,
        3,
        4096,
        {0: 10, 7: 0},
        Capabilities("strict", hinted_runs=False, recovery=True, pause=True),
        {"guest": "process", "seed": 5, "rate": None},
    )
    assert wire.decode_hello(wire.encode_hello(given)) == given
    assert given.session() == Session(4096, {0: 10, 7: 0}, 3)


def test_the_weaker_side_decides() -> None:
    strict = Capabilities("strict", hinted_runs=True, recovery=False)
    able = Capabilities("tolerant", hinted_runs=True, recovery=True)
    assert strict.weaker(able) == able.weaker(strict) == Capabilities("strict", True, False)
    assert able.weaker(Capabilities(hinted_runs=False)).hinted_runs is False
    pausing = Capabilities(pause=True)
    assert pausing.weaker(pausing).pause
    assert not pausing.weaker(able).pause
    assert not able.weaker(pausing).pause


def test_a_peer_that_does_not_know_of_pauses_cannot_pause() -> None:
    assert wire.decode_hello(hello()).capabilities.pause is False


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"version": None}, "version"),
        ({"stream": "other"}, "stream"),
        ({"stream": 5}, "stream"),
        ({"stream": "bulk-16"}, "stream"),
        ({"streams": 0}, "streams"),
        ({"streams": 17}, "streams"),
        ({"session": ""}, "session"),
        ({"session": "x" * 65}, "session"),
        ({"session": "\ud800"}, "session"),
        ({"generation": -1}, "generation"),
        ({"generation": 1 << 32}, "generation"),
        ({"generation": 1.0}, "generation"),
        ({"page_size": 5000}, "page_size"),
        ({"page_size": 2048}, "page_size"),
        ({"page_size": 10**1000}, "page_size"),
        ({"regions": []}, "regions"),
        ({"regions": {}}, "regions"),
        ({"regions": [5]}, "regions"),
        ({"regions": [{"id": n, "pages": 1} for n in range(257)]}, "regions"),
        ({"regions": [{"id": 1, "pages": 1}] * 2}, "regions"),
        ({"regions": [{"id": 65536, "pages": 1}]}, "id"),
        ({"regions": [{"id": 0, "pages": -1}]}, "pages"),
        ({"regions": [{"id": 0, "pages": 1 << 41}]}, "pages"),
        ({"regions": [{"id": 0}]}, "pages"),
        ({"capabilities": None}, "capabilities"),
        ({"capabilities": {"duplicates": "some", "hinted-runs": True, "recovery": True}}, "duplicates"),
        ({"capabilities": {"duplicates": "strict", "hinted-runs": 1, "recovery": True}}, "hinted-runs"),
        ({"capabilities": {"duplicates": "strict", "hinted-runs": True}}, "recovery"),
        ({"capabilities": {"duplicates": "strict", "hinted-runs": True, "recovery": True, "pause": 1}}, "pause"),
        ({"capabilities": {"duplicates": "strict", "hinted-runs": True, "recovery": True, "pause": None}}, "pause"),
        ({"details": {"a": []}}, "details"),
        ({"details": []}, "details"),
    ],
)
def test_each_bad_field_of_a_hello_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.decode_hello(hello(**changes))
    assert caught.value.field == named


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"5",
        b"{",
        b"\xff\xfe",
        b"[" * 16000,
        b'{"a":' * 3000,
        b"{}" + b" " * (16 << 10),
        b'{"a":NaN}',
    ],
)
def test_a_hello_that_is_no_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="hello"):
        wire.decode_hello(payload)


def test_a_newer_peer_may_say_more() -> None:
    assert wire.decode_hello(hello(colour="blue")).stream == "bulk-0"


def test_a_report_comes_back_and_is_bounded() -> None:
    report: dict[str, str | int | float | bool | None] = {
        "reason": "ü",
        "at": 1.5,
        "n": 3,
        "ok": True,
        "x": None,
    }
    assert wire.decode_report(wire.encode_report(report)) == report
    # Whatever a reason is of: a side that fails says why, and whether it ran the guest (S9).
    for letter in "x", "ü", "\0", "\ud800", "\N{ELEPHANT}":
        said = wire.decode_report(wire.encode_report({"reason": f"why: {letter * 100000}", "ran": False}))
        assert str(said["reason"]).startswith(f"why: {letter * 200}")
        assert said["ran"] is False
    with pytest.raises(ValueError, match="report of"):
        wire.encode_report({str(n): "x" * 1000 for n in range(5)})
    for bad in (b'{"a":[1]}', b'{"a":{}}', b"null", b" " * 5000, b'{"a":1e999}', b'{"a":-1%s}' % (b"0" * 30)):
        with pytest.raises(ProtocolError, match="report"):
            wire.decode_report(bad)


# ---------------------------------------------------------------------------------------------------- fuzzing


def corpus() -> list[bytes]:
    every_other = [(page, 1) for page in range(0, 1000, 2)]
    greeting = Hello("control", "id", 2, 4096, {0: 1000, 3: 64}, details={"guest": "kvm"})
    frame = wire.encode_frame
    return [
        frame(FrameType.HELLO, wire.encode_hello(greeting), generation=2),
        frame(FrameType.PAGES, bytes(8192), generation=2, first=998, count=2),
        frame(FrameType.ZEROS, generation=2, first=0, count=1000),
        frame(FrameType.REQUEST, generation=2, first=1, count=1, flags=1),
        frame(FrameType.ROUND, generation=2, round=4),
        frame(FrameType.END, generation=2, round=4),
        frame(FrameType.DISCARD, wire.encode_page_set([(1, 5)], 1000, generation=2, list_id=1), generation=2),
        frame(FrameType.HINTED, wire.encode_page_set(every_other, 1000, generation=2), generation=2),
        frame(FrameType.SETTLED, wire.encode_page_set([(0, 64)], 64, generation=2), generation=2, region=3),
        frame(FrameType.LISTS_ACK, generation=2, first=9),
        frame(FrameType.STATE, b"state", generation=2),
        frame(FrameType.RUN, wire.encode_report({"epoch": 4}), generation=2),
        frame(
            FrameType.AUDIT, wire.encode_audit(bits(1000, 3), bits(1000, 9), np.arange(16), generation=2), generation=2
        ),
        frame(FrameType.ALIVE, wire.encode_report({"paused": True}), generation=2),
    ]


def parse(data: bytes) -> None:
    """Whatever a receiver does with a frame."""
    decoded, payload = wire.decode_frame(data, SESSION)
    npages = SESSION.regions.get(decoded.region, 0)
    match decoded.type:
        case FrameType.HELLO | FrameType.HELLO_ACK:
            assert wire.decode_hello(payload).page_size >= 4096
        case FrameType.DISCARD | FrameType.HINTED | FrameType.FINISH | FrameType.SETTLED:
            inside(wire.decode_page_set(payload, npages, generation=2).runs, npages)
        case FrameType.AUDIT:
            assert {pages.size for pages in wire.decode_audit(payload, npages, generation=2)[:2]} == {npages}
        case (
            FrameType.RUN | FrameType.RUNNING | FrameType.COMPLETE | FrameType.ABORT | FrameType.ERROR | FrameType.ALIVE
        ):
            wire.decode_report(payload)
        case FrameType.PAGES:
            assert len(payload) == decoded.count * 4096
            assert decoded.first + decoded.count <= npages
        case _:
            assert len(payload) <= 16 << 20


def inside(runs: wire.Runs, npages: int) -> None:
    assert len(runs) == 0 or (runs.min() >= 0 and int(runs.sum(axis=1).max()) <= npages)


def reseal(data: bytearray) -> None:
    """Make the checksums right again, so that mutations reach the parsers behind them."""
    payload = memoryview(data)[40:]
    if len(payload) >= 36 and data[4] in (20, 21, 26, 31):
        struct.pack_into("<I", data, 40 + 32, zlib.crc32(payload[36:]))
    struct.pack_into("<I", data, 36, zlib.crc32(payload) if data[5] & 0x80 else 0)


def test_the_corpus_parses() -> None:
    for data in corpus():
        parse(data)


@pytest.mark.parametrize("seed", range(8))
def test_a_mutated_frame_parses_or_is_refused(seed: int) -> None:
    rng = random.Random(seed)
    frames = corpus()
    refused = 0
    for _ in range(3000):
        data = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            # Most of the bytes of a PAGES frame are content: aim at the front.
            at = rng.randrange(min(len(data), rng.choice((40, 80, 8192))))
            data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        if len(data) >= 40 and rng.random() < 0.7:
            reseal(data)
        try:
            parse(bytes(data))
        except ProtocolError:
            refused += 1
    assert 300 < refused < 3000
