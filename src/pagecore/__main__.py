"""``python -m pagecore`` and the ``pagecore`` command."""

from __future__ import annotations

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
    cli()
    return 0


if __name__ == "__main__":
    sys.exit(main())
