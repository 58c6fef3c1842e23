"""What a link asks of its sockets: the options of TCP, the size of a call, and how long one may wait."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import platform
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from concurrency import DEADLINE, Worker
from pagecore.errors import PeerGoneError
from pagecore.migrate import link
from pagecore.migrate.link import MAX_BYTES, TICK, Stream
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.tcp import tune_tcp

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def connected(kind: str, source: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends; over TCP the first one has this address, and the other one 127.0.0.1."""
    if kind == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname(), DEADLINE, (source, 0))
            theirs = listener.accept()[0]
    with ours, theirs:
        theirs.settimeout(DEADLINE)
        yield ours, theirs


# ----------------------------------------------------------------------------------------------- options of TCP


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def no_delay(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_within_one_machine_nothing_is_paced() -> None:
    with connected("tcp") as ends:
        for end in ends:
            tune_tcp(end)
            assert congestion_control(end) == b"reno"
            assert no_delay(end)


def test_between_two_addresses_the_congestion_control_is_the_systems() -> None:
    with connected("tcp", "127.0.0.2") as ends:
        for end in ends:
            before = congestion_control(end)
            tune_tcp(end)
            assert congestion_control(end) == before
            assert no_delay(end)


def test_a_unix_socket_has_nothing_to_tune() -> None:
    with connected("unix") as (ours, _):
        # Options of TCP are an error there.
        with pytest.raises(OSError, match="not supported"):
            no_delay(ours)
        tune_tcp(ours)


def test_a_peer_that_has_reset_the_connection_is_found_by_who_uses_it() -> None:
    with connected("tcp") as (ours, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
        with pytest.raises(OSError, match="not connected"):
            ours.getpeername()
        tune_tcp(ours)
        with pytest.raises(PeerGoneError):
            Stream(ours, DEADLINE).send([b"x"])


# Of seccomp(2), for setsockopt(*, IPPROTO_TCP, TCP_CONGESTION) alone.
SETSOCKOPT = {"x86_64": 54, "aarch64": 208}
LOAD, SKIP_UNLESS, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2


def forbid_congestion_control() -> None:
    """The kernel refuses this thread, and no other, to choose one."""
    program = [
        (LOAD, 0, 0, 0),  # the system call
        (SKIP_UNLESS, 0, 4, SETSOCKOPT[platform.machine()]),
        (LOAD, 0, 0, 24),  # its second argument, low half
        (SKIP_UNLESS, 0, 2, socket.IPPROTO_TCP),
        (LOAD, 0, 0, 32),  # its third
        (SKIP_UNLESS, 1, 0, socket.TCP_CONGESTION),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filters = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    assert library.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) == 0
    assert library.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER), filters, zero, zero) == 0, ctypes.get_errno()


@pytest.mark.skipif(platform.machine() not in SETSOCKOPT, reason="the number of setsockopt is not known here")
def test_a_system_that_allows_no_other_congestion_control_keeps_its_own() -> None:
    def tuned(end: socket.socket) -> None:
        forbid_congestion_control()
        with pytest.raises(PermissionError):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        tune_tcp(end)

    with connected("tcp") as (ours, _):
        before = congestion_control(ours)
        Worker(tuned, ours).value()
        assert congestion_control(ours) == before
        assert no_delay(ours)


# ------------------------------------------------------------------------------------------- the size of a call


def test_one_call_takes_a_piece_and_no_more_wherever_buffers_end() -> None:
    """While the kernel copies it no urgent answer gets that processor. A packet for each call shows them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(DEADLINE)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200 << 10)
        header, payload = bytes(40), bytes(range(256)) * (4 << 10)
        sender = Worker(Stream(ours, DEADLINE).send, [header, payload, header, payload, b""])
        whole = header + payload + header + payload
        got = []
        while sum(map(len, got)) < len(whole):
            got.append(theirs.recv(len(whole)))
        sender.value()
    assert [len(one) for one in got] == [MAX_BYTES] * 8 + [80]
    assert b"".join(got) == whole


def test_one_call_takes_no_more_buffers_than_the_kernel_does() -> None:
    with connected("unix") as (ours, theirs):
        Stream(ours, DEADLINE).send([b"x"] * 3000)
        assert theirs.recv(4000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"x" * 3000


# ----------------------------------------------------------------------------------------- how long a call waits


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_whoever_waits_for_a_peer_that_takes_nothing_looks_up_all_the_time(kind: str) -> None:
    looks: list[float] = []
    with connected(kind) as (ours, _):
        stream = Stream(ours, 1.5 * TICK, lambda: looks.append(time.monotonic()))
        with pytest.raises(PeerGoneError, match=r"silent: nothing moved for 0\.15 s"):
            stream.send([bytes(64 << 20)])
    assert len(looks) >= 2


@pytest.mark.parametrize("forth", [True, False])
def test_a_peer_that_moves_a_little_at_a_time_does_not_keep_anybody_from_ending(forth: bool) -> None:
    """A frame takes as long as the link is slow, and each piece of it less than a tick."""
    stop, over = Stop(60), threading.Event()
    stop.requested.set()
    with connected("unix") as (ours, theirs):

        def move() -> None:
            while not over.wait(TICK / 20):
                theirs.recv(128 << 10) if forth else theirs.send(b"x")

        peer = Worker(move)
        stream = Stream(ours, DEADLINE, stop.check)
        due = (stream.send, [bytes(64 << 20)]) if forth else (stream.receive_into, memoryview(bytearray(1 << 20)))
        try:
            with pytest.raises(Cancelled):
                due[0](due[1])
        finally:
            over.set()
        peer.value()


@pytest.mark.parametrize("forth", [True, False])
def test_nothing_is_ended_whose_last_byte_has_moved(forth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """S9: a RUN that went whole has been handed over, however long it took."""
    monkeypatch.setattr(link, "TICK", 0.0)
    stop = Stop(60)
    stop.requested.set()
    with connected("unix") as (ours, theirs):
        stream = Stream(ours, DEADLINE, stop.check)
        if forth:
            stream.send([b"whole"])
            assert theirs.recv(8) == b"whole"
        else:
            theirs.send(b"whole")
            stream.receive_into(memoryview(bytearray(5)))


@pytest.mark.ci
@pytest.mark.timing
def test_a_slow_reader_of_a_unix_socket_makes_no_call_wait_for_long() -> None:
    """Each 32 KiB of a call wait anew in the kernel, for as long as it was told."""
    took, over = [], threading.Event()
    with connected("unix") as (ours, theirs):

        def read() -> None:
            while not over.wait(0.9 * TICK):
                theirs.recv(32 << 10)

        def between() -> None:
            took.append(time.monotonic())
            if took[-1] - took[0] > 12 * TICK:
                over.set()
                ours.shutdown(socket.SHUT_RDWR)

        reader = Worker(read)
        stream = Stream(ours, DEADLINE)
        stream.between = between
        with pytest.raises(PeerGoneError):
            stream.send([bytes(16 << 20)])
        reader.value()
    assert max(later - sooner for sooner, later in itertools.pairwise(took)) < 4 * TICK
