"""What the phases of one migration share at the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pagecore import Bitmap, PageTracker
from pagecore.migrate.answers import AnswerCounters
from pagecore.migrate.link import Link
from pagecore.migrate.options import Options
from pagecore.migrate.pause import Pause
from pagecore.migrate.progress import Reporter, Stop
from pagecore.migrate.sender import Outgoing, Pacer, SendCounters
from pagecore.testing import Guest

__all__ = ["SourceSession"]


@dataclass
class SourceSession:
    """The guest, its tracker, and what was counted, over all generations of the link.

    Attributes
    ----------
    options : Options
    reporter : Reporter
    stop : Stop
    pause : Pause
    guest : Guest
    tracker : PageTracker
    memory : memoryview
        Of the guest, read-only.
    pacer : Pacer
        Of the bulk streams of every generation.
    free : Bitmap
        What the guest held free at the switch.
    answers : AnswerCounters
    rounds : int
        Of precopy, so far.
    started_at, paused_at, running_at, finished_at : float
        CLOCK_MONOTONIC of the first round, the last instruction here, the first one there, and COMPLETE; seconds.
    """

    options: Options
    reporter: Reporter
    stop: Stop
    pause: Pause
    guest: Guest
    tracker: PageTracker
    memory: memoryview
    pacer: Pacer
    free: Bitmap
    answers: AnswerCounters = field(default_factory=AnswerCounters)
    rounds: int = 0
    started_at: float = 0.0
    paused_at: float = 0.0
    running_at: float = 0.0
    finished_at: float = 0.0
    _bulk: list[SendCounters] = field(default_factory=list)
    _urgent: list[SendCounters] = field(default_factory=list)

    def outgoing(self, link: Link) -> Outgoing:
        """The sending end of a new link; what it sends is counted here."""
        made = Outgoing(link, self.memory, self.tracker, self.pacer)
        self._bulk += [writer.counters for writer in made.bulk]
        self._urgent.append(made.urgent.counters)
        return made

    def phase(self, name: str) -> None:
        """Report that a phase begins."""
        self.reporter.event("phase", phase=name, round=self.rounds)

    def counters(self) -> dict[str, Any]:
        """How far it is, for a progress report."""
        every = self._bulk + self._urgent
        return {
            "rounds": self.rounds,
            "pages_sent": sum(one.pages for one in every),
            "pages_urgent": sum(one.pages for one in self._urgent),
            "pages_zero": sum(one.zeros for one in every),
            "wire_bytes": sum(one.wire_bytes for one in every),
            "owed": self.tracker.dirty_count,
            "hinted": self.tracker.hinted_count,
            "paused_seconds": self.pause.seconds,
            "pages_written": self.guest.stats().pages_written,
        }
