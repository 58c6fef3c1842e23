"""``pagecore bench``: its commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pagecore import UnsupportedError, _bench_view
from pagecore.bench import hints
from pagecore.cli.console import WIDE, errors, output
from pagecore.cli.results import plot_option, written
from pagecore.cli.size import Size
from pagecore.migrate.outcome import EXIT_UNSUPPORTED

if TYPE_CHECKING:
    from pagecore.bench.bitmap import Row


rounds_option = click.option(
    "--rounds", type=click.IntRange(1), default=9, show_default=True, help="Paired rounds of each row."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output instead of a table."
)
gate_option = click.option("--gate", is_flag=True, help="Exit with 1 where a ratio misses what it must reach.")


def only_option(examples: str) -> Callable[[Any], Any]:
    """For the groups that the examples are of."""
    return click.option(
        "--only", default="", metavar="NAME", help=f"Only groups whose name contains this: {examples} ..."
    )


@click.group(short_help="Measure pagecore beside plain C and its peers.")
def bench() -> None:
    """Measure pagecore beside its peers on this machine."""


@bench.command("hints", short_help="Free-page hints, beside the bitmap sync.")
@click.option("--guest", "guests", type=Size(), multiple=True, help="Guest size.  [default: 8G, 64G, 1T]")
@click.option("--density", "densities", type=float, multiple=True, help="Dirty share.  [default: 0.0001, 0.01, 0.5]")
@click.option("--bandwidth", type=Size(), default="1250000000", show_default=True, help="Of the link, bytes a second.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Each figure is the least of so many.")
@json_option
@plot_option("Draw the table, too")
@click.option("--peers", is_flag=True, help="Instead: hints and takes beside plain C and a loop as QEMU's.")
@click.option("--gate", is_flag=True, help="The same, and exit with 1 where a ratio misses what it must reach.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def bench_hints(as_json: bool, plot: str | None, peers: bool, gate: bool, quiet: bool, **values: Any) -> None:
    """Free-page hints against the bitmap sync: time, pages saved, and the break-even point."""
    console = errors()
    if peers or gate:
        if plot is not None or values["guests"] or values["densities"]:
            raise click.UsageError("--peers and --gate have guests of their own, and draw nothing")
        from pagecore.bench.tracker import TrackerSuite

        rounds = values["rounds"]
        if rounds < 1:
            raise click.UsageError(f"rounds {rounds} is below 1")
        _measure(TrackerSuite(rounds).rows(), rounds, gate=gate, as_json=as_json, quiet=quiet)
    try:
        report = hints.measure_hints(
            guests=values.pop("guests") or hints.GUESTS,
            densities=values.pop("densities") or hints.DENSITIES,
            **values,
            report=None if quiet else console.print,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        output().print(_bench_view.hints_table(report))
    if plot is not None and not written(plot, "picture", lambda: hints.draw(report, plot)):
        sys.exit(1)


@bench.command(short_help="Bitmaps, beside plain C and other libraries.")
@rounds_option
@only_option("drain, clear, single")
@json_option
@plot_option("Draw the ratios, too")
@gate_option
def bitmap(rounds: int, only: str, as_json: bool, plot: str | None, gate: bool) -> None:
    """Bitmaps: ratios to plain C loops, to the memory's bandwidth and to other libraries, with what each must reach."""
    from pagecore.bench.bitmap import Suite

    _measure(Suite(rounds).rows(only), rounds, gate=gate, as_json=as_json, plot=plot)


@bench.command(short_help="Placement, beside the bare ioctls.")
@rounds_option
@only_option("copy, zero, move")
@json_option
@plot_option("Draw the ratios, too")
@gate_option
def place(rounds: int, only: str, as_json: bool, plot: str | None, gate: bool) -> None:
    """Placement: ratios to the bare ioctls on the same memory, with what each must reach."""
    from pagecore.bench.place import Suite

    try:
        suite = Suite(rounds)
    except UnsupportedError as error:
        click.echo(f"{error}\nsee: pagecore doctor", err=True)
        sys.exit(EXIT_UNSUPPORTED)
    try:
        _measure(suite.rows(only), rounds, gate=gate, as_json=as_json, plot=plot)
    finally:
        suite.close()


@bench.command(short_help="Dirty logs, beside the bare kernel calls.")
@rounds_option
@click.option(
    "--size", type=Size(), default="1G", show_default=True, help="Memory that is logged; the gates are of 1G."
)
@only_option("kvm, pagemap")
@json_option
@plot_option("Draw the ratios, too")
@gate_option
def logs(*, rounds: int, size: int, only: str, as_json: bool, plot: str | None, gate: bool) -> None:
    """Dirty logs: a collect beside the bare kernel call and the naive ways, and what each puts on the writers."""
    from pagecore.bench.dirty_log import DirtyLogSuite

    try:
        suite = DirtyLogSuite(rounds, size)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        _measure(suite.rows(only), rounds, gate=gate, as_json=as_json, plot=plot)
    finally:
        for name, reason in suite.skipped.items():
            click.echo(f"{name}: {reason}", err=True)


def _measure(
    measured: Iterator[Row],
    rounds: int,
    *,
    gate: bool,
    as_json: bool,
    plot: str | None = None,
    quiet: bool = False,
) -> NoReturn:
    """Show rows as they come, write and draw them, and exit as the gates say."""
    from pagecore.bench import report

    rows = []
    table = report.table()
    console = errors(quiet=quiet)
    with console.status("measuring") as status:
        for row in measured:
            rows.append(row)
            table.add_row(*report.cells(row))
            status.update(f"measured {row.operation}, {row.case}")
    if as_json:
        click.echo(json.dumps(report.as_json(rows, rounds), indent=2))
    else:
        output(WIDE).print(table)
    drawn = plot is None or written(plot, "picture", lambda: report.draw(rows, plot))
    missed = sum(not row.passed for row in rows)
    if rows:
        console.print(f"{missed} of {sum(row.must is not None for row in rows)} gates missed")
    else:
        console.print("nothing was measured: --only names no group that can be measured here")
    sys.exit(1 if not drawn or (gate and missed) else 0)
