"""What is done with a run that is over, or with a report of one: shown, saved, drawn."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import click

from pagecore import PagecoreError, _cli_view, _progress_view
from pagecore.cli.console import output
from pagecore.cli.extras import how_to_install
from pagecore.migrate import Outcome
from pagecore.migrate.report import save_report

__all__ = ["plot_option", "report_option", "save", "show", "written"]

FORMATS = (".png", ".svg", ".pdf")


def _check_plot(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Before anything is moved: a run of minutes must not end in a missing library."""
    if path is None:
        return None
    if not path.lower().endswith(FORMATS):
        raise click.BadParameter(f"{path!r} ends in none of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError(f"--plot needs matplotlib: {how_to_install('plot')}")
    return path


def plot_option(what: str) -> Callable[[Any], Any]:
    """``--plot``, wherever there is something to draw."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False, writable=True),
        callback=_check_plot,
        metavar="FILE.png",
        help=f"{what}: PNG, SVG or PDF.",
    )


report_option = click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE.json",
    help="Save all that was counted, for pagecore inspect.",
)


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print a run: a table for a person, or JSON on standard output and the last word on standard error."""
    message = _progress_view.shown(outcome.message)
    if as_json:
        click.echo(json.dumps(outcome.to_json(), indent=2))
        click.echo(message, err=True)
        return
    console = output()
    table = _cli_view.outcome_table(outcome)
    if table.row_count:
        console.print(table)
    # soft_wrap: the last line is one line, for eyes and for scripts.
    console.print(message, style=_cli_view.style_of(outcome), soft_wrap=True, markup=False)


def save(outcome: Outcome, *, report: str | None = None, plot: str | None = None) -> bool:
    """Write what was asked for; False where one of them could not be written, after a line about it."""
    saved = True
    if report is not None:
        saved = written(report, "report", lambda: save_report(outcome, report))
    if plot is not None:
        saved &= written(plot, "picture", lambda: _draw(outcome, plot))
    return saved


def written(path: str, what: str, write: Callable[[], None]) -> bool:
    """Write one file; where it cannot be written, return False after a line about it."""
    try:
        write()
    except (OSError, PagecoreError, ValueError) as error:
        # The reason names the temporary file, which is not there any more.
        reason = error.strerror or error if isinstance(error, OSError) else error
        with contextlib.suppress(OSError):
            click.echo(_progress_view.shown(f"the {what} could not be written to {path}: {reason}"), err=True)
        return False
    return True


def _draw(outcome: Outcome, path: str) -> None:
    from pagecore.migrate.plot import draw

    draw(outcome, path)
