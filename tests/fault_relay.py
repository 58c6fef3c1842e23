"""A relay between the two sides of a migration that passes bytes on until a fault is due, at a byte of a stream."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pagecore.migrate.address import parse_address
from pagecore.wire import HEADER_BYTES, FrameType, decode_hello

CHUNK: Final = 1 << 16
TICK: Final = 0.05


@dataclass
class Fault:
    """What is to happen when so many bytes have passed on a stream.

    Attributes
    ----------
    action : str
        ``cut`` closes all streams of the link, ``cut-one`` this one alone, ``half-open`` passes nothing on any more
        and closes nothing, ``stall`` passes nothing on for a while, ``hold`` passes nothing on in this direction of
        this stream, ``call`` calls a function, ``inject`` puts other bytes before the next frame.
    stream : str
    to_destination : bool
        The direction.
    after : int
        Bytes of it that still pass, HELLO included; where `kind` is given, bytes from the beginning of that frame;
        where `since` is, bytes from when that frame had passed on the control stream.
    kind, since : FrameType, optional
    link : int
        Which link of the session it is, counted from 0 in the order of their control streams. Where `kind` is given,
        the first from there on.
    seconds : float
        Of a stall.
    call : callable, optional
    data : bytes
        What is injected.
    """

    action: str
    stream: str = "control"
    to_destination: bool = True
    after: int = 0
    kind: FrameType | None = None
    since: FrameType | None = None
    link: int = 0
    seconds: float = 0.3
    call: Callable[[], object] | None = None
    data: bytes = b""
    hit: bool = field(default=False, init=False)

    def __str__(self) -> str:
        way = ">" if self.to_destination else "<"
        frame = self.kind or self.since
        where = f"{frame.name}+{self.after}" if frame is not None else str(self.after)
        return f"{self.action}@{self.link}{way}{self.stream}:{where}"


class Cable:
    """The streams of one link, between the two pairs of sockets."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sockets: list[socket.socket] = []
        self.pipes: list[Pipe] = []
        # By the kind of a frame that has passed on the control stream: what had passed on each pipe by then.
        self.marks: dict[int, dict[Pipe, int]] = {}
        self.still_until = 0.0
        self.cut = False

    def close(self) -> None:
        self.cut = True
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Pipe:
    """One direction of one stream; follows its frames."""

    def __init__(self, cable: Cable, stream: str, *, to_destination: bool) -> None:
        self.cable = cable
        self.stream = stream
        self.to_destination = to_destination
        self.passed = 0
        self._header = b""
        self._left = 0
        cable.pipes.append(self)

    def take(self, data: bytes) -> list[int]:
        """Go on by these bytes; the kinds of the frames whose header is in them."""
        kinds = []
        self.passed += len(data)
        while data:
            if self._left:
                some = min(self._left, len(data))
                self._left -= some
                data = data[some:]
                continue
            some = HEADER_BYTES - len(self._header)
            self._header += data[:some]
            data = data[some:]
            if len(self._header) == HEADER_BYTES:
                kinds.append(self._header[4])
                self._left = struct.unpack_from("<I", self._header, 32)[0]
                self._header = b""
        return kinds

    def find(self, data: bytes, kind: FrameType) -> int | None:
        """Where in these bytes a frame of this kind begins; None where none does, or its header is not whole."""
        at, header = self._left, self._header
        while at < len(data):
            start = at - len(header)
            whole = header + data[at : at + HEADER_BYTES - len(header)]
            if len(whole) < HEADER_BYTES:
                return None
            if whole[4] == kind:
                return start
            at, header = start + HEADER_BYTES + struct.unpack_from("<I", whole, 32)[0], b""
        return None

    def boundary(self, data: bytes, wanted: int) -> int | None:
        """Where the first frame begins that does so at `wanted` or later; None where these bytes do not say."""
        at, header = self._left, self._header
        while True:
            start = at - len(header)
            if start >= wanted:
                return start if start <= len(data) else None
            whole = header + data[at : at + HEADER_BYTES - len(header)]
            if len(whole) < HEADER_BYTES:
                return None
            at, header = start + HEADER_BYTES + struct.unpack_from("<I", whole, 32)[0], b""


