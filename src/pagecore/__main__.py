"""``python -m pagecore`` and the ``pagecore`` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; the extra ``cli`` brings what it needs."""
    try:
        from pagecore.cli import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print(
            f"the pagecore command needs {error.name}: python -m pip install 'pagecore[cli]'", file=sys.stderr
        )
        return 2
    cli()
    return 0


if __name__ == "__main__":
    sys.exit(main())
