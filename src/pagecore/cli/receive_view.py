"""What a person sees of a side that receives: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pagecore import _progress_view
from pagecore.migrate import Terms, format_size, parse_address

__all__ = ["ReceiveView"]

PLAIN_INTERVAL: Final = 1.0
PHASES: Final = {
    "precopy": "precopy: pages arrive, the guest runs at the source",
    "switch": "switch: the guest stands still",
    "postcopy": "postcopy: the guest runs here",
    "finish": "the guest runs here",
    "settle": "the last pages settle",
    "verify": "verifying all of the memory",
}
ARRIVED: Final = ("postcopy", "finish")
GOES_ON: Final = "the guest runs here already: the rest is on its way; a second Ctrl-C gives up, and the guest is lost"


class ReceiveView:
    """Follows the events of a receiving side.

    Parameters
    ----------
    console : Console
    quiet : bool
        Say nothing.
    terms : Terms
        Who may come is said where that is more than one would expect.
    """

    def __init__(self, console: Console, *, quiet: bool, terms: Terms) -> None:
        self._console = console
        self._quiet = quiet
        self._terms = terms
        self._began = time.monotonic()
        self._next = 0.0
        self._pages = 0
        self._arrived = False
        self._interrupted = False
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(30),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show it, if it is of interest."""
        if self._quiet:
            return
        name = event["event"]
        if name == "listening":
            self._say(f"waiting for a source at {event['address'].removeprefix('tcp:')}")
            if strangers := self._terms.strangers(parse_address(event["address"])):
                self._say(f"{strangers} may bring the guest: nothing has to be proved there")
            self._describe("waiting")
        elif name == "refused":
            self._say(f"refused a connection: {event['reason']}")
        elif name == "session":
            options = event["options"]
            self._pages = options["size"] // 4096
            self._say(f"a guest comes: {options['guest']}, {format_size(options['size'])}")
        elif name == "phase":
            text = PHASES.get(event["phase"], event["phase"])
            if self._bar is None:
                self._say(text)
            self._describe(text)
            if event["phase"] in ARRIVED and not self._arrived:
                self._arrived = True
                if self._interrupted:
                    self._say(GOES_ON)
        elif name == "progress":
            self._progress(event)
        elif name in ("failed", "lost") and event["error"]:
            self._say(f"{event['role']}: {event['error']}")
        elif name == "paused":
            self._say("the source pauses")
        elif name == "resumed":
            self._say("the source goes on")
        elif name == "interrupted" and event["times"] == 1:
            self._interrupted = True
            self._say(GOES_ON if self._arrived else "ending; a second Ctrl-C ends this side at once")

    def _progress(self, event: dict[str, Any]) -> None:
        if "placed" not in event:
            done = event["received"] + event["received_zeros"]
            text = f"{event['received']} pages received, {event['received_zeros']} zero"
        else:
            done = event["resident"]
            text = f"{event['placed']} pages placed, {event['faults']} faults, {event['requested']} pages asked for"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._pages), total=self._pages)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_INTERVAL
            self._say(text)

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def _say(self, text: str) -> None:
        if self._bar is None:
            text = f"{time.monotonic() - self._began:7.2f} s  {text}"
        self._console.print(_progress_view.shown(text), soft_wrap=True, markup=False)
