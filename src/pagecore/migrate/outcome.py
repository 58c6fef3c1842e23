"""What became of a migration: the reports of both sides, judged together."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any, Final

from pagecore.migrate.options import PAGE_SIZE, Options
from pagecore.migrate.series import Series, timeline

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_UNSUPPORTED", "EXIT_VERIFIED", "Outcome", "Side", "judge"]

EXIT_VERIFIED: Final = 0
EXIT_FAILED: Final = 1
EXIT_UNSUPPORTED: Final = 3
EXIT_INTERRUPTED: Final = 130

# The phases from RUN on: the guest is at the destination, or may be.
HANDED_OVER: Final = ("postcopy", "finish", "settle", "verify")
# What one side says when it is the other that failed.
_ECHOES: Final = ("PeerGoneError", "RemoteError")


@dataclass
class Side:
    """What one process reported."""

    role: str
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: int | None = None
    stderr: str = ""
    series: Series = field(default_factory=Series)

    def take(self, event: dict[str, Any]) -> None:
        """Remember the newest event of each name, and the course of things."""
        self.series.take(event)
        if event["event"] == "ended":
            self.status = event["status"]
        else:
            self.events[event["event"]] = event

    @property
    def result(self) -> dict[str, Any] | None:
        """Its result, if it came to one."""
        return self.events.get("result")

    @property
    def failure(self) -> dict[str, Any] | None:
        """Why it failed, if it said so."""
        return self.events.get("failed") or self.events.get("lost")

    @property
    def handed_over(self) -> bool:
        """Whether it reported a phase in which the guest is at the destination, or may be."""
        return self.events.get("phase", {}).get("phase") in HANDED_OVER

    def how_it_ended(self) -> str:
        """For a side that said nothing."""
        status = self.status or 0
        if status < 0:
            return f"the {self.role} process was ended by {signal.Signals(-status).name}"
        tail = self.stderr.strip().splitlines()
        return f"the {self.role} process ended with status {status}" + (f": {tail[-1]}" if tail else "")


@dataclass(frozen=True)
class Outcome:
    """What a person, or a script, wants to know.

    Attributes
    ----------
    verified : bool
        Every page that the guest holds is right; what was placed after the switch equals the frozen source.
    exit_code : int
        0 verified, 1 not verified or failed, 3 unsupported, 130 interrupted.
    guest_at : str
        ``source``, ``destination``, ``gone``, or ``nowhere`` if none was started; ``unknown`` where the destination is
        another machine, all was sent there, and it did not say that it has it, or the source was killed before.
    message : str
        One line that says how it ended and on which side the guest was.
    report : dict
        Plain values of everything that was counted, with its course over time and the map of the memory.
    """

    verified: bool
    exit_code: int
    guest_at: str
    message: str
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, for ``--json`` and for a file."""
        return {
            "verified": self.verified,
            "exit_code": self.exit_code,
            "guest_at": self.guest_at,
            "message": self.message,
            **self.report,
        }


def judge(options: Options, source: Side, destination: Side, interrupts: int) -> Outcome:
    """The outcome, from what both sides reported and how they ended."""
    report = _report(options, source, destination)
    verified = bool(
        source.result
        and destination.result
        and source.result["audit_wrong"] == 0
        and source.result["self_check_errors"] == 0
        and destination.result["exact"]
    )
    where = _where(source, destination)
    if interrupts > 1:
        text = "interrupted twice: both sides were ended at once; the guest is gone"
        return Outcome(False, EXIT_INTERRUPTED, "gone", text, report)
    if interrupts:
        return Outcome(verified, EXIT_INTERRUPTED, where, _interrupted(where, source, destination), report)
    if source.result and destination.result:
        code = EXIT_VERIFIED if verified else EXIT_FAILED
        return Outcome(verified, code, "destination", _verdict(source.result, destination.result), report)
    unsupported = any(side.failure and side.failure.get("unsupported") for side in (source, destination))
    text = f"failed: {_cause(source, destination)}; {_fate(where, source, destination)}"
    return Outcome(False, EXIT_UNSUPPORTED if unsupported else EXIT_FAILED, where, text, report)


