"""Where a destination waits for the streams of its session, and of the generations after a lost link (W6)."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from pagecore.errors import BusyError, PagecoreError, PeerGoneError, ProtocolError, UnsupportedError
from pagecore.migrate.address import parse_address
from pagecore.migrate.door import HELLO_SECONDS, Arrival, Door
from pagecore.migrate.greeting import check_agreement, expect_plain_bytes, greet
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.transport import Transport, has_zstd
from pagecore.wire import FrameType, Hello, stream_names

__all__ = ["Listener"]

log = logging.getLogger("pagecore.migrate")

BACKLOG: Final = 64
TICK: Final = 0.1


class Listener:
    """Listens for one session, as long as it is open: for its first link, then for those that follow a lost one.

    Whoever else comes is shown out, also while the session runs.

    Parameters
    ----------
    address : str
        As `parse_address` reads it. A Unix socket is this user's alone; its file is removed at the end.
    transport : Transport, optional
        Carries the streams; without it they are plain sockets, at loopback and Unix sockets alone.
    refused : callable, optional
        Called with the reason why a connection was refused, on any thread.

    Attributes
    ----------
    address : str
        Where it listens, with the port that the system chose where none was given.

    Raises
    ------
    ValueError
        If the address is not allowed on the terms of the transport.
    OSError
    """

    def __init__(
        self,
        address: str,
        transport: Transport | None = None,
        refused: Callable[[str], None] = lambda reason: log.warning("a connection was refused: %s", reason),
    ) -> None:
        self._transport = transport or Transport()
        wanted = parse_address(address).resolved()[0]
        self._transport.terms.check(wanted)
        self._path = wanted.host if wanted.family == socket.AF_UNIX else None
        self._lock = threading.Lock()
        # None: whoever comes first names the session.
        self._session: str | None = None
        self._generation = -1
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(socket.socket(wanted.family, socket.SOCK_STREAM))
            if self._path is None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                if _left_behind(self._path):
                    os.unlink(self._path)
                # The file is made with these rights: what the path leads to afterwards may be somebody else's.
                os.fchmod(self._socket.fileno(), 0o600)
            try:
                self._socket.bind(wanted.where)
            except OSError as error:
                raise OSError(error.errno, error.strerror, wanted.text) from None
            if self._path is not None:
                undo.callback(os.unlink, self._path)
            self._socket.listen(BACKLOG)
            undo.pop_all()
        self.address = wanted.text
        if self._path is None:
            host, port = self._socket.getsockname()[:2]
            self.address = wanted._replace(where=(host, port)).text
        self._door = Door(self._socket, self._transport, self._admit, refused)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. Links that were accepted stay."""
        self._door.close()
        self._socket.close()
        if self._path is not None:
            # It may be gone, or somebody else's by now. What became of the guest is known, and not for this to change.
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def accept(
        self,
        session_id: str | None,
        answer: Callable[[Hello], Hello],
        *,
        timeout: float,
        patience: float,
        check: Callable[[], None],
        after: int = -1,
    ) -> Link:
        """Wait for the streams of the session; a later generation takes the place of one that is not whole yet.

        Parameters
        ----------
        session_id : str or None
            None takes the first session that comes, and then waits for that one alone.
        answer : callable
            Makes our HELLO of the peer's on the control stream; an error from it refuses the peer.
        timeout, patience : float
            Seconds for all of it, which may be infinite; seconds without a byte later on.
        check : callable
            Called a few times a second while it waits; what it raises ends the wait.
        after : int
            The last generation that there was: W6, only a later one is let in.

        Raises
        ------
        PagecoreError, OSError
            If the peer of an awaited session cannot be agreed with. One that came by itself is shown out, and the
            next one is waited for; `UnsupportedError` always ends the wait.
        PeerGoneError
            If none came in time.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if session_id is not None:
                self._session = session_id
            named = self._session is not None
            self._generation = max(self._generation, after)
        gathered = _Gathered(self._transport, answer, check)
        try:
            while not gathered.complete:
                check()
                if time.monotonic() >= deadline:
                    raise PeerGoneError(f"no peer opened the session within {timeout:g} s")
                if not named and gathered.given_up:
                    gathered.drop()
                arrival = self._door.next(TICK)
                if arrival is None:
                    continue
                try:
                    self._take(gathered, arrival)
                except (PagecoreError, OSError) as error:
                    # Shown out alone: a stranger must not end what the peer has begun.
                    self._door.refuse(arrival.stream, error)
                    if named or isinstance(error, UnsupportedError):
                        raise
            with self._lock:
                self._session, self._generation = gathered.ours.session_id, gathered.ours.generation
            return gathered.link(patience)
        except BaseException:
            gathered.drop()
            raise

    def _admit(self, hello: Hello) -> None:
        """Whether a stream is one that is, or will be, waited for; called by the door."""
        with self._lock:
            if self._session is None:
                return
            if not secrets.compare_digest(hello.session_id.encode(), self._session.encode()):
                if self._generation >= 0:
                    raise BusyError("another session is running here")
                raise ProtocolError("session", "is not the one that is awaited here")
            # W6: streams of a generation that was lost are of no use to anybody.
            if hello.generation <= self._generation:
                raise ProtocolError("generation", f"{hello.generation} is over; {self._generation} was the last")

    def _take(self, gathered: _Gathered, arrival: Arrival) -> None:
        # Between the door and here the session may have got its name.
        self._admit(arrival.hello)
        gathered.take(arrival)


def _left_behind(path: str) -> bool:
    """Whether a socket's file is there, and nobody listens at it any more."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            # Whoever listens may take nobody, and must not be waited for.
            sock.setblocking(False)
            try:
                sock.connect(path)
            except ConnectionRefusedError:
                return True
            except BlockingIOError:
                return False
    return False


