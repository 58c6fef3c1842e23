"""Runs a migration, or one side of it, for a person or a script: signals, progress, and the end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console

from pagecore import _progress_view
from pagecore.cli.results import save, show
from pagecore.migrate import Migration, Outcome, Send
from pagecore.migrate.outcome import EXIT_FAILED

__all__ = ["ProgressConsole", "run"]

Observer = Callable[[dict[str, Any]], None]


class ProgressConsole(Console):
    """Standard error. A pipe that was closed is an error to whoever prints; rich would end the program."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Runnable(Protocol):
    """A migration, or one side of it."""

    def run(self) -> Outcome: ...

    def interrupt(self) -> None: ...


def run(
    make: Callable[[Observer], Runnable],
    view: _progress_view.ProgressView,
    *,
    as_json: bool,
    report: str | None,
    plot: str | None,
) -> int:
    """Run what `make` makes, and say what became of it; returns the exit status.

    SIGINT and SIGTERM are its `interrupt` meanwhile; where the guest leaves from, SIGUSR1 and SIGUSR2 are its `pause`
    and `resume`. Nothing that cannot be shown or written ends it, or keeps the rest from being shown and written.
    """
    runnable = make(_unfailing(view.event))
    does = {signal.SIGINT: runnable.interrupt, signal.SIGTERM: runnable.interrupt}
    if isinstance(runnable, Migration | Send):
        does |= {signal.SIGUSR1: runnable.pause, signal.SIGUSR2: runnable.resume}
    else:
        does |= {signal.SIGUSR1: _nothing, signal.SIGUSR2: _nothing}
    handlers = {number: signal.signal(number, lambda *_, act=act: act()) for number, act in does.items()}
    try:
        with _shown(view):
            outcome = runnable.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    saved = save(outcome, report=report, plot=plot)
    # Last: standard output may be on a full disk, too.
    show(outcome, as_json=as_json)
    return outcome.exit_code if saved else EXIT_FAILED


def _nothing() -> None:
    """Whoever signals all processes of a group means another one of them."""


def _unfailing(observer: Observer) -> Observer:
    """Calls it until it fails: a guest is not lost for a terminal that went away, or a log on a full disk."""
    lost = False

    def observe(event: dict[str, Any]) -> None:
        nonlocal lost
        if not lost:
            try:
                observer(event)
            except OSError:
                lost = True

    return observe


@contextlib.contextmanager
def _shown(view: _progress_view.ProgressView) -> Iterator[None]:
    with contextlib.suppress(OSError):
        view.__enter__()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            view.__exit__(None, None, None)
