"""Watchdog: says so when the kernel has waiters and nothing is placed for them."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

from pagecore._uffd_types import Waiting, read_fdinfo
from pagecore.placement_stats import PlacementStats

__all__ = ["StuckWaiter", "Watchdog", "read_waiting"]

_log = logging.getLogger("pagecore.placement")


@dataclass(frozen=True, slots=True)
class StuckWaiter:
    """Somebody whose fault was read and who was not woken since.

    Attributes
    ----------
    region_id, page : int
        What is waited for.
    seconds : float
        Since the fault was read.
    planes : tuple of str
        The planes in which the page is set: what the loop believes about it.
    """

    region_id: int
    page: int
    seconds: float
    planes: tuple[str, ...]


class Watched(Protocol):
    """What the watchdog asks of a placement loop."""

    @property
    def name(self) -> str: ...

    def stats(self) -> PlacementStats: ...

    def stuck(self, seconds: float = 0.0) -> list[StuckWaiter]: ...

    def waiter_figures(self) -> list[Waiting]: ...


def read_waiting(number: int) -> Waiting:
    """What the kernel says about a userfaultfd; (0, 0) where the descriptor is closed meanwhile, or is none."""
    try:
        found = read_fdinfo(number)
    except (OSError, ValueError):
        return Waiting(0, 0)
    return Waiting(found.pending, found.total)


class Watchdog:
    """Looks every quarter of `seconds`; warns once for each stretch of `seconds` without progress.

    Needs the GIL: while a thread sleeps on a page with the GIL held it is as stuck as everybody else, and
    `PlacementLoop.stuck` is what a debugger finds then.
    """

    def __init__(self, loop: Watched, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"pagecore-watchdog-{loop.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, since = -1, 0.0
        while not self._over.wait(self._seconds / 4):
            stats = self._loop.stats()
            progress = sum(sum(results.values()) for results in stats.outcomes.values())
            figures = self._loop.waiter_figures()
            asleep = sum(total for _, total in figures)
            if progress != seen or not asleep:
                seen, since = progress, 0.0
                continue
            since += self._seconds / 4
            if since >= self._seconds:
                since = 0.0
                self._warn(figures)

    def _warn(self, figures: list[Waiting]) -> None:
        waiters = self._loop.stuck()
        named = "; ".join(
            f"page {waiter.page} of region {waiter.region_id} for {waiter.seconds:.1f} s "
            f"({', '.join(waiter.planes) or 'in no plane'})"
            for waiter in waiters[:8]
        )
        _log.warning(
            "placement loop %r: nothing was placed for %.1f s while %d threads wait (%d faults unread): %s",
            self._loop.name,
            self._seconds,
            sum(total for _, total in figures),
            sum(pending for pending, _ in figures),
            named or "no fault of theirs was read",
        )
