"""TLS in the link helper: who is believed, who is not and learns why, and what becomes of the helper itself."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

import pagecore
from concurrency import Worker, wait_until
from link_rig import Authority, Reception, exchange, hello, hello_frame, session
from pagecore.errors import PeerGoneError, UnsupportedError
from pagecore.migrate import helper, transport
from pagecore.migrate.address import Terms, parse_address
from pagecore.migrate.greeting import WORD
from pagecore.migrate.helper import Helper
from pagecore.migrate.link import Link, RemoteError
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.tls import tls_context
from pagecore.migrate.transport import Transport

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def served(authority: Authority) -> Iterator[Transport]:
    """The helper of a listening side."""
    with Transport(authority.terms("destination")) as made:
        yield made


@pytest.fixture(scope="module")
def dialling(authority: Authority) -> Iterator[Transport]:
    """The helper of a connecting side."""
    with Transport(authority.terms("source", compress="zstd")) as made:
        yield made


# ------------------------------------------------------------------------------------------------ who is believed


class Shake:
    """One connection whose listening side has a helper; `client` is the other end, to be spoken to as one likes."""

    def __init__(self, terms: Terms) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client = socket.create_connection(listening.getsockname())
            far, _ = listening.accept()
        self.client.settimeout(10)
        self.near, near = socket.socketpair()
        self.near.settimeout(10)
        self.worker = carrying(terms, far, near, server=True)

    def word(self) -> str:
        return word(self.near)

    def close(self) -> None:
        self.client.close()
        self.near.close()
        self.worker.value()


def carrying(terms: Terms, far: socket.socket, near: socket.socket, *, server: bool, host: str = "") -> Worker:
    request = {"server": server, "host": host, "tls": True, "compress": "none"}
    return Worker(Helper(terms).carry, request, far, near)


def word(near: socket.socket) -> str:
    """What the helper says of a link."""
    size = WORD.unpack(near.recv(WORD.size, socket.MSG_WAITALL))[0]
    return near.recv(size, socket.MSG_WAITALL).decode() if size else ""


def meet(server: Terms, client: Terms, host: str = "127.0.0.1") -> tuple[str, str]:
    """The words of both helpers, the listening one's first."""
    shake = Shake(server)
    near, theirs = socket.socketpair()
    near.settimeout(10)
    dialled = carrying(client, shake.client, theirs, server=False, host=host)
    said = shake.word(), word(near)
    near.close()
    shake.close()
    dialled.value()
    return said


def test_two_whom_the_authority_vouches_for(authority: Authority) -> None:
    assert meet(authority.terms("one"), authority.terms("two")) == ("", "")


def test_a_name_is_checked_where_it_was_dialled(authority: Authority) -> None:
    server = authority.terms("named", identity="vm7.example.org")
    assert meet(server, authority.terms("two"), host="vm7.example.org") == ("", "")
    listening, dialling = meet(server, authority.terms("two"), host="vm8.example.org")
    assert "Hostname mismatch" in dialling
    assert "bad certificate" in listening


@pytest.mark.parametrize(
    ("server", "client", "heard"),
    [
        ("good", "other ca", ("unable to get local issuer certificate", "unknown ca")),
        ("other ca", "good", ("unknown ca", "unable to get local issuer certificate")),
        ("good", "expired", ("certificate has expired", "certificate expired")),
        ("expired", "good", ("certificate expired", "certificate has expired")),
    ],
)
def test_who_is_not_vouched_for_is_refused_and_both_know_why(
    authority: Authority, stranger: Authority, server: str, client: str, heard: tuple[str, str]
) -> None:
    terms = {
        "good": authority.terms("good"),
        "other ca": stranger.terms("bad", tls_ca=authority.path),
        "expired": authority.terms("old", expired=True),
    }
    listening, dialling = meet(terms[server], terms[client])
    assert heard[0] in listening
    assert heard[1] in dialling


