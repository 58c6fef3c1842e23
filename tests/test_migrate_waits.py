"""What the source does while there is no session: its waits hear who wants an end, and what fails costs no guest."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from concurrency import Worker
from link_rig import Reception, agree, hello, no_descriptors, no_thread
from pagecore import HintSession
from pagecore.errors import PeerGoneError
from pagecore.migrate import Send, recovery, rendezvous, source
from pagecore.migrate import link as link_module
from pagecore.migrate.destination import Destination
from pagecore.migrate.link import Link, RemoteError, Stream
from pagecore.migrate.options import Options
from pagecore.migrate.outcome import Side, judge
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.recovery import Returning
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.source import Source
from pagecore.migrate.transport import Transport
from pagecore.wire import Capabilities, FrameType, encode_header, encode_report

pytestmark = pytest.mark.timeout(60)


def cancel_after(calls: int) -> Callable[[], None]:
    """A check that wants an end when it was asked so often."""
    asked: list[None] = []

    def check() -> None:
        asked.append(None)
        if len(asked) > calls:
            raise Cancelled

    return check


@contextlib.contextmanager
def full(family: socket.AddressFamily, where: Any) -> Iterator[socket.socket]:
    """Somebody who listens, and whose queue is full: over TCP what comes is dropped, a Unix socket says "again"."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listening.bind(where)
        listening.listen(0)
        for _ in range(4):
            knocking = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            knocking.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                knocking.connect(listening.getsockname())
        yield listening


# ---------------------------------------------------------------------------------------------- until it is there


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_connection_that_does_not_come_about_ends_when_somebody_wants_that(way: str, tmp_path: Path) -> None:
    path = str(tmp_path / "link")
    where: Any = ("127.0.0.1", 0) if way == "tcp" else path
    with full(socket.AF_INET if way == "tcp" else socket.AF_UNIX, where) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}" if way == "tcp" else f"unix:{path}"
        with pytest.raises(Cancelled):
            connect(address, hello(), timeout=3, patience=3, check=cancel_after(2))
        with pytest.raises(PeerGoneError, match="no peer at"):
            connect(address, hello(), timeout=0.15, patience=3)


def test_a_queue_that_is_full_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    with full(socket.AF_UNIX, str(tmp_path / "link")) as listening:
        taken: list[socket.socket] = []
        end = cancel_after(4)

        def check() -> None:
            end()
            if not taken:
                taken.append(listening.accept()[0])

        with pytest.raises(Cancelled):
            connect(f"unix:{tmp_path}/link", hello(), timeout=3, patience=3, check=check)
        listening.settimeout(5)
        with taken[0], listening.accept()[0] as ours:
            assert ours.recv(4) == encode_header(FrameType.HELLO, flags=0x80, length=0)[:4]


def test_a_name_that_nobody_resolves_ends_when_somebody_wants_that(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[Any]:
        over.wait(3)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(Cancelled):
        connect("there.example.org:1", hello(), timeout=10, patience=3, check=cancel_after(0))
    over.set()
    with pytest.raises(PeerGoneError, match=r"no peer at tcp:there.*: Name or service not known"):
        connect("there.example.org:1", hello(), timeout=10, patience=3)


def test_before_each_address_of_a_name_somebody_may_want_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refused(opening: Any) -> socket.socket:
        tried.append(opening.address.host)
        raise PeerGoneError("nobody there")

    def check() -> None:
        if tried:
            raise Cancelled

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 1)) for last in (1, 2, 3)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(rendezvous._Opening, "_connected", refused)
    with pytest.raises(Cancelled):
        connect("there.example.org:1", hello(), timeout=10, patience=3, check=check)
    assert tried == ["127.0.0.1"]


@contextlib.contextmanager
def trickling(sock: socket.socket) -> Iterator[None]:
    """A frame that comes a byte at a time, and takes 3 s to be over."""
    over = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            for byte in encode_header(FrameType.HELLO_ACK, flags=0x80, length=16000) + bytes(250):
                sock.send(bytes([byte]))
                if over.wait(0.01):
                    return

    worker = Worker(trickle)
    try:
        yield
    finally:
        over.set()
        worker.value()


def test_a_listener_that_trickles_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "link"))
        listening.listen()
        opening = Worker(lambda: connect(f"unix:{tmp_path}/link", hello(), timeout=0.2, patience=10))
        over = pytest.raises(PeerGoneError, match="the time to open the session is over")
        with listening.accept()[0] as sock, trickling(sock), over:
            opening.value()


