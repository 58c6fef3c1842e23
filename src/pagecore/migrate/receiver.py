"""Precopy at the destination: pages are stored plainly, newer rounds overwrite older ones (D0)."""

from __future__ import annotations

import mmap
import select
from typing import Final

from pagecore import PageState
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.progress import Stop
from pagecore.wire import HEADER_BYTES, FrameType, Header, decode_header

__all__ = ["PrecopyReceiver"]

_ZEROS: Final = bytes(1 << 20)


class PrecopyReceiver:
    """Stores what comes on the bulk stream until the lists of the switch are announced on the control stream.

    Parameters
    ----------
    link : Link
    memory : mmap.mmap
        The guest's; nothing of it is registered yet, so that plain stores are safe.
    state : PageState
        Its planes say what was stored and what is zero.
    stall_timeout : float
        Seconds without a frame before the peer counts as lost.
    """

    def __init__(self, link: Link, memory: mmap.mmap, state: PageState, stall_timeout: float) -> None:
        self._link = link
        self._view = memoryview(memory)
        self._state = state
        self._stall_timeout = stall_timeout
        self._page_size = link.session.page_size
        # The next header is received together with the payload before it: one system call a frame.
        self._raw = bytearray(HEADER_BYTES)
        self._have = 0
        self.pages = 0
        self.zeros = 0

    def run(self, stop: Stop) -> tuple[Header, bytes]:
        """Store pages until the first frame of the control stream; returns that frame.

        Raises
        ------
        PeerGoneError, ProtocolError, RemoteError, Cancelled
        """
        poll = select.poll()
        poll.register(self._link.bulk, select.POLLIN)
        poll.register(self._link.control, select.POLLIN)
        quiet = 0.0
        try:
            while True:
                stop.check()
                ready = [descriptor for descriptor, _ in poll.poll(100)] if not self._have else [-1]
                # Bulk first: a command follows the pages that were sent before it.
                if self._have or self._link.bulk.fileno() in ready:
                    self._frame()
                    quiet = 0.0
                elif ready:
                    return self._link.receive()
                else:
                    quiet += 0.1
                    if quiet > self._stall_timeout:
                        raise PeerGoneError(f"the source was silent for {self._stall_timeout:g} s")
        finally:
            # The view would keep the guest's memory from being closed.
            self._view.release()

    def _frame(self) -> None:
        self._link.bulk.receive_into(memoryview(self._raw)[self._have :])
        self._have = 0
        header = decode_header(self._raw, self._link.session)
        if header.round != self._link.round:
            # W5: an old copy after a barrier would overwrite a newer one.
            raise ProtocolError("round", f"{header.round} after barrier {self._link.round - 1}")
        if header.type is FrameType.PAGES:
            start = header.first * self._page_size
            with self._view[start : start + header.length] as target:
                self._have = self._link.bulk.receive_into(target, memoryview(self._raw))
            self._state.store(header.first, header.count)
            self.pages += header.count
        elif header.type is FrameType.ZEROS:
            # D0: marked where nothing was stored (fresh memory is zeros), written where an older copy is.
            for first, count in self._state.store_zeros(header.first, header.count).tolist():
                self._zero(first * self._page_size, count * self._page_size)
            self.zeros += header.count
        elif header.type is FrameType.ROUND:
            # W5: everything of this round is stored before it is acknowledged.
            self._link.send(FrameType.ROUND_ACK)
            self._link.round += 1
        else:
            raise ProtocolError("type", f"{header.type.name} on the bulk stream before the switch")

    def _zero(self, start: int, size: int) -> None:
        for at in range(start, start + size, len(_ZEROS)):
            some = min(len(_ZEROS), start + size - at)
            self._view[at : at + some] = _ZEROS[:some]