def _verdict(source: dict[str, Any], destination: dict[str, Any]) -> str:
    text = f"verified: {destination['verification']}"
    if not destination["exact"]:
        text = f"NOT {text}"
    if source["audit_wrong"]:
        text += f"; {source['audit_wrong']} of {source['audit_pages']} pages were not placed as they were sent"
    if source["self_check_errors"]:
        text += f"; the guest found {source['self_check_errors']} errors at the source"
    return text


def _where(source: Side, destination: Side) -> str:
    """On which side the guest was when all ended."""
    if "guest" not in source.events:
        return "nowhere"
    if destination.result:
        return "destination"
    if destination.failure and destination.failure["guest"] != "source":
        # It ran the guest, and knows whether all of its memory came.
        return str(destination.failure["guest"])
    # Of a destination elsewhere nobody else knows; of a process that ended here without a word this is the last one.
    if source.failure and (source.failure["guest"] == "source" or destination.status is None):
        return str(source.failure["guest"])
    if source.handed_over and destination.status is None:
        # It was killed while it served a destination elsewhere. Only once that had everything is there a result.
        return "destination" if source.result else "unknown"
    # The source is dead, or handed the guest over to a side that never ran it, or is dead.
    return "gone"


def _cause(source: Side, destination: Side) -> str:
    """The first cause: a process that died without a word, or an error that is no echo of the other's."""
    for side in (source, destination):
        if side.status is not None and side.status < 0 and not side.failure:
            return side.how_it_ended()
    told = [side.events[name] for name in ("lost", "failed") for side in (source, destination) if name in side.events]
    failures = [event for event in told if event["error"]]
    for failure in failures:
        if failure["kind"] not in _ECHOES:
            return str(failure["error"])
    if failures:
        return str(failures[0]["error"])
    silent = next((side for side in (source, destination) if side.status), source)
    return silent.how_it_ended()


def _fate(where: str, source: Side, destination: Side) -> str:
    if where == "nowhere":
        return "no guest was started"
    if where == "destination":
        silent = "" if destination.failure else ", which had all of its memory, but did not say what it found"
        return f"the guest was at the destination{silent}"
    if where == "unknown" and not source.failure:
        return "the guest is gone, unless all of its memory was at the destination"
    if where == "unknown":
        text = "all of its memory was sent, and no answer came: the guest runs at the destination with all of it"
        return f"{text}, or is gone"
    if where == "gone":
        return "the guest is gone: pages that nobody will send fail closed (SIGBUS or a wait), never zeros"
    if source.failure and source.failure.get("self_check"):
        return "the guest was at the source and passed one more self-check round"
    return "the guest was at the source"


def _interrupted(where: str, source: Side, destination: Side) -> str:
    if where in ("source", "nowhere"):
        return f"interrupted before the switch: {_fate(where, source, destination)}"
    if where == "destination":
        # A destination says so of itself once it has everything.
        return "interrupted after the switch: the guest was at the destination, and its memory is complete"
    if where == "unknown":
        return f"interrupted after the switch: {_cause(source, destination)}; {_fate(where, source, destination)}"
    # It may have gone with a side that ended before there was a switch.
    when = " after the switch" if source.handed_over or destination.handed_over else ""
    return f"interrupted{when}: {_cause(source, destination)}; the guest is gone"


def _report(options: Options, source: Side, destination: Side) -> dict[str, Any]:
    """Everything countable, flat enough for a table."""
    report: dict[str, Any] = {"options": options.to_json(), "pages": options.npages}
    guest = source.events.get("guest")
    if guest:
        report["guest"] = {name: guest[name] for name in ("kind", "reason", "dirty_log") if name in guest}
    sent = source.result or source.events.get("progress") or {}
    skip = ("event", "role", "at")
    report["source"] = {key: value for key, value in sent.items() if key not in skip}
    got = destination.result or {}
    report["destination"] = {key: value for key, value in got.items() if key not in skip}
    if source.result:
        seconds = source.result["total_time"] - source.result.get("paused_seconds", 0.0)
        if seconds > 0:
            report["throughput"] = source.result["pages_sent"] * PAGE_SIZE / seconds
    report.update(timeline(source.series, destination.series))
    seen = destination.events.get("map")
    report["map"] = {key: value for key, value in seen.items() if key not in skip} if seen else None
    return report
