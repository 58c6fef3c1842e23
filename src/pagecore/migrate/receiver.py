"""Precopy at the destination: pages are stored plainly, newer rounds overwrite older ones (D0)."""

from __future__ import annotations

import mmap
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from pagecore import PageState
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.progress import Stop
from pagecore.wire import HEADER_BYTES, FrameType, Header, decode_header, store_pages

__all__ = ["PrecopyReceiver"]

_ZEROS: Final = bytes(1 << 20)
# What one system call brings of small frames.
AHEAD: Final = 256 << 10
# Of frames with more than this the payload is received where it belongs, without a copy.
SMALL: Final = 64 << 10


class _Halted(Exception):
    """The other streams, or the control stream, are at their end."""


class PrecopyReceiver:
    """Stores what comes on the bulk streams until the lists of the switch are announced on the control stream.

    Parameters
    ----------
    link : Link
    memory : mmap.mmap
        The guest's; nothing of it is registered yet, so that plain stores are safe.
    state : PageState
        Its planes say what was stored and what is zero.
    stall_timeout : float
        Seconds without a frame before the peer counts as lost.
    hear : callable
        Gets what a source that pauses says instead of sending pages.
    """

    def __init__(
        self, link: Link, memory: mmap.mmap, state: PageState, stall_timeout: float, hear: Callable[[bytes], None]
    ) -> None:
        self._link = link
        self._view = memoryview(memory)
        self._state = state
        self._stall_timeout = stall_timeout
        self._hear = hear
        self._lanes = [_Lane(self, stream, link.session.page_size) for stream in link.bulk]
        self._barrier = threading.Lock()
        self._arrived = 0
        self._halted = False
        self.error: Exception | None = None

    @property
    def pages(self) -> int:
        """Pages of content that were stored."""
        return sum(lane.pages for lane in self._lanes)

    @property
    def zeros(self) -> int:
        """Zero pages."""
        return sum(lane.zeros for lane in self._lanes)

    def run(self, stop: Stop) -> tuple[Header, bytes]:
        """Store pages until a command comes on the control stream; returns that frame.

        Raises
        ------
        PeerGoneError, ProtocolError, RemoteError, Cancelled
        """
        # Readable once this thread wants the lanes to end, or one of them failed.
        self._halt = os.eventfd(0, os.EFD_CLOEXEC)
        threads = [
            threading.Thread(target=lane.run, args=(self._halt,), name=f"bulk-{number}", daemon=True)
            for number, lane in enumerate(self._lanes)
        ]
        try:
            for thread in threads:
                thread.start()
            try:
                command = self._wait(stop)
            finally:
                self._end()
                for thread in threads:
                    thread.join()
            if self.error is not None:
                raise self.error
            assert command is not None
            # W5: a command comes after a barrier, with nothing on its way.
            if not all(lane.idle for lane in self._lanes):
                raise ProtocolError("type", "a command came in the middle of a round")
            return command
        finally:
            os.close(self._halt)
            # The view would keep the guest's memory from being closed.
            self._view.release()

    def _wait(self, stop: Stop) -> tuple[Header, bytes] | None:
        """The first command; None where a lane failed."""
        poll = select.poll()
        poll.register(self._link.control, select.POLLIN)
        poll.register(self._halt, select.POLLIN)
        heard, heard_at = -1, 0.0
        while True:
            stop.check()
            ready = [descriptor for descriptor, _ in poll.poll(100)]
            if self._halt in ready:
                return None
            if ready:
                header, payload = self._link.receive()
                if header.type is not FrameType.ALIVE:
                    return header, payload
                self._hear(payload)
                heard_at = time.monotonic()
            frames = sum(lane.frames for lane in self._lanes)
            if frames != heard:
                heard, heard_at = frames, time.monotonic()
            elif time.monotonic() > heard_at + self._stall_timeout:
                raise PeerGoneError(f"the source was silent for {self._stall_timeout:g} s")

    def _end(self) -> None:
        self._halted = True
        os.eventfd_write(self._halt, 1)

    # What follows is called by the lanes.

    def fail(self, error: Exception) -> None:
        """One lane failed: all end, and `run` raises it."""
        with self._barrier:
            if self.error is None:
                self.error = error
        self._end()

    def check(self) -> None:
        """While a lane waits in the middle of a frame."""
        if self._halted:
            raise _Halted

    def judge(self, header: Header, lane: _Lane) -> None:
        """W5: an old copy after a barrier would overwrite a newer one."""
        if header.round != self._link.round or lane.at_barrier == header.round:
            raise ProtocolError("round", f"{header.round} after barrier {max(self._link.round - 1, lane.at_barrier)}")

    def arrive(self, lane: _Lane) -> None:
        """W5: once every stream is there, all of this round is stored, and that is acknowledged."""
        with self._barrier:
            ended = lane.at_barrier = self._link.round
            self._arrived += 1
            if self._arrived < len(self._lanes):
                return
            self._arrived = 0
            # Before the acknowledgement: frames of the next round may follow at once.
            self._link.round += 1
            self._link.send(FrameType.ROUND_ACK, round=ended)

    def store(self, lane: _Lane, header: Header) -> None:
        """Store the payload of a PAGES frame, most of which is still to come."""
        start = header.first * self._link.session.page_size
        with self._view[start : start + header.length] as target:
            lane.fill(target)
        self._state.store(header.first, header.count)

    def store_whole(self, lane: _Lane, frames: memoryview) -> tuple[int, int, int]:
        """Store the plain frames of pages that are there; see `store_pages`."""
        session, due = self._link.session, self._link.round
        if lane.at_barrier == due:
            return 0, 0, 0
        return store_pages(
            frames, self._view, self._state, page_size=session.page_size, generation=session.generation, round=due
        )

    def store_zeros(self, header: Header) -> None:
        """D0: marked where nothing was stored (fresh memory is zeros), written where an older copy is."""
        page_size = self._link.session.page_size
        for first, count in self._state.store_zeros(header.first, header.count).tolist():
            self._zero(first * page_size, count * page_size)

    def decode(self, raw: memoryview) -> Header:
        """Judge a header by what the session agreed on."""
        return decode_header(raw, self._link.session)

    def _zero(self, start: int, size: int) -> None:
        for at in range(start, start + size, len(_ZEROS)):
            some = min(len(_ZEROS), start + size - at)
            self._view[at : at + some] = _ZEROS[:some]


