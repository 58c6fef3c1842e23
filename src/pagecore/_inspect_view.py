"""What is in a file: a bitmap, a working set, or the report of a run."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pagecore._cli_view import outcome_table, style_of
from pagecore._progress_view import shown
from pagecore._run_count import run_count
from pagecore.migrate import Outcome, format_size
from pagecore.saved_bitmap import SavedBitmap
from pagecore.working_set import WorkingSet

__all__ = ["Content", "content_json", "content_view"]

Content = SavedBitmap | WorkingSet | Outcome

# How dense a part of the memory is: none, up to all of it. Plain characters: they show on every terminal.
RAMP: Final = " .:-=+*#%@"
PARTS: Final = 64
# The longest run is looked for where there are not more of them.
MAX_RUNS: Final = 1 << 20
# Of a working set, the runs that were touched first.
FIRST_RUNS: Final = 8


def content_json(content: Content) -> dict[str, Any]:
    """All that is shown, and more, as plain values."""
    if isinstance(content, SavedBitmap):
        return {"kind": "bitmap", **_bitmap_json(content)}
    if isinstance(content, WorkingSet):
        return {"kind": "working set", **_working_set_json(content)}
    return {"kind": "run report", **content.to_json()}


def content_view(content: Content) -> RenderableType:
    """For a person."""
    if isinstance(content, SavedBitmap):
        return _bitmap_view(content)
    if isinstance(content, WorkingSet):
        return _working_set_view(content)
    return Group(outcome_table(content), Text(shown(content.message), style_of(content)))


def _bitmap_json(saved: SavedBitmap) -> dict[str, Any]:
    bitmap = saved.bitmap
    runs = run_count(bitmap, bitmap.size)
    longest = None
    if runs <= MAX_RUNS:
        longest = int(bitmap.runs()[:, 1].max()) if runs else 0
    edges = np.linspace(0, bitmap.size, min(PARTS, bitmap.size) + 1).astype(np.int64).tolist()
    return {
        "pages": bitmap.size,
        "page_size": saved.page_size,
        "generation": saved.generation,
        "set": bitmap.count(),
        "runs": runs,
        "longest_run": longest,
        "first": bitmap.find_set(),
        "last": bitmap.find_last(),
        "density": [round(bitmap.count_range(low, high - low) / (high - low), 4) for low, high in pairwise(edges)],
    }


def _bitmap_view(saved: SavedBitmap) -> RenderableType:
    values = _bitmap_json(saved)
    pages, count, runs = values["pages"], values["set"], values["runs"]
    table = _table()
    table.add_row(
        "bitmap", f"{_pages(pages)} of {format_size(saved.page_size)} ({format_size(pages * saved.page_size)})"
    )
    share = f", {count / pages:.2%}" if pages else ""
    table.add_row("set", f"{_pages(count)} ({format_size(count * saved.page_size)}{share})")
    if count:
        longest = f", the longest of {_pages(values['longest_run'])}" if values["longest_run"] else ""
        table.add_row("runs", f"{runs}, of {count / runs:.1f} pages on average{longest}" if runs > 1 else "1")
        table.add_row("from, to", f"page {values['first']} to page {values['last']}")
    table.add_row("generation", str(saved.generation))
    if pages:
        table.add_row("where", Text(f"|{_ramp(values['density'])}|"))
    return table


def _working_set_json(working_set: WorkingSet) -> dict[str, Any]:
    runs = working_set.runs
    return {
        "pages": working_set.pages,
        "page_size": working_set.page_size,
        "runs": len(runs),
        "regions": {str(region): int(runs[runs[:, 0] == region, 2].sum()) for region in np.unique(runs[:, 0]).tolist()},
        "first_runs": runs[:FIRST_RUNS].tolist(),
    }


def _working_set_view(working_set: WorkingSet) -> RenderableType:
    values = _working_set_json(working_set)
    pages, size = values["pages"], working_set.page_size
    table = _table()
    table.add_row("working set", f"{_pages(pages)} of {format_size(size)} ({format_size(pages * size)})")
    each = f", of {pages / values['runs']:.1f} pages on average" if values["runs"] > 1 else ""
    table.add_row("runs", f"{values['runs']}{each}")
    for region, count in values["regions"].items():
        table.add_row(f"region {region}", _pages(count))
    for number, (region, first, count) in enumerate(values["first_runs"]):
        table.add_row("" if number else "touched first", f"region {region}: page {first}, {_pages(count)}")
    return table


def _pages(count: int) -> str:
    return "1 page" if count == 1 else f"{count} pages"


def _ramp(shares: list[float]) -> str:
    # Only nothing is blank, and only everything is the last sign.
    return "".join(RAMP[-1] if share >= 1 else RAMP[math.ceil(share * (len(RAMP) - 2))] for share in shares)


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
