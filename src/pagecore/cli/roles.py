"""``pagecore send`` and ``pagecore receive``: the two sides of a migration, each where it is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import click

from pagecore import _progress_view
from pagecore.cli.extras import how_to_install
from pagecore.cli.receive_view import ReceiveView
from pagecore.cli.running import ProgressConsole, run
from pagecore.cli.size import Size
from pagecore.migrate import Options, Receive, Send, Terms, format_size, parse_address
from pagecore.migrate.address import own_address
from pagecore.migrate.tls import tls_context
from pagecore.migrate.transport import has_zstd

__all__ = ["receive_command", "send_command"]

# The guest is the sender's, so these are all that the receiver has a say in.
RECEIVER: Final = frozenset({"duplicates", "timeout", "reconnect_timeout", "as_json", "quiet", "report", "plot"})

_OWN: Final = "[default: a Unix socket of this user]"
_TERMS: Final = (
    click.Option(["--tls-cert"], type=click.Path(), metavar="FILE", help="Our certificate (PEM)."),
    click.Option(["--tls-key"], type=click.Path(), metavar="FILE", help="Its key."),
    click.Option(["--tls-ca"], type=click.Path(), metavar="FILE", help="The authority that vouches for the peer."),
    click.Option(["--insecure"], is_flag=True, help="Speak to other machines without TLS, whoever they are."),
)


def send_command(shared: Iterable[click.Parameter], epilog: str) -> click.Command:
    """``pagecore send``, with the options of ``migrate``."""
    to = click.Option(
        ["--to"],
        default=own_address,
        metavar="ADDRESS",
        help=f"Where the receiver listens: HOST:PORT or unix:PATH.  {_OWN}",
    )
    compress = click.Option(
        ["--compress"],
        type=click.Choice(["none", "auto", "zstd"]),
        help="Of the bulk streams; auto: zstd where it pays, as measured.  [default: auto with TLS, else none]",
    )
    options = [one for one in shared if one.name not in ("link", "help")]
    return _command("send", "Move a running guest to a receiver.", _send, [to, *_TERMS, compress, *options], epilog)


def receive_command(shared: Iterable[click.Parameter], epilog: str) -> click.Command:
    """``pagecore receive``, with those options of ``migrate`` that are the receiver's."""
    listen = click.Option(
        ["--listen"],
        default=own_address,
        metavar="ADDRESS",
        help=f"HOST:PORT (port 0: any that is free) or unix:PATH.  {_OWN}",
    )
    max_size = click.Option(
        ["--max-size"],
        type=Size(),
        default=format_size(_half_of_memory()),
        help="The largest guest to take.  [default: half of this machine's memory]",
    )
    options = [one for one in shared if one.name in RECEIVER]
    short = "Take a guest that pagecore send brings, and run it."
    return _command("receive", short, _receive, [listen, *_TERMS, max_size, *options], epilog)


def _command(
    name: str, short: str, function: Callable[..., None], parameters: list[click.Parameter], epilog: str
) -> click.Command:
    return click.Command(
        name, params=parameters, callback=function, help=function.__doc__, short_help=short, epilog=epilog
    )


def _half_of_memory() -> int:
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return half - half % (2 << 20)


def _send(*, to: str, as_json: bool, quiet: bool, report: str | None, plot: str | None, **values: Any) -> None:
    """Move a running guest of this machine to a receiver, here or elsewhere, and prove that it arrived.

    The receiver is started first: pagecore receive. Guest memory leaves this machine over TLS with certificates on
    both sides, or with --insecure. Ctrl-C before the switch leaves the guest here; after it, this side serves until
    the receiver has everything, and a second Ctrl-C gives the guest up. SIGUSR1 pauses the transfer, SIGUSR2 lets it go
    on; the guest runs meanwhile.
    """
    terms = _terms(to, values, server=False, compress=values.pop("compress"))
    options = _options(values)
    view = _progress_view.progress_view(options, ProgressConsole(), quiet=quiet or as_json)
    sys.exit(run(lambda said: Send(options, to, terms, said), view, as_json=as_json, report=report, plot=plot))


def _receive(
    *, listen: str, max_size: int, as_json: bool, quiet: bool, report: str | None, plot: str | None, **values: Any
) -> None:
    """Wait for a guest that pagecore send brings, run it here, and prove that it arrived.

    One guest is taken, and then the command ends. At a Unix socket this user and root may bring it; at loopback, any
    user of this machine, unless it takes a certificate; everywhere else it takes one, or --insecure.
    """
    terms = _terms(listen, values, server=True)
    options = _options(values)
    view = ReceiveView(ProgressConsole(), quiet=quiet or as_json, terms=terms)
    sys.exit(
        run(
            lambda said: Receive(options, listen, terms, said, max_size=max_size),
            view,
            as_json=as_json,
            report=report,
            plot=plot,
        )
    )


def _options(values: dict[str, Any]) -> Options:
    try:
        return Options(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _terms(address: str, values: dict[str, Any], *, server: bool, compress: Any = None) -> Terms:
    """Take the terms out of the values; refused here is refused before anything is started."""
    given = {name: values.pop(name) for name in ("tls_cert", "tls_key", "tls_ca", "insecure")}
    if compress == "zstd" and not has_zstd():
        raise click.UsageError(f"--compress zstd needs zstandard: {how_to_install('zstd')}")
    try:
        where = parse_address(address)
        terms = Terms(**given)
        if terms.tls:
            tls_context(terms, server=server)
        if compress is None:
            compress = "auto" if terms.tls and not server else "none"
        terms = Terms(**given, compress="none" if compress == "auto" and not has_zstd() else compress)
        # A name that nobody knows is no wrong usage: whoever connects will say so.
        with contextlib.suppress(OSError):
            for one in where.resolved():
                terms.check(one)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return terms
