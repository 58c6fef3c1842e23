"""What a person sees: how a migration ended, what this machine can do, what a handler did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pagecore._progress_view import shown, time_text
from pagecore.conformance import Row, Verdict
from pagecore.migrate import Outcome, format_size
from pagecore.migrate.options import PAGE_SIZE
from pagecore.probe import Report

__all__ = [
    "conformance_json",
    "conformance_list",
    "conformance_table",
    "doctor_view",
    "outcome_table",
    "style_of",
    "verdict_line",
]


def style_of(outcome: Outcome) -> str:
    """Green where it was verified, red where it was not."""
    if outcome.verified:
        return "bold green"
    return "bold yellow" if outcome.exit_code == 130 else "bold red"


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
        table.add_row("guest", Text(shown(f"{guest['kind']}: {guest['reason']}")))
        table.add_row("memory", f"{format_size(report['options']['size'])} in {report['pages']} pages")
    if "rounds" in source:
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
    if "throughput" in report:
        table.add_row("throughput", f"{format_size(report['throughput'])}/s")
    if placement:
        for name in ("owed", "hinted"):
            table.add_row(f"fault latency, {name}", _latency_text(placement["latency"][name]))
    if report.get("map"):
        counts = [(name, count) for name, count in report["map"]["counts"].items() if count]
        table.add_row("how pages travelled", ", ".join(f"{name} {format_size(n * PAGE_SIZE)}" for name, n in counts))
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
        f"p50 {time_text(latency['p50_us'])}, p99 {time_text(latency['p99_us'])},"
        f" max {time_text(latency['max_us'])} ({latency['count']} faults)"
    )


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
