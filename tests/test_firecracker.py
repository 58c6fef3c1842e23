"""Firecracker's handshake: every version is read, and nothing in it is believed."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from concurrency import Worker
from pagecore import ProtocolError, UnsupportedError
from pagecore.firecracker import GuestRegion, parse_handshake, receive_handshake

MIB = 1 << 20
FIRST = {"base_host_virt_addr": 0x7F0000000000, "size": 4 * MIB, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
SECOND = {**FIRST, "base_host_virt_addr": 0x7E0000000000, "size": MIB, "offset": 4 * MIB}


def parse(*regions: Any, **options: Any) -> list[GuestRegion]:
    return parse_handshake(json.dumps(regions).encode(), **options)


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def test_every_version_is_read() -> None:
    expected = [GuestRegion(0x7F0000000000, 4 * MIB, 0, 4096), GuestRegion(0x7E0000000000, MIB, 4 * MIB, 4096)]
    assert parse(FIRST, SECOND) == expected
    assert parse(*(without(region, "page_size") for region in (FIRST, SECOND))) == expected
    assert parse(*(without(region, "page_size", "page_size_kib") for region in (FIRST, SECOND))) == expected
    assert parse({**FIRST, "gpa_start": None, "new": [{}]}, SECOND) == expected
    # What was deprecated may have been put right by now, or be gone.
    assert parse({**FIRST, "page_size_kib": 4}, SECOND) == expected
    huge = {**FIRST, "page_size": 2 * MIB, "page_size_kib": 2 * MIB}
    assert parse(huge) == [GuestRegion(0x7F0000000000, 4 * MIB, 0, 2 * MIB)]
    assert parse(without(huge, "page_size"))[0].page_size == 2 * MIB


@pytest.mark.parametrize(
    ("regions", "field"),
    [
        ([], "handshake"),
        ([5], "handshake"),
        ([[]], "handshake"),
        ([FIRST, None], "handshake"),
        ([without(FIRST, "base_host_virt_addr")], "base_host_virt_addr"),
        ([without(FIRST, "size")], "size"),
        ([without(FIRST, "offset")], "offset"),
        *[
            ([{**FIRST, name: value}], name)
            for name in ("base_host_virt_addr", "size", "offset", "page_size")
            for value in (-1, -4096, 2**64, 1.5, "4096", True, [], {})
        ],
        ([{**FIRST, "base_host_virt_addr": 0x7F0000000001}], "base_host_virt_addr"),
        ([{**FIRST, "offset": False}], "offset"),
        ([{**FIRST, "size": 0}], "size"),
        ([{**FIRST, "size": 4097}], "size"),
        ([{**FIRST, "offset": 512}], "offset"),
        *[([{**FIRST, "page_size": value}], "page_size") for value in (0, 1, 4095, 3000, 8192, 2**40)],
        ([{**without(FIRST, "page_size"), "page_size_kib": 4}], "page_size"),
        ([{**FIRST, "page_size": 2 * MIB, "size": MIB}], "size"),
        ([{**FIRST, "page_size": 2 * MIB, "base_host_virt_addr": 0x7F0000001000}], "base_host_virt_addr"),
        ([{**FIRST, "base_host_virt_addr": 2**64 - MIB}], "size"),
        ([{**FIRST, "offset": 2**63 - MIB}], "size"),
        (
            [FIRST, {**SECOND, "base_host_virt_addr": FIRST["base_host_virt_addr"] + 4 * MIB - 4096}],
            "base_host_virt_addr",
        ),
        ([FIRST, {**SECOND, "base_host_virt_addr": FIRST["base_host_virt_addr"]}], "base_host_virt_addr"),
        ([SECOND, {**FIRST, "offset": MIB}], "offset"),
        ([FIRST, {**SECOND, "offset": 4 * MIB - 4096}], "offset"),
    ],
)
def test_what_cannot_be_right_names_its_field(regions: list[Any], field: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(*regions)
    assert caught.value.field == field


def test_a_region_beyond_the_snapshot_is_refused() -> None:
    assert len(parse(FIRST, SECOND, snapshot_size=5 * MIB)) == 2
    with pytest.raises(ProtocolError, match=f"the regions end at {5 * MIB}, the snapshot has {5 * MIB - 1} bytes"):
        parse(FIRST, SECOND, snapshot_size=5 * MIB - 1)


def test_several_page_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="pages of several sizes"):
        parse(FIRST, {**SECOND, "page_size": 2 * MIB, "size": 2 * MIB})


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[", b"[{}", b"\xff\xfe[]", b"5", b"[" * 100_000, b"[NaN]"])
def test_what_is_no_list_of_regions_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_handshake(body)
    assert caught.value.field == "handshake"


# Receiving ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    descriptors = len(os.listdir("/proc/self/fd"))
    with near, far:
        yield near, far
        assert len(os.listdir("/proc/self/fd")) == descriptors, "a descriptor was leaked"


def test_text_and_descriptor_arrive(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    reader, writer = os.pipe()
    body = json.dumps([FIRST, SECOND]).encode()
    socket.send_fds(far, [body], [writer])
    received, descriptor = receive_handshake(near, timeout=5)
    assert received == body
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"x")
    assert os.read(reader, 1) == b"x"
    for number in (reader, writer, descriptor):
        os.close(number)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_it_is_put_together_from_pieces(ends: tuple[socket.socket, socket.socket], size: int) -> None:
    """A stream keeps no boundaries; brackets within the text are not its end."""
    near, far = ends
    body = json.dumps([{**FIRST, "deep": [[1], [2]]}, SECOND], indent=1).encode() + b"\n"
    receiver = Worker(lambda: receive_handshake(near, timeout=10))
    socket.send_fds(far, [body[:size]], [far.fileno()])
    for at in range(size, len(body), size):
        far.send(body[at : at + size])
    received, descriptor = receiver.value()
    assert received.rstrip() == body.rstrip()
    os.close(descriptor)


def send_descriptors(far: socket.socket, body: bytes, count: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [far.fileno()] * count))] if count else []
    far.sendmsg([body], rights)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 came, not one"), (2, "2 came, not one"), (4, "4 came"), (5, "more than 4"), (50, "more")]
)
def test_there_must_be_one_descriptor(ends: tuple[socket.socket, socket.socket], count: int, said: str) -> None:
    """Those that came all the same are closed."""
    near, far = ends
    send_descriptors(far, json.dumps([FIRST]).encode(), count)
    with pytest.raises(ProtocolError, match=f"^descriptor: {said}"):
        receive_handshake(near, timeout=5)


def test_what_does_not_end_in_time_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    send_descriptors(far, b'[{"size":', 1)
    with pytest.raises(ProtocolError, match=r"9 bytes in 0\.05 s, and not complete"):
        receive_handshake(near, timeout=0.05)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"GET / HTTP/1.1\r\n", "not a list of regions"),
        (b'{"a":1}', "not a list of regions"),
        (b" " * (1 << 20) + b"  [", "longer than 1048576 bytes"),
        (b"[" + b"1," * (1 << 19) + b"1", "longer than 1048576 bytes"),
    ],
)
def test_what_is_no_handshake_is_refused_at_once(
    ends: tuple[socket.socket, socket.socket], body: bytes, said: str
) -> None:
    near, far = ends
    receiver = Worker(lambda: receive_handshake(near, timeout=10))
    far.sendall(body)
    with pytest.raises(ProtocolError, match=said):
        receiver.value()


def test_a_text_with_something_behind_it_is_handed_over_to_be_refused(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    send_descriptors(far, b"[1,2]]", 1)
    body, descriptor = receive_handshake(near, timeout=5)
    os.close(descriptor)
    with pytest.raises(ProtocolError, match="Extra data"):
        parse_handshake(body)


def test_a_connection_that_ends_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    far.send(b"[1,")
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="the connection ended after 3 bytes"):
        receive_handshake(near, timeout=5)
