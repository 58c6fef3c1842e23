"""The source's urgent stream: every request gets an answer (S7), beside the bulk stream and ahead of it."""

from __future__ import annotations

import select
import socket
import threading
from dataclasses import dataclass

import numpy as np

from pagecore import AnswerKind, PageTracker
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.sender import FrameWriter
from pagecore.wire import HEADER_BYTES, FrameFlags, FrameType, Header, decode_header

__all__ = ["AnswerCounters", "Answers"]


@dataclass(slots=True)
class AnswerCounters:
    """Requests by what became of them; pages."""

    requested: int = 0
    owed: int = 0
    free: int = 0
    already_sent: int = 0
    gone: int = 0
    again: int = 0
    ignored: int = 0


class Answers:
    """Reads requests and answers them, on a thread of its own, until it is closed.

    Parameters
    ----------
    link : Link
    tracker : PageTracker
    writer : FrameWriter
        Of the urgent stream.
    counters : AnswerCounters
        Counted on from there: a session may have several links, one after the other.
    emulate_qemu : bool
        Leave requests for pages that are not dirty unanswered, as a source without a hinted plane does.

    Raises
    ------
    PeerGoneError
        If there are no descriptors for it.
    """

    def __init__(
        self,
        link: Link,
        tracker: PageTracker,
        writer: FrameWriter,
        counters: AnswerCounters,
        *,
        emulate_qemu: bool = False,
    ) -> None:
        self._link = link
        self._tracker = tracker
        self._writer = writer
        self._emulate_qemu = emulate_qemu
        try:
            self._wake, self._woken = socket.socketpair()
        except OSError as error:
            # A moment without descriptors: over another link there may be some.
            raise PeerGoneError(f"nobody can answer on this link: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._serve, name="answers", daemon=True)
        self.counters = counters
        self.error: Exception | None = None

    def start(self) -> None:
        """Answer from now on.

        Raises
        ------
        PeerGoneError
            If there is no thread for it.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            # The system's bound. As with descriptors: after the switch that is no reason to give the guest up.
            raise PeerGoneError(f"nobody can answer on this link: {error}") from None

    def close(self) -> None:
        """End the thread and wait for it; whoever has hung up the stream does not wait long."""
        self._wake.close()
        if self._thread.is_alive():
            self._thread.join()
        self._woken.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._link.urgent, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        raw = bytearray(HEADER_BYTES)
        try:
            while True:
                ready = [descriptor for descriptor, _ in poll.poll()]
                if self._woken.fileno() in ready:
                    return
                self._link.urgent.receive_into(memoryview(raw))
                self._answer(decode_header(raw, self._link.session))
        # Whoever drives the migration looks at `error`: an exception here would end in nobody's hands.
        except Exception as error:
            self.error = error

    def _answer(self, request: Header) -> None:
        if request.type is not FrameType.REQUEST:
            raise ProtocolError("type", f"{request.type.name} on the urgent stream, where only REQUEST is due")
        if request.round < self._link.round:
            raise ProtocolError("round", f"{request.round} is before the last barrier ({self._link.round})")
        again = FrameFlags.AGAIN in request.flags
        self.counters.requested += request.count
        if self._emulate_qemu and again:
            # The end of the emulation: what nobody answered reads as zeros, as after an unregister.
            self._writer.answer(FrameType.ZEROS, request.first, request.count)
            self.counters.again += request.count
            return
        for answer in self._tracker.resolve(request.first, request.count, again):
            if answer.kind is AnswerKind.OWED:
                self._send_content(answer.first, answer.count, again)
            elif self._emulate_qemu:
                self.counters.ignored += answer.count
            elif answer.kind is AnswerKind.FREE:
                self.counters.free += answer.count
                self._writer.answer(FrameType.FILL, answer.first, answer.count)
            elif answer.kind is AnswerKind.SENT:
                self.counters.already_sent += answer.count
                self._writer.answer(FrameType.SENT, answer.first, answer.count)
            else:
                self.counters.gone += answer.count
                self._writer.answer(FrameType.GONE, answer.first, answer.count)

    def _send_content(self, first: int, count: int, again: bool) -> None:
        runs = np.array([(first, count)], np.int64)
        if again:
            self.counters.again += count
        else:
            self.counters.owed += count
        try:
            # S1: resolve() cleared the dirty bits before this reads the content.
            self._writer.pages(runs, flags=FrameFlags.AGAIN if again else 0)
        except BaseException:
            self._tracker.put_back(runs)
            raise
