"""One of the two processes of a migration: ``python -m pagecore.migrate.child source|destination``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import NoReturn

from pagecore.errors import PagecoreError, UnsupportedError
from pagecore.migrate.destination import Destination
from pagecore.migrate.options import Options
from pagecore.migrate.progress import CommandPipe, Reporter, Stop, take_report_stream
from pagecore.migrate.source import Source

__all__ = ["main"]

DONE, FAILED, UNSUPPORTED = 0, 1, 3


def main(role: str) -> int:
    """Take one side of a migration; the configuration comes as the first line of standard input."""
    # Ctrl-C on the terminal is the parent's; it says what it wants over the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The urgent stream shares the interpreter with the bulk stream: let it in soon.
    sys.setswitchinterval(0.0005)
    logging.basicConfig(
        stream=sys.stderr, level=os.environ.get("PAGECORE_LOG", "WARNING"), format=f"{role}: %(message)s"
    )
    reporter = Reporter(take_report_stream(), role)
    commands = CommandPipe()
    configuration = commands.read()
    if configuration is None:
        return FAILED
    options = Options.from_json(configuration["options"])
    stop = Stop(options.timeout)
    stop.listen(commands)
    side = Source if role == "source" else Destination
    try:
        good = side(options, configuration["address"], configuration["session"], reporter, stop).run()
    except Exception as error:
        # Before there was a peer to tell: the guest, if any, never left.
        if not isinstance(error, PagecoreError | OSError | ValueError):
            logging.getLogger("pagecore.migrate").error("unexpected: %r", error, exc_info=error)
        reporter.event(
            "failed",
            cancelled=False,
            error=str(error),
            kind=type(error).__name__,
            guest="source",
            unsupported=isinstance(error, UnsupportedError),
        )
        return UNSUPPORTED if isinstance(error, UnsupportedError) else FAILED
    return DONE if good else FAILED


def run(role: str) -> NoReturn:
    """Call `main` and leave with what it returned."""
    status = main(role)
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that waits for a page that never comes must not keep this process; nothing is left to clean up.
    os._exit(status)


if __name__ == "__main__":
    run(sys.argv[1])
