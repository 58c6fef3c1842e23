"""Puts pages on the streams of a link: frames, zero pages apart, at a pace, a thread for each bulk stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pagecore import PageTracker, give_way, let_by, split_zero
from pagecore.errors import PeerGoneError
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.options import PAGE_SIZE
from pagecore.wire import MAX_DATA_BYTES, FrameType, Runs, encode_header, encode_pages

__all__ = ["FrameWriter", "Outgoing", "Pacer", "SendCounters", "go_on"]

# A frame is a unit that the receiver must take whole: small ones keep the stream responsive while pages are asked for.
FRAME_PAGES: Final = 64
# The most that a frame may carry: where nobody asks, each costs both sides a little more than its bytes.
QUIET_FRAME_PAGES: Final = MAX_DATA_BYTES // PAGE_SIZE
# How much one take claims: enough for one large sendmsg, little to put back when it fails.
BATCH_PAGES: Final = 512
# A capped link is fed in pieces of about so many seconds.
SLICE: Final = 0.005
# After so many pieces of bulk without an answer the senders leave no more turns, and write large frames, until one.
QUIET_PIECES: Final = 64
# How often the thread that waits for the senders looks at everything else.
LOOK: Final = 0.02


def go_on() -> bool:
    """Nothing is held back."""
    return False


@dataclass(slots=True)
class SendCounters:
    """Pages that left, by how they travelled."""

    pages: int = 0
    zeros: int = 0
    wire_bytes: int = 0


class Pacer:
    """Holds all bulk streams together down to so many bytes a second."""

    def __init__(self, rate: int | None) -> None:
        self.rate = rate
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    @property
    def batch_pages(self) -> int:
        """Pages to take at once: a slice of a capped stream, or one large batch."""
        if self.rate is None:
            return BATCH_PAGES
        return max(1, min(FRAME_PAGES, int(self.rate * SLICE) // PAGE_SIZE))

    def spend(self, size: int, halted: Callable[[], bool] = go_on) -> None:
        """Book `size` bytes, and sleep until what was booked before has had its time, or until halted."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            until = self._free_at
            # An idle link saves nothing up beyond one slice.
            self._free_at = max(self._free_at, now - SLICE) + size / self.rate
        # At few bytes a second, and with many streams, it is a long time.
        while (wait := until - time.monotonic()) > 0 and not halted():
            time.sleep(min(wait, LOOK))


class FrameWriter:
    """Writes runs of guest pages to one stream. Any thread: frames do not interleave.

    Parameters
    ----------
    link : Link
    stream : Stream
    memory : memoryview
        Of the guest.
    quiet : callable
        Whether nobody waits for single pages, so that frames may be large.
    """

    def __init__(self, link: Link, stream: Stream, memory: memoryview, quiet: Callable[[], bool] = go_on) -> None:
        self._link = link
        self.stream = stream
        self._memory = memory
        self._quiet = quiet
        self._lock = threading.Lock()
        self.counters = SendCounters()

    def pages(self, runs: Runs, *, flags: int = 0) -> None:
        """Send the content of the runs; pages that are all zero go as such.

        Parameters
        ----------
        runs : numpy.ndarray
            int64, shape (n, 2). Their dirty bits are clear already: the content is read here (S1).
        flags : int
            `FrameFlags` of the page frames.
        """
        quiet = self._quiet()
        size = QUIET_FRAME_PAGES if quiet else FRAME_PAGES
        data, zeros = split_zero(self._memory, runs, PAGE_SIZE)
        buffers: list[bytes | memoryview] = []
        for first, count in zeros.tolist():
            buffers.append(self._header(FrameType.ZEROS, first, count, 0, flags))
            self.counters.zeros += count
        # Copied behind their headers: for one page that costs less than what Python does for a frame, for two as much.
        single = data[:, 1] == 1
        if single.any():
            buffers.append(self._single(data[single], flags))
            self.counters.pages += int(single.sum())
        for first, count in data[~single].tolist():
            start = first
            while start < first + count:
                # Cut where a multiple of it begins: of frames across the bounds of a huge page none could be made.
                end = min(first + count, start - start % size + size)
                buffers.append(self._header(FrameType.PAGES, start, end - start, (end - start) * PAGE_SIZE, flags))
                buffers.append(self._memory[start * PAGE_SIZE : end * PAGE_SIZE])
                start = end
            self.counters.pages += count
        self._send(buffers, quiet=quiet)

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

    def _single(self, runs: Runs, flags: int) -> bytes:
        generation, round = self._link.session.generation, self._link.round
        return encode_pages(self._memory, runs, page_size=PAGE_SIZE, flags=flags, generation=generation, round=round)

    def _send(self, buffers: list[bytes | memoryview], *, quiet: bool = False) -> None:
        self.counters.wire_bytes += sum(map(len, buffers))
        with self._lock:
            self.stream.send(buffers, quiet=quiet)


class _Halted(Exception):
    """Another sender failed, or whoever waits for them: this one gives back what it took."""


