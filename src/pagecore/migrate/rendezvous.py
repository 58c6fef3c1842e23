"""How the streams of a session find together: addresses, connecting, listening, HELLO (W2)."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.link import Link, Stream
from pagecore.wire import (
    FrameType,
    Hello,
    decode_hello,
    encode_frame,
    encode_hello,
    encode_report,
    stream_names,
)

__all__ = ["Listener", "connect", "new_session_id", "parse_address"]

log = logging.getLogger("pagecore.migrate")

# Strangers that knock at a loopback port are shown out, but not for ever.
MAX_STRANGERS: Final = 16
HELLO_TIMEOUT: Final = 10.0
BACKLOG: Final = 16


def new_session_id() -> str:
    """A name for a session that nobody can guess: it is what a stranger at the port lacks."""
    return secrets.token_hex(16)


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """The socket family and address of ``unix:PATH`` or ``tcp:HOST:PORT``.

    Raises
    ------
    ValueError
        If it is neither, or an address that is not this machine's own: the link is not encrypted and its peer
        not authenticated, so guest memory must not leave the machine on it.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > 107:
            raise ValueError(f"the socket path {rest!r} is longer than the 107 bytes that Linux allows")
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is neither unix:PATH nor tcp:HOST:PORT")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address; write 127.0.0.1 or [::1]") from None
    if not address.is_loopback:
        raise ValueError(
            f"{address} is refused: the link is neither encrypted nor authenticated yet, "
            "so only loopback (127.0.0.1, [::1]) and Unix sockets are allowed"
        )
    return (socket.AF_INET6 if address.version == 6 else socket.AF_INET), (str(address), int(port))


def connect(
    address: str, hello: Hello, *, timeout: float, patience: float, check: Callable[[], None] = lambda: None
) -> Link:
    """Open the streams of a session to a listening peer, control first: its acknowledgement says how many there are.

    Parameters
    ----------
    address : str
        ``unix:PATH`` or ``tcp:HOST:PORT``; loopback only.
    hello : Hello
        Ours; its stream name is filled in.
    timeout : float
        Seconds for all of it.
    patience : float
        Seconds that a later send or receive may take without a byte moving.
    check : callable, optional
        Called a few times a second while a stream waits; what it raises ends the wait.

    Raises
    ------
    PeerGoneError, ProtocolError
    RemoteError
        If the peer refused, with its reason.
    """
    family, where = parse_address(address)
    deadline = time.monotonic() + timeout
    streams: dict[str, Stream] = {}
    names = ["control"]
    with contextlib.ExitStack() as undo:
        for name in names:
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.settimeout(_left(deadline))
            try:
                sock.connect(where)
            except OSError as error:
                raise PeerGoneError(f"no peer at {address}: {error.strerror or error}") from None
            stream = streams[name] = Stream(sock, _left(deadline), check)
            ours = replace(hello, stream=name)
            stream.send([_greeting(FrameType.HELLO, ours)])
            theirs = _read_hello(stream, FrameType.HELLO_ACK)
            _check_agreement(ours, theirs)
            if name == "control":
                peer = theirs
                names += stream_names(min(ours.streams, theirs.streams))[1:]
        undo.pop_all()
    for stream in streams.values():
        stream.patience = patience
    return Link(streams, hello, peer)


