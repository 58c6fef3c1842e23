"""``python -m pagecore`` and the ``pagecore`` command."""

from __future__ import annotations

import contextlib
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; the extra ``cli`` brings what it needs."""
    try:
        from pagecore.cli import cli
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(f"the pagecore command needs {missing}: python -m pip install 'pagecore[cli]'", file=sys.stderr)
        return 2
    try:
        cli()
    except OSError as error:
        return _complain(error)
    return 0


def _complain(error: OSError) -> int:
    """Say in a line what the system refused, as far as that can be said: it may be standard output itself."""
    # What was not written cannot be written at the end of the interpreter either.
    sys.stdout = None
    with contextlib.suppress(OSError):
        print(f"pagecore: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