class _Errand:
    """One call of `Outgoing.send_owed`: how many pages may still go, and whether anything failed."""

    def __init__(self, limit: int | None, senders: int) -> None:
        self._left = limit
        self._senders = senders
        self._lock = threading.Lock()
        self.ended = threading.Event()
        # Nothing more is granted; what was goes out.
        self.closed = False
        # What was granted is given back, too.
        self.halted = False
        self.error: Exception | None = None
        self.sent = 0

    def check(self) -> None:
        if self.halted:
            raise _Halted

    def grant(self, pages: int) -> int:
        """How many of these pages may go."""
        with self._lock:
            if self.closed:
                return 0
            if self._left is None:
                return pages
            granted = min(pages, self._left)
            self._left -= granted
            return granted

    def account(self, granted: int, sent: int) -> None:
        """So many went of those that were granted."""
        with self._lock:
            self.sent += sent
            if self._left is not None:
                self._left += granted - sent

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self.error is None:
                self.error = error
            self.halted = True

    def leave(self) -> None:
        """A sender has ended."""
        with self._lock:
            self._senders -= 1
            if not self._senders:
                self.ended.set()


class _Turns:
    """Between two pieces of bulk: lets by who answers, so that an urgent page does not queue for a processor either."""

    def __init__(self, answers: SendCounters) -> None:
        self._answers = answers
        self._seen = answers.wire_bytes
        # Of bulk, since the last answer.
        self._pieces = QUIET_PIECES

    def quiet(self) -> bool:
        """Whether it is long ago that a page was asked for."""
        if self._seen != self._answers.wire_bytes:
            self._seen = self._answers.wire_bytes
            self._pieces = 0
        return self._pieces >= QUIET_PIECES

    def __call__(self) -> None:
        # Only where requests come: turns that nobody needs cost a sixth of the throughput.
        if not self.quiet():
            let_by()
        self._pieces += 1


class Outgoing:
    """The source's end of one link: drains the tracker into the bulk streams, and writes to the urgent one.

    Parameters
    ----------
    link : Link
    memory : memoryview
        Of the guest.
    tracker : PageTracker
    pacer : Pacer
        Of the bulk streams; answers on the urgent one are not held back.

    Attributes
    ----------
    bulk : tuple of FrameWriter
    urgent : FrameWriter
    """

    def __init__(self, link: Link, memory: memoryview, tracker: PageTracker, pacer: Pacer) -> None:
        self.urgent = FrameWriter(link, link.urgent, memory)
        turns = [_Turns(self.urgent.counters) for _ in link.bulk]
        for stream, each in zip(link.bulk, turns, strict=True):
            stream.between = each
        self.bulk = tuple(
            FrameWriter(link, stream, memory, each.quiet) for stream, each in zip(link.bulk, turns, strict=True)
        )
        self._tracker = tracker
        self._pacer = pacer

    @property
    def wire_bytes(self) -> int:
        """Bytes of the bulk streams so far."""
        return sum(writer.counters.wire_bytes for writer in self.bulk)

    def send_owed(self, limit: int | None, watch: Callable[[], None], held: Callable[[], bool] = go_on) -> int:
        """Send owed pages on all bulk streams at once, until nothing is owed, so many went, or they are held back.

        When this returns, or raises, the senders are quiet: every taken page was sent or put back (S8).

        Parameters
        ----------
        limit : int or None
            The most pages.
        watch : callable
            Called some dozen times a second by the calling thread; what it raises ends the sending.
        held : callable
            Asked before anything is sent, and as often: once it says so, no further page is taken.

        Returns
        -------
        int
            Pages sent.
        """
        errand = _Errand(limit, len(self.bulk))
        errand.closed = held()
        threads = [
            threading.Thread(target=self._drain, args=(writer, errand), name=f"bulk-{number}", daemon=True)
            for number, writer in enumerate(self.bulk)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                try:
                    thread.start()
                except RuntimeError as error:
                    # The system's bound: after the switch that is no reason to give the guest up.
                    raise PeerGoneError(f"a stream has no sender: {error}") from None
                started.append(thread)
            while not errand.ended.wait(LOOK):
                watch()
                errand.closed = errand.closed or held()
        finally:
            # Whoever waits for a peer that takes nothing looks at this at every tick.
            errand.halted = True
            for thread in started:
                thread.join()
        if errand.error is not None:
            raise errand.error
        return errand.sent

    def mark(self, kind: FrameType) -> None:
        """Send a frame that names no pages on every bulk stream: ROUND or END."""
        for writer in self.bulk:
            writer.mark(kind)

    def _drain(self, writer: FrameWriter, errand: _Errand) -> None:
        give_way()
        before, writer.stream.check = writer.stream.check, errand.check
        try:
            while not errand.halted and (granted := errand.grant(self._pacer.batch_pages)):
                sent = self._send_batch(writer, granted, errand)
                errand.account(granted, sent)
                if not sent:
                    # Hints, or the other streams, took the rest.
                    return
        except _Halted:
            pass
        # On a thread of its own: `send_owed` raises it.
        except Exception as error:
            errand.fail(error)
        finally:
            # What goes on this stream next is no part of the errand, and must not be ended with it.
            writer.stream.check = before
            errand.leave()

    def _send_batch(self, writer: FrameWriter, limit: int, errand: _Errand) -> int:
        # S1: take clears the dirty bits, and only then is the content read.
        runs = self._tracker.take(limit)
        pages = int(runs[:, 1].sum())
        if not pages:
            return 0
        before = writer.counters.wire_bytes
        try:
            writer.pages(runs)
        except BaseException:
            # S1: what may not have arrived is owed again.
            self._tracker.put_back(runs)
            raise
        self._pacer.spend(writer.counters.wire_bytes - before, lambda: errand.halted)
        return pages
