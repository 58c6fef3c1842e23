"""One of the two processes of a migration: ``python -m pagecore.migrate.child source|destination``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any, NoReturn

from pagecore.errors import PagecoreError, UnsupportedError
from pagecore.migrate.address import Terms
from pagecore.migrate.destination import Destination
from pagecore.migrate.options import Options
from pagecore.migrate.progress import CommandPipe, Reporter, Stop, reason_of, take_report_stream
from pagecore.migrate.source import Source
from pagecore.migrate.transport import Transport

__all__ = ["main"]

DONE, FAILED, UNSUPPORTED = 0, 1, 3


def main(role: str) -> int:
    """Take one side of a migration; the configuration comes as the first line of standard input."""
    # They are the parent's, of Ctrl-C on the terminal or from somebody who signals all processes of the command that
    # shows the migration; it says what it wants over the pipe.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
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
    # Who takes whatever session comes may wait for it as long as it likes.
    stop = Stop(options.timeout if "session" in configuration else float("inf"))
    stop.listen(commands)
    # Whoever wants this process to end gets what Ctrl-C gets: the guest is not lost by it where that can be helped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.signalled())
    try:
        good = _run(role, configuration, options, reporter, stop)
    except Exception as error:
        # Before there was a peer to tell: the guest, if any, never left.
        if not isinstance(error, PagecoreError | OSError | ValueError):
            logging.getLogger("pagecore.migrate").error("unexpected: %r", error, exc_info=error)
        reporter.event(
            "failed",
            cancelled=False,
            error=reason_of(error),
            kind=type(error).__name__,
            guest="source",
            unsupported=isinstance(error, UnsupportedError),
        )
        return UNSUPPORTED if isinstance(error, UnsupportedError) else FAILED
    return DONE if good else FAILED


def _run(role: str, configuration: dict[str, Any], options: Options, reporter: Reporter, stop: Stop) -> bool:
    address, session = configuration["address"], configuration.get("session")
    with Transport(Terms.from_json(configuration.get("terms", {}))) as transport:
        if role == "source":
            return Source(options, address, str(session), reporter, stop, transport=transport).run()
        max_size = configuration.get("max_size")
        return Destination(options, address, session, reporter, stop, transport=transport, max_size=max_size).run()


def run(role: str) -> NoReturn:
    """Call `main` and leave with what it returned."""
    status = main(role)
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that waits for a page that never comes must not keep this process; nothing is left to clean up.
    os._exit(status)


if __name__ == "__main__":
    run(sys.argv[1])
