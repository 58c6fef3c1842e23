"""Runs a migration on this machine: starts both processes, follows them, says what Ctrl-C means."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from pagecore.migrate.children import start_python
from pagecore.migrate.options import Options
from pagecore.migrate.outcome import HANDED_OVER, Outcome, Side, judge
from pagecore.migrate.progress import read_lines
from pagecore.migrate.rendezvous import new_session_id

__all__ = ["Migration"]

Event = dict[str, Any]

# What a child may take to end once it has nothing more to do.
GRACE_SECONDS: Final = 15.0
MAX_STDERR: Final = 16 << 10


class Backstop:
    """When a process that does not end by itself is killed: never while that would cost the guest its pages.

    Parameters
    ----------
    timeout : float
        Seconds that the process gives itself up to the switch, without its pauses.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._at = float("inf")
        # Whoever wants an end wants no pause: it lifts the clock's bound, not this one.
        self._latest = float("inf")
        self._handed_over = False

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= min(self._at, self._latest)

    def start(self) -> None:
        """The time begins, or begins anew; not what is left of it after `within`."""
        self._at = time.monotonic() + self._timeout + GRACE_SECONDS

    def within(self, seconds: float) -> None:
        """So many seconds from now at the latest, whatever begins anew or pauses."""
        self._latest = min(self._latest, time.monotonic() + seconds)

    def failed(self, role: str) -> None:
        """One of two sides has failed: the other is to come to its end."""
        # But a destination that may have the guest: what it has is verified yet, and what it misses it bounds itself.
        if not (self._handed_over and role == "source"):
            self.within(GRACE_SECONDS)

    def take(self, event: Event) -> None:
        """What happens decides for how long it may go on."""
        if self._handed_over:
            return
        # Before the switch a lost link is the end, and not reported as lost.
        phase = event["phase"] if event["event"] == "phase" else ""
        # A destination in the switch may have acknowledged: its own word alone gives the guest back (S9).
        waits = phase == "switch" and event["role"] == "destination"
        if waits or phase in HANDED_OVER or event["event"] == "link_lost":
            self._handed_over = True
            self._at = self._latest = float("inf")
        elif event["event"] == "paused":
            self._at = float("inf")
        elif event["event"] == "resumed":
            self.start()
        elif event["event"] == "interrupted":
            self.within(GRACE_SECONDS)


