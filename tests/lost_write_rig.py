"""Writes at every moment around a dirty log's collect and re-arm, and whether any of them is lost.

A *moment* is a place between two steps of a loop that copies memory while its guest writes: between two calls of the
tracker or of the log, and, since this runs in a process whose ioctl() calls back (ioctl_moments.c), before and after
each kernel call inside of them. The loop is run again and again, each time with the guest's writes, or with the turn of
another thread, at other moments; a plan says at which. The guest's thread, or vCPU, makes a whole write at the moment
and nothing before or after it, so that a run is repeatable to the last step.

The verdict: after the last sync every page whose content is not that of its last copy is owed.

``python lost_write_rig.py`` reads questions, one JSON object a line, and answers in the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvm_poker import FIRST_DATA, NPAGES
from lost_write_moments import Action, Moments, Plan, Watched
from lost_write_subjects import SUBJECTS, Subject
from pagecore import Bitmap, BusyError, DirtyLog, PageTracker, UnsupportedError

# Two of one word and of one chunk of a late re-arm, one of another, one of the last, which is not whole; one that the
# guest frees, and hints; and one that it has not written when a run begins.
P, Q, R, S, H, C = 9, 10, 70, 199, 12, 13


# ---- orders that lose writes


class LateRearm(Watched):
    """Published before it is re-armed: claims that its collect re-arms, and does it when the next moment has passed."""

    def __init__(self, log: DirtyLog, moments: Moments) -> None:
        super().__init__(log, moments, rearms_at_collect=True)

    def late(self) -> None:
        self.log.rearm(0, self.size)


class CollectsTwice(Watched):
    """What is logged after the collect is dropped: for a log whose collect re-arms."""

    def collect_into(self, bitmap: Bitmap) -> int:
        newly = super().collect_into(bitmap)
        self.log.collect_into(Bitmap(self.size))
        return newly


class LateChunks(Watched):
    """A chunk is re-armed once its pages were read."""

    def __init__(self, log: DirtyLog, moments: Moments) -> None:
        super().__init__(log, moments)
        self._due: list[tuple[int, int, Bitmap]] = []

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        self._due.append((first, count, seen.copy()))

    def late(self) -> None:
        due, self._due = self._due, []
        for first, count, seen in due:
            self.log.rearm_seen(first, count, seen)


class SeenTwice(Watched):
    """A sighting is used for a second re-arm."""

    def __init__(self, log: DirtyLog, moments: Moments) -> None:
        super().__init__(log, moments)
        self._used: list[tuple[int, int, Bitmap]] = []

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        super().rearm_seen(first, count, seen)
        self._used.append((first, count, seen.copy()))

    def late(self) -> None:
        used, self._used = self._used, []
        for first, count, seen in used:
            self.log.rearm_seen(first, count, seen)


class ClearsUnseen(Watched):
    """Re-arms what nobody has seen, too."""

    def rearm(self, first: int, count: int) -> None:
        self.moments("before the re-arm")
        self._rearm_all(first, count)
        self.moments("after the re-arm")

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        self.moments("before the re-arm of a chunk")
        self._rearm_all(first, count)
        self.moments("after the re-arm of a chunk")

    def _rearm_all(self, first: int, count: int) -> None:
        every = Bitmap(self.size)
        every.set_range(first, count)
        self.log.rearm_seen(first, count, every)


LOG_MUTANTS: dict[str, Callable[[DirtyLog, Moments], Watched]] = {
    "late-rearm": LateRearm,
    "late-epoch": LateRearm,
    "collect-twice": CollectsTwice,
    "late-chunks": LateChunks,
    "seen-twice": SeenTwice,
    "clears-unseen": ClearsUnseen,
}


# ---- the loops


@dataclass
class Loop:
    """What a run of any loop has: the guest, the copies, the writes."""

    subject: Subject
    moments: Moments
    mutant: str | None = None
    copies: list[int] = field(default_factory=lambda: [0] * NPAGES)
    # At the end of the last run.
    owed: set[int] = field(default_factory=set)
    _values: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _freed: bool = False
    # Pages that the guest wrote after it freed them.
    _reused: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        make = LOG_MUTANTS.get(self.mutant or "", Watched)
        self.log = make(self.subject.log, self.moments)

    def _write(self, page: int) -> None:
        self.subject.write(page, next(self._values))
        if self._freed:
            self._reused.add(page)

    def _copy(self, pages: list[int]) -> None:
        for page in pages:
            self.copies[page] = self.subject.read(page)

    def _stale(self) -> set[int]:
        pages = range(FIRST_DATA, NPAGES)
        return {page for page in pages if self.subject.read(page) != self.copies[page]}

    def _late(self) -> None:
        """Where a mutant does late what was due before."""
        late = getattr(self.log, "late", None)
        if late is not None:
            with self.moments.none():
                late()

    def act(self, action: Action) -> None:
        """What a plan may hold."""
        kind, page = action
        if kind == "write":
            self._write(page)
        else:
            # A thread that would have to wait comes later, and later moments are planned for, too.
            with contextlib.suppress(BusyError):
                self.aside(kind)

    def aside(self, kind: str) -> None:
        """A turn of another thread; a loop without a tracker has none."""

    def once(self, plan: Plan) -> set[int]:
        """Run with this plan; returns the pages whose last write was lost."""
        # The guest stands still: all is sent, and what the run before has lost is sent with it.
        self.settle()
        self._copy(list(range(NPAGES)))
        for page in (P, Q, R, S, H):
            self._write(page)
        self._freed = False
        self._reused.clear()
        with self.moments.running(plan, self.act):
            self.script()
        self.subject.quiet()
        self.owed = owed = self.finish()
        free = {H} if self._freed else set()
        return self._stale() - owed - (free - self._reused)

    def settle(self) -> None:
        """Nothing is logged, and all is armed."""
        self._late()
        self.subject.log.collect_into(Bitmap(NPAGES))
        self.subject.log.rearm(0, NPAGES)

    def script(self) -> None:
        raise NotImplementedError

    def finish(self) -> set[int]:
        raise NotImplementedError


class BareLoop(Loop):
    """Collect, re-arm, read: what a caller without a tracker does."""

    def script(self) -> None:
        self.moments("before it all")
        for _ in range(2):
            found = Bitmap(NPAGES)
            if self.mutant == "read-first":
                self._copy(list(range(FIRST_DATA, NPAGES)))
                self.moments("after the early reading")
            self.log.collect_into(found)
            if self.mutant == "read-before-rearm":
                self._copy(found.indices().tolist())
                self.moments("after the early reading")
            if not self.log.rearms_at_collect:
                self.log.rearm(0, NPAGES)
            self.moments("before the reading")
            if self.mutant not in ("read-first", "read-before-rearm"):
                self._copy(found.indices().tolist())
            self.moments("after the reading")
            self._late()
        self.moments("at the end")

    def finish(self) -> set[int]:
        found = Bitmap(NPAGES)
        self.subject.log.collect_into(found)
        return set(found.indices().tolist())


class TrackerLoop(Loop):
    """A source with a PageTracker: sync, hints, take, read, put_back, sync, ..."""

    def __init__(self, subject: Subject, moments: Moments, mutant: str | None, rearm: str) -> None:
        super().__init__(subject, moments, mutant)
        self._rearm = rearm
        # S3: a log that is re-armed late takes hints under another promise, which a guest that writes would break.
        self._hints = rearm == "sync" or self.log.rearms_at_collect

    def _send(self, most: int) -> None:
        early = {}
        if self.mutant == "read-first":
            early = {page: self.subject.read(page) for page in self.tracker.dirty.indices().tolist()}
            self.moments("after the early reading")
        runs = self.tracker.take(most)
        self.moments(f"between the take of {most} and the reading")
        pages = [page for first, count in runs.tolist() for page in range(first, first + count)]
        self._copy(pages)
        for page in early.keys() & set(pages):
            self.copies[page] = early[page]
        self.moments(f"after the reading of {most}")

    def aside(self, kind: str) -> None:
        if kind == "send":
            self._send(NPAGES)
        else:
            self._sync()

    def _sync(self, *, last: bool = False) -> None:
        self.tracker.sync(last=last)

    def settle(self) -> None:
        super().settle()
        # A new one: the next page that it hands out is the first.
        self.tracker = self._new_tracker()

    def _new_tracker(self) -> PageTracker:
        return PageTracker(NPAGES, dirty_log=self.log, rearm=self._rearm, chunk_shift=6, all_dirty=False)

    def script(self) -> None:
        self.moments("before it all")
        self._sync()
        self.moments("between the sync and what follows")
        if self.mutant != "late-epoch":
            self._late()
        with contextlib.ExitStack() as stack:
            if self._hints:
                session = stack.enter_context(self.tracker.hint_session("armed", marked=self.log.misses))
                epoch = session.start()
                self._freed = True
                self.moments("between the start of the epoch and the hint")
                session.clear_runs(np.array([(H, 1)], np.int64), epoch)
                self.moments("after the hint")
            self._late()
            self._send(1)
            self._late()
            self._send(1)
            self._late()
            runs = self.tracker.take(1)
            self.moments("between the take and the putting back")
            self.tracker.put_back(runs)
            self.moments("after the putting back")
        self._sync()
        self.moments("after the second sync")
        self._late()
        self._send(NPAGES)
        self._late()
        self.moments("at the end")

    def finish(self) -> set[int]:
        # The guest is stopped.
        self._sync(last=True)
        return set(self.tracker.dirty.indices().tolist())


class MarkingLoop(TrackerLoop):
    """The log is that of a writer which marks what it wrote, before each sync (S12)."""

    def __init__(self, subject: Subject, moments: Moments, mutant: str | None) -> None:
        super().__init__(subject, moments, mutant, "sync")

    def _new_tracker(self) -> PageTracker:
        return PageTracker(NPAGES, all_dirty=False)

    def _sync(self, *, last: bool = False) -> None:
        if self.mutant == "sync-first":
            super()._sync(last=last)
        written = Bitmap(NPAGES)
        self.log.collect_into(written)
        self.tracker.mark(written.runs())
        self.moments("after the marking")
        if self.mutant != "sync-first":
            super()._sync(last=last)


# ---- plans


def plans(moments: int, loop: str, depth: int) -> Iterator[Plan]:
    """Each page at each moment, and what two things can do to one another.

    At a depth of 2, another thread has its turn before or after a write: it sends all that is owed, or it syncs. At a
    depth of 3, all there is of two.
    """
    yield {}
    for at, page in itertools.product(range(moments), (P, Q, R, S, H, C)):
        yield {at: [("write", page)]}
    writes: list[Action] = [("write", P), ("write", Q), ("write", H)]
    turns: list[Action] = [("send", 0), ("sync", 0)] if loop != "bare" else []
    couples: list[tuple[Action, Action]] = []
    if depth == 2:
        couples = [couple for turn in turns for couple in ((turn, writes[0]), (writes[0], turn))]
    elif depth == 3:
        couples = list(itertools.product(writes + turns, repeat=2))
    for first, second in couples:
        for early in range(moments):
            yield {early: [first, second]}
            for late in range(early + 1, moments):
                yield {early: [first], late: [second]}


def ask(
    moments: Moments,
    *,
    log: str,
    loop: str,
    mutant: str | None = None,
    depth: int = 2,
    until: list[str] | None = None,
) -> dict[str, Any]:
    """Run every plan, or up to the one that is given as `until`.

    Returns how many `runs` there were, the `moments` of one without a plan, what was `lost`, and what is owed at the
    end where the guest was `idle`.
    """
    with SUBJECTS[log](moments) as subject:
        one: Loop
        if loop in ("bare", "marks"):
            one = (BareLoop if loop == "bare" else MarkingLoop)(subject, moments, mutant)
        else:
            one = TrackerLoop(subject, moments, mutant, loop)
        # Twice: KVM may report what a vCPU has read for the first time.
        one.once({})
        one.once({})
        labels, idle = moments.labels, sorted(one.owed)
        lost = []
        runs = 0
        for plan in plans(len(labels), loop, depth):
            runs += 1
            pages = one.once(plan)
            if pages:
                # A turn of another thread may have left less to do, and the run with fewer moments.
                met = {at: moments.labels[at] for at in plan if at < len(moments.labels)}
                what = [f"{kind} {page} {label}" for at, label in met.items() for kind, page in plan[at]]
                lost.append({"plan": what, "at": sorted(plan), "pages": sorted(pages)})
                if what == until:
                    break
    return {"runs": runs, "moments": labels, "lost": lost, "idle": idle}


def main() -> None:
    moments = Moments()
    for line in sys.stdin:
        try:
            answer = ask(moments, **json.loads(line))
        except UnsupportedError as error:
            answer = {"unsupported": str(error)}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
