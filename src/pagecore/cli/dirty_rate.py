"""``pagecore dirty-rate``: how fast a process, or the demo guest, writes its memory."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import click
from rich.table import Table

from pagecore import PagecoreError, UnsupportedError
from pagecore.cli.console import output
from pagecore.cli.size import Size
from pagecore.dirty_rate import DirtyRate, Figure, RateInterval, measure_dirty_rate, sample_dirty_rate
from pagecore.migrate import Options, format_size
from pagecore.migrate.outcome import EXIT_UNSUPPORTED
from pagecore.testing import open_guest

DEFAULTS = Options()
INTERRUPTED = 130


@click.command("dirty-rate", short_help="How fast a process, or the demo guest, writes its memory.")
@click.option("--pid", type=click.IntRange(1), metavar="PID", help="Any process, by sampling its pages.")
@click.option("--kvm", "guest", flag_value="kvm", help="The demo guest under KVM, by its dirty log.")
@click.option("--process", "guest", flag_value="process", help="The demo guest as threads, by their log.")
@click.option(
    "--log",
    type=click.Choice(["get", "clear", "ring", "pagemap", "marks"]),
    help="The demo guest's log: KVM's bitmap (get, clear) or ring, the kernel's (pagemap), its own (marks, --process"
    " alone).  [default: get, or marks]",
)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Of an interval.")
@click.option("--intervals", type=click.IntRange(1), default=3, show_default=True, help="How many, one after another.")
@click.option("--size", type=Size(), help=f"The demo guest's memory.  [default: {format_size(DEFAULTS.size)}]")
@click.option(
    "--rate",
    type=Size("flat"),
    help="Bytes a second that the demo guest is told to write, or 'flat' for flat out."
    f"  [default: {format_size(DEFAULTS.dirty_rate or 0)}]",
)
@click.option(
    "--pages-per-gib", type=int, help="With --pid: sampled pages a GiB, at least 1024 in all.  [default: 512]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample, or of the demo guest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def dirty_rate(
    *,
    pid: int | None,
    guest: Literal["kvm", "process"] | None,
    seconds: float,
    intervals: int,
    as_json: bool,
    **values: Any,
) -> None:
    """How fast memory is written: what a migration would have to outrun.

    Of another process nothing is needed but the right to trace it: random pages are compared from one look to the next,
    and the rate comes with the bounds of a 95 % confidence interval. A log, which counts every page, takes the
    process's cooperation (PagemapDirtyLog.of_process). Of the demo guest its own log is counted.

    A page that is written more than once in an interval counts once. Ctrl-C ends the last interval early.

    Exit status: 0 measured, 1 the process ended, 2 usage, 3 not permitted or not supported here, 130 interrupted.
    """
    given = {name: value for name, value in values.items() if value is not None}
    wrong = {"size", "rate", "log"} if pid is not None else {"pages_per_gib"}
    if (pid is None) == (guest is None):
        raise click.UsageError("one of --pid, --kvm and --process is needed")
    if misplaced := sorted(wrong & set(given)):
        option = misplaced[0].replace("_", "-")
        raise click.UsageError(f"--{option} does not go with {'--pid' if guest is None else f'--{guest}'}")
    stop = threading.Event()
    console = output()
    lines = not as_json and not console.is_terminal
    plan: dict[str, Any] = {"seconds": seconds, "intervals": intervals, "wait": stop.wait}
    if lines:
        plan["report"] = lambda interval: click.echo(_line(interval))
    try:
        with _until_interrupted(stop), nullcontext() if as_json or lines else console.status("measuring"):
            found = _sample(pid, plan, given) if pid is not None else _count(guest, plan, given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except UnsupportedError as error:
        click.echo(f"{error}\nsee: pagecore doctor", err=True)
        sys.exit(EXIT_UNSUPPORTED)
    except PagecoreError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
    else:
        if not lines:
            console.print(_table(found))
        console.print(_summary(found), soft_wrap=True, markup=False)
    sys.exit(INTERRUPTED if found.stopped else 0)


def _sample(pid: int, plan: dict[str, Any], given: dict[str, Any]) -> DirtyRate:
    return sample_dirty_rate(pid, **plan, **given)


def _count(kind: Any, plan: dict[str, Any], given: dict[str, Any]) -> DirtyRate:
    rate = given.get("rate", DEFAULTS.dirty_rate)
    size, log_kind = given.get("size", DEFAULTS.size), given.get("log", "auto")
    with open_guest(size, kind=kind, seed=given["seed"], dirty_rate=rate, dirty_log=log_kind) as guest:
        guest.boot()
        log = guest.dirty_log
        guest.run()
        try:
            return measure_dirty_rate(log, **plan)
        finally:
            guest.pause()


@contextmanager
def _until_interrupted(stop: threading.Event) -> Iterator[None]:
    """The first signal ends the interval; the next one what it always ends."""

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(figure: Figure, form: Callable[[float], str], unit: str) -> str:
    """A figure, with its bounds where it has any."""
    bounds = "" if figure.low == figure.high else f" ({form(figure.low)} to {form(figure.high)})"
    return f"{form(figure.value)}{unit}{bounds}"


def _rate(figure: Figure) -> str:
    return _text(figure, format_size, "/s")


def _pages(figure: Figure) -> str:
    return _text(figure, "{:.0f}".format, " pages")


def _line(interval: RateInterval) -> str:
    return f"{interval.seconds:.2f} s  {_rate(interval.bytes_per_second)}  {_pages(interval.pages)}"


def _summary(found: DirtyRate) -> str:
    size = format_size(found.npages * found.page_size)
    how = f"counted over {size}"
    if found.method == "sampling":
        how = f"estimated from {found.sampled} pages of {size} of writable mappings, bounds at 95 %"
    working_set = Figure(*(number * found.page_size for number in found.working_set))
    return (
        f"dirty rate {_rate(found.bytes_per_second)}; working set {_text(working_set, format_size, '')}"
        f" in {found.seconds:.2f} s; {how}{'; interrupted' if found.stopped else ''}"
    )


def _table(found: DirtyRate) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("interval", "seconds", "rate", "written"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, interval in enumerate(found.intervals, 1):
        table.add_row(str(number), f"{interval.seconds:.2f}", _rate(interval.bytes_per_second), _pages(interval.pages))
    return table


def _as_dict(found: DirtyRate) -> dict[str, Any]:
    """All of it as plain values."""
    result = asdict(found)
    for interval, row in zip(found.intervals, result["intervals"], strict=True):
        row["pages"] = interval.pages._asdict()
        row["bytes_per_second"] = interval.bytes_per_second._asdict()
        del row["page_size"]
    result["working_set"] = found.working_set._asdict()
    result["seconds"] = found.seconds
    result["pages"] = found.pages._asdict()
    result["bytes_per_second"] = found.bytes_per_second._asdict()
    result["spread"] = list(found.spread)
    return result
