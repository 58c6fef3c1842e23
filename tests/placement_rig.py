"""What the placement tests share: a served region, a peer that speaks frames, touches without the GIL."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import termios

import numpy as np
import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import Feature, PlacementLoop, RegisterMode, UnsupportedError, Userfaultfd
from pagecore.page_source import SocketSource
from uffd_helpers import PAGE, anonymous, discard, read_bytes

HEADER = struct.Struct("<4sBBHIIQQII")
PAGES, ZEROS, FILL, SENT, GONE, REQUEST, END = 10, 11, 12, 13, 14, 15, 18
AGAIN = 1


def header(kind, first=0, count=0, length=0, *, flags=0, region=0, generation=0, round=0, magic=b"PGC1"):
    return HEADER.pack(magic, kind, flags, region, generation, round, first, count, length, 0)


def pages_frame(first, data, **fields):
    return header(PAGES, first, len(data) // PAGE, len(data), **fields) + bytes(data)


class Served:
    """Registered anonymous memory of `npages`, and the content that a source holds for it."""

    def __init__(self, npages, *, seed=1, features=0, mode=RegisterMode.MISSING):
        self.memory = anonymous(npages)
        try:
            self.uffd = Userfaultfd(features=Feature.EVENT_REMOVE | features)
        except UnsupportedError as error:
            pytest.skip(str(error))
        self.region = self.uffd.register(self.memory, mode=mode)
        generator = np.random.default_rng(seed)
        self.content = generator.integers(1, 256, npages * PAGE, dtype=np.uint8)

    def address(self, page):
        return self.region.address + page * PAGE

    def page(self, page, count=1):
        return self.content[page * PAGE : (page + count) * PAGE].tobytes()

    def touch(self, page):
        """Read a whole page on another thread."""
        return Worker(read_bytes, self.address(page), PAGE)

    def discard(self, page, count=1):
        """madvise(DONTNEED) on another thread: it sleeps until the event is read."""
        return Worker(discard, self.address(page), count * PAGE)

    def wait_readable(self):
        ready, _, _ = select.select([self.uffd], [], [], DEADLINE)
        assert ready, "no fault and no event arrived"

    def wait_fault_pending(self):
        """Until the kernel has a fault that nobody has read."""

        def pending():
            with open(f"/proc/self/fdinfo/{self.uffd.fileno()}") as info:
                return "pending:\t0" not in info.read()

        wait_until(pending, "a pending fault")

    def close(self):
        self.uffd.close()


class Peer:
    """The far ends of the sockets of a SocketSource."""

    def __init__(self, *, bulk_lanes=1, **options):
        pairs = [socket.socketpair() for _ in range(bulk_lanes + 1)]
        for near, far in pairs:
            near.settimeout(DEADLINE)
            far.settimeout(DEADLINE)
        self.bulk = [far for _, far in pairs[:-1]]
        self.urgent = pairs[-1][1]
        self.near_urgent = pairs[-1][0]
        self.source = SocketSource([near for near, _ in pairs[:-1]], pairs[-1][0], **options)
        self._near = [near for near, _ in pairs]

    def next_request(self):
        """(first page, count, flags) of the next request; fails at the deadline."""
        data = b""
        while len(data) < HEADER.size:
            got = self.urgent.recv(HEADER.size - len(data))
            assert got, "the urgent stream ended"
            data += got
        magic, kind, flags, _, _, _, first, count, length, _ = HEADER.unpack(data)
        assert (magic, kind, length) == (b"PGC1", REQUEST, 0)
        return first, count, flags

    def no_request(self):
        """True when no request is waiting at this moment."""
        self.urgent.setblocking(False)
        try:
            return not self.urgent.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.urgent.settimeout(DEADLINE)

    def pending(self, lane):
        """Bytes on a lane (the urgent one is the last) that the loop has not taken."""
        left = fcntl.ioctl(self._near[lane].fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(left, "little")

    def close(self):
        for end in [*self.bulk, self.urgent, *self._near]:
            end.close()


@contextlib.contextmanager
def served(npages, **options):
    rig = Served(npages, **options)
    try:
        yield rig
    finally:
        rig.close()


@contextlib.contextmanager
def pushed(rig, *, regions=None, source_options=None, bulk_lanes=1, start=True, **options):
    """A loop over a SocketSource: yields (loop, peer)."""
    peer = Peer(bulk_lanes=bulk_lanes, **(source_options or {}))
    loop = PlacementLoop(regions or [rig.region], peer.source, **options)
    try:
        if start:
            loop.start()
        yield loop, peer
    finally:
        loop.stop()
        peer.close()