class _Lane:
    """One bulk stream, on a thread of its own.

    It may receive more than it was after: what follows a barrier belongs to this reader until the next one, and the
    stream passes on to another only after a barrier, with nothing on its way (W5).
    """

    def __init__(self, receiver: PrecopyReceiver, stream: Stream, page_size: int) -> None:
        self._receiver = receiver
        self.stream = stream
        self._page_size = page_size
        # What came and was not used yet: the bytes from `_at` to `_end`.
        self._buffer = memoryview(bytearray(HEADER_BYTES + AHEAD))
        self._at = self._end = 0
        # How much of what follows a frame is received together with it. Of large ones the next header alone: one system
        # call a frame. Of small ones many frames.
        self._ahead = HEADER_BYTES
        # The round whose barrier this stream has reached; rounds are counted from 1.
        self.at_barrier = 0
        self.idle = True
        self.frames = 0
        self.pages = 0
        self.zeros = 0

    def run(self, halt: int) -> None:
        """Take frame by frame, until `halt` is readable."""
        poll = select.poll()
        poll.register(self.stream, select.POLLIN)
        poll.register(halt, select.POLLIN)
        self.stream.check = self._receiver.check
        try:
            while True:
                if self._at == self._end and halt in [descriptor for descriptor, _ in poll.poll()]:
                    return
                # A peer that never pauses leaves no moment at which nothing is there.
                self._receiver.check()
                self.idle = False
                self._take()
                self.idle = self._at == self._end
        except _Halted:
            pass
        # On a thread of its own: whoever runs the receiver raises it.
        except Exception as error:
            self._receiver.fail(error)

    def fill(self, target: memoryview) -> None:
        """Fill the target with what is next, and receive ahead."""
        have = min(self._end - self._at, len(target))
        target[:have] = self._buffer[self._at : self._at + have]
        self._at += have
        if have < len(target):
            self._at, self._end = 0, self.stream.receive_into(target[have:], self._buffer[: self._ahead])

    def _take(self) -> None:
        """The small frames that have come; then, or where there are none, one frame of any kind."""
        if self._end - self._at >= HEADER_BYTES + self._page_size:
            taken, frames, pages = self._receiver.store_whole(self, self._buffer[self._at : self._end])
            self._at += taken
            self.frames += frames
            self.pages += pages
            if self._at == self._end:
                return
        self._frame()
        self.frames += 1

    def _frame(self) -> None:
        receiver = self._receiver
        raw = memoryview(bytearray(HEADER_BYTES))
        self.fill(raw)
        header = receiver.decode(raw)
        receiver.judge(header, self)
        if header.type is FrameType.PAGES:
            self._ahead = HEADER_BYTES + AHEAD if header.length <= SMALL else HEADER_BYTES
            receiver.store(self, header)
            self.pages += header.count
        elif header.type is FrameType.ZEROS:
            receiver.store_zeros(header)
            self.zeros += header.count
        elif header.type is FrameType.ROUND:
            receiver.arrive(self)
        else:
            raise ProtocolError("type", f"{header.type.name} on the bulk stream before the switch")