class Child:
    """One of the two processes, with pipes for commands, reports and complaints."""

    def __init__(self, role: str, put: Callable[[Event], None]) -> None:
        self.side = Side(role)
        self.process: subprocess.Popen[str] = start_python(
            "pagecore.migrate.child",
            role,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._put = put
        self._threads = [
            threading.Thread(target=self._follow, name=f"{role}-reports", daemon=True),
            threading.Thread(target=self._complain, name=f"{role}-stderr", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def tell(self, message: Event) -> None:
        """Send one command; a child that is gone does not hear it."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def close(self) -> None:
        """Wait for the end of a child that was killed or is ending, and of its pipes."""
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(GRACE_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        read_lines(self.process.stdout, self._put)
        self._put({"event": "ended", "role": self.side.role, "status": self.process.wait()})

    def _complain(self) -> None:
        assert self.process.stderr is not None
        while text := self.process.stderr.read(4096):
            self.side.stderr = (self.side.stderr + text)[-MAX_STDERR:]


class Migration:
    """One migration from start to outcome.

    Parameters
    ----------
    options : Options
    on_event : callable, optional
        Called with each event of either side, in the order of arrival, on the thread that calls `run`.
    via : callable, optional
        Gets the address where the destination listens; returns the one that the source is to connect to: this
        is where a proxy gets between them.
    """

    def __init__(
        self,
        options: Options,
        on_event: Callable[[Event], None] | None = None,
        *,
        via: Callable[[str], str] | None = None,
    ) -> None:
        self.options = options
        self._on_event = on_event
        self._via = via
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._children: dict[str, Child] = {}
        self._interrupts = 0
        self._paused = False
        self._backstop = Backstop(options.timeout)

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the two sides, by role."""
        return {role: child.pid for role, child in self._children.items()}

    def interrupt(self) -> None:
        """Ctrl-C.

        The first time, before the switch: the guest stays at the source, and all ends. After it the guest runs at the
        destination, and the source serves until all of its memory is there, however long that takes. The second time:
        both sides end at once, and the guest with them.

        Safe in a signal handler of the thread that calls `run`, and in any other thread.
        """
        self._interrupts += 1
        # A SimpleQueue may be put to in a signal handler, whatever that interrupted.
        self._events.put({"event": "interrupted", "role": "parent", "times": self._interrupts})
        if self._interrupts > 1:
            # A copy: `run` may be adding one on another thread.
            for child in list(self._children.values()):
                child.kill()

    def pause(self) -> None:
        """Hold the guest's pages back, for as long as it takes until `resume`; may be called as `interrupt` may.

        Before the switch the guest runs on at the source, and the time does not count. In the switch it has no effect
        until that is over. After it what the guest at the destination touches is still sent, and nothing else. Where
        nothing is owed any more, be it for that, the pause is over and the migration ends; `interrupt` ends it, too.
        """
        self._events.put({"event": "pause", "role": "parent"})

    def resume(self) -> None:
        """End a pause."""
        self._events.put({"event": "resume", "role": "parent"})

    def run(self) -> Outcome:
        """Migrate, and say what became of it.

        Returns
        -------
        Outcome
        """
        self._backstop.start()
        with tempfile.TemporaryDirectory(prefix="pagecore-") as directory:
            try:
                return self._run(os.path.join(directory, "link"))
            finally:
                for child in self._children.values():
                    child.kill()
                    child.close()

    def _run(self, path: str) -> Outcome:
        for role in ("destination", "source"):
            self._children[role] = Child(role, self._events.put)
        address = f"unix:{path}" if self.options.link == "unix" else "tcp:127.0.0.1:0"
        configuration = {"options": self.options.to_json(), "session": new_session_id()}
        self._children["destination"].tell({**configuration, "address": address})
        running = set(self._children)
        configured = False
        while running:
            event = self._next()
            if event is None:
                continue
            role = event["role"]
            self._backstop.take(event)
            if role in self._children:
                self._children[role].side.take(event)
            if event["event"] == "listening":
                where = event["address"] if self._via is None else self._via(event["address"])
                self._children["source"].tell({**configuration, "address": where})
                configured = True
                if self._paused:
                    self._command("pause")
                if self._interrupts:
                    self._command("cancel")
            elif event["event"] in ("pause", "resume"):
                self._paused = event["event"] == "pause"
                if configured:
                    self._command(event["event"])
            elif event["event"] == "interrupted" and configured:
                self._command("cancel")
            elif event["event"] == "ended":
                running.discard(role)
                self._other(role).tell({"command": "alone"})
                if event["status"]:
                    self._end_other(role)
            if self._on_event is not None:
                self._on_event(event)
        return judge(
            self.options,
            self._children["source"].side,
            self._children["destination"].side,
            self._interrupts,
        )

    def _command(self, command: str) -> None:
        # The source knows on which side of the switch it is, and tells the destination.
        self._children["source"].tell({"command": command})

    def _other(self, role: str) -> Child:
        return self._children["source" if role == "destination" else "destination"]

    def _next(self) -> Event | None:
        """The next event; None where nothing came for a moment: time to look at deadlines."""
        if self._backstop.due:
            for child in self._children.values():
                child.kill()
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=0.1)
        return None

    def _end_other(self, role: str) -> None:
        """One side failed. The other notices on the link, if there is one yet; bound its time in any case."""
        other = self._other(role)
        other.tell({"command": "cancel"})
        if other.side.role == "source" and not other.side.events:
            # It was never told what to do.
            other.kill()
        self._backstop.failed(role)
