"""A picture of a run: what was owed, moved, written and waited for over time, and a map of the guest's memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pagecore.files import save_figure
from pagecore.migrate.options import PAGE_SIZE, format_size
from pagecore.migrate.outcome import Outcome
from pagecore.migrate.travel import CLASSES, decode_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

Array = npt.NDArray[np.float64]

# The colours of Okabe and Ito, which stay apart for every kind of colour vision, and greys for what needs no eye.
SKY: Final = "#56b4e9"
BLUE: Final = "#0072b2"
VERMILION: Final = "#d55e00"
GREEN: Final = "#009e73"
YELLOW: Final = "#f0e442"
PURPLE: Final = "#cc79a7"
GREY: Final = "#d4d4d4"
BLACK: Final = "#000000"
MAP_COLOURS: Final = (SKY, BLUE, VERMILION, GREY, GREEN, YELLOW, BLACK)
MIB: Final = 1 << 20
# A rate is the mean over so many equal parts of the time shown: a sample of 10 ms alone is noise.
BINS: Final = 160
WIDTH: Final = 10.0
INCH: Final = 0.62
DOTS: Final = 100


def draw(outcome: Outcome, path: str | os.PathLike[str]) -> None:
    """Draw a run.

    Parameters
    ----------
    outcome : Outcome
    path : path-like
        PNG, SVG or PDF, as the name says. Is replaced if it exists.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib (the extra ``plot``).
    ValueError
        Another format.
    OSError
        It could not be written.
    """
    from matplotlib.figure import Figure

    report = outcome.report
    panels: list[tuple[float, Callable[[Axes], None]]] = [(3, lambda axes: _draw_rates(axes, report))]
    # A receiver on a machine of its own does not know what is owed.
    if report["series"]["source"]["at"]:
        panels.insert(0, (3, lambda axes: _draw_owed(axes, report)))
    if any(report["series"]["destination"]["faults"]):
        panels += [(2, lambda axes: _draw_faults(axes, report)), (2, lambda axes: _draw_latency(axes, report))]
    timed = len(panels)
    if report["map"] and report["map"]["pages"]:
        panels.append((4.5, lambda axes: _draw_map(axes, report["map"])))
    heights = [height for height, _ in panels]
    # Without pyplot: no window system, no state that other threads share.
    figure = Figure(figsize=(WIDTH, INCH * sum(heights) + 1), layout="constrained")
    rows = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for number, (axes, (_, draw_panel)) in enumerate(zip(rows, panels, strict=True)):
        draw_panel(axes)
        if number < timed:
            _finish(axes, report, first=not number, last=number == timed - 1)
    figure.suptitle(_title(outcome), fontsize=11)
    save_figure(figure, path, dpi=DOTS)


def _title(outcome: Outcome) -> str:
    report = outcome.report
    size = report["options"].get("size") or report["pages"] * PAGE_SIZE
    words = [f"{format_size(size)} guest"]
    if report.get("guest"):
        words.append(str(report["guest"]["kind"]))
    source = report["source"]
    if "total_time" in source:
        words.append(f"moved in {source['total_time']:.2f} s")
        words.append(f"stood still for {source['downtime'] * 1e3:.1f} ms")
    words.append("verified" if outcome.verified else "NOT verified")
    # What a file says may be anything.
    return "".join(one if one.isprintable() else "?" for one in ", ".join(words)).replace("$", r"\$")


def _end(report: dict[str, Any]) -> float:
    """Where the time shown ends: a little after the last page, since the verification is not the migration."""
    latest = max(([0.0] + column["at"])[-1] for column in report["series"].values())
    settled = [phase["at"] for phase in report["phases"] if phase["phase"] in ("settle", "verify")]
    return float(min(latest, settled[-1] * 1.05) if settled else latest) or 1.0


def _column(report: dict[str, Any], side: str, name: str) -> tuple[Array, Array]:
    """Times and values of one column; NaN where there is none."""
    columns = report["series"][side]
    return np.array(columns["at"], np.float64), np.array(columns[name], np.float64)


def _binned(at: Array, rates: Array, end: float) -> tuple[Array, Array]:
    """The mean of a rate in equal parts of the time: the rate of a sample holds since the sample before it."""
    edges = np.linspace(min(0.0, at[0]) if len(at) else 0.0, end, BINS + 1)
    known = np.flatnonzero(~np.isnan(rates))
    known = known[known > 0]
    if not len(known):
        return edges, np.full(BINS, np.nan)
    # What had been moved at each time, which is then read off at the edges.
    moved = np.zeros(len(at))
    moved[1:] = np.cumsum(np.nan_to_num(rates[1:]) * np.diff(at))
    means = np.diff(np.interp(edges, at, moved)) / np.diff(edges)
    outside = (edges[1:] <= at[known[0] - 1]) | (edges[:-1] >= at[known[-1]])
    means[outside] = np.nan
    return edges, means


def _draw_owed(axes: Axes, report: dict[str, Any]) -> None:
    at, owed = _column(report, "source", "owed")
    _, hinted = _column(report, "source", "hinted")
    scale = PAGE_SIZE / MIB
    axes.fill_between(at, owed * scale, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(at, owed * scale, color=BLUE, linewidth=1.6, label="owed by the source")
    axes.plot(at, hinted * scale, color=GREEN, linewidth=1.4, linestyle="--", label="hinted as free")
    axes.set_ylabel("memory, MiB")


def _draw_rates(axes: Axes, report: dict[str, Any]) -> None:
    end = _end(report)
    if report["series"]["source"]["at"]:
        edges, moved = _binned(*_column(report, "source", "bandwidth"), end)
        label = "link, out of the source"
    else:
        edges, moved = _binned(*_column(report, "destination", "arrived"), end)
        moved, label = moved * PAGE_SIZE, "pages, into the destination"
    axes.stairs(moved / MIB, edges, color=BLUE, linewidth=1.4, label=label)
    for side, colour, label in (
        ("source", PURPLE, "the guest's writes, at the source"),
        ("destination", VERMILION, "its writes, at the destination"),
    ):
        edges, written = _binned(*_column(report, side, "guest_writes"), end)
        if np.nansum(written):
            axes.stairs(written / MIB, edges, color=colour, linewidth=1.2, label=label)
    for number, figures in enumerate(report["rounds"]):
        axes.plot(
            [figures["at"] - figures["seconds"], figures["at"]],
            [figures["dirty_rate"] / MIB] * 2,
            color=BLACK,
            linewidth=1.4,
            linestyle=":",
            label=None if number else "newly dirty in a round",
        )
    axes.set_ylabel("MiB a second")


def _draw_faults(axes: Axes, report: dict[str, Any]) -> None:
    edges, faults = _binned(*_column(report, "destination", "faults"), _end(report))
    axes.stairs(faults, edges, color=VERMILION, fill=True, alpha=0.75, label="faults at the destination")
    axes.set_ylabel("faults a second")


def _draw_latency(axes: Axes, report: dict[str, Any]) -> None:
    for name, colour, marker, label in (
        ("fault_p99_us", VERMILION, "^", "99th percentile"),
        ("fault_p50_us", SKY, "o", "median"),
    ):
        at, latency = _column(report, "destination", name)
        axes.plot(at, latency, color=colour, marker=marker, markersize=3.2, linestyle="none", label=label)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Whole powers of ten, with names that need no exponent.
    axes.set_ylim(10 ** np.floor(np.log10(max(low, 0.1))), 10 ** np.ceil(np.log10(max(high, 10.0))))
    axes.yaxis.set_major_formatter(lambda value, _: _time_text(value))
    axes.set_ylabel("fault latency")


def _time_text(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:g} {unit}"
    return f"{microseconds:g} \u00b5s"


def _finish(axes: Axes, report: dict[str, Any], *, first: bool, last: bool) -> None:
    """What the panels over time have in common: the axis, the switch, the legend."""
    end = _end(report)
    axes.set_xlim(0, end)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    settled = [phase["at"] for phase in report["phases"] if phase["phase"] == "settle"][:1]
    for at in settled:
        axes.axvline(at, color="#777777", linewidth=0.9, linestyle="--")
    names = [(at, -2, "settled") for at in settled]
    for lost, back in report["outages"]:
        axes.axvspan(lost, end if back is None else max(back, lost + end / 400), color=YELLOW, alpha=0.6, linewidth=0)
        names.append((lost, -26, "link lost"))
    for paused, resumed in report["pauses"]:
        axes.axvspan(paused, end if resumed is None else resumed, color=GREY, alpha=0.5, linewidth=0)
        names.append((paused, -38, "paused"))
    if report["switch"]:
        began, ended = report["switch"]
        # As wide as a line at least: the guest stands still for milliseconds.
        ended = max(ended, began + end / 400)
        axes.axvspan(began, ended, color=BLACK, alpha=0.4, linewidth=0)
        names.append((began if began > end / 2 else ended, -14, "switch"))
    for at, below, name in names if first else []:
        # Beside its line, on the side where there is room.
        near, side = (-4, "right") if at > end / 2 else (4, "left")
        axes.annotate(
            name, (at, 1.0), xycoords=("data", "axes fraction"), xytext=(near, below), textcoords="offset points",
            ha=side, va="top", fontsize=8,
        )  # fmt: skip
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.005, 0.97), fontsize=8, frameon=False, ncols=4, borderpad=0.2,
        columnspacing=1.6, handlelength=1.8,
    )  # fmt: skip
    if last:
        axes.set_xlabel("seconds since the beginning of precopy")
    else:
        axes.tick_params(labelbottom=False)


def _draw_map(axes: Axes, travelled: dict[str, Any]) -> None:
    """Every cell is a page, or one of so many; rows from low addresses to high."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    cells = decode_map(travelled)
    # About four times as wide as high, in whole powers of two, as guest memory is laid out.
    width = 1 << max(0, (len(cells) * 4 - 1).bit_length() // 2)
    height = -(-len(cells) // width)
    image = np.full(width * height, len(MAP_COLOURS), np.uint8)
    image[: len(cells)] = cells
    axes.imshow(
        image.reshape(height, width),
        cmap=ListedColormap([*MAP_COLOURS, "white"]),
        vmin=-0.5,
        vmax=len(MAP_COLOURS) + 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    row = width * travelled["unit"] * PAGE_SIZE
    axes.set_ylabel("guest address")
    ticks = np.linspace(0, height, 5)
    axes.set_yticks(ticks - 0.5, [format_size(tick * row) for tick in ticks])
    axes.set_xticks([])
    unit = travelled["unit"]
    sampled = "each dot is a page" if unit == 1 else f"each dot is one page of every {unit}"
    axes.set_xlabel(f"how each page travelled: {sampled}; a line is {format_size(row)}")
    patches = [
        Patch(facecolor=colour, edgecolor="#555555", linewidth=0.5, label=f"{name} {format_size(count * PAGE_SIZE)}")
        for colour, (name, _) in zip(MAP_COLOURS, CLASSES.values(), strict=True)
        if (count := travelled["counts"][name])
    ]
    axes.legend(
        handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(patches), fontsize=8, frameon=False,
        handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
