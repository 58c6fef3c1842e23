"""The link between two controllers: streams that live and die together (W1, W6).

``control`` carries commands both ways, each ``bulk`` stream pages to the destination, ``urgent`` requests and their
answers. Each opens with a HELLO and its acknowledgement. Nothing waits without a time-out.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Final, Self

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.address import Address
from pagecore.migrate.tcp import tune_tcp
from pagecore.wire import (
    HEADER_BYTES,
    FrameType,
    Header,
    Hello,
    Session,
    check_payload,
    decode_header,
    decode_report,
    encode_frame,
    encode_report,
)

__all__ = ["TICK", "Link", "RemoteError", "Stream"]

# Vectors of one sendmsg; the kernel's bound is 1024.
MAX_VECTORS: Final = 512
# Bytes of one: while the kernel copies them, no urgent answer gets this processor.
MAX_BYTES: Final = 256 << 10
# The same where nobody asks: a frame, and a batch, at once.
MAX_QUIET_BYTES: Final = 2 << 20
# Bytes of a bulk stream over TCP that wait in the socket without being on their way: more only grow cold there.
MAX_UNSENT: Final = 128 << 10
# How often a wait looks up whether it should go on.
TICK: Final = 0.1
# What the kernel waits for at the most. To send: on a Unix socket each 32 KiB of a call wait anew.
TIMEOUTS: Final = {socket.SO_RCVTIMEO: TICK, socket.SO_SNDTIMEO: TICK * (32 << 10) / MAX_BYTES}
# How long to listen for the reason of a peer that broke the link.
LAST_WORD_SECONDS: Final = 0.5
# How long a peer may take to hear why this side breaks it.
REASON_SECONDS: Final = 1.0


class RemoteError(PagecoreError):
    """The peer ended the session and said why.

    Attributes
    ----------
    ran : bool or None
        False where it says that it has not run the guest, and never will (S9).
    """

    def __init__(self, reason: str, ran: bool | None = None) -> None:
        super().__init__(reason)
        self.ran = ran


def _up_to(buffers: list[bytes | memoryview], size: int) -> list[bytes | memoryview]:
    """The first so many bytes of the buffers, and not more of these than one call takes."""
    piece: list[bytes | memoryview] = []
    for buffer in buffers[:MAX_VECTORS]:
        if len(buffer) >= size:
            return [*piece, memoryview(buffer)[:size]]
        piece.append(buffer)
        size -= len(buffer)
    return piece


def _go_on() -> None:
    """Nothing asks for an end."""


class Stream:
    """A connected socket that never waits for ever.

    Parameters
    ----------
    sock : socket.socket
    patience : float
        Seconds without a byte before the peer counts as lost.
    check : callable
        Called some times a second while bytes are due, whether or not a few move; what it raises ends the wait.

    Attributes
    ----------
    between : callable
        Called after each system call that has sent something.
    """

    def __init__(self, sock: socket.socket, patience: float, check: Callable[[], None] = _go_on) -> None:
        self.socket = sock
        self.patience = patience
        self.check = check
        self.between: Callable[[], None] = _go_on
        # The kernel keeps the time: Python's own time-outs are another system call before each.
        sock.settimeout(None)
        for option, seconds in TIMEOUTS.items():
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", 0, round(seconds * 1e6)))
        tune_tcp(sock)
        # A Unix socket's time-out begins anew with each 32 KiB: a slow reader would keep a long call from its `check`.
        self._most = MAX_BYTES if sock.family == socket.AF_UNIX else MAX_QUIET_BYTES

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self.socket.fileno()

    def _moved(self, step: Callable[[], int]) -> int:
        """Try one system call until bytes move, the patience is over, or `check` says no."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                moved = step()
            except BlockingIOError:
                self.check()
                if time.monotonic() >= deadline:
                    raise PeerGoneError(f"the peer is silent: nothing moved for {self.patience:g} s") from None
            except OSError as error:
                raise PeerGoneError(f"the peer is gone: {error.strerror or error}") from None
            else:
                if not moved:
                    raise PeerGoneError("the peer closed the link")
                return moved

    def _look(self, at: float) -> float:
        """Call `check` where it is time, since bytes move, but few at a time; when to look again."""
        now = time.monotonic()
        if now < at:
            return at
        self.check()
        return now + TICK

    def send(self, buffers: list[bytes | memoryview], *, quiet: bool = False) -> None:
        """Send all of the buffers in order, with one system call for many; the list is used up.

        Parameters
        ----------
        buffers : list of bytes or memoryview
        quiet : bool
            Nobody waits for a page: calls may be long.

        Raises
        ------
        PeerGoneError
        """
        size = self._most if quiet else MAX_BYTES
        look_at = time.monotonic() + TICK
        while buffers:
            sent = self._moved(functools.partial(self.socket.sendmsg, _up_to(buffers, size)))
            self.between()
            done = 0
            while done < len(buffers) and sent >= len(buffers[done]):
                sent -= len(buffers[done])
                done += 1
            del buffers[:done]
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]
            # Never after the last byte: what has gone has gone.
            if buffers:
                look_at = self._look(look_at)

    def receive_into(self, target: memoryview, ahead: memoryview | None = None) -> int:
        """Fill the target; with `ahead`, put what follows it there, as far as it has come already.

        Returns
        -------
        int
            Bytes in `ahead`.

        Raises
        ------
        PeerGoneError
        """
        views = [target] if ahead is None else [target, ahead]
        look_at = time.monotonic() + TICK
        while len(views[0]):
            got = self._moved(lambda: self.socket.recvmsg_into(views)[0])
            if got > len(views[0]):
                return got - len(views[0])
            views[0] = views[0][got:]
            if len(views[0]):
                look_at = self._look(look_at)
        return 0

    def readable(self, timeout: float) -> bool:
        """Whether something is there to receive (or the end of the stream) within so many seconds."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def receive_frame(self, session: Session | None) -> tuple[Header, bytes]:
        """The next control frame: its header is judged before memory is taken for the payload (W4).

        Raises
        ------
        RemoteError
            If the peer ended the session with a reason (ERROR, ABORT).
        PeerGoneError, ProtocolError
        """
        raw = bytearray(HEADER_BYTES)
        self.receive_into(memoryview(raw))
        header = decode_header(raw, session)
        payload = bytearray(header.length)
        self.receive_into(memoryview(payload))
        check_payload(header, payload)
        if header.type in (FrameType.ERROR, FrameType.ABORT):
            report = decode_report(payload)
            ran = report.get("ran")
            raise RemoteError(str(report.get("reason", "no reason given")), ran if isinstance(ran, bool) else None)
        return header, bytes(payload)

    def hang_up(self) -> None:
        """End it under whoever waits on it; the descriptor stays theirs."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and close, once nobody uses it."""
        # close alone would not end a blocking call of another thread.
        self.hang_up()
        self.socket.close()


