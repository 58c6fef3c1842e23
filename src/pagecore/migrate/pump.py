"""Carries one stream between the controller and the peer's helper, both ways, holding a chunk of each at most."""

from __future__ import annotations

import select
import socket
import ssl
import time
from typing import Final

from pagecore.errors import ProtocolError
from pagecore.migrate.chunks import CHUNK, Packer, Unpacker
from pagecore.migrate.pays import LinkPace

__all__ = ["Pump"]

# Once the controller has closed its end, the peer gets so many seconds to take the rest and say its own end.
LINGER: Final = 2.0
MAX_VECTORS: Final = 512

_LATER: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Pump:
    """One stream. Whoever takes nothing holds up whoever sends: nothing is stored but one chunk each way.

    Parameters
    ----------
    near : socket.socket
        The controller's plain bytes. Non-blocking.
    far : socket.socket
        The peer's chunks; TLS has been made. Non-blocking.
    packer : Packer
    unpacker : Unpacker
    pace : LinkPace
        Is told what was written.

    Attributes
    ----------
    lost : Exception or None
        What ended it before both ends were said.
    """

    def __init__(
        self, near: socket.socket, far: socket.socket, packer: Packer, unpacker: Unpacker, pace: LinkPace
    ) -> None:
        self._near = near
        self._far = far
        self._packer = packer
        self._unpacker = unpacker
        self._pace = pace
        self._buffer = memoryview(bytearray(CHUNK))
        # On the way out: what the far side has not taken yet; the controller's end was seen, and passed on.
        self._out = memoryview(b"")
        self._near_ended = False
        # On the way in: what the controller has not taken yet; the peer's end was passed on.
        self._in: list[memoryview] = []
        self._end_passed = False
        self._near_gone = False
        self._give_up_at = float("inf")
        self.lost: Exception | None = None

    def run(self) -> None:
        """Until both sides have said their end, or one is lost."""
        while not self._done():
            moved = False
            if self.lost is None:
                try:
                    moved = self._outward()
                    moved = self._inward() or moved
                except (OSError, ProtocolError) as error:
                    self.lost = error
                    self._linger()
            moved = self._deliver() or moved
            if not moved and not self._done():
                self._wait()

    def _done(self) -> bool:
        if self.lost is not None and (self._near_gone or not self._in):
            return True
        ended = self._near_ended and not self._out and (self._end_passed or (self._near_gone and self._unpacker.ended))
        return ended or time.monotonic() >= self._give_up_at

    def _outward(self) -> bool:
        moved = False
        if not self._out and not self._near_ended:
            try:
                size = self._near.recv_into(self._packer.space)
            except BlockingIOError:
                return False
            except OSError:
                size = 0
            moved = True
            self._near_ended = not size
            self._out = self._packer.pack(size) if size else self._packer.end()
        while self._out:
            try:
                sent = self._far.send(self._out)
            except _LATER:
                break
            moved = True
            self._pace.wrote(sent)
            self._out = self._out[sent:]
        return moved

    def _inward(self) -> bool:
        if self._in or self._unpacker.ended:
            return False
        size = self._receive()
        self._in = self._unpacker.feed(self._buffer[:size])
        return size > 0

    def _deliver(self) -> bool:
        """Hand the controller what has come."""
        moved = False
        if self._near_gone:
            self._in = []
        while self._in:
            try:
                sent = self._near.sendmsg(self._in[:MAX_VECTORS])
            except BlockingIOError:
                break
            except OSError:
                self._leave()
                break
            moved = True
            while self._in and sent >= len(self._in[0]):
                sent -= len(self._in.pop(0))
            if sent:
                self._in[0] = self._in[0][sent:]
        if self._unpacker.ended and not self._in and not self._end_passed and not self._near_gone:
            self._end_passed = moved = True
            try:
                self._near.shutdown(socket.SHUT_WR)
            except OSError:
                self._leave()
        return moved

    def _receive(self) -> int:
        """Fill the buffer with what has come: TLS hands it over a record of 16 KiB at a time."""
        size = 0
        while size < CHUNK:
            try:
                some = self._far.recv_into(self._buffer[size:])
            except _LATER:
                break
            if not some:
                if size:
                    # The rest of what came goes on first; the next look finds the end again.
                    break
                raise ConnectionResetError("the peer's end of the link was cut")
            size += some
        return size

    def _wait(self) -> None:
        poll = select.poll()
        near = 0 if self._out or self._near_ended else select.POLLIN
        near |= select.POLLOUT if self._in else 0
        # Watched even where nothing is wanted of it: it may hang up while the far side takes nothing.
        if near or not self._near_gone:
            poll.register(self._near, near)
        far = 0 if self._in or self._unpacker.ended else select.POLLIN
        far |= select.POLLOUT if self._out else 0
        if far and self.lost is None:
            poll.register(self._far, far)
        left = self._give_up_at - time.monotonic()
        for descriptor, events in poll.poll(None if left == float("inf") else max(0, left) * 1000):
            if descriptor == self._near.fileno() and events & (select.POLLHUP | select.POLLERR):
                self._leave()

    def _leave(self) -> None:
        """The controller has gone: what comes for it is dropped, what it sent is still delivered, for a while."""
        self._near_gone = True
        self._in = []
        self._linger()

    def _linger(self) -> None:
        self._give_up_at = min(self._give_up_at, time.monotonic() + LINGER)
