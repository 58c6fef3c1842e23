"""How ``pagecore bench`` looks: tables."""

from __future__ import annotations

import math

from rich.table import Table

from pagecore.bench.hints import HintsReport

__all__ = ["hints_table"]


def duration(seconds: float) -> str:
    """Three digits and a unit; a dash for what is infinite."""
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def hints_table(report: HintsReport) -> Table:
    """One row for each list of hints, with the sync of its guest beside it."""
    table = Table(
        title=f"hints against the bitmap sync; link {report.bandwidth / 1e9:.3g} GB/s",
        caption="gain: seconds of the link saved for each second spent; break-even: the share of the list's pages that"
        " must have been owed",
    )
    for name in ("guest", "dirty", "sync", "list", "call", "a run", "a page off", "pages off", "saves", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("break-even", justify="right", no_wrap=True)
    before = None
    for row in report.hints:
        case = (row.guest, row.density)
        head = (f"{row.guest >> 30} GiB", f"{row.density:.2%}", duration(report.sync_of(row)))
        table.add_row(
            *(head if case != before else ("", "", "")),
            f"{row.runs} x 1..{row.longest}",
            duration(row.seconds),
            duration(row.per_run),
            duration(row.per_taken),
            str(row.taken),
            duration(row.saved_seconds) if row.taken else "-",
            f"{row.gain:.3g}" if row.taken else "-",
            f"{row.break_even_share:.2%}",
        )
        before = case
    return table
