"""Many small frames at once: they are what the frame-by-frame coder says, and a bad one is left to it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pagecore import PageState
from pagecore.errors import ProtocolError
from pagecore.wire import (
    HEADER_BYTES,
    MAX_DATA_BYTES,
    FrameFlags,
    FrameType,
    Session,
    decode_frame,
    decode_header,
    encode_header,
    encode_pages,
    store_pages,
)

PAGE = 512
NPAGES = 64
SESSION = Session(PAGE, {0: NPAGES, 3: NPAGES}, generation=2)
DUE: dict[str, Any] = {"page_size": PAGE, "generation": 2, "round": 5}
FIELDS: dict[str, Any] = {"generation": 2, "round": 5, "first": 7, "count": 2, "length": 2 * PAGE}


def content(seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(NPAGES * PAGE)


def pages_frame(fill: int = 1, **fields: Any) -> bytes:
    values = {**FIELDS, **fields}
    return encode_header(values.pop("kind", FrameType.PAGES), **values) + bytes([fill]) * (2 * PAGE)


def test_each_run_becomes_a_frame_with_a_copy_of_its_pages() -> None:
    memory = content()
    runs = np.array([(3, 1), (0, 2), (NPAGES - 1, 1)], np.int64)
    data = encode_pages(memory, runs, flags=FrameFlags.AGAIN, **DUE)
    for first, count in runs.tolist():
        size = HEADER_BYTES + count * PAGE
        header, payload = decode_frame(data[:size], SESSION)
        assert (header.type, header.flags, header.region, header.round) == (FrameType.PAGES, FrameFlags.AGAIN, 0, 5)
        assert (header.first, header.count) == (first, count)
        assert payload == memory[first * PAGE : (first + count) * PAGE]
        data = data[size:]
    assert not data


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([(0, 1), (5, 0)], ValueError, "0 pages of run 1"),
        ([(NPAGES, 1)], IndexError, "outside"),
        ([(-1, 1)], IndexError, "outside"),
        ([1, 2], ValueError, "runs"),
    ],
)
def test_runs_that_no_frame_can_carry_are_refused(runs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_pages(content(), runs, **DUE)


def test_a_frame_has_the_bound_of_the_protocol() -> None:
    most = MAX_DATA_BYTES // PAGE
    memory = bytearray((most + 1) * PAGE)
    session, state = Session(PAGE, {0: most + 1}, generation=2), PageState(most + 1)
    whole = encode_pages(memory, [(0, most)], **DUE)
    decode_frame(whole, session)
    assert store_pages(whole, memory, state, **DUE) == (len(whole), 1, most)
    with pytest.raises(ValueError, match=f"{most + 1} pages"):
        encode_pages(memory, [(0, most + 1)], **DUE)
    # W4: longer ones are left to whoever says what is wrong with them.
    fields = {"generation": 2, "round": 5, "count": most + 1, "length": (most + 1) * PAGE}
    longer = encode_header(FrameType.PAGES, **fields) + memory
    with pytest.raises(ProtocolError, match="length"):
        decode_header(longer, session)
    assert store_pages(longer, memory, state, **DUE) == (0, 0, 0)
    with pytest.raises(ValueError, match="page size 0"):
        encode_pages(memory, [(0, 1)], page_size=0)


def test_whole_frames_are_stored_and_end_the_mark_of_zeros() -> None:
    memory, state = bytearray(content()), PageState(NPAGES)
    state.store_zeros(0, NPAGES)
    frames = pages_frame(1) + pages_frame(2, first=NPAGES - 2, flags=FrameFlags.AGAIN)
    expected = bytearray(memory)
    expected[7 * PAGE : 9 * PAGE] = bytes([1]) * (2 * PAGE)
    expected[-2 * PAGE :] = bytes([2]) * (2 * PAGE)
    # Of the third one there is all but a byte.
    assert store_pages(frames + pages_frame(3)[:-1], memory, state, **DUE) == (len(frames), 2, 4)
    assert memory == expected
    stored = [7, 8, NPAGES - 2, NPAGES - 1]
    assert state.received.indices().tolist() == stored
    assert state.zero.indices().tolist() == [page for page in range(NPAGES) if page not in stored]


def test_memory_and_state_must_be_of_one_size() -> None:
    with pytest.raises(ValueError, match="64 pages, the state 63"):
        store_pages(b"", bytearray(NPAGES * PAGE), PageState(NPAGES - 1), **DUE)
    with pytest.raises(ValueError, match="page size 0"):
        store_pages(b"", bytearray(NPAGES * PAGE), PageState(NPAGES), page_size=0)
    with pytest.raises(BufferError):
        store_pages(b"", bytes(NPAGES * PAGE), PageState(NPAGES), **DUE)


UNUSUAL: dict[str, dict[str, Any]] = {
    "another kind": {"kind": FrameType.FILL, "length": 0},
    "checksum": {"flags": FrameFlags.CHECKSUM},
    "an unknown flag": {"flags": 0x40},
    "a sum without the flag": {"crc": 1},
    "another region": {"region": 3},
    "another generation": {"generation": 1},
    "another round": {"round": 4},
    "outside": {"first": NPAGES},
    "far outside": {"first": (1 << 64) - 1},
    "across the end": {"first": NPAGES - 1},
    "no pages": {"count": 0},
    "no pages, no bytes": {"count": 0, "length": 0},
    "too many pages": {"count": 1 << 55, "first": 0},
    "the product wraps round": {"count": (1 << 55) + 2},
    "too few bytes": {"length": 2 * PAGE - 1},
    "too many bytes": {"length": 3 * PAGE},
}


@pytest.mark.parametrize("fields", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_alone(fields: dict[str, Any]) -> None:
    memory, state = bytearray(NPAGES * PAGE), PageState(NPAGES)
    frames = pages_frame(first=20) + pages_frame(**fields) + bytes(4 * PAGE)
    assert store_pages(frames, memory, state, **DUE) == (HEADER_BYTES + 2 * PAGE, 1, 2)
    assert state.received.indices().tolist() == [20, 21]
    assert not any(memory[: 20 * PAGE])
    assert not any(memory[22 * PAGE :])


def test_nothing_is_stored_that_the_decoder_would_refuse() -> None:
    """Bytes of the headers are changed at random: what is stored is what one gets frame by frame."""
    rng = random.Random(7)
    outcomes = set()
    for _ in range(600):
        frames = bytearray()
        heads = []
        for fill in range(1, 5):
            heads.append(len(frames))
            frames += pages_frame(fill, first=rng.randrange(NPAGES - 1))
        for _ in range(rng.randrange(3)):
            frames[rng.choice(heads) + rng.randrange(HEADER_BYTES)] = rng.choice([0, 1, 2, 0x80, rng.randrange(256)])
        del frames[rng.randrange(len(frames)) if rng.random() < 0.2 else len(frames) :]
        expected, stored, at, count = bytearray(NPAGES * PAGE), PageState(NPAGES), 0, 0
        while len(frames) - at >= HEADER_BYTES:
            try:
                header = decode_header(frames[at:], SESSION)
            except ProtocolError:
                break
            end = at + HEADER_BYTES + header.length
            plain = header.type is FrameType.PAGES and not header.flags & FrameFlags.CHECKSUM and not header.region
            if not plain or header.round != 5 or end > len(frames):
                break
            expected[header.first * PAGE : (header.first + header.count) * PAGE] = frames[at + HEADER_BYTES : end]
            stored.store(header.first, header.count)
            at, count = end, count + 1
        memory, state = bytearray(NPAGES * PAGE), PageState(NPAGES)
        taken, number, _ = store_pages(frames, memory, state, **DUE)
        assert (taken, number) == (at, count)
        assert memory == expected
        assert state.received == stored.received
        outcomes.add(count)
    assert outcomes == {0, 1, 2, 3, 4}
