"""The command line: ``pagecore migrate``, ``pagecore bench``, ``pagecore doctor``, ``pagecore version``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from pagecore import UnsupportedError, __version__, _cli_view
from pagecore.migrate import Migration, Options, format_size, parse_size
from pagecore.migrate.outcome import EXIT_UNSUPPORTED
from pagecore.probe import probe

if TYPE_CHECKING:
    from pagecore.bench.bitmap import Row

__all__ = ["cli"]

EPILOG = """\b
Exit status:
  0    verified; doctor: all that pagecore requires is there
  1    failed, or not verified
  2    usage, or a part of the installation is missing
  3    this kernel or this user cannot do it: see pagecore doctor
  130  interrupted"""

DEFAULTS = Options()


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs of some versions only
    """A size as 4K, 2M or 1G; ``none`` where that is a choice."""

    name = "size"

    def __init__(self, none: str | None = None) -> None:
        self._none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Bytes; None for the word that stands for no size."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if self._none is not None and value.lower() == self._none:
            return None
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PAGECORE"})
def cli() -> None:
    """Memory migration with precopy, free-page hints and postcopy."""


@cli.command(epilog=EPILOG)
@click.option("--size", type=Size(), default=format_size(DEFAULTS.size), show_default=True, help="Guest memory.")
@click.option(
    "--dirty-rate",
    type=Size("flat"),
    default=format_size(DEFAULTS.dirty_rate or 0),
    show_default=True,
    help="Bytes a second that the guest writes, or 'flat' for flat out.",
)
@click.option(
    "--free-share",
    type=float,
    default=DEFAULTS.free_share,
    show_default=True,
    help="The part of its memory that the guest holds free, 0 to 0.9.",
)
@click.option("--hints/--no-hints", default=DEFAULTS.hints, show_default=True, help="Leave out what the guest hints.")
@click.option(
    "--postcopy/--no-postcopy",
    default=DEFAULTS.postcopy,
    show_default=True,
    help="Run at the destination before all memory is there.",
)
@click.option(
    "--precopy-rounds", type=int, help="The most rounds before the switch.  [default: 1; 30 without postcopy]"
)
@click.option(
    "--downtime-limit",
    type=float,
    default=DEFAULTS.downtime_limit,
    show_default=True,
    metavar="SECONDS",
    help="Without postcopy: switch once what is left fits in it.",
)
@click.option("--bandwidth", type=Size("none"), help="Cap of the bulk stream, bytes a second.  [default: none]")
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS.seed,
    show_default=True,
    help="All that the guest does follows from it.",
)
@click.option("--guest", type=click.Choice(["auto", "kvm", "process"]), default=DEFAULTS.guest, show_default=True)
@click.option("--vcpus", type=int, default=DEFAULTS.vcpus, show_default=True, help="1 to 8.")
@click.option(
    "--link",
    type=click.Choice(["unix", "tcp"]),
    default=DEFAULTS.link,
    show_default=True,
    help="tcp is loopback.",
)
@click.option(
    "--duplicates",
    type=click.Choice(["tolerant", "strict"]),
    default=DEFAULTS.duplicates,
    show_default=True,
    help="Strict: a page that comes twice after the switch is an error.",
)
@click.option(
    "--emulate-qemu",
    is_flag=True,
    help="The source forgets what was hinted, as QEMU does. Try it with --bandwidth 100M; see the latency.",
)
@click.option(
    "--timeout",
    type=float,
    default=DEFAULTS.timeout,
    show_default=True,
    metavar="SECONDS",
    help="For all of it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def migrate(as_json: bool, quiet: bool, **values: Any) -> None:
    """Move a running guest from one process to another on this machine, and prove that it arrived.

    The guest writes, frees, reuses and checks its memory all the time. It is a tiny KVM guest where /dev/kvm
    can run one, otherwise threads that log their own writes.

    Ctrl-C before the switch leaves the guest at the source; after it, the source serves until the destination
    has everything. A second Ctrl-C ends both sides at once, and the guest with them.
    """
    try:
        options = Options(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    errors = Console(stderr=True, highlight=False)
    view = _cli_view.progress_view(options, errors, quiet=quiet or as_json)
    migration = Migration(options, view.event)
    handlers = {
        number: signal.signal(number, lambda *_: migration.interrupt()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with view:
            outcome = migration.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if as_json:
        click.echo(json.dumps(_cli_view.outcome_json(outcome), indent=2))
        click.echo(outcome.message, err=True)
    else:
        console = Console(highlight=False)
        console.print(_cli_view.outcome_table(outcome))
        # soft_wrap: the last line is one line, for eyes and for scripts.
        console.print(outcome.message, style=_cli_view.style_of(outcome), soft_wrap=True, markup=False)
    sys.exit(outcome.exit_code)


@cli.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what this kernel and this user can do, and the command that enables what is missing."""
    report = probe()
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console(highlight=False).print(_cli_view.doctor_view(report))
    sys.exit(0 if report.usable else EXIT_UNSUPPORTED)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def version(as_json: bool) -> None:
    """Print the version of pagecore."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"pagecore {__version__}")


@cli.group()
def bench() -> None:
    """Measure pagecore beside its peers on this machine."""


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

    _measure(Suite(rounds).rows(only), rounds, json_path, picture, gate)


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
        _measure(suite.rows(only), rounds, json_path, picture, gate)
    finally:
        suite.close()


def _measure(measured: Iterator[Row], rounds: int, json_path: str | None, picture: str | None, gate: bool) -> None:
    from pagecore.bench import report

    rows = []
    table = report.table()
    with Console(stderr=True).status("measuring") as status:
        for row in measured:
            rows.append(row)
            table.add_row(*report.cells(row))
            status.update(f"measured {row.operation}, {row.case}")
    Console(highlight=False, width=max(Console().width, 140)).print(table)
    if json_path:
        with open(json_path, "w") as file:
            json.dump(report.as_json(rows, rounds), file, indent=2)
    if picture:
        report.draw(rows, picture)
    missed = sum(not row.passed for row in rows)
    click.echo(f"{missed} of {sum(row.must is not None for row in rows)} gates missed", err=True)
    sys.exit(1 if gate and missed else 0)
