"""What a person sees: a migration's progress and its end, what this machine can do, what a handler did."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pagecore.conformance import Row, Verdict
from pagecore.migrate import Options, Outcome, format_size
from pagecore.probe import Report

__all__ = [
    "ProgressView",
    "conformance_json",
    "conformance_list",
    "conformance_table",
    "doctor_view",
    "outcome_json",
    "outcome_table",
    "progress_view",
    "style_of",
    "verdict_line",
]

PAGE_SIZE: Final = 4096
PLAIN_INTERVAL: Final = 1.0
INTERRUPTED: Final = "ending; a second Ctrl-C ends both sides at once, and the guest with them"

# Both sides tell of the phases that they share: there the source's word counts.
_LAST_PHASES: Final = ("settle", "verify")
PHASES: Final = {
    "boot": "the guest fills its memory",
    "connect": "connecting",
    "precopy": "precopy",
    "switch": "switch: the guest stands still",
    "postcopy": "postcopy: the guest runs at the destination",
    "finish": "finishing",
    "settle": "the last pages settle",
    "verify": "verifying all of the memory",
}


class ProgressView(Protocol):
    """Follows the events of a migration."""

    def event(self, event: dict[str, Any]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_view(options: Options, console: Console, *, quiet: bool) -> ProgressView:
    """Live on a terminal, plain lines elsewhere, nothing where nobody wants it."""
    if quiet:
        return _Silent()
    return _Live(options, console) if console.is_terminal else _Plain(options, console)


def _phase_text(event: dict[str, Any]) -> str:
    text = PHASES.get(event["phase"], event["phase"])
    return f"{text}, round {event['round']}" if event["phase"] == "precopy" and event.get("round") else text


class _Silent:
    def event(self, event: dict[str, Any]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Plain(_Silent):
    """One line for each thing that happens, and one a second between them."""

    def __init__(self, options: Options, console: Console) -> None:
        self._pages = options.npages
        self._console = console
        self._began = time.monotonic()
        self._next = 0.0

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        self._console.print(f"{seconds:7.2f} s  {text}", soft_wrap=True, markup=False)

    def event(self, event: dict[str, Any]) -> None:
        """Print it, if it is of interest."""
        name, role = event["event"], event["role"]
        if name == "guest":
            self._say(f"guest: {event['kind']} ({event['reason']})")
        elif name == "phase" and (role == "source" or event["phase"] in _LAST_PHASES):
            self._say(_phase_text(event))
        elif name == "running":
            self._say(f"the guest runs at the destination after {event['downtime'] * 1e3:.1f} ms")
        elif name == "progress" and role == "source" and time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_INTERVAL
            self._say(_sent_text(event))
        elif name in ("failed", "lost") and event["error"]:
            self._say(f"{role}: {event['error']}")
        elif name == "interrupted" and event["times"] == 1:
            self._say(INTERRUPTED)


class _Live(_Silent):
    """A bar that fills as fewer pages are owed, and what is counted below it."""

    def __init__(self, options: Options, console: Console) -> None:
        self._pages = options.npages
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(30),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=options.npages)
        self._counts = Text()
        self._live = Live(Group(self._bar, self._counts), console=console, transient=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show it."""
        name, role = event["event"], event["role"]
        if name == "guest":
            self._console.print(f"guest: {event['kind']} ({event['reason']})", markup=False)
        elif name == "phase" and (role == "source" or event["phase"] in _LAST_PHASES):
            done = self._pages if event["phase"] == "verify" else None
            self._bar.update(self._task, description=_phase_text(event), completed=done)
        elif name == "running":
            text = f"the guest runs at the destination after {event['downtime'] * 1e3:.1f} ms"
            self._console.print(text, markup=False)
        elif name == "interrupted" and event["times"] == 1:
            self._console.print(INTERRUPTED)
        elif name == "progress" and role == "source":
            self._bar.update(self._task, completed=self._pages - event["owed"])
            self._counts.plain = "  " + _sent_text(event)


def _sent_text(event: dict[str, Any]) -> str:
    return (
        f"{event['pages_sent']} pages sent, {event['pages_zero']} zero, {event['hinted']} hinted, {event['owed']} owed"
    )


def style_of(outcome: Outcome) -> str:
    """Green where it was verified, red where it was not."""
    if outcome.verified:
        return "bold green"
    return "bold yellow" if outcome.exit_code == 130 else "bold red"


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "verified": outcome.verified,
        "exit_code": outcome.exit_code,
        "guest_at": outcome.guest_at,
        "message": outcome.message,
        **outcome.report,
    }


