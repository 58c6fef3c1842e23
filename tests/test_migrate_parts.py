"""The parts of the controllers that need no guest: options, addresses, streams, HELLO, pace."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from concurrency import Worker
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.address import Terms, own_address, parse_address
from pagecore.migrate.children import start_python
from pagecore.migrate.coordinator import GRACE_SECONDS, Backstop, Migration
from pagecore.migrate.destination import Destination, HintSession
from pagecore.migrate.link import Link, RemoteError, Stream
from pagecore.migrate.listener import Listener
from pagecore.migrate.options import Options, format_size, parse_size
from pagecore.migrate.outcome import Outcome, Side, judge
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.rendezvous import connect, new_session_id
from pagecore.migrate.sender import FRAME_PAGES, Pacer
from pagecore.migrate.serving import Serving
from pagecore.migrate.source import Source
from pagecore.wire import Capabilities, FrameType, Hello, encode_frame, encode_header, encode_hello, encode_report

# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "size"),
    [("4K", 4096), ("2M", 2 << 20), ("1g", 1 << 30), ("1.5G", 3 << 29), ("64MiB", 64 << 20), ("512", 512)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "4X", "-4K", "1e9", "4 K K", "2000T", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_sizes_are_written_as_a_person_would() -> None:
    assert [format_size(size) for size in (0, 812, 4096, 256 << 20, 3 << 29)] == [
        "0",
        "812",
        "4K",
        "256M",
        "1.5G",
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": 5000}, "size 5000"),
        ({"size": 1 << 20}, "16M"),
        ({"free_share": 1.5}, "free share 1.5"),
        ({"bandwidth": 100}, "bandwidth 100"),
        ({"dirty_rate": 1}, "dirty rate 1"),
        ({"precopy_rounds": -1}, "precopy rounds -1"),
        ({"dirty_log": "soft-dirty"}, "dirty log 'soft-dirty'"),
        ({"guest": "process", "dirty_log": "ring"}, "process guest has no dirty log 'ring'"),
        ({"guest": "kvm", "dirty_log": "marks"}, "kvm guest has no dirty log 'marks'"),
        ({"seed": -1}, "seed -1"),
        ({"vcpus": 9}, "vcpus 9"),
        ({"guest": "xen"}, "xen"),
        ({"link": "rdma"}, "rdma"),
        ({"duplicates": "some"}, "some"),
        ({"timeout": 0}, "timeout 0"),
        ({"settle_steps": -1}, "settle steps -1"),
        ({"emulate_qemu": True, "hints": False}, "emulate-qemu"),
        ({"streams": 0}, "streams 0"),
        ({"streams": 17}, "streams 17"),
        ({"reconnect_timeout": -1}, "reconnect timeout -1"),
        ({"throttle": True}, "throttle"),
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Options(**values)


def test_options_travel_as_json() -> None:
    options = Options(size=64 << 20, dirty_rate=None, bandwidth=1 << 20)
    assert Options.from_json(options.to_json()) == options
    with pytest.raises(ValueError, match="colour"):
        Options.from_json({"colour": "blue"})


# ------------------------------------------------------------------------------------------------- addresses


def test_addresses_are_read_as_people_write_them() -> None:
    assert parse_address("unix:/run/x") == (socket.AF_UNIX, "/run/x")
    assert parse_address("127.0.0.1:5") == parse_address("tcp:127.0.0.1:5") == (socket.AF_INET, ("127.0.0.1", 5))
    assert parse_address("[::1]:5") == (socket.AF_INET6, ("::1", 5))
    assert parse_address("vm-7.example.net:7070") == (socket.AF_UNSPEC, ("vm-7.example.net", 7070))
    for text in ("unix:/run/x", "tcp:127.0.0.1:5", "tcp:[::1]:5", "tcp:host:5"):
        assert parse_address(text).text == text


@pytest.mark.parametrize(
    "address",
    [
        "",
        "unix:",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "h:65536",
        "::1:5",
        ":5",
        "a b:5",
        "h/:5",
        "unix:" + "p" * 200,
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError):
        parse_address(address)


@pytest.mark.parametrize("address", ["10.0.0.1:5", "0.0.0.0:5", "[::]:5", "8.8.8.8:5"])
def test_memory_leaves_the_machine_on_certain_terms_alone(address: str) -> None:
    with pytest.raises(ValueError, match="neither encrypted nor authenticated"):
        Listener(address)
    with pytest.raises(ValueError, match="neither encrypted nor authenticated"):
        connect(address, hello("x"), timeout=1, patience=1)
    for terms in (Terms("cert", "key", "ca"), Terms(insecure=True)):
        terms.check(parse_address(address))


def test_two_sides_that_are_told_nothing_meet_at_a_socket_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"pagecore-{os.geteuid()}.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert own_address() == f"unix:/run/user/7/{name}"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert own_address() == f"unix:{tempfile.gettempdir()}/{name}"


def test_what_stays_on_the_machine_needs_no_terms() -> None:
    for text in ("unix:/run/x", "127.9.9.9:5", "[::1]:5"):
        Terms().check(parse_address(text))
    for resolved in parse_address("localhost:5").resolved():
        Terms().check(resolved)
    # A name may lead anywhere: what counts is what it is resolved to.
    with pytest.raises(ValueError, match="neither encrypted"):
        Terms().check(parse_address("localhost:5"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tls_cert": "c"}, "mutual"),
        ({"tls_cert": "c", "tls_key": "k"}, "mutual"),
        ({"tls_cert": "c", "tls_key": "k", "tls_ca": "a", "insecure": True}, "--insecure"),
        ({"compress": "gzip"}, "gzip"),
    ],
)
def test_terms_that_make_no_sense_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Terms(**values)
    with pytest.raises(ValueError, match="colour"):
        Terms.from_json({"colour": "blue"})


# --------------------------------------------------------------------------------------------------- streams


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield Stream(ours, 0.3), theirs
    ours.close()
    theirs.close()


def test_many_buffers_arrive_in_order_over_partial_sends(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    buffers = [bytes([index % 251]) * (index * 37 % 9000) for index in range(1500)]
    whole = b"".join(buffers)
    sender = Worker(stream.send, [memoryview(one) for one in buffers])
    got = bytearray()
    while len(got) < len(whole):
        got += peer.recv(1 << 16)
    sender.value()
    assert got == whole


def test_what_follows_is_received_ahead(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    peer.sendall(b"payloadhead")
    payload, header = bytearray(7), bytearray(40)
    assert stream.receive_into(memoryview(payload), memoryview(header)) == 4
    assert payload == b"payload"
    assert header[:4] == b"head"


def test_a_silent_peer_is_given_up_after_the_patience(pair: tuple[Stream, socket.socket]) -> None:
    stream, _ = pair
    began = time.monotonic()
    with pytest.raises(PeerGoneError, match="silent"):
        stream.receive_into(memoryview(bytearray(1)))
    assert 0.25 < time.monotonic() - began < 3


def test_a_peer_that_takes_nothing_is_given_up(pair: tuple[Stream, socket.socket]) -> None:
    stream, _ = pair
    with pytest.raises(PeerGoneError, match="silent"):
        stream.send([bytes(8 << 20)])


def test_a_closed_peer_is_gone(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    peer.close()
    with pytest.raises(PeerGoneError):
        stream.receive_into(memoryview(bytearray(1)))
    with pytest.raises(PeerGoneError):
        stream.send([b"x"])


def test_a_wait_ends_when_it_is_cancelled(pair: tuple[Stream, socket.socket]) -> None:
    stream, _ = pair
    stop = Stop(60)
    stream.patience, stream.check = 60, stop.check
    stop.requested.set()
    with pytest.raises(Cancelled):
        stream.receive_into(memoryview(bytearray(1)))


# ----------------------------------------------------------------------------------------------------- HELLO


def hello(session_id: str, **changes: Any) -> Hello:
    values: dict[str, Any] = {
        "stream": "control",
        "session_id": session_id,
        "generation": 0,
        "page_size": 4096,
        "regions": {0: 100},
        "capabilities": Capabilities("strict"),
    }
    return Hello(**{**values, **changes})


class Accepting:
    """A listener on a thread of its own, and what became of it."""

    def __init__(self, address: str, session_id: str, answer: Callable[[Hello], Hello], timeout: float = 10) -> None:
        self.link: Link | None = None
        self.error: Exception | None = None
        self._listener = Listener(address)
        self.address = self._listener.address
        self._arguments = (session_id, answer, timeout)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        session_id, answer, timeout = self._arguments
        try:
            with self._listener:
                self.link = self._listener.accept(session_id, answer, timeout=timeout, patience=5, check=lambda: None)
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/link" if request.param == "unix" else "tcp:127.0.0.1:0"


def test_three_streams_find_together_and_the_weaker_side_decides(address: str) -> None:
    name = new_session_id()
    accepting = Accepting(address, name, lambda _: hello(name, capabilities=Capabilities("tolerant")))
    with connect(accepting.address, hello(name), timeout=10, patience=5) as link:
        accepting.join()
        assert accepting.link is not None
        with accepting.link as other:
            assert link.capabilities == other.capabilities == Capabilities("strict")
            link.send(FrameType.RUN, b"{}")
            assert other.expect(FrameType.RUN)[1] == b"{}"
            other.bulk[0].send([b"abc"])
            view = bytearray(3)
            link.bulk[0].receive_into(memoryview(view))
            assert view == b"abc"
            other.fail(FrameType.ERROR, "no more pages")
            with pytest.raises(RemoteError, match="no more pages"):
                link.expect(FrameType.RUNNING)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"page_size": 8192}, "page_size"),
        ({"regions": {0: 99}}, "regions"),
        ({"generation": 3}, "generation"),
    ],
)
def test_sides_that_do_not_agree_part_and_both_know_why(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    name = new_session_id()
    accepting = Accepting(f"unix:{tmp_path}/link", name, lambda _: hello(name))
    with pytest.raises(RemoteError, match=named):
        connect(accepting.address, hello(name, **changes), timeout=10, patience=5)
    accepting.join()
    assert isinstance(accepting.error, ProtocolError)
    assert accepting.error.field == named


def test_strangers_are_shown_out_and_the_session_opens_all_the_same(address: str) -> None:
    name = new_session_id()
    accepting = Accepting(address, name, lambda _: hello(name))
    with pytest.raises(RemoteError, match="session"):
        connect(accepting.address, hello(new_session_id()), timeout=10, patience=5)
    family, where = parse_address(accepting.address)
    for garbage in (
        b"GET / HTTP/1.0\r\n\r\n" + bytes(40),
        encode_header(FrameType.HELLO, flags=0x80, length=1 << 20),
        encode_header(FrameType.PAGES, count=1, length=4096),
        encode_frame(FrameType.HELLO, b"[1, 2]"),
        encode_frame(FrameType.HELLO, encode_hello(hello("x")).replace(b'"version":1', b'"version":7')),
    ):
        with socket.socket(family, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(10)
            stranger.connect(where)
            stranger.sendall(garbage)
            # Told why, and shown out.
            assert b"reason" in stranger.recv(4096)
    with connect(accepting.address, hello(name), timeout=10, patience=5):
        accepting.join()
        assert accepting.link is not None
        accepting.link.close()


def test_nobody_comes(tmp_path: Path) -> None:
    accepting = Accepting(f"unix:{tmp_path}/link", "x", lambda _: hello("x"), timeout=0.2)
    accepting.join()
    assert isinstance(accepting.error, PeerGoneError)
    with pytest.raises(PeerGoneError, match="no peer"):
        connect(f"unix:{tmp_path}/nobody", hello("x"), timeout=1, patience=1)


# ------------------------------------------------------------------------------------------- pace, judgement


def test_a_capped_stream_keeps_its_pace_in_small_frames() -> None:
    pacer = Pacer(40 << 20)
    assert 1 <= pacer.batch_pages <= FRAME_PAGES
    began = time.monotonic()
    for _ in range(40):
        pacer.spend(200 << 10)
    # 8 MiB at 40 MiB a second, less the last piece and the slice that an idle stream may have saved.
    assert 0.17 < time.monotonic() - began < 10
    assert Pacer(1000).batch_pages == 1
    assert Pacer(None).batch_pages > FRAME_PAGES


def test_a_side_that_died_without_a_word_is_the_cause() -> None:
    source, destination = Side("source"), Side("destination")
    source.take({"event": "guest", "role": "source", "kind": "kvm", "reason": "it runs"})
    source.take({"event": "ended", "role": "source", "status": 1})
    source.take(
        {
            "event": "failed",
            "role": "source",
            "error": "the peer closed the link",
            "kind": "PeerGoneError",
            "guest": "source",
            "self_check": True,
        }
    )
    destination.take({"event": "ended", "role": "destination", "status": -9})
    outcome = judge(Options(), source, destination, 0)
    assert outcome.exit_code == 1
    assert outcome.guest_at == "source"
    assert "SIGKILL" in outcome.message
    assert "one more self-check round" in outcome.message
    assert judge(Options(), source, destination, 1).exit_code == 130


@pytest.mark.parametrize("where", ["destination", "gone", "unknown"])
def test_of_a_destination_elsewhere_the_source_says_what_it_knows_and_of_one_that_died_here_nothing(where: str) -> None:
    def outcome(status: int | None, interrupts: int = 0) -> Outcome:
        source, destination = Side("source"), Side("destination")
        source.take({"event": "guest", "role": "source", "kind": "process", "reason": "it runs"})
        failed = {"error": "the link was lost", "kind": "PeerGoneError", "guest": where}
        source.take({"event": "failed", "role": "source", **failed})
        destination.status = status
        return judge(Options(), source, destination, interrupts)

    said = {
        "destination": "the guest was at the destination, which had all of its memory, but did not say what it found",
        "gone": "the guest is gone",
        "unknown": "the guest runs at the destination with all of it, or is gone",
    }
    for interrupts, code in ((0, 1), (1, 130)):
        elsewhere, here = outcome(None, interrupts), outcome(-9, interrupts)
        assert [elsewhere.guest_at, here.guest_at] == [where, "gone"]
        assert [elsewhere.exit_code, here.exit_code] == [code, code]
        if not interrupts or where != "destination":
            assert said[where] in elsewhere.message
        assert said["gone"] in here.message


@pytest.mark.parametrize(
    ("postcopy", "running", "owed", "complete", "error", "where"),
    [
        (True, True, 0, True, PeerGoneError("lost"), "destination"),
        (True, True, 0, True, RemoteError("it did not verify"), "destination"),
        (True, True, 0, False, PeerGoneError("lost"), "unknown"),
        (True, True, 0, False, RemoteError("no memory"), "gone"),
        (True, True, 1, False, PeerGoneError("lost"), "gone"),
        (True, False, 0, False, PeerGoneError("lost"), "unknown"),
        (False, True, 0, False, PeerGoneError("lost"), "destination"),
        (False, False, 0, False, PeerGoneError("lost"), "unknown"),
    ],
)
def test_the_source_says_where_the_guest_is_only_as_far_as_it_can_know(
    *, postcopy: bool, running: bool, owed: int, complete: bool, error: Exception, where: str
) -> None:
    events: list[dict[str, Any]] = []
    reporter: Any = SimpleNamespace(event=lambda _, **values: events.append(values))
    side = Source(Options(postcopy=postcopy), "unix:none", "session", reporter, Stop(60))
    side._link = SimpleNamespace(explain=lambda one: one, fail=lambda *_: None)  # type: ignore[assignment]
    side._complete = side._complete or complete
    session: Any = SimpleNamespace(running_at=float(running), tracker=SimpleNamespace(dirty_count=owed))
    assert not side._lose_guest(session, error)
    assert [event["guest"] for event in events] == [where]


# ------------------------------------------------------------------------------------------- what may fail beside


def test_a_done_that_cannot_be_told_ends_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """S5: it is told on a thread of its own, and nobody would hear of it."""

    def finish() -> bool:
        raise PeerGoneError("the guest hears nothing")

    monkeypatch.setattr(HintSession, "resume", lambda *_: SimpleNamespace(finish=finish))
    reporter: Any = SimpleNamespace(event=lambda *_, **__: None)
    side = Destination(Options(postcopy=False), "unix:none", "session", reporter, Stop(60))
    side._guest = SimpleNamespace(run=lambda: 1.0, error=None)  # type: ignore[assignment]
    link: Any = SimpleNamespace(
        expect=lambda _: (None, encode_report({"epoch": 1})), watch=lambda _: None, send=lambda *_: None
    )
    side._start_guest(link)
    with pytest.raises(PeerGoneError, match="hears nothing"):
        side._arrive(link)


@pytest.mark.parametrize("said", [None, "3"])
def test_a_child_has_a_group_of_its_own_and_starts_no_threads_for_matrices(
    said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", said)
    tell = "import os; print(os.environ['OPENBLAS_NUM_THREADS'], os.getpgid(0) == os.getpid())"
    with start_python("timeit", "-n1", "-r1", tell, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == f"{said or 1} True\n"
        child.communicate(timeout=30)


def test_an_interrupt_writes_to_no_pipe() -> None:
    """A signal handler may have interrupted a write to that very pipe, which refuses to be entered again; and the
    first line that a child reads must be its configuration."""
    told: list[Any] = []
    migration = Migration(Options())
    migration._children = {"source": SimpleNamespace(tell=told.append)}  # type: ignore[dict-item]
    migration.interrupt()
    assert not told
    assert migration._next() == {"event": "interrupted", "role": "parent", "times": 1}


def test_a_hung_process_is_killed_but_never_one_whose_guest_that_would_cost_its_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("pagecore.migrate.coordinator.time", SimpleNamespace(monotonic=lambda: now[0]))

    def due(*events: dict[str, Any], after: float, failed: str | None = None) -> bool:
        backstop = Backstop(60)
        backstop.start()
        for event in events:
            backstop.take({"role": "source", **event})
        if failed is not None:
            backstop.failed(failed)
        now[0] += after
        return backstop.due

    switch, run = ({"event": "phase", "phase": phase} for phase in ("switch", "postcopy"))
    interrupted = {"event": "interrupted", "times": 1}
    long = 60 + GRACE_SECONDS
    assert [due(switch, after=seconds) for seconds in (long - 1, long)] == [False, True]
    assert [due(interrupted, after=seconds) for seconds in (GRACE_SECONDS - 1, GRACE_SECONDS)] == [False, True]
    assert not due({"event": "paused"}, after=1e6)
    assert due({"event": "paused"}, {"event": "resumed"}, after=long)
    # Who is interrupted ends a pause, which gives nobody more time; nor does one whose word was on its way.
    pause, resume = ({"event": name} for name in ("paused", "resumed"))
    for events in ([pause, interrupted, resume], [interrupted, pause], [interrupted, pause, resume]):
        assert [due(*events, after=seconds) for seconds in (GRACE_SECONDS - 1, GRACE_SECONDS)] == [False, True]
    # After RUN nothing ends it: no clock, no first signal, whichever came first.
    for events in ([run], [interrupted, run], [run, interrupted], [interrupted, {"event": "link_lost"}]):
        assert not due(*events, after=1e6)
    assert not due(run, {"event": "paused"}, {"event": "resumed"}, after=1e6)
    # But for a side whose other one has failed, and not where it is the destination, which has the guest.
    assert due(run, after=GRACE_SECONDS, failed="destination")
    assert not due(run, after=1e6, failed="source")
    assert all(due(switch, after=GRACE_SECONDS, failed=role) for role in ("source", "destination"))


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_destination_in_the_switch_is_not_killed_by_the_time(role: str) -> None:
    """S9: it may have acknowledged, and then only its own word gives the guest back. A source has it as yet."""
    backstop = Backstop(-GRACE_SECONDS)
    backstop.start()
    assert backstop.due
    backstop.take({"event": "phase", "role": role, "phase": "switch"})
    # Neither that time nor any that begins later.
    backstop.take({"event": "interrupted", "role": "parent", "times": 1})
    backstop.take({"event": "resumed", "role": "source"})
    assert backstop.due is (role == "source")


def test_a_peer_that_goes_on_talking_is_not_listened_to_for_ever() -> None:
    """One stream is broken, and the source, which pauses, does not notice: it has nothing to send there."""
    ours, theirs = socket.socketpair()
    streams = {"control": Stream(ours, 60), "urgent": Stream(ours, 60)}
    link = Link(streams, hello("x"), hello("x"))
    told = encode_frame(FrameType.ALIVE, encode_report({"paused": True}), round=1)
    over = threading.Event()

    def talk() -> None:
        while not over.wait(0.05):
            theirs.sendall(told)

    talking = Worker(talk)
    broken = PeerGoneError("the peer closed the link")
    explaining = Worker(link.explain, broken)
    try:
        assert explaining.value(10) is broken
    finally:
        over.set()
        talking.value()
        ours.close()
        theirs.close()


def test_a_peer_that_completes_and_closes_is_not_lost() -> None:
    """COMPLETE came after the look at the control stream, and the end of the urgent one before the look at it."""
    session: Any = SimpleNamespace(stop=Stop(60), tracker=None, options=Options(), answers=None)
    link: Any = SimpleNamespace(watch=lambda _: None, urgent=SimpleNamespace(hang_up=lambda: None))
    serving = Serving(session, link, SimpleNamespace(urgent=None))  # type: ignore[arg-type]

    def nothing_yet(_: float) -> bool:
        serving._answers.error = PeerGoneError("the peer closed the link")
        return False

    link.control = SimpleNamespace(readable=nothing_yet)
    serving.check()
    with pytest.raises(PeerGoneError):
        serving.check()
    serving.close()


def test_what_the_parent_says_is_no_first_signal() -> None:
    """One Ctrl-C or `systemctl stop` reaches both: the guest is given up by whoever signals twice."""
    stop = Stop(60)
    stop.requested.set()
    stop.signalled()
    stop.check_given_up()
    stop.signalled()
    with pytest.raises(Cancelled):
        stop.check_given_up()
