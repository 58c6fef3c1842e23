"""``pagecore inspect``: what is in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import click

from pagecore import ProtocolError, SavedBitmap, WorkingSet, _inspect_view, _progress_view
from pagecore.cli.console import output
from pagecore.cli.results import plot_option, save
from pagecore.migrate import Outcome
from pagecore.migrate.report import load_report

__all__ = ["inspect"]

LOADERS: dict[bytes, Callable[[str], _inspect_view.Content]] = {b"PGBM": SavedBitmap.load, b"PGWS": WorkingSet.load}


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plot_option("Draw the run")
def inspect(file: str, as_json: bool, plot: str | None) -> None:
    """Show a saved bitmap, a working set, or the report of a run.

    A file that is damaged is refused, with the name of the field that is wrong.
    """
    try:
        content = _load(file)
    except (ProtocolError, OSError) as error:
        click.echo(_progress_view.shown(f"{file}: {error}"), err=True)
        sys.exit(1)
    if plot is not None and not isinstance(content, Outcome):
        raise click.UsageError("--plot draws the report of a run, and this is none")
    if as_json:
        click.echo(json.dumps(_inspect_view.content_json(content), indent=2))
    else:
        output().print(_inspect_view.content_view(content))
    if isinstance(content, Outcome) and not save(content, plot=plot):
        sys.exit(1)


def _load(path: str) -> _inspect_view.Content:
    with open(path, "rb") as stream:
        magic = stream.read(4)
    loader = LOADERS.get(magic)
    if loader is not None:
        return loader(path)
    if magic[:1] != b"{":
        raise ProtocolError("magic", f"{magic!r} begins neither a bitmap, nor a working set, nor the report of a run")
    return load_report(path)
