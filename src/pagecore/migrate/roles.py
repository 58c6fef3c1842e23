"""One side of a migration whose other side is elsewhere: its process, its events, what Ctrl-C means, the outcome."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any, Final

from pagecore.migrate.address import Terms
from pagecore.migrate.coordinator import Backstop, Child, Event
from pagecore.migrate.options import Options
from pagecore.migrate.outcome import EXIT_INTERRUPTED, HANDED_OVER, Outcome, Side, judge
from pagecore.migrate.rendezvous import new_session_id

__all__ = ["Receive", "Send"]

# What a side may take that gives up, and says so to the other.
GIVE_UP_SECONDS: Final = 5.0


class _Role:
    """What both roles share.

    Parameters
    ----------
    options : Options
    address : str
        As `parse_address` reads it.
    terms : Terms
    on_event : callable, optional
        Called with each event of this side, in the order of arrival, on the thread that calls `run`.
    """

    _role: str
    _other: str

    def __init__(
        self,
        options: Options,
        address: str,
        terms: Terms | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.options = options
        self._address = address
        self._terms = terms or Terms()
        self._on_event = on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._child: Child | None = None
        self._interrupts = 0
        self._backstop = Backstop(options.timeout)
        self._handed_over = False

    @property
    def pid(self) -> int:
        """The process id of this side; 0 before it was started."""
        return 0 if self._child is None else self._child.pid

    def interrupt(self) -> None:
        """Ctrl-C.

        The first time, before the switch: the guest stays at the source, and all ends. After it the guest runs at the
        destination, and this side goes on until everything has arrived, however long that takes. The second time: this
        side ends at once; after the switch it gives up the guest, says so to the other side, and ends then.

        Safe in a signal handler of the thread that calls `run`.
        """
        self._interrupts += 1
        # A SimpleQueue may be put to in a signal handler, whatever that interrupted.
        self._events.put({"event": "interrupted", "role": "parent", "times": self._interrupts})
        if self._interrupts > (2 if self._handed_over else 1) and self._child is not None:
            self._child.kill()

    def run(self) -> Outcome:
        """Take part in the migration, and say what became of it.

        Returns
        -------
        Outcome
        """
        child = self._child = Child(self._role, self._events.put)
        try:
            child.tell(
                {
                    "options": self.options.to_json(),
                    "address": self._address,
                    "terms": self._terms.to_json(),
                    **self._more(),
                }
            )
            self._follow(child)
            return self._judge(child.side)
        finally:
            child.kill()
            child.close()

    def _more(self) -> dict[str, Any]:
        """The rest of the child's configuration."""
        raise NotImplementedError

    def _peer(self, own: Side) -> Side:
        """What this side knows of the other one, which said nothing of itself."""
        raise NotImplementedError

    def _follow(self, child: Child) -> None:
        while child.side.status is None:
            if self._backstop.due:
                child.kill()
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                continue
            if event["role"] == self._role:
                child.side.take(event)
            self._backstop.take(event)
            self._look_at(event)
            if event["event"] == "interrupted":
                child.tell({"command": "cancel" if event["times"] == 1 else "give up"})
                if event["times"] > 1:
                    self._backstop.within(GIVE_UP_SECONDS)
            elif event["event"] in ("pause", "resume"):
                child.tell({"command": event["event"]})
            if self._on_event is not None:
                self._on_event(event)

    def _look_at(self, event: Event) -> None:
        if event["event"] == "phase" and event["phase"] in HANDED_OVER:
            self._handed_over = True

    def _judge(self, own: Side) -> Outcome:
        peer = self._peer(own)
        told = own.events.get("peer", {})
        if "result" in told:
            peer.events["result"] = told["result"]
        elif "error" in told:
            text = f"all pages arrived, but the {self._other} did not say what it found: {told['error']}"
            peer.events["failed"] = {"error": text, "kind": "Silence", "guest": "destination"}
        source, destination = (own, peer) if self._role == "source" else (peer, own)
        outcome = judge(self.options, source, destination, min(self._interrupts, 1))
        if self._interrupts < 2 or outcome.guest_at in ("destination", "unknown"):
            return outcome
        fate, where = self._fate_of_a_kill()
        text = f"interrupted twice: the {self._role} was ended at once; {fate}"
        return Outcome(False, EXIT_INTERRUPTED, where, text, outcome.report)

    def _fate_of_a_kill(self) -> tuple[str, str]:
        raise NotImplementedError


class Send(_Role):
    """The source of a migration to a destination that listens somewhere.

    Parameters
    ----------
    options : Options
    address : str
        Where it listens.
    terms : Terms, optional
    on_event : callable, optional
    """

    _role = "source"
    _other = "destination"

    def pause(self) -> None:
        """Hold the guest's pages back until `resume`; see `Migration.pause`."""
        self._events.put({"event": "pause", "role": "parent"})

    def resume(self) -> None:
        """End a pause."""
        self._events.put({"event": "resume", "role": "parent"})

    def _more(self) -> dict[str, Any]:
        self._backstop.start()
        # The source names the session; who does not know the name cannot join it.
        return {"session": new_session_id()}

    def _peer(self, own: Side) -> Side:
        return Side("destination")

    def _fate_of_a_kill(self) -> tuple[str, str]:
        return "the guest is gone", "gone"


class Receive(_Role):
    """The destination of a migration: listens, and takes the first guest that comes.

    Parameters
    ----------
    options : Options
        Those of this side; the guest's come from the source.
    address : str
        Where to listen.
    terms : Terms, optional
    on_event : callable, optional
    max_size : int, optional
        Bytes of memory that a guest may have.
    """

    _role = "destination"
    _other = "source"

    def __init__(
        self,
        options: Options,
        address: str,
        terms: Terms | None = None,
        on_event: Callable[[Event], None] | None = None,
        *,
        max_size: int | None = None,
    ) -> None:
        super().__init__(options, address, terms, on_event)
        self._max_size = max_size

    def _more(self) -> dict[str, Any]:
        return {"max_size": self._max_size}

    def _look_at(self, event: Event) -> None:
        super()._look_at(event)
        if event["event"] == "session":
            # Nobody knows how long the wait for it was to be.
            self._backstop.start()
            with contextlib.suppress(ValueError):
                self.options = Options.from_json(event["options"])

    def _peer(self, own: Side) -> Side:
        peer = Side("source")
        if "session" in own.events:
            peer.events["guest"] = {"kind": self.options.guest, "reason": "as the source says"}
            # As far as anybody knows here, it stays there until it runs here.
            if not self._handed_over:
                peer.events["failed"] = {"error": "", "kind": "Silence", "guest": "source"}
        return peer

    def _fate_of_a_kill(self) -> tuple[str, str]:
        if self._handed_over:
            return "the guest is gone", "gone"
        return "the guest was at the source", "source"