class Listener:
    """Where a destination waits for the streams of one session, and for their return after a loss."""

    def __init__(self, address: str) -> None:
        family, where = parse_address(address)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.bind(where)
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self.address = address
        if family != socket.AF_UNIX:
            host, port = self._socket.getsockname()[:2]
            self.address = f"tcp:[{host}]:{port}" if family == socket.AF_INET6 else f"tcp:{host}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def accept(
        self,
        session_id: str,
        answer: Callable[[Hello], Hello],
        *,
        timeout: float,
        patience: float,
        check: Callable[[], None],
        after: int = -1,
    ) -> Link:
        """Wait for the streams of the session; whoever does not know its name is shown out.

        Parameters
        ----------
        session_id : str
        answer : callable
            Makes our HELLO of the peer's; an error from it refuses the peer.
        timeout, patience : float
            Seconds for all of it; seconds without a byte later on.
        check : callable
            Called a few times a second while it waits; what it raises ends the wait.
        after : int
            The last generation that there was: W6, only a newer one is let in. A newer one that comes while an older
            is still incomplete takes its place.

        Raises
        ------
        ProtocolError
            If the peer of this session sent something that cannot be right, or too many strangers came.
        PeerGoneError
            If it did not come in time.
        """
        deadline = time.monotonic() + timeout
        party = _Party()
        strangers = 0
        with contextlib.ExitStack() as undo:
            undo.callback(party.close)
            while not party.complete:
                check()
                if time.monotonic() >= deadline:
                    raise PeerGoneError(f"no peer opened the session within {timeout:g} s")
                self._socket.settimeout(0.1)
                try:
                    sock, _ = self._socket.accept()
                except TimeoutError:
                    continue
                stream = Stream(sock, min(HELLO_TIMEOUT, _left(deadline)), check)
                try:
                    theirs = _read_hello(stream, FrameType.HELLO)
                    if not secrets.compare_digest(theirs.session_id.encode(), session_id.encode()):
                        raise ProtocolError("session", "is not the one that is awaited here")
                    if theirs.generation <= after:
                        raise ProtocolError("generation", f"{theirs.generation} has been; {after} was the last")
                except PagecoreError as error:
                    log.warning("a connection was refused: %s", error)
                    _refuse(stream, error)
                    strangers += 1
                    if strangers >= MAX_STRANGERS:
                        raise
                    continue
                try:
                    party.expect(theirs)
                    ours = replace(answer(theirs), stream=theirs.stream)
                    _check_agreement(ours, theirs)
                    stream.send([_greeting(FrameType.HELLO_ACK, ours)])
                except (PagecoreError, OSError) as error:
                    _refuse(stream, error)
                    raise
                except BaseException:
                    stream.close()
                    raise
                party.join(stream, ours, theirs)
            undo.pop_all()
        for stream in party.streams.values():
            stream.patience = patience
        return Link(party.streams, *party.hellos)


class _Party:
    """The streams of one generation, as they come in; the control stream first."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.hellos: tuple[Hello, Hello]
        self._names: tuple[str, ...] = ("control",)

    @property
    def complete(self) -> bool:
        return len(self.streams) == len(self._names)

    def expect(self, theirs: Hello) -> None:
        """Raise unless this stream is due; the control stream of a newer generation begins anew."""
        if self.streams and theirs.stream == "control" and theirs.generation > self.hellos[1].generation:
            self.close()
        name = theirs.stream
        if name in self.streams:
            raise ProtocolError("stream", f"{name} comes twice")
        if name not in self._names:
            raise ProtocolError("stream", f"{name} comes where one of {', '.join(self._names)} is due")
        if self.streams and theirs.generation != self.hellos[1].generation:
            raise ProtocolError("generation", f"{theirs.generation} on {name}, {self.hellos[1].generation} on control")

    def join(self, stream: Stream, ours: Hello, theirs: Hello) -> None:
        self.streams[theirs.stream] = stream
        if theirs.stream == "control":
            self.hellos = (ours, theirs)
            self._names = stream_names(min(ours.streams, theirs.streams))

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        self.streams = {}
        self._names = ("control",)


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _greeting(kind: FrameType, hello: Hello) -> bytes:
    return encode_frame(kind, encode_hello(hello), generation=hello.generation)


def _read_hello(stream: Stream, kind: FrameType) -> Hello:
    header, payload = stream.receive_frame(None)
    if header.type is not kind:
        raise ProtocolError("type", f"{header.type.name} came where {kind.name} was due")
    hello = decode_hello(payload)
    if hello.generation != header.generation:
        raise ProtocolError("generation", f"{hello.generation} in the HELLO, {header.generation} before it")
    return hello


def _check_agreement(ours: Hello, theirs: Hello) -> None:
    """Both sides speak of the same stream of the same session over the same memory."""
    for name in ("stream", "session_id", "generation", "page_size", "regions"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            raise ProtocolError(name, f"the peer says {other!r}, this side {mine!r}")


def _refuse(stream: Stream, error: Exception) -> None:
    stream.patience = 1.0
    with contextlib.suppress(PagecoreError, OSError):
        stream.send([encode_frame(FrameType.ERROR, encode_report({"reason": str(error)}))])
    stream.close()