class Relay:
    """As the `via` of a Migration: passes all on, and provokes its faults, each once.

    Parameters
    ----------
    directory : str
        For its socket.
    faults : Fault
    """

    def __init__(self, directory: str, *faults: Fault) -> None:
        self._path = os.path.join(directory, "relay")
        self.faults: tuple[Fault, ...] = faults
        self._cables: list[Cable] = []
        self._generations: dict[int, Cable] = {}
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._lock = threading.Lock()
        self._closed = False
        # While it is true, whoever connects is sent away.
        self.barred = False
        # The frames that passed: link, stream, to the destination or not, kind.
        self.frames: list[tuple[int, str, bool, int]] = []

    def __call__(self, address: str) -> str:
        self._upstream = parse_address(address)
        self._listener.bind(self._path)
        self._listener.listen(64)
        self._start(self._accept)
        return f"unix:{self._path}"

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for cable in self._cables:
            cable.close()
        for thread in list(self._threads):
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()
        for cable in self._cables:
            for sock in cable.sockets:
                sock.close()

    def cut(self) -> None:
        """Close every stream."""
        for cable in list(self._cables):
            cable.close()

    def cut_for_good(self) -> None:
        """Close every stream, and let nobody connect any more."""
        self.barred = True
        self.cut()

    def let_in(self) -> None:
        """Let whoever connects pass again."""
        self.barred = False

    def _start(self, body: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                near, _ = self._listener.accept()
                if self.barred:
                    near.close()
                else:
                    self._start(self._open, near)

    def _open(self, near: socket.socket) -> None:
        family, where = self._upstream
        far = socket.socket(family)
        try:
            first = _exactly(near, HEADER_BYTES)
            first += _exactly(near, struct.unpack_from("<I", first, 32)[0])
            hello = decode_hello(first[HEADER_BYTES:])
            far.connect(where)
        except (OSError, EOFError):
            near.close()
            far.close()
            return
        with self._lock:
            if hello.stream == "control":
                cable = Cable(len(self._cables))
                self._cables.append(cable)
                self._generations[hello.generation] = cable
            cable = self._generations[hello.generation]
            cable.sockets += [near, far]
        if self._closed or cable.cut:
            cable.close()
            return
        self._start(self._pump, Pipe(cable, hello.stream, to_destination=False), far, near, b"")
        self._pump(Pipe(cable, hello.stream, to_destination=True), near, far, first)

    def _pump(self, pipe: Pipe, source: socket.socket, target: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                while data:
                    due = self._next_fault(pipe, data)
                    size = len(data) if due is None else due[1]
                    self._wait_while_still(pipe.cable)
                    if pipe.cable.cut:
                        return
                    target.sendall(data[:size])
                    for kind in pipe.take(data[:size]):
                        self.frames.append((pipe.cable.number, pipe.stream, pipe.to_destination, kind))
                        if pipe.stream == "control":
                            pipe.cable.marks[kind] = {one: one.passed for one in pipe.cable.pipes}
                    data = data[size:]
                    if due is not None:
                        self._provoke(due[0], pipe.cable, source, target)
                        while due[0].action == "hold" and not pipe.cable.cut and not self._closed:
                            time.sleep(TICK)
                data = source.recv(CHUNK)
                if not data:
                    break
        # The end of a stream travels on, both ways; what was sent before it arrives first. A half-open one has no end.
        self._wait_while_still(pipe.cable)
        for sock, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                sock.shutdown(how)

    def _next_fault(self, pipe: Pipe, data: bytes) -> tuple[Fault, int] | None:
        """The first fault in this piece, and how much of it still passes."""
        found: list[tuple[Fault, int]] = []
        for fault in self.faults:
            if fault.hit or (fault.stream, fault.to_destination) != (pipe.stream, pipe.to_destination):
                continue
            if fault.since is not None:
                from_there = pipe.cable.marks.get(fault.since, {}).get(pipe)
                known = from_there is not None and pipe.cable.number >= fault.link
                at = max(0, fault.after + from_there - pipe.passed) if known else None
            elif fault.kind is None:
                at = fault.after - pipe.passed if fault.link == pipe.cable.number else None
            else:
                begins = pipe.find(data, fault.kind) if pipe.cable.number >= fault.link else None
                at = None if begins is None else max(0, begins + fault.after)
            if at is not None and fault.action == "inject":
                # In the middle of a frame it would be a page's content, which nothing but the audit finds out.
                at = pipe.boundary(data, at)
            if at is not None and 0 <= at <= len(data):
                found.append((fault, at))
        return min(found, key=lambda one: one[1]) if found else None

    def _provoke(self, fault: Fault, cable: Cable, source: socket.socket, target: socket.socket) -> None:
        with self._lock:
            if fault.hit:
                return
            fault.hit = True
        if fault.action == "cut":
            cable.close()
        elif fault.action == "cut-one":
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        elif fault.action == "half-open":
            cable.still_until = float("inf")
        elif fault.action == "stall":
            cable.still_until = time.monotonic() + fault.seconds
        elif fault.action == "hold":
            pass
        elif fault.action == "inject":
            target.sendall(fault.data)
        else:
            assert fault.call is not None
            fault.call()

    def _wait_while_still(self, cable: Cable) -> None:
        while time.monotonic() < cable.still_until and not cable.cut and not self._closed:
            # Bytes may pile up; nobody looks at them.
            time.sleep(TICK)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        some = sock.recv(size - len(data))
        if not some:
            raise EOFError
        data += some
    return data
