"""The door of a listening peer: whoever knocks says HELLO within bounds, or is shown out, and holds up nobody."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.greeting import WORD, check_greeting, refuse
from pagecore.migrate.link import Stream
from pagecore.migrate.transport import Transport
from pagecore.wire import HEADER_BYTES, FrameType, Hello, check_payload, decode_header

__all__ = ["Arrival", "Door"]

log = logging.getLogger("pagecore.migrate")

# From the connection to the end of its HELLO, the handshake of TLS included.
HELLO_SECONDS: Final = 10.0
# Who has not said HELLO yet. One more, and the oldest has to go: a crowd that says nothing keeps nobody out.
MAX_VISITORS: Final = 32
# Who has, and waits to be asked in: two generations of a session with all its streams.
MAX_ARRIVALS: Final = 36
# Strangers are told of in the log, but they do not get to fill it.
MAX_COMPLAINTS: Final = 20
TICK: Final = 0.1

# pid, uid, gid of the other end of a Unix socket.
_CREDENTIALS: Final = struct.Struct("3i")


class Arrival(NamedTuple):
    """A stream whose HELLO is well-formed; nothing more is known of it."""

    stream: Stream
    hello: Hello


class Door:
    """Takes connections on a thread of its own, up to their HELLO.

    Parameters
    ----------
    listening : socket.socket
        The caller's; it is closed after the door.
    transport : Transport
    admit : callable
        Called on the door's thread with each HELLO; what it raises is the reason why that stream is refused.
    refused : callable
        Called with the reason, on the thread of whoever refuses.
    """

    def __init__(
        self,
        listening: socket.socket,
        transport: Transport,
        admit: Callable[[Hello], None],
        refused: Callable[[str], None],
    ) -> None:
        self._listening = listening
        self._transport = transport
        self._admit = admit
        self._refused = refused
        self._visitors: dict[int, _Visitor] = {}
        self._arrivals: deque[Arrival] = deque()
        self._arrived = threading.Condition()
        self._complaints = 0
        self._wake, self._woken = socket.socketpair()
        listening.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="door", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Arrival | None:
        """The next stream that said HELLO; None where none does in so many seconds."""
        with self._arrived:
            if not self._arrivals:
                self._arrived.wait(timeout)
            return self._arrivals.popleft() if self._arrivals else None

    def refuse(self, stream: Stream, error: Exception) -> None:
        """Show somebody out, and say why; never raises."""
        self._complain(error)
        try:
            refuse(stream, error)
        except Exception as unexpected:
            log.error("unexpected: %r", unexpected, exc_info=unexpected)
            stream.close()

    def _complain(self, error: Exception) -> None:
        if not isinstance(error, PagecoreError | OSError):
            log.error("unexpected: %r", error, exc_info=error)
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            self._refused(str(error))
        elif self._complaints == MAX_COMPLAINTS + 1:
            self._refused("and more connections, of which no more is said")

    def close(self) -> None:
        """Let nobody in any more; who waits inside has to go."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        for visitor in self._visitors.values():
            visitor.sock.close()
        while (arrival := self.next(0)) is not None:
            arrival.stream.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            timeout = TICK * 1000 if self._visitors else None
            ready = [descriptor for descriptor, _ in poll.poll(timeout)]
            if self._woken.fileno() in ready:
                return
            for descriptor in ready:
                if descriptor in self._visitors:
                    self._hear(poll, descriptor)
            now = time.monotonic()
            for descriptor in [one for one, visitor in self._visitors.items() if now >= visitor.deadline]:
                self._end(poll, descriptor, PeerGoneError(f"it said no HELLO in {HELLO_SECONDS:g} s"))
            # Last: its descriptor may have been somebody else's a moment ago.
            if self._listening.fileno() in ready:
                self._let_in(poll)

    def _let_in(self, poll: select.poll) -> None:
        try:
            sock, _ = self._listening.accept()
        except OSError as error:
            # The peer thought better of it, or descriptors are short for a moment.
            log.debug("no connection was accepted: %s", error)
            return
        try:
            _check_user(sock)
            tls = self._transport.terms.tls
            if tls:
                sock = self._transport.wrap(sock, server=True, tls=True)
        # Whatever it is: without this thread nobody ever comes in again.
        except Exception as error:
            self._show_out(sock, error)
            return
        if len(self._visitors) >= MAX_VISITORS:
            self._end(poll, next(iter(self._visitors)), PeerGoneError("others are waiting, and it said no HELLO"))
        self._visitors[sock.fileno()] = _Visitor(sock, word=tls)
        poll.register(sock, select.POLLIN)

    def _hear(self, poll: select.poll, descriptor: int) -> None:
        visitor = self._visitors[descriptor]
        try:
            hello = visitor.take()
            if hello is None:
                return
            self._admit(hello)
            stream = Stream(visitor.sock, HELLO_SECONDS)
        except Exception as error:
            self._end(poll, descriptor, error)
            return
        poll.unregister(descriptor)
        del self._visitors[descriptor]
        crowd: Arrival | None = None
        with self._arrived:
            if len(self._arrivals) >= MAX_ARRIVALS:
                crowd = self._arrivals.popleft()
            self._arrivals.append(Arrival(stream, hello))
            self._arrived.notify()
        if crowd is not None:
            self.refuse(crowd.stream, PeerGoneError("others are waiting"))

    def _end(self, poll: select.poll, descriptor: int, error: Exception) -> None:
        poll.unregister(descriptor)
        self._show_out(self._visitors.pop(descriptor).sock, error)

    def _show_out(self, sock: socket.socket, error: Exception) -> None:
        try:
            stream = Stream(sock, 0)
        except OSError:
            # It went to a helper that could not be had, and is closed.
            self._complain(error)
            sock.close()
            return
        self.refuse(stream, error)


