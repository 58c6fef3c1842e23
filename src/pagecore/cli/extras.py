"""What to type where an extra is missing."""

from __future__ import annotations

import shlex
import sys

__all__ = ["how_to_install"]


def how_to_install(extra: str) -> str:
    """The command that installs an extra for the interpreter that runs this, whichever is on the path."""
    return f"{shlex.quote(sys.executable)} -m pip install 'pagecore[{extra}]'"