class _Gathered:
    """The streams of one generation, as they come: control first, the others in any order."""

    def __init__(self, transport: Transport, answer: Callable[[Hello], Hello], check: Callable[[], None]) -> None:
        self._transport = transport
        self._answer = answer
        self._check = check
        self._streams: dict[str, Stream] = {}
        self._missing: set[str] = set()
        self._late_at = float("inf")
        self._compress = "none"
        self.ours: Hello
        self._theirs: Hello

    @property
    def complete(self) -> bool:
        """Whether all streams are there."""
        return bool(self._streams) and not self._missing

    @property
    def given_up(self) -> bool:
        """Whether the peer left before all streams were there, or lets us wait for them too long."""
        if not self._streams:
            return False
        # It has nothing to say yet: what can be read is the end.
        return time.monotonic() >= self._late_at or self._streams["control"].readable(0)

    def drop(self) -> None:
        """Begin anew; the streams that came are closed."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._late_at = float("inf")

    def link(self, patience: float) -> Link:
        """The link that they make."""
        for stream in self._streams.values():
            stream.patience = patience
        return Link(self._streams, self.ours, self._theirs)

    def take(self, arrival: Arrival) -> None:
        """Answer one stream, and keep it.

        Raises
        ------
        PagecoreError, OSError
            If it does not belong here; it is still the caller's.
        """
        stream, theirs = arrival.stream, arrival.hello
        stream.check = self._check
        if theirs.stream == "control":
            self._begin(theirs)
        elif not self._streams:
            raise ProtocolError("stream", f"{theirs.stream} comes before control")
        elif theirs.session_id != self.ours.session_id:
            raise ProtocolError("session", "is not the one that is opening here")
        elif theirs.stream not in self._missing:
            raise ProtocolError("stream", f"{theirs.stream} comes twice, or was not agreed on")
        ours = replace(self.ours, stream=theirs.stream)
        check_agreement(ours, theirs)
        greet(stream, FrameType.HELLO_ACK, ours)
        if self._compress != "none" and theirs.stream.startswith("bulk"):
            # From here on both sides speak through their helpers.
            stream = Stream(self._transport.wrap(stream.socket, server=True), HELLO_SECONDS, self._check)
            try:
                expect_plain_bytes(stream)
            except BaseException:
                stream.close()
                raise
        self._missing.discard(theirs.stream)
        self._streams[theirs.stream] = stream

    def _begin(self, theirs: Hello) -> None:
        if self._streams:
            if theirs.session_id != self.ours.session_id:
                raise BusyError("another session is opening here")
            if theirs.generation <= self.ours.generation:
                raise ProtocolError("stream", "control comes twice")
            # The source lost its link before it was whole, and begins again (W6).
            self.drop()
        ours = self._answer(theirs)
        ours = replace(
            ours,
            streams=min(ours.streams, theirs.streams),
            details={**ours.details, "zstd": has_zstd()},
        )
        check_agreement(ours, theirs)
        self.ours, self._theirs = ours, theirs
        self._missing = set(stream_names(ours.streams))
        self._late_at = time.monotonic() + HELLO_SECONDS
        wanted = theirs.details.get("compress", "none")
        packed = wanted != "none" and has_zstd() and not self._transport.terms.tls
        self._compress = str(wanted) if packed else "none"