class _Visitor:
    """A connection on its way through the helper's word and its HELLO, as its bytes come.

    Parameters
    ----------
    sock : socket.socket
    word : bool
        The link helper's word of how it went comes first.
    """

    def __init__(self, sock: socket.socket, *, word: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.deadline = time.monotonic() + HELLO_SECONDS
        self._data = bytearray()
        self._hello: Hello | None = None
        self._steps = self._read(word)
        self._need = next(self._steps)

    def take(self) -> Hello | None:
        """Take what has come, and not a byte beyond the HELLO; the HELLO, once it is whole.

        Raises
        ------
        ProtocolError, PeerGoneError
        """
        while True:
            try:
                some = self.sock.recv(self._need - len(self._data))
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerGoneError(f"the peer is gone: {error.strerror or error}") from None
            if not some:
                raise PeerGoneError("it closed the connection before its HELLO")
            self._data += some
            if len(self._data) == self._need:
                self._need = next(self._steps, 0)
                self._data.clear()
            if not self._need:
                return self._hello

    def _read(self, word: bool) -> Iterator[int]:
        """Yields how many bytes are due next; they are in `_data` when it goes on."""
        if word:
            yield WORD.size
            if size := WORD.unpack(self._data)[0]:
                yield size
                raise PeerGoneError(self._data.decode(errors="replace"))
        yield HEADER_BYTES
        header = decode_header(self._data)
        if header.type is not FrameType.HELLO:
            raise ProtocolError("type", f"{header.type.name} came where HELLO was due")
        if header.length:
            yield header.length
        payload = bytes(self._data) if header.length else b""
        check_payload(header, payload)
        self._hello = check_greeting(header, payload)


def _check_user(sock: socket.socket) -> None:
    """At a Unix socket, nobody but this user and root is a peer, whoever may reach the file."""
    if sock.family != socket.AF_UNIX:
        return
    given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user = _CREDENTIALS.unpack(given)[1]
    if user not in (0, os.geteuid()):
        raise ProtocolError("user", f"{user} is neither this side's {os.geteuid()} nor root")
