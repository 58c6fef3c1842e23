"""Postcopy at the destination: pages arrive under the running guest, until each is settled (D16)."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable
from itertools import zip_longest
from types import TracebackType
from typing import Any, Final, Self

from pagecore import Bitmap, LatencyHistogram, PageState, PlacementLoop, PlacementStats, Region
from pagecore.errors import OutOfMemoryError, PagecoreError, PeerGoneError, ProtocolError, SourceError
from pagecore.migrate.link import Link
from pagecore.migrate.options import PAGE_SIZE
from pagecore.migrate.travel import page_classes
from pagecore.page_source import SocketSource
from pagecore.testing import PlacementAudit
from pagecore.wire import FrameType, decode_page_set, encode_audit

__all__ = ["Postcopy"]

# Pages that are still missing at the end are asked for in small lots, which the urgent stream can hold, and again
# when they have not come after a while.
ASK_RUNS: Final = 64
ASK_AGAIN_SECONDS: Final = 1.0


class Postcopy:
    """The placement loop over one registered region, fed by the bulk and urgent streams of a link.

    A context manager; faults are served inside.

    Parameters
    ----------
    link : Link
    region : Region
    state : PageState
    name : str
        Of the session, for errors.
    patience : float
        Seconds without a page, or any other word of the source, before it counts as lost; and without memory for pages.
    look : callable
        Called while it waits; what it raises ends the wait.
    hear : callable
        Gets what a source that pauses says instead of sending pages.
    """

    def __init__(
        self,
        link: Link,
        region: Region,
        state: PageState,
        *,
        name: str,
        patience: float,
        look: Callable[[], None],
        hear: Callable[[bytes], None],
    ) -> None:
        self._link = link
        self._region = region
        self._state = state
        # Zero pages of precopy read as released from here on; the source has zeros there. What is released later
        # was discarded by the guest, and has no content to compare.
        self._zero = state.released.copy()
        self._patience = patience
        self._look = look
        self._hear = hear
        self._heard = (-1, 0.0)
        self._placed = self._shortages = 0
        self._short_since: float | None = None
        self._audit = PlacementAudit(state.size, state=state)
        self._name = name
        # What the loops over earlier links have counted.
        self._before: list[PlacementStats] = []
        self.loop = self._loop()
        # D12: the last close of the descriptor would make zeros of what is missing. Whoever opened it may close it:
        # this one is there until nothing is missing, or the process has ended.
        self._held = os.dup(region.uffd.fileno())

    def _loop(self) -> PlacementLoop:
        """The placement loop over the current link; the planes, and what they say, outlive it."""
        link = self._link
        source = SocketSource(
            [stream.socket for stream in link.bulk],
            link.urgent.socket,
            page_size=PAGE_SIZE,
            generation=link.session.generation,
            round=link.round,
        )
        return PlacementLoop(
            [self._region],
            source,
            states=[self._state],
            duplicates="strict" if link.capabilities.duplicates == "strict" else "tolerant",
            on_lost="poison",
            observer=self._audit,
            name=self._name,
        )

    def __enter__(self) -> Self:
        self.loop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.stop()

    def run(self) -> None:
        """Until the source has nothing left, and every page is settled or may read as zeros.

        Raises
        ------
        PeerGoneError
            If the link is lost.
        PagecoreError, OSError
        """
        try:
            self._run()
        except SourceError as error:
            # Of a stream: what it should have brought may come over another link.
            raise PeerGoneError(f"the peer is gone: {error}") from None

    def _run(self) -> None:
        payload = self._wait_for_finish()
        named = decode_page_set(payload, self._state.size, generation=self._link.session.generation).pages
        while not self.loop.wait_ended(0.1):
            self._check()
        while len(owed := self._owed(named)):
            self._ask_again(owed[:ASK_RUNS])

    def _wait_for_finish(self) -> bytes:
        while True:
            while not self._link.control.readable(0.05):
                self._check()
            header, payload = self._link.receive()
            if header.type is FrameType.FINISH:
                return payload
            if header.type is not FrameType.ALIVE:
                raise ProtocolError("type", f"{header.type.name} came where FINISH was due")
            self._hear(payload)
            self._heard = (self._heard[0], time.monotonic())
            self._check()

    def quiesce(self) -> None:
        """S9: nothing in an ioctl, no page parked (its claim is given back), no frame of the old link to come.

        Until then the loop goes on without its source: hinted and released pages are filled, discards are read.
        """
        self.loop.stop()

    def resume(self, link: Link) -> None:
        """Serve faults again, from another link; what is still requested is asked for again (D9).

        Raises
        ------
        PeerGoneError
            If there are no descriptors or threads for it: over yet another link there may be some. Until then nobody
            serves.
        """
        self._link = link
        self._heard = (-1, 0.0)
        counted = self.loop.stats()
        try:
            loop = self._loop().start()
        except PagecoreError:
            raise
        # What a thread that cannot be started raises is a RuntimeError.
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PeerGoneError(f"nothing can be taken from this link: {reason}") from None
        # Once, however many links it takes until there is another one.
        self._before.append(counted)
        self.loop = loop

    def end(self) -> None:
        """Stop serving faults and unregister: the memory is the guest's own again.

        Raises
        ------
        SourceError
            If that would turn a missing page into zeros.
        """
        self.loop.stop()
        # Nothing is under way now, so that this is exact (D8). D16: an unregister turns what is missing into
        # zeros; here that can only be hinted pages, whose fill is zeros.
        if len(owed := self._owed(None)):
            first, count = owed[0].tolist()
            raise SourceError("pages are missing at the end of the migration", first, count)
        self._unregister()

    def missing(self) -> int:
        """Pages that only the source could send."""
        return int(self.loop.unsettled()[:, 1].sum())

    def fail_closed(self) -> None:
        """D12: nobody will send what is missing now. Never zeros: whoever touches such a page gets SIGBUS.

        Where the kernel cannot do that (it has poison since Linux 6.6), they wait until this process has ended.
        """
        self.loop.give_up(self.loop.unsettled())
        self.loop.stop()
        # What was under way gave its claim back; nobody else places now.
        self.loop.give_up(self.loop.unsettled())
        # An unregister makes zeros of whatever is missing and carries no mark; of hinted pages, too, and that is their
        # fill.
        if not len(self.loop.unsettled()):
            self._unregister()

    def _unregister(self) -> None:
        self._region.uffd.unregister(self._region)
        os.close(self._held)

    def audit(self, generation: int) -> bytes:
        """What was placed, for AUDIT; the zeros that fill what the guest discarded are not (section 6)."""
        return encode_audit(self._audit.content, self._audit.zeros, self._audit.sums(), generation=generation)

    def counters(self) -> dict[str, Any]:
        """How far it is, for a progress report."""
        stats = self._all_stats()
        names = ("placed", "zeroed", "filled", "faults", "requested", "removed")
        return {
            **{name: sum(getattr(one, name) for one in stats) for name in names},
            "resident": stats[-1].resident,
            "latency_buckets": [sum(counts) for counts in zip_longest(*(one.buckets() for one in stats), fillvalue=0)],
        }

    def travelled(self) -> Any:
        """The class of each page; see `page_classes`."""
        return page_classes(self._state, self._zero, self._audit)

    def stats_json(self) -> dict[str, Any]:
        """The statistics of all loops as plain values; `reached_ns` is the last one's."""
        return {**_json(self._all_stats()), "twice": self._audit.twice}

    def _all_stats(self) -> list[PlacementStats]:
        return [*self._before, self.loop.stats()]

    def _check(self) -> None:
        self._look()
        if self.loop.error is not None:
            raise self.loop.error
        self._check_memory()
        stats = self.loop.stats()
        heard = stats.placed + stats.zeroed + stats.filled + stats.duplicates + stats.already_sent
        if heard != self._heard[0]:
            self._heard = (heard, time.monotonic())
        elif time.monotonic() > self._heard[1] + self._patience:
            raise PeerGoneError(f"the source was silent for {self._patience:g} s")

    def _check_memory(self) -> None:
        """What the kernel has no memory for is tried again, for a while; another link would bring no more of it."""
        stats = self._all_stats()
        placed, shortages = (sum(getattr(one, name) for one in stats) for name in ("placed", "shortages"))
        short, self._shortages = shortages > self._shortages, shortages
        if placed > self._placed:
            self._placed, self._short_since = placed, None
        elif short:
            now = time.monotonic()
            self._short_since = self._short_since or now
            if now > self._short_since + self._patience:
                raise OutOfMemoryError(errno.ENOMEM, f"placing pages, tried for {self._patience:g} s")

    def _owed(self, named: Bitmap | None) -> Any:
        """The runs that an unregister must not meet: not settled, not both hinted here and named there."""
        state = self._state
        owed = ~state.settled()
        owed.andnot(state.excluded)
        fillable = state.hinted.copy()
        if named is not None:
            fillable &= named
        owed.andnot(fillable)
        return owed.runs()

    def _ask_again(self, runs: Any) -> None:
        """Ask for a few runs that did not come, and wait for them a while."""
        # D16: `again` crosses the end of the bulk stream; the source answers until COMPLETE.
        self.loop.request_again(runs)
        deadline = time.monotonic() + ASK_AGAIN_SECONDS
        first, count = runs[-1].tolist()
        # Answers come in the order of the requests: when the last run is there, all are, or are not to come.
        while not self.loop.wait_settled(0.002, fill_is_zero=False) and time.monotonic() < deadline:
            self._check()
            if self._state.settled().test_range(first, count):
                return


def _json(stats: list[PlacementStats]) -> dict[str, Any]:
    """The statistics of placement loops that followed one another, as plain values."""
    last = stats[-1]
    values: dict[str, Any] = {field.name: getattr(last, field.name) for field in dataclasses.fields(last)}
    for name, value in values.items():
        if isinstance(value, int) and name not in ("resident", "page_size"):
            values[name] = sum(getattr(one, name) for one in stats)
    values["outcomes"] = {
        kind: {result: sum(one.outcomes[kind][result] for one in stats) for result in results}
        for kind, results in last.outcomes.items()
    }
    values["latency"] = {name: _latency([one.latency[name] for one in stats]) for name in last.latency}
    return values


def _latency(histograms: list[LatencyHistogram]) -> dict[str, Any]:
    whole = LatencyHistogram(
        tuple(map(sum, zip(*(one.buckets for one in histograms), strict=True))),
        sum(one.total_ns for one in histograms),
        max(one.max_ns for one in histograms),
    )
    return {
        "count": whole.count,
        "p50_us": whole.percentile(50) / 1e3,
        "p99_us": whole.percentile(99) / 1e3,
        "max_us": whole.max_ns / 1e3,
        "buckets": list(whole.buckets),
    }
