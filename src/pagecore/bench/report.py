"""What the rows of a benchmark look like: a table, JSON, a picture."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pagecore.files import save_figure

if TYPE_CHECKING:
    from rich.table import Table

    from pagecore.bench.bitmap import Row


def table() -> Table:
    """An empty table; `cells` makes its rows."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False)
    for name, justify in (
        ("operation", "left"), ("case", "left"), ("against", "left"), ("ratio", "right"), ("must", "right"),
        ("aim", "right"), ("ours", "right"), ("theirs", "right"), ("", "left"),
    ):  # fmt: skip
        result.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return result


def cells(row: Row) -> list[str]:
    """One row as text."""
    number = "{:+.1f} ns" if row.unit == "ns more" else "{:.2f} x"
    gates = ["" if gate is None else number.format(gate) for gate in (row.must, row.aim)]
    times = [duration(row.nanoseconds), duration(row.peer_nanoseconds)]
    verdict = "" if row.must is None else "ok" if row.passed else "missed"
    return [row.operation.replace("[", "\\["), row.case, row.peer, number.format(row.ratio), *gates, *times, verdict]


def duration(nanoseconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("ms", 1e6), ("\u00b5s", 1e3)):
        if nanoseconds >= scale:
            return f"{nanoseconds / scale:.2f} {unit}"
    return f"{nanoseconds:.0f} ns"


def as_json(rows: list[Row], rounds: int) -> dict[str, Any]:
    """The rows, and what their figures depend on."""
    with open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "machine": {
            "cpu": model,
            "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
            "path": os.environ.get("PAGECORE_CPU", "best"),
        },
        "rounds": rounds,
        "rows": [{**asdict(row), "passed": row.passed} for row in rows],
    }


def draw(rows: list[Row], path: str) -> None:
    """A bar for each row that is a ratio, with its must and its aim; PNG, SVG or PDF, as the name says."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.unit == "x"][::-1]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = ["#888888" if row.must is None else "#2a7f62" if row.passed else "#b3452c" for row in shown]
    axes.barh(range(len(shown)), [row.ratio for row in shown], color=colours, height=0.7)
    for name, colour in (("must", "black"), ("aim", "#777777")):
        points = [(getattr(row, name), at) for at, row in enumerate(shown) if getattr(row, name) is not None]
        x, y = [x for x, _ in points], [y for _, y in points]
        axes.scatter(x, y, s=120, marker="|", color=colour, label=name, zorder=3)
    axes.set_yticks(range(len(shown)), [f"{row.operation}, {row.case}, vs {row.peer}" for row in shown], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the peer (median of paired rounds)")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend(loc="lower right", fontsize=7)
    save_figure(figure, path, dpi=150)
