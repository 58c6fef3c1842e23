"""Postcopy at the destination, on memory of its own, with the source's ends of the streams in the test's hands."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from concurrency import Worker
from pagecore import Bitmap, Feature, PageState, Region, Userfaultfd
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.lists import Lists, discard_and_register
from pagecore.migrate.postcopy import Postcopy
from pagecore.wire import (
    HEADER_BYTES,
    FrameType,
    Hello,
    decode_header,
    decode_page_set,
    encode_frame,
    encode_header,
    encode_page_set,
    encode_report,
)
from uffd_helpers import read_bytes

PAGE = 4096
NPAGES = 64
DEADLINE = 10.0


def runs(*pairs: tuple[int, int]) -> Bitmap:
    return decode_page_set(encode_page_set(list(pairs), NPAGES), NPAGES).pages


def content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE


@dataclass
class Rig:
    """Registered memory with its postcopy, and the source's ends of the streams."""

    memory: mmap.mmap
    state: PageState
    region: Region
    link: Link
    postcopy: Postcopy
    source: dict[str, socket.socket]
    # What was said instead of pages.
    heard: list[bytes]

    generation: int = 0

    def send(self, stream: str, page: int, *, flags: int = 0) -> None:
        header = encode_header(
            FrameType.PAGES, flags=flags, generation=self.generation, round=1, first=page, count=1, length=PAGE
        )
        self.source[stream].sendall(header + content(page))

    def finish(self, *hinted: tuple[int, int]) -> None:
        self.source["bulk-0"].sendall(encode_frame(FrameType.END, generation=self.generation, round=1))
        payload = encode_page_set(list(hinted), NPAGES, generation=self.generation)
        self.source["control"].sendall(encode_frame(FrameType.FINISH, payload, generation=self.generation, round=1))

    def alive(self, *, paused: bool) -> None:
        payload = encode_report({"paused": paused})
        self.source["control"].sendall(encode_frame(FrameType.ALIVE, payload, generation=self.generation, round=1))

    def touch(self, page: int) -> Worker:
        """The guest reads a page, on a thread of its own."""
        return Worker(read_bytes, self.region.address + page * PAGE, PAGE)

    def request(self) -> tuple[int, int]:
        """The next request: its first page, and its generation."""
        self.source["urgent"].settimeout(DEADLINE)
        header = decode_header(self.source["urgent"].recv(HEADER_BYTES), self.link.session)
        return header.first, header.generation

    def hang_up(self) -> None:
        for sock in self.source.values():
            sock.close()

    def return_to(self) -> None:
        """The next generation of the link."""
        self.link.close()
        self.hang_up()
        self.generation += 1
        self.link, self.source = linked(self.generation)

    def read(self, page: int) -> bytes:
        """Content as another process would see it: an error where this one would get SIGBUS."""
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), PAGE, self.region.address + page * PAGE)


def linked(generation: int) -> tuple[Link, dict[str, socket.socket]]:
    pairs = {name: socket.socketpair() for name in ("control", "bulk-0", "urgent")}
    hello = Hello("control", "test", generation, PAGE, {0: NPAGES})
    link = Link({name: Stream(ours, DEADLINE) for name, (ours, _) in pairs.items()}, hello, hello)
    return link, {name: theirs for name, (_, theirs) in pairs.items()}


@contextlib.contextmanager
def postcopy_rig() -> Iterator[Rig]:
    """Pages 0 to 7 came before the switch, 8 to 15 are zeros, 16 to 31 are hinted, the rest is owed."""
    memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    state = PageState(NPAGES)
    for page in range(8):
        memory[page * PAGE : (page + 1) * PAGE] = content(page)
    state.store(0, 8)
    state.store_zeros(8, 8)
    link, source = linked(0)
    with Userfaultfd(Feature.EVENT_REMOVE) as uffd:
        lists = Lists(runs((16, 48)), runs((16, 16)), 1)
        region = discard_and_register(memory, state, lists, uffd, emulate_qemu=False)
        heard: list[bytes] = []
        postcopy = Postcopy(link, region, state, name="test", patience=1.0, look=lambda: None, hear=heard.append)
        with postcopy:
            rig = Rig(memory, state, region, link, postcopy, source, heard)
            yield rig
    rig.link.close()
    rig.hang_up()
    # A region that is still registered holds the memory (D13): it goes with its last user.
