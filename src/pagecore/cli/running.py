"""Runs a migration, or one side of it, for a person or a script: signals, progress, and the end."""

from __future__ import annotations

import json
import signal
from typing import Protocol

import click
from rich.console import Console

from pagecore import _cli_view
from pagecore.migrate import Outcome

__all__ = ["run"]


class Runnable(Protocol):
    """A migration, or one side of it."""

    def run(self) -> Outcome: ...

    def interrupt(self) -> None: ...


def run(runnable: Runnable, view: _cli_view.ProgressView, *, as_json: bool) -> int:
    """Run it, and say what became of it; returns the exit status.

    SIGINT and SIGTERM are its `interrupt` meanwhile.
    """
    handlers = {
        number: signal.signal(number, lambda *_: runnable.interrupt()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with view:
            outcome = runnable.run()
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
    return outcome.exit_code
