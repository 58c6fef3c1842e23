"""Runs a migration, or one side of it, for a person or a script: signals, progress, and the end."""

from __future__ import annotations

import signal
from typing import Protocol

from pagecore import _progress_view
from pagecore.cli.results import save, show
from pagecore.migrate import Migration, Outcome, Send

__all__ = ["run"]


class Runnable(Protocol):
    """A migration, or one side of it."""

    def run(self) -> Outcome: ...

    def interrupt(self) -> None: ...


def run(
    runnable: Runnable,
    view: _progress_view.ProgressView,
    *,
    as_json: bool,
    report: str | None,
    plot: str | None,
) -> int:
    """Run it, and say what became of it; returns the exit status.

    SIGINT and SIGTERM are its `interrupt` meanwhile; where the guest leaves from, SIGUSR1 and SIGUSR2 are its `pause`
    and `resume`.
    """
    does = {signal.SIGINT: runnable.interrupt, signal.SIGTERM: runnable.interrupt}
    if isinstance(runnable, Migration | Send):
        does |= {signal.SIGUSR1: runnable.pause, signal.SIGUSR2: runnable.resume}
    handlers = {number: signal.signal(number, lambda *_, act=act: act()) for number, act in does.items()}
    try:
        with view:
            outcome = runnable.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    show(outcome, as_json=as_json)
    save(outcome, report=report, plot=plot)
    return outcome.exit_code
