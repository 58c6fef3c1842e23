"""Who may come in: a crowd, the slow, the wrong and the late, and none of them disturbs the peer of the session."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from concurrency import Worker, wait_until
from link_rig import SESSION, Reception, agree, exchange, hello, hello_frame, session
from pagecore.errors import PeerGoneError, ProtocolError, UnsupportedError
from pagecore.migrate import door, listener, peer
from pagecore.migrate.link import RemoteError
from pagecore.migrate.rendezvous import connect
from pagecore.wire import MAX_STREAMS, FrameType, Hello, encode_frame, encode_header, encode_report, stream_names

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["unix", "tcp"])
def reception(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reception]:
    with Reception(f"unix:{tmp_path}/link" if request.param == "unix" else "127.0.0.1:0") as given:
        yield given


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Reception]:
    with Reception(f"unix:{tmp_path}/link") as given:
        yield given


def reason(sock: socket.socket) -> str:
    """What a stranger is told before the connection ends."""
    data = b""
    # What was not read over there resets the connection, after the reason.
    with contextlib.suppress(ConnectionResetError):
        while some := sock.recv(4096):
            data += some
    return data.decode(errors="replace")


def test_every_stream_of_a_session_carries_both_ways(reception: Reception) -> None:
    waiting = reception.accept()
    with connect(reception.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        assert len(ours.bulk) == len(theirs.bulk) == 2
        exchange(ours, theirs)
    assert not reception.refused


def test_without_descriptors_the_door_does_not_ask_all_the_time(
    here: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pagecore.migrate")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as visitor:
        with open("/dev/null") as unused:
            least = unused.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, limits[1]))
        try:
            visitor.connect(here.address.removeprefix("unix:"))
            wait_until(lambda: len(caplog.records) > 2, "the door finds no descriptor")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        visitor.sendall(b"x" * 64)
        assert "magic" in reason(visitor)
    times = [record.created for record in caplog.records[:3]]
    assert all(after - before > door.TICK / 2 for before, after in pairwise(times))


@pytest.mark.parametrize(("wish", "allowed", "made"), [(5, 1, 1), (1, 5, 1), (MAX_STREAMS, MAX_STREAMS, MAX_STREAMS)])
def test_the_weaker_side_decides_how_many_streams_there_are(
    here: Reception, wish: int, allowed: int, made: int
) -> None:
    waiting = here.accept(answer=lambda _: hello(streams=allowed))
    with connect(here.address, hello(streams=wish), timeout=10, patience=5) as ours, waiting.value() as theirs:
        assert len(ours.bulk) == len(theirs.bulk) == made


def test_a_crowd_that_says_nothing_keeps_nobody_out(reception: Reception) -> None:
    waiting = reception.accept()
    crowd = [reception.connection() for _ in range(50)]
    began = time.monotonic()
    with connect(reception.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        exchange(ours, theirs)
    assert time.monotonic() - began < door.HELLO_SECONDS / 2
    # The first of them had to make room, and were told.
    assert "others are waiting" in reason(crowd[0])
    for one in crowd:
        one.close()


@pytest.fixture
def loopback() -> Iterator[Reception]:
    with Reception("127.0.0.1:0") as given:
        yield given


def test_a_flood_from_one_address_keeps_out_nobody_from_another(loopback: Reception) -> None:
    said = hello_frame()
    with loopback.connection() as first, contextlib.ExitStack() as stack:
        first.sendall(said[:50])
        flood = [stack.enter_context(loopback.connection("127.0.0.2")) for _ in range(2 * door.MAX_VISITORS)]
        # The oldest of the flood itself had to go, as many as there were too many.
        for one in flood[: door.MAX_VISITORS + 1]:
            assert "others are waiting" in reason(one)
        first.sendall(said[50:])
        opens_beside(loopback, first)


def test_a_flood_of_hellos_from_one_address_keeps_out_nobody_from_another(loopback: Reception) -> None:
    arrivals = loopback.listener._door._arrivals
    with loopback.connection() as first, contextlib.ExitStack() as stack:
        first.sendall(hello_frame())
        wait_until(lambda: len(arrivals) == 1, "the first")
        flood: list[socket.socket] = []
        while len(flood) < 2 * door.MAX_ARRIVALS:
            flood.append(stack.enter_context(loopback.connection("127.0.0.2")))
            flood[-1].sendall(hello_frame("flood"))
            if len(flood) < door.MAX_ARRIVALS:
                wait_until(lambda: len(arrivals) == len(flood) + 1, "one of the flood")
            else:
                assert "others are waiting" in reason(flood[len(flood) - door.MAX_ARRIVALS])
        opens_beside(loopback, first)


def opens_beside(reception: Reception, first: socket.socket) -> None:
    """The session whose first stream has said its HELLO opens, whoever else is there."""
    waiting = reception.accept(None, lambda _: hello(streams=1))
    assert first.recv(1 << 16)[4] == FrameType.HELLO_ACK
    with contextlib.ExitStack() as stack:
        for name in stream_names(1)[1:]:
            sock = stack.enter_context(reception.connection())
            sock.sendall(hello_frame(stream=name))
            assert sock.recv(1 << 16)[4] == FrameType.HELLO_ACK
        waiting.value().close()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:0:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%lo", "fe80::2", True),
    ],
)
def test_what_counts_as_one_origin(one: str, other: str, same: bool) -> None:
    assert (peer.origin((one, 1)) == peer.origin((other, 2))) is same


def test_of_several_crowds_the_largest_has_to_go() -> None:
    assert peer.crowding({1: "a", 2: "b", 3: "b", 4: "c"}) == 2
    assert peer.crowding({1: "a", 2: "b"}) == 1


def test_who_dawdles_over_a_hello_is_shown_out(reception: Reception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HELLO_SECONDS", 0.4)
    waiting = reception.accept()
    with reception.connection() as slow:
        began = time.monotonic()
        taken = dribble(slow, hello_frame())
        assert 0.3 < time.monotonic() - began < 10
        assert taken < len(hello_frame())
    with connect(reception.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        exchange(ours, theirs)
    assert reception.refused == ["it said no HELLO in 0.4 s"]


def dribble(sock: socket.socket, said: bytes) -> int:
    """Never silent for long, and never done: the time counts from the connection. Returns how much was taken."""
    for at in range(len(said)):
        try:
            sock.send(said[at : at + 1])
        except OSError:
            return at
        time.sleep(0.02)
    return len(said)


def test_a_hello_in_pieces_is_a_hello_and_nothing_beyond_it_is_taken(here: Reception) -> None:
    waiting = here.accept(answer=lambda _: hello(streams=1))
    socks = {}
    for name in stream_names(1):
        sock = socks[name] = here.connection()
        said = hello_frame(stream=name)
        for at in range(0, len(said), 7):
            sock.send(said[at : at + 7])
        # What follows at once is the first of the session's bytes.
        if name != "control":
            sock.send(b"first")
        assert sock.recv(1 << 16)[4] == FrameType.HELLO_ACK
    with waiting.value() as theirs:
        for stream in (theirs.bulk[0], theirs.urgent):
            data = bytearray(5)
            stream.receive_into(memoryview(data))
            assert data == b"first"
    for sock in socks.values():
        sock.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere.example.org\r\n\r\n", "magic"),
        (encode_header(FrameType.HELLO, flags=0x80, length=(16 << 10) + 1), "length: 16385 bytes for HELLO"),
        (encode_header(FrameType.STATE, flags=0x80, length=1), "STATE before the HELLO"),
        (encode_frame(FrameType.ERROR, encode_report({"reason": "x"})), "ERROR came where HELLO was due"),
        (encode_frame(FrameType.HELLO, b"{"), "hello: is not JSON"),
        (encode_frame(FrameType.HELLO, b""), "hello: is not JSON"),
        (hello_frame()[:-1] + b"x", "crc"),
        (hello_frame().replace(b'"version":1', b'"version":0', 1), "crc"),
        (hello_frame("\ud800"), "session: is not text"),
        (hello_frame("another"), "session: is not the one that is awaited here"),
        (hello_frame(stream="urgent"), "urgent comes before control"),
    ],
)
def test_strangers_are_told_why_and_disturb_nobody(here: Reception, said: bytes, told: str) -> None:
    waiting = here.accept(None if "control" in told else SESSION)
    with here.connection() as stranger:
        stranger.sendall(said)
        assert told in reason(stranger)
    assert told in here.refused[0]
    with connect(here.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        exchange(ours, theirs)


@pytest.mark.parametrize("where", ["connection", "hello"])
def test_a_fault_of_the_door_itself_is_told_and_keeps_nobody_out(
    here: Reception, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> None:
        raise KeyError("some fault")

    waiting = here.accept()
    with monkeypatch.context() as patch:
        if where == "connection":
            patch.setattr(door, "check_user", fault)
        else:
            patch.setattr(door, "check_greeting", fault)
        with here.connection() as stranger:
            if where == "hello":
                stranger.sendall(hello_frame())
            assert "some fault" in reason(stranger)
    assert "unexpected: KeyError('some fault')" in caplog.text
    with connect(here.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        exchange(ours, theirs)


def test_versions_that_differ_part_and_both_know_why(here: Reception) -> None:
    waiting = here.accept(timeout=0.2)
    old = hello_frame()[40:].replace(b'"version":1', b'"version":0')
    with here.connection() as sock:
        sock.sendall(encode_frame(FrameType.HELLO, old))
        assert "version: 0; this side speaks 1" in reason(sock)
    assert here.refused == ["version: 0; this side speaks 1"]
    with pytest.raises(PeerGoneError, match="no peer opened the session"):
        waiting.value()


def test_another_session_is_refused_while_one_runs(reception: Reception) -> None:
    waiting = reception.accept(None)
    with connect(reception.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        for session in ("another", SESSION):
            with pytest.raises(RemoteError, match=r"another session is running|generation: 0 is over"):
                connect(reception.address, hello(session), timeout=10, patience=5)
        exchange(ours, theirs)


def test_a_later_generation_comes_back_and_an_older_one_does_not(here: Reception) -> None:
    waiting = here.accept(None)
    connect(here.address, hello(), timeout=10, patience=5).close()
    waiting.value().close()
    # It comes before anybody waits for it, and is kept.
    coming = connecting(here, hello(generation=2))
    waiting = here.accept(after=0)
    with coming.value() as ours, waiting.value() as theirs:
        assert ours.session.generation == theirs.session.generation == 2
        exchange(ours, theirs)
    for generation in (0, 1, 2):
        with pytest.raises(RemoteError, match=f"generation: {generation} is over"):
            connect(here.address, hello(generation=generation), timeout=10, patience=5)


def connecting(reception: Reception, said: Hello) -> Worker:
    return Worker(lambda: connect(reception.address, said, timeout=10, patience=5))


def test_a_later_generation_takes_the_place_of_one_that_is_not_whole(here: Reception) -> None:
    waiting = here.accept()
    with here.connection() as first:
        first.sendall(hello_frame())
        assert first.recv(1 << 16)[4] == FrameType.HELLO_ACK
        with connect(here.address, hello(generation=1), timeout=10, patience=5) as ours, waiting.value() as theirs:
            assert theirs.session.generation == 1
            exchange(ours, theirs)
        assert first.recv(1) == b""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stream": "control"}, "control comes twice"),
        ({"stream": "bulk-2"}, "bulk-2 comes twice, or was not agreed on"),
        ({"stream": "bulk-0", "page_size": 8192}, "page_size"),
        ({"stream": "bulk-0", "generation": 1}, "generation"),
        ({"stream": "bulk-0", "session_id": "another"}, "session"),
        ({"session_id": "another"}, "another session is opening here"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_and_the_session_opens(
    here: Reception, changes: dict[str, object], told: str
) -> None:
    waiting = here.accept(None, lambda _: hello(streams=1))
    with contextlib.ExitStack() as stack:
        for name in stream_names(1):
            sock = stack.enter_context(here.connection())
            sock.sendall(hello_frame(stream=name))
            assert sock.recv(1 << 16)[4] == FrameType.HELLO_ACK
            if name == "control":
                with here.connection() as other:
                    other.sendall(hello_frame(**{"session_id": SESSION, **changes}))
                    assert told in reason(other)
        waiting.value().close()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_session_that_comes_to_nothing_makes_room(
    here: Reception, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HELLO_SECONDS", 60.0 if leaves else 0.2)
    waiting = here.accept(None)
    with here.connection() as sock:
        sock.sendall(hello_frame("comes-to-nothing"))
        assert sock.recv(1 << 16)[4] == FrameType.HELLO_ACK
        if leaves:
            sock.close()
        else:
            assert sock.recv(1) == b""
    wait_until(lambda: try_to_open(here), "room for the next session")
    waiting.value().close()


def try_to_open(reception: Reception) -> bool:
    """Its peer may have noticed the end of the one before by now."""
    try:
        connect(reception.address, hello(), timeout=10, patience=5).close()
    except RemoteError:
        return False
    return True


def test_a_guest_that_is_refused_leaves_room_for_the_next(here: Reception) -> None:
    def choosy(theirs: Hello) -> Hello:
        if theirs.session_id != SESSION:
            raise ProtocolError("size", "is too much")
        return agree(theirs)

    waiting = here.accept(None, choosy)
    for _ in range(2):
        with pytest.raises(RemoteError, match="size: is too much"):
            connect(here.address, hello("large"), timeout=10, patience=5)
    with connect(here.address, hello(), timeout=10, patience=5) as ours, waiting.value() as theirs:
        exchange(ours, theirs)


def test_what_a_destination_cannot_do_for_anybody_ends_its_wait(here: Reception) -> None:
    def cannot(_: Hello) -> Hello:
        raise UnsupportedError("postcopy", "another kernel")

    waiting = here.accept(None, cannot)
    with pytest.raises(RemoteError, match="postcopy is not available: another kernel"):
        connect(here.address, hello(), timeout=10, patience=5)
    with pytest.raises(UnsupportedError):
        waiting.value()


def test_who_is_awaited_by_name_and_does_not_agree_ends_the_wait(here: Reception) -> None:
    waiting = here.accept()
    with pytest.raises(RemoteError, match="regions"):
        connect(here.address, hello(regions={0: 7}), timeout=10, patience=5)
    with pytest.raises(ProtocolError, match="regions"):
        waiting.value()


def test_an_address_that_is_taken_is_named(reception: Reception) -> None:
    with pytest.raises(OSError, match=re.escape(f"Address already in use: '{reception.address}'")):
        Reception(reception.address)


def test_a_socket_that_was_left_behind_is_taken_over_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "link"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Reception(f"unix:{path}") as reception, session(reception) as (ours, theirs):
        exchange(ours, theirs)
    path.write_text("something of somebody's")
    with pytest.raises(OSError, match="already in use"):
        Reception(f"unix:{path}")
    assert path.read_text() == "something of somebody's"


def test_a_socket_that_is_somebody_elses_by_now_is_no_failure_of_a_side_that_ends(tmp_path: Path) -> None:
    with Reception(f"unix:{tmp_path}/link"):
        (tmp_path / "link").unlink()
        (tmp_path / "link").mkdir()
    assert (tmp_path / "link").is_dir()


def test_a_check_ends_the_wait(here: Reception) -> None:
    class Stopped(Exception):
        pass

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        here.accept(check=check).value()


def test_a_unix_socket_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "link"
    with Reception(f"unix:{path}"):
        assert path.stat().st_mode & 0o777 == 0o600
        if os.geteuid() == 0:
            # Even where the file lets another user in, the door does not.
            for directory in (tmp_path, *tmp_path.parents[:2]):
                directory.chmod(0o755)
            path.chmod(0o666)
            script = (
                "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
                "data = b''\n"
                "while some := s.recv(4096): data += some\n"
                "print(data[40:].decode())"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30, check=False
            )
            assert "neither this side's 0 nor root" in done.stdout, done.stderr
    assert not path.exists()


OTHERS_SOCKET = """
import os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o666)
    listening.listen()
    print("listening", flush=True)
    print(listening.accept()[0].recv(4096))
"""


def test_nothing_is_said_to_another_users_socket(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("has another user listen, so it has to begin as root: run the tests as root")
    for directory in tmp_path.parents[:2]:
        directory.chmod(0o755)
    tmp_path.chmod(0o777)
    path = str(tmp_path / "link")
    command = [sys.executable, "-c", OTHERS_SOCKET, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "listening\n"
            with pytest.raises(ProtocolError, match="user: 65534 is neither this side's 0 nor root"):
                connect(f"unix:{path}", hello(), timeout=10, patience=5)
            assert other.communicate(timeout=20)[0] == "b''\n"
        finally:
            other.kill()
