"""Puts pages on a stream: frames, zero pages apart, at a pace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

from pagecore import PageTracker, split_zero
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.options import PAGE_SIZE
from pagecore.wire import FrameType, Runs, encode_header

__all__ = ["BulkSender", "FrameWriter", "Pacer", "SendCounters"]

# A frame is a unit that the receiver must take whole: small ones keep the stream responsive.
FRAME_PAGES: Final = 64
# How much one take claims: enough for one large sendmsg, little to put back when it fails.
BATCH_PAGES: Final = 512
# A capped stream is fed in pieces of about so many seconds.
SLICE: Final = 0.005


@dataclass(slots=True)
class SendCounters:
    """Pages that left, by how they travelled."""

    pages: int = 0
    zeros: int = 0
    wire_bytes: int = 0


class Pacer:
    """Holds a stream down to so many bytes a second."""

    def __init__(self, rate: int | None) -> None:
        self.rate = rate
        self._free_at = time.monotonic()

    @property
    def batch_pages(self) -> int:
        """Pages to take at once: a slice of a capped stream, or one large batch."""
        if self.rate is None:
            return BATCH_PAGES
        return max(1, min(FRAME_PAGES, int(self.rate * SLICE) // PAGE_SIZE))

    def spend(self, size: int) -> None:
        """Sleep until what was sent before has had its time, then book `size` bytes."""
        if self.rate is None:
            return
        now = time.monotonic()
        if self._free_at > now:
            time.sleep(self._free_at - now)
        # An idle stream saves nothing up beyond one slice.
        self._free_at = max(self._free_at, now - SLICE) + size / self.rate


class FrameWriter:
    """Writes runs of guest pages to one stream. Any thread: frames do not interleave."""

    def __init__(self, link: Link, stream: Stream, memory: memoryview) -> None:
        self._link = link
        self._stream = stream
        self._memory = memory
        self._lock = threading.Lock()
        self.counters = SendCounters()

    def pages(self, runs: Runs, *, flags: int = 0, frame_pages: int = FRAME_PAGES) -> None:
        """Send the content of the runs; pages that are all zero go as such.

        Parameters
        ----------
        runs : numpy.ndarray
            int64, shape (n, 2). Their dirty bits are clear already: the content is read here (S1).
        flags : int
            `FrameFlags` of the page frames.
        frame_pages : int
            Pages of one frame at the most.
        """
        data, zeros = split_zero(self._memory, runs, PAGE_SIZE)
        buffers: list[bytes | memoryview] = []
        for first, count in zeros.tolist():
            buffers.append(self._header(FrameType.ZEROS, first, count, 0, flags))
            self.counters.zeros += count
        for first, count in data.tolist():
            for start in range(first, first + count, frame_pages):
                some = min(frame_pages, first + count - start)
                buffers.append(self._header(FrameType.PAGES, start, some, some * PAGE_SIZE, flags))
                buffers.append(self._memory[start * PAGE_SIZE : (start + some) * PAGE_SIZE])
            self.counters.pages += count
        self._send(buffers)

    def answer(self, kind: FrameType, first: int, count: int) -> None:
        """Send a frame that names pages and carries none: ZEROS, FILL, SENT, GONE."""
        self._send([self._header(kind, first, count, 0, 0)])

    def mark(self, kind: FrameType) -> None:
        """Send a frame that names no pages: ROUND or END."""
        # A control frame carries a checksum, of nothing here.
        self._send([self._header(kind, 0, 0, 0, 0x80)])

    def _header(self, kind: FrameType, first: int, count: int, length: int, flags: int) -> bytes:
        return encode_header(
            kind,
            flags=flags,
            generation=self._link.session.generation,
            round=self._link.round,
            first=first,
            count=count,
            length=length,
        )

    def _send(self, buffers: list[bytes | memoryview]) -> None:
        self.counters.wire_bytes += sum(map(len, buffers))
        with self._lock:
            self._stream.send(buffers)


class BulkSender:
    """Drains the tracker into the bulk stream."""

    def __init__(self, writer: FrameWriter, tracker: PageTracker, pacer: Pacer) -> None:
        self._writer = writer
        self._tracker = tracker
        self._pacer = pacer

    @property
    def counters(self) -> SendCounters:
        """What was sent so far."""
        return self._writer.counters

    def send_some(self, limit: int = BATCH_PAGES) -> int:
        """Send one batch of owed pages; returns how many there were, 0 when nothing is owed."""
        # S1: take clears the dirty bits, and only then is the content read.
        runs = self._tracker.take(min(limit, self._pacer.batch_pages))
        pages = int(runs[:, 1].sum())
        if not pages:
            return 0
        before = self.counters.wire_bytes
        try:
            self._writer.pages(runs)
        except BaseException:
            # S1: what may not have arrived is owed again.
            self._tracker.put_back(runs)
            raise
        self._pacer.spend(self.counters.wire_bytes - before)
        return pages
