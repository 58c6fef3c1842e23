"""Who comes back after the link was lost: what both sides tell one another, and who waits for whom for how long."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from concurrency import Worker
from pagecore import PageState
from pagecore.errors import PeerGoneError
from pagecore.migrate.destination import Destination
from pagecore.migrate.link import Link, RemoteError
from pagecore.migrate.listener import Listener
from pagecore.migrate.options import Options
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.recovery import FAREWELL_SECONDS, Reception, Returning
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.transport import Transport
from pagecore.wire import Capabilities, FrameType, Hello, decode_report, encode_report

if TYPE_CHECKING:
    from pagecore.migrate.progress import Reporter
    from pagecore.migrate.session import SourceSession
    from pagecore.testing import Guest

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(90)]

ABLE = Capabilities(recovery=True)


def hello(generation: int, **changes: Any) -> Hello:
    values: dict[str, Any] = {"stream": "control", "page_size": 4096, "regions": {0: 64}, "streams": 2}
    return Hello(session_id="the-session", generation=generation, **{**values, **changes})


def test_a_newer_generation_ends_the_older_one_whoever_still_waits_on_it(tmp_path: Path) -> None:
    """W6: the source may know of the loss long before this side does, whose link is only silent."""
    with Listener(f"unix:{tmp_path}/link") as listener, contextlib.ExitStack() as links:

        def come(generation: int) -> Link:
            made = connect(listener.address, hello(generation), timeout=10, patience=10)
            return links.enter_context(made)

        first = Worker(come, 0)
        link = links.enter_context(
            listener.accept("the-session", lambda theirs: theirs, timeout=10, patience=60, check=lambda: None)
        )
        first.value()
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            waiter = Worker(link.receive)
            with pytest.raises(RemoteError, match="generation"):
                come(0)
            assert not waiter.done()
            assert reception.wait(0.0) is None
            second = come(3)
            with pytest.raises(PeerGoneError):
                waiter.value()
            third = come(4)
            # The one before was nobody's yet, and is over; of the two the newer counts.
            with pytest.raises(PeerGoneError):
                second.receive()
            fresh = reception.wait(10.0)
            assert fresh is not None
            links.enter_context(fresh)
            assert fresh.session.generation == 4
            assert len(fresh.bulk) == 2
            fresh.send(FrameType.RETURN, encode_report({"ran": True}))
            assert decode_report(third.expect(FrameType.RETURN)[1]) == {"ran": True}
        link.close()


def returning(address: str, *, patience: float = 20.0, running_at: float = 0.0) -> Returning:
    """A source that looks for its destination; nothing of its session is asked for before it is found."""
    options = Options(reconnect_timeout=patience)
    session = SimpleNamespace(stop=Stop(60), options=options, reporter=SimpleNamespace(), running_at=running_at)
    session.reporter.event = lambda *_, **__: None
    return Returning(cast("SourceSession", session), address, hello(0, capabilities=ABLE), Transport())


@pytest.mark.parametrize("ran", [True, False])
def test_what_is_said_of_the_guest_on_the_next_link_is_heard(ran: bool, tmp_path: Path) -> None:
    """S9: the guest is at the source alone, and it is told so only once."""
    with Listener(f"unix:{tmp_path}/link") as listener, contextlib.ExitStack() as links:
        lost, link = pair(listener, links)
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            link.hang_up()
            source = Worker(returning(listener.address).come_back, lost, PeerGoneError("lost"))
            fresh = reception.wait(10.0)
            assert fresh is not None
            fresh.fail(FrameType.ERROR, "the time is over", ran=ran)
            with pytest.raises(RemoteError, match="the time is over") as said:
                source.value(5.0)
            assert said.value.ran is ran
            fresh.close()


def test_who_comes_back_goes_where_the_session_began_whatever_the_name_means_by_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meant = ["127.0.0.1"]

    def getaddrinfo(name: str, port: int, **_: object) -> list[Any]:
        assert name == "there.example.org"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (meant[-1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with contextlib.ExitStack() as links:
        listener = links.enter_context(Listener("127.0.0.1:0"))
        port = listener.address.rpartition(":")[2]
        links.enter_context(Listener(f"127.0.0.2:{port}"))
        lost, link = pair(listener, links, f"there.example.org:{port}")
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            meant.append("127.0.0.2")
            link.hang_up()
            source = Worker(returning(f"there.example.org:{port}").come_back, lost, PeerGoneError("lost"))
            fresh = reception.wait(10.0)
            assert fresh is not None
            links.enter_context(fresh)
            fresh.send(FrameType.RETURN, encode_report({"ran": True, "complete": True}))
            found = links.enter_context(source.value().link)
            assert found.address == lost.address == (socket.AF_INET, ("127.0.0.1", int(port)))


def destination_of(listener: Listener, links: contextlib.ExitStack, link: Link, reception: Reception) -> Destination:
    """One that lost its link, and listens for the source that comes back."""
    reporter = cast("Reporter", SimpleNamespace(event=lambda *_, **__: None))
    destination = Destination(Options(), listener.address, "the-session", reporter, Stop(60))
    links.callback(destination._hang_up)
    destination._link, destination._reception = link, reception
    return destination


def test_a_destination_that_ends_tells_a_source_that_is_on_its_way_back(tmp_path: Path) -> None:
    with Listener(f"unix:{tmp_path}/link") as listener, contextlib.ExitStack() as links:
        lost, link = pair(listener, links)
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            destination = destination_of(listener, links, link, reception)
            link.hang_up()
            source = Worker(returning(listener.address).come_back, lost, PeerGoneError("lost"))
            destination._fail(TimeoutError("the time is over"))
            with pytest.raises(RemoteError, match="the destination failed: the time is over") as said:
                source.value(5.0)
            assert said.value.ran is False


def test_a_destination_that_was_to_end_does_so_once_the_source_hears_it(tmp_path: Path) -> None:
    """S9: it never ran the guest. Ended before, the source would look for it in vain, and lose its guest."""
    with Listener(f"unix:{tmp_path}/link") as listener, contextlib.ExitStack() as links:
        lost, link = pair(listener, links)
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            destination = destination_of(listener, links, link, reception)
            destination._guest = cast("Guest", SimpleNamespace(error=None))
            destination._state = PageState(64)
            destination._stop.signalled()
            coming = Worker(destination._await_return, PeerGoneError("lost"))
            # While nobody is there to hear it, it waits.
            assert not coming.done(0.3)
            source = Worker(returning(listener.address).come_back, lost, PeerGoneError("lost"))
            with pytest.raises(Cancelled) as wanted:
                coming.value()
            destination._fail(wanted.value)
            with pytest.raises(RemoteError, match="cancelled") as said:
                source.value()
            assert said.value.ran is False


@pytest.mark.parametrize(
    ("hears_until", "running_at", "waits"),
    [(20.0, 0.0, True), (20.0, 5.0, False), (0.05, 0.0, False), ("x", 0.0, False)],
)
def test_a_source_that_may_still_have_its_guest_back_outlasts_the_destination(
    hears_until: Any, running_at: float, waits: bool, tmp_path: Path
) -> None:
    """S9: the side that decides last has the longer deadline. Who has heard that the guest runs decides nothing."""
    with contextlib.ExitStack() as links:
        with Listener(f"unix:{tmp_path}/link") as listener:
            lost, _ = pair(listener, links, hears_until=hears_until)
        away = returning(listener.address, patience=0.1, running_at=running_at)
        source = Worker(away.come_back, lost, PeerGoneError("lost"))
        if not waits:
            with pytest.raises(PeerGoneError, match=r"not found within 0\.1 s"):
                source.value()
            return
        # Several times what it would wait for a link alone.
        assert not source.done(0.4)
        away._session.stop.give_up()
        with pytest.raises(Cancelled, match="the rest was given up"):
            source.value()


def test_a_denial_is_heard_on_a_link_that_is_not_known_to_be_lost(tmp_path: Path) -> None:
    """S9: it says it into nothing, and then to the source that comes back."""
    with Listener(f"unix:{tmp_path}/link") as listener, contextlib.ExitStack() as links:
        lost, link = pair(listener, links)
        with Reception(listener, lambda theirs: theirs, link, 10.0) as reception:
            destination = destination_of(listener, links, link, reception)
            ending = Worker(destination._fail, TimeoutError("the time is over"))
            # The source's end of it takes nothing in.
            assert not ending.done(0.3)
            lost.hang_up()
            source = Worker(returning(listener.address).come_back, silent(lost), PeerGoneError("lost"))
            with pytest.raises(RemoteError, match="the time is over") as said:
                source.value()
            assert said.value.ran is False
            # And that it was heard is all that it waited for.
            began = time.monotonic()
            ending.value()
            assert time.monotonic() - began < FAREWELL_SECONDS / 2


def silent(link: Link) -> Link:
    """A link on which nothing is heard any more, whatever came."""
    return cast(
        "Link",
        SimpleNamespace(
            capabilities=ABLE, peer=link.peer, address=link.address, explain=lambda error: error, close=link.close
        ),
    )


def pair(listener: Listener, links: contextlib.ExitStack, address: str = "", **details: Any) -> tuple[Link, Link]:
    """The first link of a session, its source's end first."""
    ours = hello(0, capabilities=ABLE, details=details)
    made = Worker(lambda: connect(address or listener.address, ours, timeout=10, patience=10))
    link = listener.accept("the-session", lambda theirs: theirs, timeout=10, patience=60, check=lambda: None)
    return links.enter_context(made.value()), links.enter_context(link)