def test_the_time_to_open_a_session_is_none_of_the_session(tmp_path: Path) -> None:
    check = cancel_after(1000)
    with Reception(f"unix:{tmp_path}/link") as reception:
        waiting = reception.accept(answer=agree)
        with connect(reception.address, hello(), timeout=10, patience=5, check=check) as made, waiting.value():
            assert {stream.check for stream in (made.control, made.urgent, *made.bulk)} == {check}


def test_a_reason_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LAST_WORD_SECONDS", 0.15)
    ours, theirs = socket.socketpair()
    with ours, theirs, trickling(theirs):
        link = Link({"control": Stream(ours, 60), "urgent": Stream(ours, 60)}, hello(), hello())
        broken, began = PeerGoneError("the peer closed the link"), time.monotonic()
        assert link.explain(broken) is broken
        assert time.monotonic() - began < 2


def test_a_peer_that_takes_the_reason_a_byte_at_a_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sipped(socket.socket):
        def sendmsg(self, buffers: Any) -> int:  # type: ignore[override]
            time.sleep(0.002)
            return self.send(buffers[0][:1])

    monkeypatch.setattr(link_module, "REASON_SECONDS", 0.15)
    ours, theirs = socket.socketpair()
    with theirs, Sipped(fileno=ours.detach()) as sipped:
        link = Link({"control": Stream(sipped, 60), "urgent": Stream(sipped, 60)}, hello(), hello())
        began = time.monotonic()
        link.fail(FrameType.ERROR, "x" * 1000)
        assert time.monotonic() - began < 1


# ------------------------------------------------------------------------------------------ the guest stays here