def lenient(**changes: object) -> ssl.SSLContext:
    """A client that believes everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def hang_up(sock: ssl.SSLSocket) -> None:
    """Hear what the listening side makes of us, and close."""
    with sock:
        sock.recv(1)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("case", ["no certificate", "old version", "plain", "other speech", "leaves", "silent"])
def test_whoever_does_not_prove_itself_gets_nothing_else(
    authority: Authority, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "silent":
        monkeypatch.setattr(helper, "HANDSHAKE_SECONDS", 0.2)
    terms = authority.terms("destination")
    shake = Shake(terms)
    expected = {
        "no certificate": "peer did not return a certificate",
        "old version": "unsupported protocol",
        "plain": "does not speak TLS",
        "other speech": "preface: b'12345678' is not b'PGCLINK1'",
        "leaves": "",
        "silent": "did not prove itself within 0.2 s",
    }
    if case == "no certificate":
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            hang_up(lenient().wrap_socket(shake.client))
    elif case == "old version":
        with pytest.raises(ssl.SSLError):
            lenient(maximum_version=ssl.TLSVersion.TLSv1_2).wrap_socket(shake.client)
    elif case == "plain":
        shake.client.sendall(hello_frame())
    elif case == "other speech":
        context = lenient()
        context.load_cert_chain(terms.tls_cert or "", terms.tls_key)
        shake.client = context.wrap_socket(shake.client)
        shake.client.sendall(b"12345678")
    elif case == "leaves":
        shake.client.close()
    said = shake.word()
    assert said
    assert expected[case] in said
    shake.close()


def test_nobody_shakes_hands_for_a_controller_that_has_left(authority: Authority) -> None:
    shake = Shake(authority.terms("destination"))
    shake.near.close()
    shake.worker.value(helper.HANDSHAKE_SECONDS / 2)
    shake.client.close()


def test_a_dialler_of_plain_speech_is_told_that_this_is_no_tls(authority: Authority) -> None:
    with Reception("127.0.0.1:0") as reception:
        waiting = reception.accept(timeout=2.0)
        near, theirs = socket.socketpair()
        near.settimeout(10)
        dialled = carrying(authority.terms("one"), reception.connection(), theirs, server=False, host="127.0.0.1")
        assert "does not speak TLS" in word(near)
        near.close()
        dialled.value()
        assert "magic" in reception.refused[0]
        with connect(reception.address, hello(), timeout=10, patience=5) as ours, waiting.value() as other:
            exchange(ours, other)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda one, two: Terms(one.tls_cert, two.tls_key, one.tls_ca), "key values mismatch"),
        (lambda one, two: Terms("/nowhere.pem", one.tls_key, one.tls_ca), "/nowhere.pem.*No such file"),
        (lambda one, two: Terms(one.tls_cert, one.tls_key, "/nowhere.pem"), "/nowhere.pem.*No such file"),
        (lambda one, two: Terms(one.tls_cert, one.tls_key, one.tls_key), "no certificate or crl found"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: Authority, spoil: Callable[[Terms, Terms], Terms], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        tls_context(spoil(authority.terms("one"), authority.terms("two")), server=True)


def test_an_encrypted_key_does_not_ask_at_the_terminal(authority: Authority, tmp_path: Path) -> None:
    terms = authority.terms("locked")
    key = serialization.load_pem_private_key(Path(terms.tls_key or "").read_bytes(), None)
    Path(terms.tls_key or "").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="the key is encrypted"):
        tls_context(terms, server=True)


# --------------------------------------------------------------------------------------------------- a session


def test_a_session_over_tls_with_packed_bulk_streams(served: Transport, dialling: Transport) -> None:
    with Reception("127.0.0.1:0", served) as reception:
        with reception.connection() as plain:
            plain.sendall(hello_frame())
            # Nothing of it was read as a HELLO: it gets an alert of TLS at best.
            with contextlib.suppress(ConnectionResetError):
                assert not plain.recv(4).startswith(b"PGC1")
        wait_until(lambda: any("does not speak TLS" in why for why in reception.refused), "a word of the plain one")
        crowd = [reception.connection() for _ in range(50)]
        with session(reception, transport=dialling) as (ours, theirs):
            exchange(ours, theirs)
            data = b"many pages are alike " * 200000
            sender = Worker(ours.bulk[0].send, [data])
            got = bytearray(len(data))
            theirs.bulk[0].receive_into(memoryview(got))
            sender.value()
            assert got == data
            # A second session is refused while this one runs, and the first goes on.
            with pytest.raises(RemoteError, match="another session is running here"):
                connect(reception.address, hello("another"), transport=dialling, timeout=20, patience=5)
            exchange(ours, theirs)
        for one in crowd:
            one.close()
        assert any("others are waiting" in why for why in reception.refused)


@pytest.mark.ci
@pytest.mark.parametrize("compress", ["auto", "zstd"])
def test_a_plain_session_with_packed_bulk_streams(compress: str, tmp_path: Path) -> None:
    with Transport() as far, Transport(Terms(compress=compress)) as near:
        with (
            Reception(f"unix:{tmp_path}/link", far) as reception,
            session(reception, transport=near) as (ours, theirs),
        ):
            exchange(ours, theirs)
        assert far.pid is not None
        assert near.pid is not None


@pytest.mark.parametrize("named", [True, False])
def test_at_an_address_that_is_known_the_name_is_still_what_a_certificate_must_carry(
    authority: Authority, dialling: Transport, named: bool
) -> None:
    # ".invalid" is a name that nobody ever knows: it is not resolved.
    identity = "there.invalid" if named else "127.0.0.1"
    with Transport(authority.terms("named", identity=identity)) as far, Reception("127.0.0.1:0", far) as reception:
        at = parse_address(reception.address)
        address = f"there.invalid:{at.where[1]}"
        if named:
            waiting = reception.accept()
            link = connect(address, hello(), transport=dialling, timeout=20, patience=5, at=at)
            with link as ours, waiting.value() as theirs:
                exchange(ours, theirs)
        else:
            with pytest.raises(PeerGoneError, match="Hostname mismatch"):
                connect(address, hello(), transport=dialling, timeout=20, patience=5, at=at)


def test_a_session_that_packed_leaves_the_next_one_plain(tmp_path: Path) -> None:
    # The one who comes first leaves before its bulk stream has a helper; the next one packs nothing.
    with Transport() as far, Reception(f"unix:{tmp_path}/link", far) as reception:
        waiting = reception.accept(None)
        with reception.connection() as first:
            first.sendall(hello_frame("first", details={"compress": "zstd"}))
            assert first.recv(1 << 16)
        plain = Transport()
        link = wait_until(lambda: try_with(reception, plain), "room for the next session")
        with link, waiting.value() as theirs:
            exchange(link, theirs)
        assert far.pid is None


def test_a_stream_without_a_helper_is_none_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = Transport(Terms(compress="zstd")), Transport()
    ends: list[socket.socket] = []

    def wrap(*_: object, **__: object) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(WORD.pack(3) + b"out")
        ends.append(ours)
        return ours

    monkeypatch.setattr(far, "wrap", wrap)
    with near, Reception(f"unix:{tmp_path}/link", far) as reception:
        waiting = reception.accept()
        with pytest.raises((PeerGoneError, RemoteError)):
            connect(reception.address, hello(streams=1), transport=near, timeout=5, patience=2)
        with pytest.raises(PeerGoneError, match="the link could not be made: out"):
            waiting.value()
        assert [end.fileno() for end in ends] == [-1]


def test_a_destination_without_zstd_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pagecore.migrate.listener.has_zstd", lambda: False)
    able, stubborn = Transport(Terms(compress="auto")), Transport(Terms(compress="zstd"))
    with Reception(f"unix:{tmp_path}/link") as reception:
        waiting = reception.accept(None)
        with pytest.raises(UnsupportedError, match=r"pagecore\[zstd\]"):
            connect(reception.address, hello("first"), transport=stubborn, timeout=20, patience=5)
        # The listening side may not have noticed yet that the first one is gone.
        link = wait_until(lambda: try_with(reception, able), "room for the next session")
        with link, waiting.value() as theirs:
            exchange(link, theirs)
    # Nothing had to be packed: nothing was asked of a helper.
    assert able.pid is None
    assert stubborn.pid is None


def try_with(reception: Reception, way: Transport) -> Link | None:
    try:
        return connect(reception.address, hello(), transport=way, timeout=20, patience=5)
    except RemoteError:
        return None


# --------------------------------------------------------------------------------------------- the helper itself


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.ci
def test_a_helper_that_dies_takes_its_streams_along_and_the_next_one_works(authority: Authority) -> None:
    with (
        Transport(authority.terms("a")) as far,
        Transport(authority.terms("b")) as near,
        Reception("127.0.0.1:0", far) as reception,
    ):
        for generation, victim in enumerate((near, far)):
            said = hello(generation=generation)
            with session(reception, said, near, after=generation - 1) as (ours, theirs):
                exchange(ours, theirs)
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGKILL)
                # All of its threads, so that nothing is handed to it any more.
                os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
                for link in (ours, theirs):
                    for stream in (link.control, *link.bulk, link.urgent):
                        with pytest.raises(PeerGoneError):
                            stream.receive_into(memoryview(bytearray(1)))
        with session(reception, hello(generation=2), near, after=1) as (ours, theirs):
            exchange(ours, theirs)


@pytest.mark.parametrize("how", ["cannot be started", "takes nothing"])
def test_without_a_helper_a_visitor_goes_and_the_door_stays(
    how: str, authority: Authority, dialling: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    before = children()
    far = Transport(authority.terms("late"))
    with far, Reception("127.0.0.1:0", far) as reception:
        far.close()
        waiting = reception.accept()
        with monkeypatch.context() as patch:
            if how == "cannot be started":
                patch.setattr(subprocess, "Popen", fails)
            else:
                patch.setattr(socket, "send_fds", fails)
            with reception.connection() as visitor, contextlib.suppress(ConnectionResetError):
                assert visitor.recv(1) == b""
            assert far.pid is None
        # The visitor may hear of it first.
        wait_until(lambda: reception.refused, "a word of the visitor")
        assert "the link helper is gone: Resource temporarily unavailable" in reception.refused[0]
        link = connect(reception.address, hello(), transport=dialling, timeout=20, patience=5)
        with link, waiting.value() as theirs:
            exchange(link, theirs)
    assert children() == before


@pytest.mark.ci
def test_nothing_is_left_of_a_helper(authority: Authority) -> None:
    before, processes = sorted(os.listdir("/proc/self/fd")), children()
    with (
        Transport(authority.terms("a")) as far,
        Transport(authority.terms("b")) as near,
        Reception("127.0.0.1:0", far) as reception,
        session(reception, transport=near) as (ours, theirs),
    ):
        exchange(ours, theirs)
    assert children() == processes
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("left", [0, 1])
def test_a_helper_without_descriptors_refuses_one_stream_and_goes_on_with_the_others(
    left: int, served: Transport, dialling: Transport
) -> None:
    said = ["the link helper did not take it, or has ended", os.strerror(errno.EMFILE)][left]
    with Reception("127.0.0.1:0", served) as reception, session(reception, transport=dialling) as (ours, theirs):
        for way in (served, dialling):
            pid = way.pid
            assert pid is not None
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            free = (number for number in itertools.count() if not os.path.lexists(f"/proc/{pid}/fd/{number}"))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(free) + left, limits[1]))
            over = threading.Event()
            waiting = reception.accept(after=0, check=lambda over=over: over.is_set() and pytest.fail("nobody came"))
            try:
                with pytest.raises(PeerGoneError) as refused:
                    connect(reception.address, hello(generation=1), transport=dialling, timeout=20, patience=5)
                if way is served:
                    # The visitor may hear of it first.
                    wait_until(lambda: reception.refused, "a word of the visitor")
                assert said in (str(refused.value) if way is dialling else reception.refused[0])
            finally:
                over.set()
                with pytest.raises(pytest.fail.Exception):
                    waiting.value()
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            assert way.pid == pid
            exchange(ours, theirs)
        with session(reception, hello(generation=2), transport=dialling, after=0) as (again, others):
            exchange(again, others)


def test_a_helper_without_room_for_a_thread_refuses_one_stream_and_goes_on_with_the_others() -> None:
    with Transport() as way, contextlib.ExitStack() as stack:

        def pair() -> tuple[socket.socket, socket.socket]:
            ends = socket.socketpair()
            for end in map(stack.enter_context, ends):
                end.settimeout(10)
            return ends

        def wrapped(sock: socket.socket) -> socket.socket:
            near = stack.enter_context(way.wrap(sock))
            near.settimeout(10)
            return near

        # Both helpers of a link are this one.
        first, second = map(wrapped, pair())
        assert (word(first), word(second)) == ("", "")
        assert way.pid is not None
        limits = resource.prlimit(way.pid, resource.RLIMIT_AS)
        pages = int(Path(f"/proc/{way.pid}/statm").read_text().split()[0])
        # Less than the stack of a thread takes.
        resource.prlimit(way.pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 19), limits[1]))
        ours, theirs = pair()
        assert word(wrapped(ours)) == "can't start new thread"
        # To the peer nothing is said.
        assert theirs.recv(1) == b""
        resource.prlimit(way.pid, resource.RLIMIT_AS, limits)
        first.send(b"hello")
        assert second.recv(5) == b"hello"
        third, fourth = map(wrapped, pair())
        assert (word(third), word(fourth)) == ("", "")


def test_a_helper_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "END_SECONDS", 0.1)
    with Transport() as way:

        def ask() -> None:
            ours, theirs = socket.socketpair()
            with theirs:
                way.wrap(ours).close()

        ask()
        hung = way.pid
        assert hung is not None
        assert way._requests is not None
        # It takes a few requests instead of a few hundred.
        way._requests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        os.kill(hung, signal.SIGSTOP)
        try:
            Worker(wait_until, lambda: ask() or way.pid != hung, "another helper").value(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(hung, signal.SIGCONT)
        assert stat(hung) == "Z"


def test_no_signal_to_all_processes_ends_a_helper(served: Transport, dialling: Transport) -> None:
    with Reception("127.0.0.1:0", served) as reception, session(reception, transport=dialling) as (ours, theirs):
        for way in (served, dialling):
            assert way.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(way.pid, number)
        exchange(ours, theirs)


CONTROLLER = """
import socket, sys, time
from pagecore.migrate.address import Terms, parse_address
from pagecore.migrate.transport import Transport
with Transport(Terms(*sys.argv[1:4])) as way:
    near, far = socket.socketpair()
    kept = way.wrap(near)
    print(way.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.ci
def test_a_helper_does_not_outlive_its_controller(authority: Authority) -> None:
    terms = authority.terms("a")
    source = str(Path(pagecore.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(terms.tls_cert), str(terms.tls_key), str(terms.tls_ca)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    ) as controller:
        assert controller.stdout is not None
        pid = int(controller.stdout.readline())
        controller.kill()
    wait_until(lambda: stat(pid) == "Z", "the end of the helper")


def stat(pid: int) -> str:
    """The state of a process; Z where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
