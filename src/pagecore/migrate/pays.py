"""Whether compression pays on a link, decided from what was measured on it: ratio, speed, and the link's own pace."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from typing import Final

__all__ = ["LinkPace", "Pays"]

# A chunk goes packed only where it is clearly smaller.
SMALLER: Final = 0.9
# And packing goes on only where it saves much time: a link that is slow for want of processors at its ends gets slower
# by more work for them.
FASTER: Final = 0.7
# Chunks between two trials where packing did not pay: more and more, so that trying costs nothing.
FIRST_PAUSE: Final = 8
LAST_PAUSE: Final = 256
# Weight of the newest measurement.
NEWEST: Final = 0.25
# Seconds that one look at the link covers at least.
WINDOW: Final = 0.005
_NUMBER: Final = struct.Struct("i")


class LinkPace:
    """How fast a socket's peer takes bytes, seen in how its queue empties.

    Only a queue that is never empty says so: an idle link is slow for want of bytes. Where it became empty, the link is
    at least so fast.

    Parameters
    ----------
    sock : socket.socket
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._since = time.perf_counter()
        self._queued = 0
        self._written = 0
        self.seconds_per_byte = 0.0

    def wrote(self, size: int) -> None:
        """So many bytes were handed to the socket."""
        self._written += size

    def look(self) -> None:
        """Measure, if enough time has passed since the last look."""
        now = time.perf_counter()
        if now - self._since >= WINDOW:
            queued = _NUMBER.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(_NUMBER.size)))[0]
            self.measured(now - self._since, self._queued, self._written, queued)
            self._since, self._queued, self._written = now, queued, 0

    def measured(self, seconds: float, queued_before: int, written: int, queued: int) -> None:
        """Take one measurement: bytes in the queue before and after, and what was written in between."""
        drained = queued_before + written - queued
        if drained <= 0 or not queued_before:
            return
        pace = seconds / drained
        if queued or pace < self.seconds_per_byte:
            self.seconds_per_byte = _blend(self.seconds_per_byte, pace)


class Pays:
    """Decides chunk by chunk.

    Without packing, a byte takes the link its time. With it, the slower of packing the byte and sending what is left of
    it: the socket's queue lets both go on at once.

    Parameters
    ----------
    pace : LinkPace
    always : bool
        Pack whatever gets smaller, whatever it costs.
    """

    def __init__(self, pace: LinkPace, *, always: bool = False) -> None:
        self._pace = pace
        self._always = always
        self._ratio = 0.0
        self._seconds_per_byte = 0.0
        self._chunks_to_trial = 0
        self._pause = FIRST_PAUSE

    @property
    def pays(self) -> bool:
        """What the measurements say now."""
        link = self._pace.seconds_per_byte
        if not self._ratio or not link:
            return False
        return self._ratio < SMALLER and max(self._seconds_per_byte, self._ratio * link) < FASTER * link

    def worth_packing(self, size: int) -> bool:
        """Whether to pack the next chunk; now and then one is packed to see."""
        if self._always:
            return True
        self._pace.look()
        if self.pays:
            self._chunks_to_trial, self._pause = FIRST_PAUSE, FIRST_PAUSE
            return True
        self._chunks_to_trial -= 1
        if self._chunks_to_trial >= 0:
            return False
        self._chunks_to_trial = self._pause
        self._pause = min(LAST_PAUSE, 2 * self._pause)
        return True

    def packed(self, size: int, packed: int, seconds: float) -> bool:
        """Take note of how a chunk was packed; whether it is to travel so."""
        self._ratio = _blend(self._ratio, packed / size)
        self._seconds_per_byte = _blend(self._seconds_per_byte, seconds / size)
        return packed < size if self._always else packed < SMALLER * size


def _blend(before: float, now: float) -> float:
    return now if not before else (1 - NEWEST) * before + NEWEST * now
