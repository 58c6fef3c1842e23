"""How a child process reports to its parent and is told what to do: JSON lines over pipes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import struct
import termios
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
# While more than so many bytes wait for the parent there are no samples. A pipe holds four times as much: what happens
# still finds room in it while the parent stands still (Ctrl-Z).
MAX_UNREAD: Final = 16 << 10


class Cancelled(Exception):
    """The parent asked for an end: Ctrl-C, or it is gone itself."""


def reason_of(error: Exception) -> str:
    """What to tell a person, and the peer; nothing where the end was asked for, and costs nobody anything."""
    if isinstance(error, Cancelled):
        return str(error)
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
            a second in the end, once more when the context is left; so it must touch no guest memory. Not called while
            the parent does not read.
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
            if self._unread() <= MAX_UNREAD:
                self.event("progress", **values())
            if ended:
                return
            interval = (time.monotonic() - began) * INTERVAL_SHARE
            ended = over.wait(min(max(interval, FIRST_INTERVAL), LAST_INTERVAL))

    def _unread(self) -> int:
        """Bytes in the pipe to the parent."""
        # No pipe, but a file or a text in memory: it is never full.
        with contextlib.suppress(OSError):
            (size,) = struct.unpack("i", fcntl.ioctl(self._stream.fileno(), termios.FIONREAD, bytes(4)))
            return int(size)
        return 0


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
    """Whether to go on: what the parent and signals ask for on one side, the clock on the other. Any thread may ask."""

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._held_at: float | None = None
        self._paused = False
        # No Events: what sets them may be a signal that comes while another one does.
        self.requested = Flag()
        self._given_up = Flag()
        self._signalled = Flag()
        # The other process has ended: nobody comes back.
        self.alone = threading.Event()

    def listen(self, commands: CommandPipe) -> None:
        """Follow the command pipe on a thread of its own until it closes."""
        threading.Thread(target=self._follow, args=(commands,), name="commands", daemon=True).start()

    def _follow(self, commands: CommandPipe) -> None:
        does = {
            "cancel": self.requested.set,
            "give up": self.give_up,
            "pause": self.pause,
            "resume": self.resume,
            "alone": self.alone.set,
        }
        while (command := commands.read()) is not None:
            if (act := does.get(str(command.get("command")))) is not None:
                act()
        # End of file: nobody would read a result. Without the parent both sides end.
        self.requested.set()

    def signalled(self) -> None:
        """A signal that asks for an end: whoever sends a second one does not want to wait for it.

        What the parent says is none: one signal may have reached both.
        """
        if self._signalled.is_set():
            self._given_up.set()
        self._signalled.set()
        self.requested.set()

    def give_up(self) -> None:
        """End at once, even if that loses the guest."""
        self.requested.set()
        self._given_up.set()

    def pause(self) -> None:
        """Ask for a pause of the transfer."""
        self._paused = True

    def resume(self) -> None:
        """Ask for its end."""
        self._paused = False

    @property
    def paused(self) -> bool:
        """Whether the transfer is to pause. Whoever asks for an end wants no pause any more."""
        return self._paused and not self.requested.is_set()

    def limit(self, seconds: float) -> None:
        """No more than so many seconds from now."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def hold_clock(self) -> None:
        """The time until `release_clock` does not count."""
        if self._held_at is None:
            self._held_at = time.monotonic()

    def release_clock(self) -> None:
        """Let the clock go on."""
        if self._held_at is not None:
            self._deadline += time.monotonic() - self._held_at
            self._held_at = None

    def remaining(self) -> float:
        """Seconds to the deadline; 0 when it has passed."""
        return max(0.0, self._deadline - (self._held_at or time.monotonic()))

    def check(self) -> None:
        """Raise where the work must not go on; before the switch.

        Raises
        ------
        Cancelled
            The parent or a signal asked for an end.
        TimeoutError
            The time up to the switch is over.
        """
        if self.requested.is_set():
            raise Cancelled
        if not self.remaining():
            raise TimeoutError("the time for this migration is over")

    def check_given_up(self) -> None:
        """As `check`, after the switch: neither a first wish for an end nor the clock takes a guest's pages from it.

        Raises
        ------
        Cancelled
        """
        if self._given_up.is_set():
            raise Cancelled("the rest was given up")


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