@pytest.mark.parametrize("failing", ["", "resume", "throttle", "take_back", "explain", "self_check"])
def test_the_guest_goes_on_before_anything_else_and_no_step_fails_for_another(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S5: DONE is told on one side, whatever else goes wrong; and the peer hears that it is over."""
    done: list[str] = []

    def step(name: str, result: Any = None) -> Callable[..., Any]:
        def call(*_: object) -> Any:
            done.append(name)
            if name == failing:
                raise PeerGoneError(f"no {name}")
            return result

        return call

    told: list[dict[str, Any]] = []
    reporter: Any = SimpleNamespace(event=lambda _, **values: told.append(values))
    side = Source(Options(), "unix:none", "session", reporter, Stop(60))
    lost = PeerGoneError("lost")
    parts: dict[str, Any] = {
        "_guest": SimpleNamespace(resume=step("resume"), throttle=step("throttle")),
        "_link": SimpleNamespace(explain=step("explain", lost), fail=step("fail"), close=step("close")),
        "_hints": SimpleNamespace(
            state=SimpleNamespace(name="HANDED_OVER"), take_back=step("take_back"), finish=step("finish")
        ),
        "_self_check": step("self_check"),
    }
    for name, part in parts.items():
        monkeypatch.setattr(side, name, part, raising=False)
    assert not side._keep_guest(lost)
    every = ["resume", "throttle", "take_back", "finish", "explain", "fail", "close", "self_check"]
    assert done == [name for name in every if failing != "take_back" or name != "finish"]
    assert [(event["problem"], event["self_check"]) for event in told] == [
        (f"no {failing}" * bool(failing), not failing)
    ]


def test_a_source_that_was_killed_while_it_looked_for_its_peer_died_in_no_switch() -> None:
    def said(phase: str) -> str:
        own = Side("source")
        own.take({"event": "guest", "role": "source", "kind": "process", "reason": "it was asked for"})
        own.take({"event": "phase", "role": "source", "phase": phase, "at": 1.0})
        own.take({"event": "ended", "role": "source", "status": -9})
        return judge(Options(), own, Side("destination"), 1).message

    assert said("connect") == "interrupted: the source process was ended by SIGKILL; the guest is gone"
    assert said("postcopy").startswith("interrupted after the switch: ")


@pytest.mark.parametrize(
    ("interrupts", "found", "where", "said"),
    [
        (0, False, "unknown", "failed: the source process was ended by SIGKILL; the guest is gone, unless all of its"),
        (3, False, "unknown", "SIGKILL; the guest is gone, unless all of its memory was at the destination"),
        (0, True, "destination", "the guest was at the destination, which had all of its memory"),
        (3, True, "destination", "the guest was at the destination, and its memory is complete"),
    ],
)
def test_of_a_guest_elsewhere_a_sender_that_was_killed_does_not_say_more_than_it_knows(
    interrupts: int, found: bool, where: str, said: str
) -> None:
    """Whoever hears "gone" may run an older copy of it."""
    sender: Any = Send(Options(), "unix:none")
    own = Side("source")
    own.take({"event": "guest", "role": "source", "kind": "process", "reason": "it was asked for"})
    own.take({"event": "phase", "role": "source", "phase": "postcopy", "at": 1.0})
    if found:
        result = {"audit_wrong": 0, "self_check_errors": 0, "total_time": 1.0, "pages_sent": 1, "at": 2.0}
        own.take({"event": "result", "role": "source", **result})
    own.take({"event": "ended", "role": "source", "status": -9})
    sender._interrupts, sender._handed_over = interrupts, True
    outcome = sender._judge(own)
    assert (outcome.guest_at, outcome.verified) == (where, False)
    assert said in outcome.message


# -------------------------------------------------------------------------------- a moment without descriptors


def test_without_a_descriptor_there_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", no_descriptors)
    with pytest.raises(PeerGoneError, match="no peer at unix:none: Too many open files"):
        connect("unix:none", hello(), timeout=5, patience=5)


def test_a_stream_that_cannot_reach_the_helper_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(socket, "socketpair", no_descriptors)
        with pytest.raises(PeerGoneError, match="the link helper cannot be reached: Too many open files"):
            Transport().wrap(ours, compress="zstd")
        assert ours.fileno() == -1


def test_whoever_comes_back_outlasts_a_moment_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[float] = []

    def attempt(_: Returning, deadline: float) -> Any:
        attempts.append(deadline)
        if len(attempts) < 3:
            no_descriptors()
        return SimpleNamespace(complete=True)

    monkeypatch.setattr(recovery.Returning, "_attempt", attempt)
    reporter = SimpleNamespace(event=lambda *_, **__: None)
    session: Any = SimpleNamespace(stop=Stop(60), options=Options(), reporter=reporter, running_at=1.0)
    lost: Any = SimpleNamespace(
        capabilities=Capabilities(recovery=True), address=None, explain=lambda error: error, close=lambda: None
    )
    returning = Returning(session, "unix:none", hello(), Transport())
    assert returning.come_back(lost, PeerGoneError("lost")).complete
    assert len(attempts) == 3


@pytest.mark.parametrize("short_of", ["descriptors", "threads"])
def test_a_link_that_finds_nobody_to_answer_is_left_for_another(short_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Back:
        def __init__(self, *_: object) -> None:
            pass

        def come_back(self, _: Link, error: Exception) -> None:
            raise RemoteError(f"another link, after: {error}")

    monkeypatch.setattr(source, "Returning", Back)
    if short_of == "descriptors":
        monkeypatch.setattr(socket, "socketpair", no_descriptors)
    else:
        monkeypatch.setattr(threading.Thread, "start", no_thread("answers"))
    urgent = SimpleNamespace(hang_up=lambda: None)
    nobody: Any = SimpleNamespace(event=None, watch=lambda _: None, urgent=urgent)
    side = Source(Options(), "unix:none", "session", nobody, Stop(60))
    side._guest = SimpleNamespace(npages=1, kind="process")  # type: ignore[assignment]
    session: Any = SimpleNamespace(tracker=None, answers=None, options=Options(), stop=Stop(60))
    with pytest.raises(RemoteError, match=r"another link, after: nobody can answer .*: (Too many|can't start)"):
        side._hand_over(session, nobody, SimpleNamespace(urgent=None), {})  # type: ignore[arg-type]


def test_what_the_source_said_counts_whatever_else_the_link_lacks() -> None:
    """A source that has ended does not come back: the destination would wait for it."""

    def no_loop(_: object) -> None:
        raise PeerGoneError("nothing can be taken from this link")

    def ended(*_: object) -> None:
        raise RemoteError("the source failed")

    nobody: Any = SimpleNamespace(event=None)
    side: Any = Destination(Options(), "unix:none", "session", nobody, Stop(60))
    side._link = SimpleNamespace(close=lambda: None)
    side._state = object()
    side._postcopy = SimpleNamespace(quiesce=lambda: None, resume=no_loop)
    fresh: Any = SimpleNamespace(watch=lambda _: None, send=ended)
    with pytest.raises(RemoteError, match="the source failed"):
        side._resume(fresh)


def test_a_guest_is_not_run_where_nobody_could_tell_it_that_hinting_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """S9: whoever has not run it may give it back."""
    nobody: Any = SimpleNamespace(event=None)
    side: Any = Destination(Options(), "unix:none", "session", nobody, Stop(60))
    side._guest = SimpleNamespace(run=lambda: pytest.fail("it ran"))
    monkeypatch.setattr(HintSession, "resume", lambda *_: None)
    run = encode_report({"session": 1})
    monkeypatch.setattr(threading.Thread, "start", no_thread("hints-done"))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        side._start_guest(SimpleNamespace(expect=lambda _: (None, run)))
    assert not side._ran
