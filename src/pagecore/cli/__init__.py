"""The command line: ``pagecore migrate`` and what stands beside it."""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any

import click

from pagecore import __version__, _cli_view, _progress_view
from pagecore.cli.bench import bench
from pagecore.cli.console import WIDE, errors, output
from pagecore.cli.dirty_rate import dirty_rate
from pagecore.cli.inspect import inspect
from pagecore.cli.results import plot_option, report_option
from pagecore.cli.roles import receive_command, send_command
from pagecore.cli.running import ProgressConsole, run
from pagecore.cli.size import Size
from pagecore.migrate import Migration, Options, format_size
from pagecore.migrate.options import DIRTY_LOGS
from pagecore.migrate.outcome import EXIT_UNSUPPORTED
from pagecore.probe import probe

__all__ = ["cli"]

DEFAULTS = Options()


def _exits(zero: str) -> str:
    """The exit statuses of a command, of which the first is its own."""
    return f"""\b
Exit status:
  0    {zero}
  1    failed, or not verified
  2    wrong usage, or a part of the installation is missing
  3    this kernel or this user cannot do it: see pagecore doctor
  130  interrupted"""


@click.group(
    epilog=_exits("done, or verified"),
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PAGECORE"},
)
def cli() -> None:
    """Memory migration with precopy, free-page hints and postcopy."""