def outcome_table(outcome: Outcome) -> Table:
    """What was counted and timed, for a person."""
    report = outcome.report
    source, destination = report["source"], report["destination"]
    placement = destination.get("placement")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    guest = report.get("guest")
    if guest:
        table.add_row("guest", f"{guest['kind']}: {guest['reason']}")
    table.add_row("memory", f"{format_size(report['options']['size'])} in {report['pages']} pages")
    if source:
        sent = source["pages_sent"]
        rounds = "1 round" if source["rounds"] == 1 else f"{source['rounds']} rounds"
        table.add_row("pages sent", f"{sent} ({format_size(sent * PAGE_SIZE)}) in {rounds}")
        table.add_row("pages hinted", f"{source['hinted']} (free at the switch: never sent, or outdated)")
        table.add_row("pages zero", f"{source['pages_zero']}")
    if placement:
        table.add_row(
            "pages requested",
            f"{placement['requested']} ({placement['already_sent']} of them on their way already)",
        )
        table.add_row("pages duplicate", f"{placement['duplicates']}")
    if "downtime" in source:
        table.add_row("downtime", f"{source['downtime'] * 1e3:.1f} ms")
        table.add_row("total time", f"{source['total_time']:.2f} s")
        table.add_row("throughput", f"{format_size(report['throughput'])}B/s")
    if placement:
        for name in ("owed", "hinted"):
            table.add_row(f"fault latency, {name}", _latency_text(placement["latency"][name]))
    if source.get("audit_pages"):
        table.add_row(
            "placed after the switch",
            f"{source['audit_pages']} pages, {source['audit_wrong']} other than the source's",
        )
    return table


def _latency_text(latency: dict[str, Any]) -> str:
    if not latency["count"]:
        return "no such fault"
    return (
        f"p50 {_time_text(latency['p50_us'])}, p99 {_time_text(latency['p99_us'])},"
        f" max {_time_text(latency['max_us'])} ({latency['count']} faults)"
    )


def _time_text(microseconds: float) -> str:
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.0f} us"


def doctor_view(report: Report) -> RenderableType:
    """What is there, and what would bring the rest."""
    table = Table(
        title=f"Linux {report.kernel} on {report.machine}, user id {report.user}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for item in report.items:
        mark, style = ("yes", "green") if item.available else ("no", "red" if item.need == "required" else "yellow")
        table.add_row(Text(mark, style), Text(item.title), Text(item.why))
    lines = [Text(f"\n{item.title}:\n  {item.remedy}") for item in report.missing if item.remedy]
    verdict = "everything that pagecore requires is there" if report.usable else "pagecore cannot place a page here"
    return Group(table, *lines, Text(f"\n{verdict}", "bold green" if report.usable else "bold red"))


_VERDICT_STYLES: Final = {"pass": "green", "fail": "bold red", "not applicable": "yellow"}


def verdict_line(verdict: Verdict) -> Text:
    """One row as it is played."""
    return Text.assemble(
        (f"{verdict.result:<14}", _VERDICT_STYLES[verdict.result]), f" {verdict.row.name:<20} {verdict.seen}"
    )


def conformance_table(verdicts: Iterable[Verdict]) -> Table:
    """The whole table, for a person: situation, operation, what must happen, and what did."""
    table = _conformance_columns("verdict", "seen")
    for verdict in verdicts:
        row = verdict.row
        mark = Text(verdict.result, _VERDICT_STYLES[verdict.result])
        table.add_row(row.name, row.situation, row.operation, row.must, mark, verdict.seen)
    return table


def conformance_list(rows: Iterable[Row]) -> Table:
    """The table before anything is played."""
    table = _conformance_columns()
    for row in rows:
        table.add_row(row.name, row.situation, row.operation, row.must)
    return table


def _conformance_columns(*more: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("row", no_wrap=True)
    for name in ("situation", "operation", "must", *more):
        table.add_column(name, overflow="fold")
    return table


def conformance_json(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "rows": [
            {
                "row": verdict.row.name,
                "situation": verdict.row.situation,
                "operation": verdict.row.operation,
                "must": verdict.row.must,
                "result": verdict.result,
                "seen": verdict.seen,
                "seconds": round(verdict.seconds, 4),
            }
            for verdict in verdicts
        ]
    }
