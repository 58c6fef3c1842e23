"""The door of a listening peer: whoever knocks says HELLO within bounds, or is shown out, and holds up nobody."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Final, NamedTuple

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.greeting import NO_WORD, WORD, check_greeting, refuse
from pagecore.migrate.link import Stream
from pagecore.migrate.peer import check_user, crowding, origin
from pagecore.migrate.transport import Transport
from pagecore.wire import HEADER_BYTES, FrameType, Hello, check_payload, decode_header

__all__ = ["Arrival", "Door"]

log = logging.getLogger("pagecore.migrate")

# From the connection to the end of its HELLO, the handshake of TLS included.
HELLO_SECONDS: Final = 10.0
# Who has not said HELLO yet. One more, and somebody has to go: the oldest of those of whose origin there are the most,
# so that a crowd that says nothing keeps nobody out, and a flood nobody from elsewhere.
MAX_VISITORS: Final = 32
# Who has, and waits to be asked in: two generations of a session with all its streams. The same holds for them.
MAX_ARRIVALS: Final = 36
# Strangers are told of in the log, but they do not get to fill it.
MAX_COMPLAINTS: Final = 20
TICK: Final = 0.1


class Arrival(NamedTuple):
    """A stream whose HELLO is well-formed; nothing more is known of it."""

    stream: Stream
    hello: Hello
    origin: Hashable


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
        self._arrivals: list[Arrival] = []
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
            return self._arrivals.pop(0) if self._arrivals else None

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
            sock, where = self._listening.accept()
        except OSError as error:
            # The peer thought better of it, or descriptors are short for a moment: it still stands there, and is no
            # reason to ask all the time.
            log.debug("no connection was accepted: %s", error)
            time.sleep(TICK)
            return
        try:
            check_user(sock)
            place = origin(where)
            tls = self._transport.terms.tls
            if tls:
                sock = self._transport.wrap(sock, server=True, tls=True)
        # Whatever it is: without this thread nobody ever comes in again.
        except Exception as error:
            self._show_out(sock, error)
            return
        self._visitors[sock.fileno()] = _Visitor(sock, place, word=tls)
        poll.register(sock, select.POLLIN)
        if len(self._visitors) > MAX_VISITORS:
            crowd = crowding({descriptor: visitor.origin for descriptor, visitor in self._visitors.items()})
            self._end(poll, crowd, PeerGoneError("others are waiting, and it said no HELLO"))

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
            self._arrivals.append(Arrival(stream, hello, visitor.origin))
            if len(self._arrivals) > MAX_ARRIVALS:
                crowd = self._arrivals.pop(crowding({at: one.origin for at, one in enumerate(self._arrivals)}))
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
    origin : hashable
        Where it comes from.
    word : bool
        The link helper's word of how it went comes first.
    """

    def __init__(self, sock: socket.socket, origin: Hashable, *, word: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.origin = origin
        self.deadline = time.monotonic() + HELLO_SECONDS
        self._data = bytearray()
        self._hello: Hello | None = None
        self._ended = "it closed the connection before its HELLO"
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
                raise PeerGoneError(self._ended)
            self._data += some
            if len(self._data) == self._need:
                self._need = next(self._steps, 0)
                self._data.clear()
            if not self._need:
                return self._hello

    def _read(self, word: bool) -> Iterator[int]:
        """Yields how many bytes are due next; they are in `_data` when it goes on."""
        if word:
            ended, self._ended = self._ended, NO_WORD
            yield WORD.size
            self._ended = ended
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
