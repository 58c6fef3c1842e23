"""How the source opens a session: one stream after the other, each with its HELLO (W2)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.address import Address, parse_address
from pagecore.migrate.greeting import check_agreement, expect_plain_bytes, greet, read_hello, seconds_left
from pagecore.migrate.link import TICK, Link, Stream
from pagecore.migrate.peer import check_user
from pagecore.migrate.transport import Transport, agreed_compression
from pagecore.wire import FrameType, Hello, stream_names

__all__ = ["connect", "new_session_id"]

# What a connection may take to come about, where packets are dropped on the way.
CONNECT_SECONDS: Final = 10.0
# How soon to knock again at a Unix socket whose queue is full: there is nothing to wait on.
KNOCK_SECONDS: Final = 0.02


def new_session_id() -> str:
    """A name for a session that nobody can guess: it is what a stranger at the port lacks."""
    return secrets.token_hex(16)


def _go_on() -> None:
    """Nothing asks for an end."""


def connect(
    address: str,
    hello: Hello,
    *,
    transport: Transport | None = None,
    timeout: float,
    patience: float,
    check: Callable[[], None] = _go_on,
    at: Address | None = None,
) -> Link:
    """Open the streams of a session, or of its next generation, to a listening peer.

    Parameters
    ----------
    address : str
        As `parse_address` reads it.
    hello : Hello
        Ours; the names of the streams are filled in. The peer may allow fewer bulk streams.
    transport : Transport, optional
        Carries the streams; without it they are plain sockets, to loopback and Unix sockets alone.
    timeout : float
        Seconds for all of it.
    patience : float
        Seconds that the peer may be silent.
    check : callable
        Called a few times a second while it waits; what it raises ends the wait.
    at : Address, optional
        Where the session's peer was reached before: a name is not asked again, which may lead to somebody else by now.
        What a certificate must name is still `address`.

    Returns
    -------
    Link
        The caller closes it; the transport outlives it.

    Raises
    ------
    ValueError
        If the address is not allowed on the terms of the transport.
    PeerGoneError, ProtocolError
    UnsupportedError
        If zstd is insisted on, and the peer has none.
    RemoteError
        If the peer refused, with its reason.
    """
    transport = transport or Transport()
    opening = _Opening(transport, hello, time.monotonic() + timeout, patience, check)
    with contextlib.ExitStack() as undo:
        undo.callback(opening.close)
        opening.control(parse_address(address), at)
        for name in stream_names(opening.peer.streams)[1:]:
            opening.open(name)
        undo.pop_all()
    for stream in opening.streams.values():
        stream.patience = patience
        stream.check = check
    return Link(opening.streams, hello, opening.peer, opening.address)


class _Opening:
    """The streams of a session on their way."""

    def __init__(
        self, transport: Transport, hello: Hello, deadline: float, patience: float, check: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._terms = transport.terms
        self._hello = replace(hello, details={**hello.details, "compress": self._terms.compress})
        self._deadline = deadline
        self._patience = patience
        self._asked = check
        self._compress = "none"
        self.streams: dict[str, Stream] = {}

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def control(self, address: Address, at: Address | None) -> None:
        """Open the control stream, at the first of the peer's addresses that answers; the others follow it."""
        error: Exception = PeerGoneError(f"no peer at {address.text}: the name has no address")
        for candidate in self._resolved(address) if at is None else [at]:
            self._check()
            self._terms.check(candidate)
            self.address, self._host = candidate, address.host
            try:
                sock = self._connected()
            except PeerGoneError as refused:
                error = refused
                if time.monotonic() >= self._deadline:
                    break
                continue
            self.peer = self._greet("control", sock)
            if not 1 <= self.peer.streams <= self._hello.streams:
                raise ProtocolError("streams", f"{self.peer.streams} of {self._hello.streams}")
            self._compress = agreed_compression(self._terms.compress, self.peer.details.get("zstd"))
            return
        raise error

    def open(self, name: str) -> None:
        """Open another stream."""
        self._greet(name, self._connected())

    def _check(self) -> None:
        """Whoever waits may want an end; and a peer that says it a byte at a time is never silent."""
        self._asked()
        if time.monotonic() >= self._deadline:
            raise PeerGoneError("the time to open the session is over")

    def _resolved(self, address: Address) -> list[Address]:
        """The addresses of a name. Nothing ends the call that asks for them: it is left to a thread of its own."""
        if address.family != socket.AF_UNSPEC:
            return [address]
        found: list[Address] = []
        failed: list[Exception] = []

        def resolve() -> None:
            try:
                found.extend(address.resolved())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=resolve, name="resolve", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(TICK)
            self._check()
        for error in failed:
            if not isinstance(error, OSError):
                raise error
            raise PeerGoneError(f"no peer at {address.text}: {error.strerror or error}")
        return found

    def _connected(self) -> socket.socket:
        with contextlib.ExitStack() as undo:
            try:
                sock = undo.enter_context(socket.socket(self.address.family, socket.SOCK_STREAM))
                sock.setblocking(False)
                failed = sock.connect_ex(self.address.where)
            except OSError as error:
                raise PeerGoneError(f"no peer at {self.address.text}: {error.strerror or error}") from None
            # Apart from that: what the check raises may be an OSError, too, and is no loss.
            failed = self._reached(sock, failed)
            if failed:
                raise PeerGoneError(f"no peer at {self.address.text}: {os.strerror(failed)}")
            check_user(sock)
            undo.pop_all()
        return sock

    def _reached(self, sock: socket.socket, failed: int) -> int:
        """Wait for the connection that was begun with this error number; the one that it ended with."""
        until = time.monotonic() + min(CONNECT_SECONDS, seconds_left(self._deadline))
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while failed in (errno.EINPROGRESS, errno.EAGAIN):
            self._asked()
            if time.monotonic() >= until:
                return errno.ETIMEDOUT
            if failed == errno.EAGAIN:
                time.sleep(KNOCK_SECONDS)
                failed = sock.connect_ex(self.address.where)
            elif poll.poll(TICK * 1000):
                failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return failed

    def _greet(self, name: str, sock: socket.socket) -> Hello:
        compress = self._compress if name.startswith("bulk") else "none"
        if self._terms.tls:
            sock = self._transport.wrap(sock, host=self._host, tls=True, compress=compress)
        stream = self._remember(name, sock)
        if self._terms.tls:
            expect_plain_bytes(stream)
        ours = replace(self._hello, stream=name)
        greet(stream, FrameType.HELLO, ours)
        theirs = read_hello(stream, FrameType.HELLO_ACK)
        check_agreement(ours, theirs)
        if compress != "none" and not self._terms.tls:
            # From here on both sides speak through their helpers; the peer does not speak first.
            expect_plain_bytes(self._remember(name, self._transport.wrap(sock, compress=compress)))
        return theirs

    def _remember(self, name: str, sock: socket.socket) -> Stream:
        stream = self.streams[name] = Stream(sock, min(self._patience, seconds_left(self._deadline)), self._check)
        return stream
