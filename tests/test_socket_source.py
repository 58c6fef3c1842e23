"""Frames that cannot be right, and a peer that dies: the loop names the field, and places nothing of them."""

import pytest

from concurrency import DEADLINE, wait_until
from pagecore import PlacementLoop, ProtocolError, SourceError
from pagecore.page_source import BufferSource, SocketSource
from placement_rig import (
    END,
    PAGES,
    REQUEST,
    SENT,
    ZEROS,
    header,
    pages_frame,
    pushed,
    served,
)
from uffd_helpers import PAGE

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(64) as rig:
        yield rig


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (header(PAGES, 0, 1, PAGE, magic=b"PGC2"), "magic"),
        (header(99, 0, 1), "type"),
        (header(REQUEST, 0, 1), "type"),
        (header(ZEROS, 0, 1, generation=6), "generation"),
        (header(ZEROS, 0, 1, generation=8), "generation"),
        (header(ZEROS, 0, 1, generation=7, round=2), "round"),
        (header(ZEROS, 0, 0, generation=7, round=3), "count"),
        (header(PAGES, 0, 9, 9 * PAGE, generation=7, round=3), "count"),
        (header(PAGES, 0, 2, PAGE, generation=7, round=3), "length"),
        (header(PAGES, 0, 1, 0, generation=7, round=3), "length"),
        (header(ZEROS, 0, 1, PAGE, generation=7, round=3), "length"),
        (header(SENT, 0, 1, 1, generation=7, round=3), "length"),
        (header(ZEROS, 0, 1, generation=7, round=3, region=1), "region"),
        (header(ZEROS, 0, 1, generation=7, round=3, flags=0x80), "flags"),
        (header(PAGES, 0, 1, PAGE, generation=7, round=3, flags=0x80), "flags"),
        (header(ZEROS, 0, 1, generation=7, round=3, flags=0x02), "flags"),
        (header(END, generation=7, round=3, flags=1), "flags"),
        (header(ZEROS, 64, 1, generation=7, round=3), "first"),
        (header(ZEROS, 63, 2, generation=7, round=3), "first"),
        (header(ZEROS, 2**64 - 1, 2, generation=7, round=3), "first"),
        (header(ZEROS, 1, 2**64 - 1, generation=7, round=3), "first"),
    ],
)
@pytest.mark.parametrize("stream", ["bulk", "urgent"])
def test_a_wrong_frame_names_its_field(rig, frame, field, stream):
    """W4, W5, W6, D14."""
    options = {"generation": 7, "round": 3, "max_pages": 8}
    with pushed(rig, source_options=options) as (loop, peer):
        sock = peer.bulk[0] if stream == "bulk" else peer.urgent
        sock.sendall(frame)
        with pytest.raises(ProtocolError, match=f"^{field}: ") as caught:
            loop.wait_settled(DEADLINE)
        assert caught.value.field == field
        assert not loop.states[0].claimed.any()


def test_a_later_round_is_welcome(rig):
    with pushed(rig, source_options={"round": 3}) as (loop, peer):
        peer.bulk[0].sendall(pages_frame(0, rig.page(0), round=4) + header(END, round=4))
        assert loop.wait_ended(DEADLINE)
        assert loop.stats().placed == 1


@pytest.mark.parametrize("sent", [b"", b"PGC1", pages_frame(0, bytes(PAGE))[:-1]])
def test_a_peer_that_dies_is_an_error_and_no_page(rig, sent):
    with pushed(rig) as (loop, peer):
        peer.bulk[0].sendall(sent)
        peer.bulk[0].close()
        with pytest.raises(SourceError, match=r"^a stream of pages: .*reset by peer"):
            loop.wait_ended(DEADLINE)
        assert not loop.states[0].claimed.any()


@pytest.mark.parametrize("stream", ["bulk", "urgent"])
@pytest.mark.parametrize("come", [7, 40, 40 + PAGE])
def test_a_stream_that_was_stopped_within_a_frame_serves_nobody_else(rig, stream, come):
    """One error that says so, for every later loop, and nothing read where the frame was left."""
    frame = pages_frame(3, rig.page(3, 2))
    with pushed(rig) as (loop, peer):
        sock = peer.bulk[0] if stream == "bulk" else peer.urgent
        sock.sendall(frame[:come])
        wait_until(lambda: not peer.pending(0 if stream == "bulk" else 1), "it is taken")
        loop.stop()
        sock.sendall(frame[come:] + pages_frame(9, rig.page(9)) + header(END))
        left = peer.pending(0 if stream == "bulk" else 1)
        for _ in range(2):
            with PlacementLoop([rig.region], peer.source, states=loop.states) as another:
                with pytest.raises(
                    SourceError, match=r"^a stream of pages was stopped within a frame by an earlier loop"
                ):
                    another.wait_ended(DEADLINE)
                assert another.stats().placed == 0
        assert peer.pending(0 if stream == "bulk" else 1) == left
        assert not loop.states[0].claimed.any()


def test_a_frame_in_single_bytes_is_put_together(rig):
    with pushed(rig) as (loop, peer):
        for byte in pages_frame(9, rig.page(9)):
            peer.bulk[0].send(bytes([byte]))
        wait_until(lambda: loop.stats().placed == 1, "the page is placed")
        assert rig.touch(9).value() == rig.page(9)


def test_a_request_to_a_dead_peer_is_an_error(rig):
    with pushed(rig) as (loop, peer):
        peer.urgent.close()
        with pytest.raises(SourceError):
            loop.wait_ended(DEADLINE)
        waiter = rig.touch(5)
        assert not waiter.done(0.02), "no zeros"
    with pushed(rig, start=False) as (_, _):
        rig.region.place(5, rig.page(5))
        assert waiter.value() == rig.page(5)


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 0},
        {"max_pages": 0},
        {"page_size": 2**21, "max_pages": 2**20},
        {"page_size": 2**33, "max_pages": 2**31},
    ],
)
def test_sizes_of_a_source_are_checked(options):
    with pytest.raises(ValueError, match="is outside"):
        SocketSource([], None, **options)


def test_a_datagram_socket_is_refused():
    import socket

    near, far = socket.socketpair(type=socket.SOCK_DGRAM)
    with near, far, pytest.raises(ValueError, match="no stream socket"):
        SocketSource([], near)


def test_a_buffer_must_hold_whole_pages():
    with pytest.raises(ValueError, match="length 4097 is not a multiple of page size 4096"):
        BufferSource(bytes(4097))
    assert BufferSource(bytes(8192)).size == 2