@cli.command(epilog=_exits("verified"), short_help="Move a running guest to another process, and verify it.")
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
    "--precopy-rounds",
    type=int,
    help="The most rounds before the switch, 0 for none.  [default: 1; 30 without postcopy]",
)
@click.option(
    "--downtime-limit",
    type=float,
    default=DEFAULTS.downtime_limit,
    show_default=True,
    metavar="SECONDS",
    help="Without postcopy: switch once what is left fits in it.",
)
@click.option("--throttle", is_flag=True, help="Without postcopy: slow the guest down where precopy gets nowhere.")
@click.option("--bandwidth", type=Size("none"), help="Cap of the bulk streams, bytes a second.  [default: none]")
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS.seed,
    show_default=True,
    help="All that the guest does follows from it.",
)
@click.option(
    "--guest",
    type=click.Choice(["auto", "kvm", "process"]),
    default=DEFAULTS.guest,
    show_default=True,
    help="auto: under KVM where that can run one, else as threads of a process.",
)
@click.option(
    "--dirty-log",
    type=click.Choice(DIRTY_LOGS),
    default=DEFAULTS.dirty_log,
    show_default=True,
    help="What records the guest's writes: get, clear, ring or pagemap of a KVM guest, marks or pagemap of a process.",
)
@click.option("--vcpus", type=int, default=DEFAULTS.vcpus, show_default=True, help="1 to 8.")
@click.option(
    "--link",
    type=click.Choice(["unix", "tcp"]),
    default=DEFAULTS.link,
    show_default=True,
    help="tcp is loopback.",
)
@click.option("--streams", type=int, default=DEFAULTS.streams, show_default=True, help="Bulk streams, 1 to 16.")
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
    help="Up to the switch, not counting pauses and a receiver's wait for its sender; after it there is no limit.",
)
@click.option(
    "--reconnect-timeout",
    type=float,
    default=DEFAULTS.reconnect_timeout,
    show_default=True,
    metavar="SECONDS",
    help="How long both sides try to meet again when the link is lost after the switch; 0: not at all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@report_option
@plot_option("Draw the run")
def migrate(as_json: bool, quiet: bool, report: str | None, plot: str | None, **values: Any) -> None:
    """Move a running guest from one process to another on this machine, and prove that it arrived.

    The guest writes, frees, reuses and checks its memory all the time. It is a tiny KVM guest where /dev/kvm
    can run one, otherwise threads that log their own writes.

    Ctrl-C before the switch leaves the guest at the source; after it, the source serves until the destination
    has everything. A second Ctrl-C ends both sides at once, and the guest with them. SIGUSR1 pauses the transfer,
    SIGUSR2 lets it go on; the guest runs meanwhile.
    """
    try:
        options = Options(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    view = _progress_view.progress_view(options, ProgressConsole(), quiet=quiet or as_json)
    sys.exit(run(lambda said: Migration(options, said), view, as_json=as_json, report=report, plot=plot))


# The guest's options, and how to show things, are those of migrate.
cli.add_command(send_command(migrate.params, _exits("verified")))
cli.add_command(receive_command(migrate.params, _exits("verified")))


@cli.command(epilog=_exits("all that pagecore requires is there"), short_help="What this kernel and this user can do.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what this kernel and this user can do, and the command that enables what is missing."""
    report = probe()
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        output().print(_cli_view.doctor_view(report))
    sys.exit(0 if report.usable else EXIT_UNSUPPORTED)


@cli.command(epilog=_exits("ended by SIGINT or SIGTERM"), short_help="Serve the page faults of restored guests.")
@click.option("--socket", "socket_path", required=True, type=click.Path(), help="Where to listen for VMMs.")
@click.option("--snapshot", required=True, type=click.Path(exists=True, dir_okay=False), help="The guests' memory.")
@click.option("--prefetch/--no-prefetch", help="Place all of it in the background.", show_default=True)
@click.option(
    "--on-lost",
    type=click.Choice(["poison", "stall"]),
    default="poison",
    show_default=True,
    help="What nobody can supply any more: SIGBUS for whoever touches it, or an endless wait.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that serve each guest.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors.")
def serve(*, socket_path: str, snapshot: str, prefetch: bool, on_lost: Any, threads: int, quiet: bool) -> None:
    """Serve the page faults of guests that are restored from a snapshot, as Firecracker hands them over.

    Each connection is a guest: a JSON list of regions, and its userfaultfd. Serves until SIGINT or SIGTERM. A page
    that is missing after that does what --on-lost says, and never reads as zeros.
    """
    from pagecore.snapshot_server import SnapshotServer

    logging.basicConfig(stream=sys.stderr, level=logging.ERROR if quiet else logging.INFO, format="%(message)s")
    try:
        server = SnapshotServer(socket_path, snapshot, prefetch=prefetch, on_lost=on_lost, threads=threads)
    except OSError as error:
        # The kernel does not say which address it refused.
        raise click.UsageError(f"{error.filename or socket_path}: {error.strerror or error}") from None
    with server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        if not quiet:
            click.echo(f"serving {snapshot} at {socket_path}", err=True)
        server.serve()


@cli.command(epilog=_exits("no row failed"), short_help="Play a VMM against a page-fault handler.")
@click.option("--socket", "socket_path", type=click.Path(), help="Where the handler listens.")
@click.option("--snapshot", type=click.Path(dir_okay=False), help="What it serves, as --make-snapshot wrote it.")
@click.option("--make-snapshot", type=click.Path(dir_okay=False), metavar="FILE", help="Write the snapshot, and end.")
@click.option("--command", metavar="COMMAND", help="Starts the handler, anew for each row.")
@click.option("--keep", is_flag=True, help="COMMAND serves one guest after another: start it when it has ended.")
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Play this row alone; may be repeated.")
@click.option("--list", "list_rows", is_flag=True, help="Print the table without playing it.")
@click.option(
    "--patience",
    type=float,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="A guest that waits longer for a page is stuck.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def conformance(
    *,
    socket_path: str | None,
    snapshot: str | None,
    make_snapshot: str | None,
    command: str | None,
    keep: bool,
    rows: tuple[str, ...],
    list_rows: bool,
    patience: float,
    as_json: bool,
) -> None:
    """Play a VMM against any page-fault handler, and say of each situation what the handler made of it.

    The handler listens at a Unix socket for Firecracker's handshake. Every row is a guest, in a process of its own.
    First write the snapshot that both sides know, and have the handler serve it:

    \b
      pagecore conformance --make-snapshot FILE
      pagecore conformance --socket PATH --snapshot FILE --command "HANDLER PATH FILE"
    """
    from pagecore import conformance as suite

    if list_rows:
        output(WIDE).print(_cli_view.conformance_list(suite.ROWS.values()))
        return
    if make_snapshot is not None:
        click.echo(f"{make_snapshot}: {suite.make_snapshot(make_snapshot)} bytes")
        return
    if socket_path is None or snapshot is None:
        raise click.UsageError("--socket and --snapshot are needed, or --make-snapshot, or --list")
    console = errors()
    verdicts = []
    try:
        for verdict in suite.run(
            socket_path, snapshot, rows=rows or None, command=command, keep=keep, patience=patience
        ):
            verdicts.append(verdict)
            if not as_json:
                console.print(_cli_view.verdict_line(verdict), soft_wrap=True)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    failed = sum(verdict.result == "fail" for verdict in verdicts)
    passed = sum(verdict.result == "pass" for verdict in verdicts)
    if as_json:
        click.echo(json.dumps(_cli_view.conformance_json(verdicts), indent=2))
    else:
        output(WIDE).print(_cli_view.conformance_table(verdicts))
    click.echo(f"{passed} passed, {failed} failed, {len(verdicts) - passed - failed} not applicable", err=as_json)
    sys.exit(1 if failed else 0)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def version(as_json: bool) -> None:
    """Print the version of pagecore."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"pagecore {__version__}")


cli.add_command(bench)
cli.add_command(dirty_rate)
cli.add_command(inspect)
