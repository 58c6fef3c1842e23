"""How a child process reports to its parent and is told what to do: JSON lines over pipes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

from pagecore import Convergence

__all__ = [
    "Cancelled",
    "CommandPipe",
    "Reporter",
    "Stop",
    "read_lines",
    "reason_of",
    "round_json",
    "take_report_stream",
]

# Often enough for a run of a second to have a curve; a long one is looked at a few times a second.
FIRST_INTERVAL: Final = 0.01
LAST_INTERVAL: Final = 0.25
INTERVAL_SHARE: Final = 1 / 256
MAX_LINE: Final = 1 << 20


class Cancelled(Exception):
    """The parent asked for an end: Ctrl-C, or it is gone itself."""


def reason_of(error: Exception) -> str:
    """What to tell a person, and the peer; nothing where the end was asked for."""
    if isinstance(error, Cancelled):
        return ""
    # Some say nothing of themselves, MemoryError for one.
    return str(error) or type(error).__name__


class Reporter:
    """Writes events to the parent, one JSON object a line. Any thread may report."""

    def __init__(self, stream: IO[str], role: str) -> None:
        self._stream = stream
        self._role = role
        self._lock = threading.Lock()

    def event(self, name: str, **values: Any) -> None:
        """Report something that happened."""
        line = json.dumps({"event": name, "role": self._role, "at": time.monotonic(), **values})
        # The parent may be gone; its closed command pipe ends this process, not a failed report.
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    @contextlib.contextmanager
    def sampling(self, values: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Report how far it is, as "progress" events from a thread of its own, for as long as the context lasts.

        Parameters
        ----------
        values : callable
            What to report: counters since the start. Called on that thread, many times a second at first and four times
            a second in the end, once more when the context is left; so it must touch no guest memory.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(values, over), name="samples", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _sample(self, values: Callable[[], dict[str, Any]], over: threading.Event) -> None:
        began = time.monotonic()
        ended = False
        while True:
            self.event("progress", **values())
            if ended:
                return
            interval = (time.monotonic() - began) * INTERVAL_SHARE
            ended = over.wait(min(max(interval, FIRST_INTERVAL), LAST_INTERVAL))


class Flag:
    """As `threading.Event`, but nobody can wait for it, and it has no lock that a signal handler may meet."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Set it."""
        self._set = True

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set


class Stop:
    """Whether to go on: the parent's commands on one side, the deadline on the other. Any thread may ask."""

    def __init__(self, timeout: float) -> None:
        self.deadline = time.monotonic() + timeout
        # No Event: what sets it may be a signal that comes while another one does.
        self.requested = Flag()
        # The other process has ended: nobody comes back.
        self.alone = threading.Event()
        self.parent_gone = False

    def listen(self, commands: CommandPipe) -> None:
        """Follow the command pipe on a thread of its own until it closes."""
        threading.Thread(target=self._follow, args=(commands,), name="commands", daemon=True).start()

    def _follow(self, commands: CommandPipe) -> None:
        while (command := commands.read()) is not None:
            if command.get("command") == "cancel":
                self.cancel(float(command.get("deadline", 10.0)))
            elif command.get("command") == "alone":
                self.alone.set()
        # End of file: nobody would read a result. Without the parent both sides end.
        self.parent_gone = True
        self.cancel(10.0)

    def cancel(self, within: float) -> None:
        """Ask for an end within so many seconds."""
        self.deadline = min(self.deadline, time.monotonic() + within)
        self.requested.set()

    def remaining(self) -> float:
        """Seconds to the deadline; 0 when it has passed."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise where the work must not go on.

        Raises
        ------
        Cancelled
            The parent asked for an end.
        TimeoutError
            The time for all of it is over.
        """
        if self.requested.is_set():
            raise Cancelled
        self.check_deadline()

    def check_deadline(self) -> None:
        """As `check`, after the switch: a cancel only brings the deadline nearer.

        Raises
        ------
        TimeoutError
        """
        if time.monotonic() >= self.deadline:
            raise TimeoutError("the time for this migration is over")


def read_lines(stream: IO[str], handle: Callable[[dict[str, Any]], None]) -> None:
    """Hand each event of a child to `handle`, until the child closes its end."""
    while line := stream.readline(MAX_LINE):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            handle(event)


class CommandPipe:
    """What the parent says: lines from standard input.

    Read without a buffer object, whose lock a thread could still hold when the interpreter ends.
    """

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._pending = b""

    def read(self) -> dict[str, Any] | None:
        """The next JSON object; None once the parent has closed its end."""
        while True:
            line, separator, rest = self._pending.partition(b"\n")
            if separator:
                self._pending = rest
                with contextlib.suppress(ValueError):
                    command = json.loads(line)
                    if isinstance(command, dict):
                        return command
                continue
            data = os.read(self._descriptor, 1 << 16)
            if not data or len(self._pending) > MAX_LINE:
                return None
            self._pending += data


def round_json(figures: Convergence) -> dict[str, Any]:
    """The figures of a round as plain values; null where there is no number."""
    values = dataclasses.asdict(figures)
    values["advice"] = figures.advice.value
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()}


def take_report_stream() -> IO[str]:
    """Standard output as the pipe to the parent; whatever else prints goes to standard error from now on."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return reports
