"""After a loss of the link: both sides find together again, under a new generation (S9, W6)."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.address import Address
from pagecore.migrate.link import Link, RemoteError
from pagecore.migrate.listener import Listener
from pagecore.migrate.options import Options
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.session import SourceSession
from pagecore.migrate.switch import LIST_ID
from pagecore.migrate.transport import Transport
from pagecore.wire import FrameType, Hello, decode_page_set, decode_report

__all__ = [
    "FAREWELL_SECONDS",
    "LOST",
    "BadFrames",
    "Reception",
    "Resumed",
    "Returning",
    "hears_until",
    "may_return",
]

log = logging.getLogger("pagecore.migrate")

# What another connection may mend. A peer that says why it ends (RemoteError) does not come back.
LOST: Final = (PeerGoneError, ProtocolError)
# A link that mangles frames is left for another one, but not for ever.
MAX_BAD_FRAMES: Final = 8
# The pauses between two attempts, seconds: doubled each time, and each one shortened by chance to no less than half,
# so that two who lost one another at once do not go on meeting at the wrong times.
FIRST_PAUSE: Final = 0.02
LAST_PAUSE: Final = 2.0
# One attempt to connect, and the exchange after it, while the guest's faults wait.
ATTEMPT_TIMEOUT: Final = 5.0
EXCHANGE_PATIENCE: Final = 5.0
# How long a destination that ends, and has not run the guest, stays for a source that looks for it, to tell it so. The
# link may be back only now: an attempt that began before has to fail first, and then there is a pause.
FAREWELL_SECONDS: Final = ATTEMPT_TIMEOUT + LAST_PAUSE + 1.0
# Two options of a day each, at the most.
LONGEST_HEARING: Final = 2 * 86400 + FAREWELL_SECONDS


def may_return(options: Options) -> bool:
    """Whether this side would go on over another link."""
    # What QEMU's source forgot cannot be told from what was sent.
    return options.reconnect_timeout > 0 and not options.emulate_qemu


def hears_until(options: Options) -> float:
    """How long after the last word of the source the destination may still be there to be heard, seconds (S9).

    Until it notices the silence, while it waits for the source, and as it ends without having run the guest.
    """
    return options.stall_timeout + options.reconnect_timeout + FAREWELL_SECONDS


class BadFrames:
    """Decides whether an error of the link is one that another link may mend."""

    def __init__(self) -> None:
        self._left = MAX_BAD_FRAMES

    def final(self, error: Exception) -> bool:
        """True where it is not. Each wrong frame counts."""
        if not isinstance(error, ProtocolError):
            return False
        self._left -= 1
        # W2: a strict side reports what came twice.
        return error.field == "duplicate" or self._left < 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """What the destination said when it was found again.

    Attributes
    ----------
    link : Link
        The new one.
    ran : bool
        Whether it has run the guest. Where it has not, it never executes a RUN of an older generation.
    first_instruction : object
        What it says about when that was.
    complete : bool
        Whether it has all pages.
    """

    link: Link
    ran: bool
    first_instruction: object
    complete: bool


class Returning:
    """The source's side: goes back to the destination until it is let in, or the time is over.

    Parameters
    ----------
    session : SourceSession
    address : str
    hello : Hello
        Of the first generation.
    transport : Transport
    """

    def __init__(self, session: SourceSession, address: str, hello: Hello, transport: Transport) -> None:
        self._session = session
        self._address = address
        self._hello = hello
        self._transport = transport
        # Where the session began. Its guest's memory goes nowhere else, whatever the name means by now.
        self._at: Address | None = None
        self._generation = hello.generation
        self._random = random.Random(session.options.seed)
        self._bad_frames = BadFrames()

    def come_back(self, link: Link, error: Exception) -> Resumed:
        """Find the destination again, and take its word for what it has; the senders must be quiet.

        Raises
        ------
        PagecoreError
            The error that lost the link, where it is no loss of the link; or that there is no other.
        Cancelled
            The rest was given up.
        """
        session, stop = self._session, self._session.stop
        error = link.explain(error)
        if isinstance(error, RemoteError) or not link.capabilities.recovery or self._bad_frames.final(error):
            raise error
        self._at = link.address
        link.close()
        session.reporter.event("link_lost", error=str(error), generation=self._generation)
        patience = self._patience(link)
        began = time.monotonic()
        pause = FIRST_PAUSE
        while True:
            stop.check_given_up()
            try:
                resumed = self._attempt(began + patience)
                session.reporter.event(
                    "reconnected",
                    generation=self._generation,
                    owed=0 if resumed.complete else session.tracker.dirty_count,
                    seconds=time.monotonic() - began,
                )
                return resumed
            except (*LOST, OSError) as again:
                # An OSError is this side's: it was short of something for a moment, descriptors or ports.
                if self._bad_frames.final(again):
                    raise
            except RemoteError as said:
                # S9: who says whether it ran the guest has ended for good.
                if said.ran is not None:
                    raise
                # Else it refuses this attempt, maybe since an earlier one is not at its end there.
            if stop.alone.wait(pause * self._random.uniform(0.5, 1.0)):
                raise error
            if time.monotonic() >= began + patience:
                raise PeerGoneError(f"the link was lost ({error}), and the destination not found within {patience:g} s")
            pause = min(LAST_PAUSE, 2 * pause)

    def _patience(self, link: Link) -> float:
        """How long to look for the destination, seconds."""
        own = self._session.options.reconnect_timeout
        if self._session.running_at:
            return own
        # S9: it may never have run the guest, and then its word is all that can give the guest back: hear it out.
        theirs = link.peer.details.get("hears_until")
        return max(own, min(theirs, LONGEST_HEARING)) if isinstance(theirs, int | float) else own

    def _attempt(self, deadline: float) -> Resumed:
        # W6: each attempt is a generation of its own; what an earlier one left on its way is refused.
        self._generation += 1
        left = max(0.1, deadline - time.monotonic())
        link = connect(
            self._address,
            replace(self._hello, generation=self._generation),
            transport=self._transport,
            timeout=min(left, ATTEMPT_TIMEOUT),
            patience=min(EXCHANGE_PATIENCE, self._session.options.stall_timeout),
            check=self._check,
            at=self._at,
        )
        try:
            resumed = self._exchange(link)
        except BaseException as error:
            if isinstance(error, RemoteError):
                # It may wait to be heard.
                link.fail(FrameType.ABORT, f"the source has heard: {error}")
            link.close()
            raise
        link.set_patience(self._session.options.stall_timeout)
        return resumed

    def _check(self) -> None:
        self._session.stop.check_given_up()
        if self._session.stop.alone.is_set():
            raise PeerGoneError("the other process has ended")

    def _exchange(self, link: Link) -> Resumed:
        _, payload = link.expect(FrameType.RETURN)
        report = decode_report(payload)
        ran, complete = report.get("ran"), report.get("complete")
        for name, value in (("ran", ran), ("complete", complete)):
            if not isinstance(value, bool):
                raise ProtocolError(name, f"{value!r} is neither true nor false")
        if not complete:
            self._reload(link)
        return Resumed(link, bool(ran), report.get("first_instruction"), bool(complete))

    def _reload(self, link: Link) -> None:
        """S9: what the destination has settled is the truth; all else is owed, or still hinted."""
        session, generation = self._session, link.session.generation
        _, payload = link.expect(FrameType.SETTLED)
        page_set = decode_page_set(payload, session.guest.npages, generation=generation)
        if page_set.list_id != LIST_ID:
            raise ProtocolError("list id", f"{page_set.list_id} was applied last, {LIST_ID} was acknowledged")
        session.tracker.begin_generation(generation)
        session.tracker.reload(page_set.pages, generation=generation)


class Reception:
    """The destination's side: lets the source in again, on a thread of its own, whenever it comes.

    A source that comes back knows that the link is lost, maybe before this side does: its new generation ends the old
    one (W6).

    Parameters
    ----------
    listener : Listener
    answer : callable
        Makes our HELLO of the source's.
    link : Link
        The current one.
    patience : float
        Seconds that the source may be silent.
    """

    def __init__(self, listener: Listener, answer: Callable[[Hello], Hello], link: Link, patience: float) -> None:
        self._listener = listener
        self._session_id = link.peer.session_id
        self._answer = answer
        self._current = link
        self._patience = min(EXCHANGE_PATIENCE, patience)
        self._fresh: Link | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reception", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._thread.join()
        if self._fresh is not None:
            self._fresh.close()

    def wait(self, timeout: float) -> Link | None:
        """The link of the newest generation, once it is there; it is the caller's then."""
        with self._changed:
            self._changed.wait_for(lambda: self._fresh is not None, timeout)
            link, self._fresh = self._fresh, None
            return link

    def _run(self) -> None:
        generation = self._current.session.generation
        while not self._closed:
            try:
                link = self._listener.accept(
                    self._session_id,
                    self._answer,
                    timeout=float("inf"),
                    patience=self._patience,
                    check=self._check,
                    after=generation,
                )
            except (PagecoreError, OSError):
                # Whoever it was, was told. The source tries again.
                continue
            except Exception as error:
                # Without this thread the source never comes in again.
                log.error("unexpected: %r", error, exc_info=error)
                continue
            generation = link.session.generation
            with self._changed:
                # Not closed: somebody may sleep in a call on it.
                self._current.hang_up()
                if self._fresh is not None:
                    self._fresh.close()
                self._current = self._fresh = link
                self._changed.notify_all()

    def _check(self) -> None:
        if self._closed:
            raise PeerGoneError("nobody waits for the source any more")
