"""What the migration tests share: one run with its events, and a proxy that gets between the two sides."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from pagecore.migrate import Migration, Options, Outcome
from pagecore.migrate.address import parse_address
from pagecore.wire import HEADER_BYTES, FrameType, decode_hello

Event = dict[str, Any]
# Small, but enough for some thousand pages, and for faults after the switch.
SIZE = 32 << 20


class Run:
    """One migration that a test drives by its events.

    Parameters
    ----------
    act : callable, optional
        ``act(run, event)``, called with each event; `signal` and `interrupt` are what it may do.
    """

    def __init__(
        self,
        act: Callable[[Run, Event], None] | None = None,
        *,
        via: Callable[[str], str] | None = None,
        **options: Any,
    ) -> None:
        values = {"size": SIZE, "timeout": 60.0, "stall_timeout": 10.0, "seed": 7, **options}
        self.events: list[Event] = []
        self._act = act
        self._done: set[str] = set()
        self.migration = Migration(Options(**values), self._event, via=via)
        began = time.monotonic()
        self.outcome: Outcome = self.migration.run()
        self.seconds = time.monotonic() - began

    def _event(self, event: Event) -> None:
        self.events.append(event)
        if self._act is not None:
            self._act(self, event)

    def once(self, name: str) -> bool:
        """True the first time that it is asked."""
        first = name not in self._done
        self._done.add(name)
        return first

    def signal(self, role: str, number: int) -> None:
        """Send a signal to one side, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.migration.pids[role], number)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.migration.interrupt()

    def named(self, name: str, role: str | None = None) -> list[Event]:
        """The events of a name."""
        return [event for event in self.events if event["event"] == name and role in (None, event["role"])]

    @property
    def source(self) -> dict[str, Any]:
        """What the source counted."""
        report: dict[str, Any] = self.outcome.report["source"]
        return report

    @property
    def placement(self) -> dict[str, Any]:
        """What the placement loop counted."""
        report: dict[str, Any] = self.outcome.report["destination"]["placement"]
        return report


def at(phase: str, role: str = "source", round: int | None = None) -> Callable[[Event], bool]:
    """Whether an event is the beginning of a phase."""

    def matches(event: Event) -> bool:
        return (
            event["event"] == "phase"
            and event["phase"] == phase
            and event["role"] == role
            and (round is None or event["round"] == round)
        )

    return matches


class Frame:
    """A frame on its way through the proxy. Change it, or make it `None` to cut all streams there."""

    def __init__(self, data: bytearray, stream: str, to_destination: bool) -> None:
        self.data = data
        self.stream = stream
        self.to_destination = to_destination

    @property
    def kind(self) -> int:
        return self.data[4]

    def put(self, offset: int, layout: str, value: int) -> None:
        """Overwrite one field."""
        struct.pack_into(layout, self.data, offset, value)


class Proxy:
    """Passes frames on between source and destination, each through `change` first.

    ``change(frame)`` returns the bytes to send on, or None to break all the streams at this point.
    """

    def __init__(self, directory: str, change: Callable[[Frame], bytes | bytearray | None]) -> None:
        self._change = change
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._path = os.path.join(directory, "proxy")
        self._lock = threading.Lock()

    def __call__(self, address: str) -> str:
        """As the `via` of a Migration."""
        self._upstream = parse_address(address)
        self._listener.bind(self._path)
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()
        return f"unix:{self._path}"

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        family, where = self._upstream
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(family)
                self._sockets += [near, far]
                far.connect(where)
                names: list[str] = []
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(*pair, names, pair[0] is near), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, names: list[str], to_destination: bool) -> None:
        with contextlib.suppress(OSError):
            while (header := self._read(source, HEADER_BYTES)) is not None:
                payload = self._read(source, struct.unpack_from("<I", header, 32)[0])
                if payload is None:
                    break
                if not names:
                    # The first frame of each stream says which it is, before there is any the other way.
                    names.append(decode_hello(bytes(payload)).stream)
                with self._lock:
                    changed = self._change(Frame(header + payload, names[0], to_destination))
                if changed is None:
                    self.close()
                    return
                target.sendall(changed)
        # The end of a stream travels on, both ways; what was sent before it arrives first.
        for sock, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                sock.shutdown(how)

    @staticmethod
    def _read(sock: socket.socket, size: int) -> bytearray | None:
        data = bytearray()
        while len(data) < size:
            some = sock.recv(min(1 << 20, size - len(data)))
            if not some:
                return None
            data += some
        return data


class Nth:
    """Counts the frames of a kind, and says which is the one to spoil."""

    def __init__(self, kind: FrameType, number: int = 0, after: FrameType | None = None) -> None:
        self.kind = kind
        self.number = number
        self.after = after
        self.hit = False

    def __call__(self, frame: Frame) -> bool:
        if self.after is not None:
            if frame.kind == self.after:
                self.after = None
            return False
        if frame.kind != self.kind or self.hit:
            return False
        self.number -= 1
        self.hit = self.number < 0
        return self.hit