class Link:
    """The connected streams of one generation of a session.

    Parameters
    ----------
    streams : mapping of str to Stream
        As `stream_names` names them.
    ours, peer : Hello
        What the two sides said on the control stream.
    address : Address, optional
        Where the peer was reached.

    Attributes
    ----------
    address : Address or None
        None at the side that listens.
    control, urgent : Stream
    bulk : tuple of Stream
    session : Session
        Page size, regions and generation.
    capabilities : Capabilities
        Of both sides: the weaker decides (W2).
    peer : Hello
    round : int
        Frames carry it; each barrier moves it on (W5).
    """

    def __init__(self, streams: Mapping[str, Stream], ours: Hello, peer: Hello, address: Address | None = None) -> None:
        self.address = address
        self.control = streams["control"]
        self.bulk = tuple(stream for name, stream in streams.items() if name.startswith("bulk"))
        self.urgent = streams["urgent"]
        self.session = ours.session()
        self.capabilities = ours.capabilities.weaker(peer.capabilities)
        self.peer = peer
        self.round = 1
        self._sending = threading.Lock()
        for stream in self.bulk:
            if stream.socket.family != socket.AF_UNIX:
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all: losing one loses all (W6)."""
        for stream in (self.control, *self.bulk, self.urgent):
            stream.close()

    def hang_up(self) -> None:
        """End all under whoever waits on them."""
        for stream in (self.control, *self.bulk, self.urgent):
            stream.hang_up()

    def set_patience(self, seconds: float) -> None:
        """How long each stream waits for a byte before the peer counts as lost."""
        for stream in (self.control, *self.bulk, self.urgent):
            stream.patience = seconds

    def watch(self, check: Callable[[], None]) -> None:
        """Have the waits of all streams call `check`; a sender of bulk pages brings its own meanwhile."""
        for stream in (self.control, *self.bulk, self.urgent):
            stream.check = check

    def send(
        self, kind: FrameType, payload: bytes = b"", *, region: int = 0, first: int = 0, round: int | None = None
    ) -> None:
        """Send one frame on the control stream, of this round unless it is said."""
        frame = encode_frame(
            kind,
            payload,
            region=region,
            first=first,
            generation=self.session.generation,
            round=self.round if round is None else round,
        )
        with self._sending:
            self.control.send([frame])

    def receive(self) -> tuple[Header, bytes]:
        """The next frame of the control stream; see `Stream.receive_frame`."""
        return self.control.receive_frame(self.session)

    def expect(self, kind: FrameType) -> tuple[Header, bytes]:
        """The next frame of the control stream, which must be of this kind."""
        header, payload = self.receive()
        if header.type is not kind:
            raise ProtocolError("type", f"{header.type.name} came where {kind.name} was due")
        return header, payload

    def fail(self, kind: FrameType, reason: str, *, ran: bool | None = None) -> None:
        """Tell the peer why this session ends, and whether the guest ran, if it still listens; never raises."""
        # It may take a byte at a time.
        with contextlib.suppress(PagecoreError, OSError), self._within(REASON_SECONDS):
            self.send(kind, encode_report({"reason": reason, "ran": ran}))

    def explain(self, error: Exception) -> Exception:
        """The reason that the peer gave before it broke the link, or the error as it is."""
        if not isinstance(error, PeerGoneError):
            # Found here: what the peer says by now is an echo of it.
            return error
        try:
            # It may have much to say that is no reason, and signs of life without end, or a frame a byte at a time.
            with self._within(LAST_WORD_SECONDS) as listen_on:
                while True:
                    listen_on()
                    self.receive()
        except RemoteError as reason:
            return reason
        except (PagecoreError, OSError):
            return error

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Iterator[Callable[[], None]]:
        """Have the waits of all streams end with an error after so many seconds in all; yields the check."""
        deadline = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() >= deadline:
                raise PeerGoneError(f"there was no more time for the peer than {seconds:g} s")

        self.control.patience = seconds
        self.watch(check)
        try:
            yield check
        finally:
            self.watch(_go_on)
