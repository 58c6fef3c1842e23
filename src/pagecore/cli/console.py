"""Where the commands print."""

from __future__ import annotations

from typing import Final

from rich.console import Console

__all__ = ["WIDE", "errors", "output"]

# What a table of many columns takes.
WIDE: Final = 150


def output(least: int = 0) -> Console:
    """Standard output, at least so many columns wide; a file or a pipe gets whole lines."""
    console = Console(highlight=False)
    least = least if console.is_terminal else max(least, WIDE)
    return console if console.width >= least else Console(highlight=False, width=least)


def errors(*, quiet: bool = False) -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, quiet=quiet)
