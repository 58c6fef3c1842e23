"""The VMM that the suite plays: memory, a descriptor, a handshake, and threads that touch pages."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from pagecore import Feature, Region, UnsupportedError, Userfaultfd
from pagecore.conformance.snapshot import HOLE, NPAGES, PAGE, Snapshot

__all__ = ["QUIET", "Area", "Failed", "HandlerEnded", "NotApplicable", "Touch", "Vmm"]

POLL: Final = 0.001
STARTING: Final = 5.0
QUIET: Final = 0.3  # how long a page that must not be served is watched
MADV_FREE: Final = 8
MAP_HUGETLB: Final = 0x40000
MAP_HUGE_SHIFT: Final = 26

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Failed(Exception):
    """The handler did something else than it must; the message says what was seen."""


class NotApplicable(Exception):
    """The row cannot be run here; the message says why."""


class HandlerEnded(Exception):
    """The handler has ended; whether that was well is for whoever started it to say."""


class Touch(threading.Thread):
    """One access to guest memory, on a thread of its own and without the GIL: it waits while the page is missing."""

    def __init__(self, body: Callable[[], Any], name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._body = body
        self.result: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self.result = self._body()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - began


class Area:
    """A region of guest memory: where it lies, and where its content stands in the snapshot.

    Pages are numbered as in the snapshot.
    """

    def __init__(self, first: int, count: int, page_size: int) -> None:
        self.first = first
        self.count = count
        self.page_size = page_size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if page_size == PAGE:
            self.memory = mmap.mmap(-1, count * PAGE, flags=flags)
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        else:
            flags |= MAP_HUGETLB | (page_size.bit_length() - 1) << MAP_HUGE_SHIFT
            self.memory = mmap.mmap(-1, count * PAGE, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.region: Region | None = None

    def fields(self) -> dict[str, int]:
        """The region as Firecracker 1.12 and newer describe it."""
        return {
            "base_host_virt_addr": self.address,
            "size": self.count * PAGE,
            "offset": self.first * PAGE,
            "page_size": self.page_size,
            "page_size_kib": self.page_size,
        }


class Vmm:
    """One guest: the whole snapshot as its memory, and a handler at the other end of a socket.

    Parameters
    ----------
    socket_path : str
        Where the handler listens.
    snapshot : Snapshot
        What it serves.
    patience : float
        Seconds after which somebody who still waits is stuck.
    may_kill : bool
        The handler may be ended.
    """

    def __init__(self, socket_path: str, snapshot: Snapshot, patience: float, *, may_kill: bool) -> None:
        self.socket_path = socket_path
        self.snapshot = snapshot
        self.patience = patience
        self.may_kill = may_kill
        self.areas: list[Area] = []
        self.handler = -1  # a pidfd of whoever listens
        self.handler_pid = 0
        self.stream: socket.socket | None = None
        self.next: Vmm | None = None
        self._uffd: Userfaultfd | None = None

    # Memory --------------------------------------------------------------------------------------------------------

    @property
    def uffd(self) -> Userfaultfd:
        """The descriptor, once memory is mapped."""
        assert self._uffd is not None
        return self._uffd

    def map(self, cuts: Sequence[int] = (), features: Feature = Feature.EVENT_REMOVE, *, page_size: int = PAGE) -> None:
        """Map and register the guest's memory, cut into several regions before these pages."""
        try:
            self._uffd = Userfaultfd(features, user_mode_only=False)
        except UnsupportedError as error:
            raise NotApplicable(str(error)) from None
        edges = [0, *cuts, NPAGES]
        try:
            self.areas = [Area(first, end - first, page_size) for first, end in itertools.pairwise(edges)]
        except OSError as error:
            need = NPAGES * PAGE // page_size
            raise NotApplicable(f"{error}: {need} free pages of {page_size} bytes are needed (nr_hugepages)") from None
        for number, area in enumerate(self.areas):
            area.region = self._uffd.register(area.memory, page_size=page_size, region_id=number)

    def address(self, page: int) -> int:
        """Where a page of the snapshot lies."""
        for area in self.areas:
            if area.first <= page < area.first + area.count:
                return area.address + (page - area.first) * PAGE
        raise IndexError(f"page {page} is outside [0, {NPAGES})")

    def place(self, page: int, data: bytes, *, wake: bool = True) -> None:
        """Place a page ourselves, as a VMM may before a handler is there."""
        area = next(area for area in self.areas if area.first <= page < area.first + area.count)
        assert area.region is not None
        result = area.region.place(page - area.first, data, wake=wake)
        assert result.placed == 1, "the VMM could not place its own page"

    # The handler ---------------------------------------------------------------------------------------------------

    def connect(self, *, another: bool = False) -> socket.socket:
        """Connect to the handler, which may be starting up; to another one, where the first has ended."""
        # One that the suite has started needs the time that a process takes to come up.
        deadline = time.monotonic() + max(STARTING if self.may_kill else 0.0, self.patience)
        while True:
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                stream.connect(self.socket_path)
            except OSError as error:
                stream.close()
                if time.monotonic() > deadline or (self.handler_ended and not another):
                    raise Failed(f"nobody listens at the socket: {os.strerror(error.errno or 0)}") from None
                time.sleep(0.01)
                continue
            break
        self.handler = -1  # of another pid namespace: its end goes unseen
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.handler_pid = struct.unpack("3i", credentials)[0]
        if self.handler_pid > 0:
            with contextlib.suppress(OSError):
                self.handler = os.pidfd_open(self.handler_pid)
        self.stream = stream
        return stream

    def hand_over(self, body: bytes | None = None, *, fds: Sequence[int] | None = None, parts: int = 1) -> None:
        """Send the handshake: a JSON array of regions, and the descriptor with its first byte."""
        stream = self.stream or self.connect()
        if body is None:
            body = json.dumps([area.fields() for area in self.areas], separators=(",", ":")).encode()
        sent = socket.send_fds(stream, [body[: -(-len(body) // parts)]], [self.uffd.fileno()] if fds is None else fds)
        while sent < len(body):
            # A later part comes when the first has been read, or at least had the time to be.
            time.sleep(0.02)
            sent += stream.send(body[sent : sent + -(-len(body) // parts)])

    def start(self, cuts: Sequence[int] = (), features: Feature = Feature.EVENT_REMOVE) -> None:
        """Memory and handshake, as a VMM does it."""
        self.map(cuts, features)
        self.hand_over()

    @property
    def handler_ended(self) -> bool:
        """Whether the process that listened has ended, as far as that can be seen."""
        return self.handler >= 0 and bool(select.select([self.handler], [], [], 0)[0])

    def wait_refused(self) -> None:
        """Wait until the handler has ended the connection, or itself."""
        assert self.stream is not None
        fds: list[Any] = [self.stream, *([self.handler] if self.handler >= 0 else [])]
        if not select.select(fds, [], [], self.patience)[0]:
            raise Failed(f"after {self.patience:g} s the connection is still open")

    def signal_handler(self, number: signal.Signals) -> None:
        """Send the handler a signal, if it is the suite's own."""
        if not self.may_kill:
            raise NotApplicable("only a handler that the suite has started is sent signals: see --command")
        if self.handler < 0:
            raise NotApplicable("the handler's process cannot be seen from here")
        signal.pidfd_send_signal(self.handler, number)

    def pause_handler(self) -> None:
        """Stop the handler's threads where they are."""
        self.signal_handler(signal.SIGSTOP)
        deadline = time.monotonic() + self.patience
        while self._handler_state() != "T":
            if time.monotonic() > deadline:
                raise Failed("the handler does not stand still")
            time.sleep(POLL)

    def _handler_state(self) -> str:
        with open(f"/proc/{self.handler_pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]

    def wait_ended(self) -> None:
        """Wait until the handler's process has ended."""
        if not select.select([self.handler], [], [], self.patience)[0]:
            raise Failed(f"after {self.patience:g} s the handler is still there")

    # Access --------------------------------------------------------------------------------------------------------

    def touch(self, page: int, *, offset: int = 0, length: int = PAGE) -> Touch:
        """Read bytes of a page on a thread of its own."""
        address = self.address(page) + offset

        def body() -> bytes:
            buffer = ctypes.create_string_buffer(length)
            ctypes.memmove(buffer, address, length)
            return buffer.raw

        return Touch(body, f"the read of page {page}")

    def write(self, page: int, offset: int, value: int) -> Touch:
        """Write one byte on a thread of its own."""
        address = self.address(page) + offset
        return Touch(lambda: ctypes.memset(address, value, 1), f"the write to page {page}")

    def advise(self, page: int, count: int = 1, advice: int = mmap.MADV_DONTNEED) -> Touch:
        """Discard pages, as a balloon does; returns when the handler has read the event."""
        address = self.address(page)

        def body() -> None:
            if _libc.madvise(address, count * PAGE, advice) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        return Touch(body, f"the discard of pages [{page}, {page + count})")

    def discard(self, page: int, count: int = 1) -> None:
        """Discard pages and wait until that is done."""
        self.wait([self.advise(page, count)])

    def protect(self, page: int, protection: int) -> None:
        """mprotect one page, which splits the mapping."""
        if _libc.mprotect(self.address(page), PAGE, protection) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self, touches: Iterable[Touch]) -> None:
        """Wait until all have ended; fail where one is stuck or the handler has died."""
        touches = list(touches)
        deadline = time.monotonic() + self.patience
        for touch in touches:
            while touch.is_alive():
                touch.join(POLL)
                if touch.is_alive() and (self.handler_ended or time.monotonic() > deadline):
                    self._stuck(touches)
        for touch in touches:
            if touch.error is not None:
                raise Failed(f"{touch.name}: {touch.error}")

    def _stuck(self, touches: list[Touch]) -> None:
        # What was under way when the handler died may still end.
        deadline = time.monotonic() + 0.02
        stuck = [touch for touch in touches if touch.is_alive()]
        while stuck and time.monotonic() < deadline:
            stuck[0].join(POLL)
            stuck = [touch for touch in stuck if touch.is_alive()]
        if not stuck:
            return
        why = "the handler has ended" if self.handler_ended else f"after {self.patience:g} s"
        raise Failed(f"{stuck[0].name} is stuck ({len(stuck)} of {len(touches)} are), {why}")

    def sweep(self, pages: Sequence[int]) -> Touch:
        """Read many pages on one thread; the result names the first that is wrong, else it is None."""
        addresses = [(page, self.address(page)) for page in pages]

        def body() -> int | None:
            buffer = ctypes.create_string_buffer(PAGE)
            for page, address in addresses:
                ctypes.memmove(buffer, address, PAGE)
                if buffer.raw != self.snapshot.page(page):
                    return page
            return None

        return Touch(body, f"a sweep of {len(pages)} pages")

    def never_wrong(self, page: int) -> str:
        """Touch a page that perhaps nobody serves: it may wait, but must not read as something else."""
        touch = self.touch(page)
        touch.join(min(QUIET, self.patience))
        if touch.is_alive():
            return f"page {page} waits"
        if touch.result != self.snapshot.page(page):
            raise Failed(f"page {page} {self._describe(touch.result, self.snapshot.page(page))}")
        return f"page {page} is right"

    def follower(self) -> Vmm:
        """A second guest, whose handshake and memory are in order."""
        self.next = Vmm(self.socket_path, self.snapshot, self.patience, may_kill=False)
        self.next.handler = self.handler
        self.next.start()
        return self.next

    # Expectations --------------------------------------------------------------------------------------------------

    def expect(self, page: int, content: bytes, touch: Touch | None = None) -> None:
        """A page must have this content."""
        touch = touch or self.touch(page)
        self.wait([touch])
        if touch.result != content:
            raise Failed(f"page {page} {self._describe(touch.result, content)}")

    def expect_snapshot(self, pages: Iterable[int]) -> None:
        """These pages must be those of the snapshot."""
        for page in pages:
            self.expect(page, self.snapshot.page(page))

    def expect_zeros(self, pages: Iterable[int]) -> None:
        """These pages were discarded, or are a hole."""
        for page in pages:
            self.expect(page, bytes(PAGE))

    def _describe(self, found: bytes, wanted: bytes) -> str:
        if not any(found):
            return "reads as zeros"
        for number in range(NPAGES):
            if found == self.snapshot.page(number):
                return f"has the content of page {number} of the snapshot" + (", not zeros" if not any(wanted) else "")
        wrong = sum(one != other for one, other in zip(found, wanted, strict=True))
        return f"is wrong in {wrong} bytes"

    def pending(self, touches: Iterable[Touch]) -> None:
        """Wait until each of the threads has ended or sleeps, for a handler that is not there or stands still."""
        touches = list(touches)
        deadline = time.monotonic() + 5.0
        while self._waiting() < sum(touch.is_alive() for touch in touches):
            if time.monotonic() > deadline:
                raise Failed(f"the kernel queued {self._waiting()} faults of {len(touches)}")
            time.sleep(POLL)

    def event_queued(self) -> None:
        """Wait until a discard sleeps for its event to be read: from then on the kernel takes no page."""
        probe = HOLE[0]
        area = next(area for area in self.areas if area.first <= probe < area.first + area.count)
        assert area.region is not None
        deadline = time.monotonic() + 5.0
        while area.region.place(probe - area.first, bytes(PAGE)).deferred == 0:
            if time.monotonic() > deadline:
                raise Failed("the kernel queued no event for a discard")
            time.sleep(POLL)

    def _waiting(self) -> int:
        with open(f"/proc/self/fdinfo/{self.uffd.fileno()}", encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("total:"))
