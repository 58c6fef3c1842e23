"""``pagecore bench``: its commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

from pagecore import UnsupportedError, _bench_view
from pagecore.bench import hints
from pagecore.cli.extras import how_to_install
from pagecore.cli.size import Size
from pagecore.migrate.outcome import EXIT_UNSUPPORTED

if TYPE_CHECKING:
    from pagecore.bench.bitmap import Row


@click.group()
def bench() -> None:
    """Measure pagecore beside its peers on this machine."""


@bench.command("hints")
@click.option("--guest", "guests", type=Size(), multiple=True, help="Guest size.  [default: 8G, 64G, 1T]")
@click.option("--density", "densities", type=float, multiple=True, help="Dirty share.  [default: 0.0001, 0.01, 0.5]")
@click.option("--bandwidth", type=Size(), default="1250000000", show_default=True, help="Of the link, bytes a second.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Each figure is the least of so many.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output instead of a table.")
@click.option("--png", type=click.Path(dir_okay=False, writable=True), help="Draw it into this file, too.")
@click.option("--peers", is_flag=True, help="Instead: hints and takes beside plain C and a loop as QEMU's.")
@click.option("--gate", is_flag=True, help="The same, and exit with 1 where a ratio misses what it must reach.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def bench_hints(as_json: bool, png: str | None, peers: bool, gate: bool, quiet: bool, **values: Any) -> None:
    """Free-page hints against the bitmap sync: time, pages saved, and the break-even point."""
    errors = Console(stderr=True, highlight=False)
    if peers or gate:
        if png is not None or values["guests"] or values["densities"]:
            raise click.UsageError("--peers and --gate have guests of their own, and draw nothing")
        from pagecore.bench.tracker import TrackerSuite

        rounds = values["rounds"]
        if rounds < 1:
            raise click.UsageError(f"rounds {rounds} is below 1")
        _measure(TrackerSuite(rounds).rows(), rounds, gate=gate, as_json=as_json, quiet=quiet)
    if png is not None:
        try:
            import matplotlib  # noqa: F401  # before minutes are spent
        except ModuleNotFoundError:
            errors.print(f"--png needs matplotlib: {how_to_install('plot')}", markup=False, soft_wrap=True)
            sys.exit(2)
    try:
        report = hints.measure_hints(
            guests=values.pop("guests") or hints.GUESTS,
            densities=values.pop("densities") or hints.DENSITIES,
            **values,
            report=None if quiet else errors.print,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if png is not None:
        hints.draw(report, png)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        # A file or a pipe gets whole lines.
        Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(_bench_view.hints_table(report))


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Paired rounds of each row.")
@click.option(
    "--only", default="", metavar="NAME", help="Only groups whose name contains this: drain, clear, single ..."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the figures here.")
@click.option(
    "--draw", "picture", type=click.Path(dir_okay=False), help="Draw them here: .png or .svg (needs matplotlib)."
)
@click.option("--gate", is_flag=True, help="Exit with 1 where a ratio misses what it must reach.")
def bitmap(rounds: int, only: str, json_path: str | None, picture: str | None, gate: bool) -> None:
    """Bitmaps: ratios to plain C loops, to the memory's bandwidth and to other libraries, with what each must reach."""
    from pagecore.bench.bitmap import Suite

    _measure(Suite(rounds).rows(only), rounds, gate=gate, json_path=json_path, picture=picture)


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Paired rounds of each row.")
@click.option("--only", default="", metavar="NAME", help="Only groups whose name contains this: copy, zero, move ...")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the figures here.")
@click.option(
    "--draw", "picture", type=click.Path(dir_okay=False), help="Draw them here: .png or .svg (needs matplotlib)."
)
@click.option("--gate", is_flag=True, help="Exit with 1 where a ratio misses what it must reach.")
def place(rounds: int, only: str, json_path: str | None, picture: str | None, gate: bool) -> None:
    """Placement: ratios to the bare ioctls on the same memory, with what each must reach."""
    from pagecore.bench.place import Suite

    try:
        suite = Suite(rounds)
    except UnsupportedError as error:
        click.echo(f"{error}\nsee: pagecore doctor", err=True)
        sys.exit(EXIT_UNSUPPORTED)
    try:
        _measure(suite.rows(only), rounds, gate=gate, json_path=json_path, picture=picture)
    finally:
        suite.close()


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Paired rounds of each row.")
@click.option(
    "--size", type=Size(), default="1G", show_default=True, help="Memory that is logged; the gates are of 1G."
)
@click.option("--only", default="", metavar="NAME", help="Only groups whose name contains this: kvm, pagemap ...")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the figures here.")
@click.option("--gate", is_flag=True, help="Exit with 1 where a ratio misses what it must reach.")
def logs(rounds: int, size: int, only: str, json_path: str | None, gate: bool) -> None:
    """Dirty logs: a collect beside the bare kernel call and the naive ways, and what each puts on the writers."""
    from pagecore.bench.dirty_log import DirtyLogSuite

    try:
        suite = DirtyLogSuite(rounds, size)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        _measure(suite.rows(only), rounds, gate=gate, json_path=json_path)
    finally:
        for name, reason in suite.skipped.items():
            click.echo(f"{name}: {reason}", err=True)


def _measure(
    measured: Iterator[Row],
    rounds: int,
    *,
    gate: bool,
    json_path: str | None = None,
    picture: str | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> NoReturn:
    """Show rows as they come, write and draw them, and exit as the gates say."""
    from pagecore.bench import report

    rows = []
    table = report.table()
    errors = Console(stderr=True, highlight=False, quiet=quiet)
    with errors.status("measuring") as status:
        for row in measured:
            rows.append(row)
            table.add_row(*report.cells(row))
            status.update(f"measured {row.operation}, {row.case}")
    if as_json:
        click.echo(json.dumps(report.as_json(rows, rounds), indent=2))
    else:
        Console(highlight=False, width=max(Console().width, 140)).print(table)
    if json_path:
        with open(json_path, "w") as file:
            json.dump(report.as_json(rows, rounds), file, indent=2)
    if picture:
        report.draw(rows, picture)
    missed = sum(not row.passed for row in rows)
    errors.print(f"{missed} of {sum(row.must is not None for row in rows)} gates missed")
    sys.exit(1 if gate and missed else 0)
