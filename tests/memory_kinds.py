"""Memory of every kind that can be registered, and the pools that huge pages come from."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from concurrency import wait_until
from pagecore import MemoryKind
from uffd_helpers import PAGE, address_of, anonymous, leaked_mapping

HUGE = 2 << 20
POOLS = pathlib.Path("/sys/kernel/mm/hugepages")
MAP_HUGETLB, MFD_HUGETLB = 0x40000, 0x4
KINDS = ("anonymous", "shared", "huge", "huge_shared")


def _reserve(pool: pathlib.Path, count: int) -> int:
    """Ask for `count` free pages of a pool; how many there are."""
    total, free = (int((pool / name).read_text()) for name in ("nr_hugepages", "free_hugepages"))
    if free < count:
        with contextlib.suppress(OSError):
            (pool / "nr_hugepages").write_text(str(total + count - free))
    return int((pool / "free_hugepages").read_text())


class _Turn:
    """One process at a time: pools belong to the machine, and what one restores another has changed."""

    depth = 0
    file = -1

    def __enter__(self) -> None:
        _Turn.depth += 1
        if _Turn.depth > 1:
            return
        path = pathlib.Path(tempfile.gettempdir()) / f"pagecore-huge-pool-{os.getuid()}"
        _Turn.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

        def taken() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(_Turn.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        wait_until(taken, "another process's tests of huge pages to end", 100)

    def __exit__(self, *_: object) -> None:
        _Turn.depth -= 1
        if _Turn.depth == 0:
            os.close(_Turn.file)


@contextlib.contextmanager
def huge_pool(count: int, size: int = HUGE) -> Iterator[None]:
    """`count` free huge pages for a while, where root may reserve them; or the test is skipped."""
    pool = POOLS / f"hugepages-{size >> 10}kB"
    if not pool.exists():
        pytest.skip(f"this processor has no pages of {size} bytes")
    with _Turn():
        before = (pool / "nr_hugepages").read_text()
        try:
            if _reserve(pool, count) < count:
                pytest.skip(f"too few huge pages; fix: echo {count} > {pool}/nr_hugepages, as root")
            yield
        finally:
            gc.collect()
            if (pool / "nr_hugepages").read_text() != before:
                (pool / "nr_hugepages").write_text(before)


@dataclass
class Memory:
    """A mapping to be registered; shared kinds have a second one of the same pages."""

    kind: MemoryKind
    page_size: int
    mapping: mmap.mmap
    fd: int = -1
    other: mmap.mmap | None = None

    def close(self) -> None:
        """Close what is not a mapping: those go with their last reference."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make(kind: str, npages: int, size: int = HUGE) -> Memory:
    """Missing memory of one of KINDS."""
    if kind == "anonymous":
        return Memory(MemoryKind.ANONYMOUS, PAGE, anonymous(npages))
    if kind == "huge":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | (size.bit_length() - 1) << 26
        return Memory(MemoryKind.HUGE, size, mmap.mmap(-1, npages * size, flags=flags))
    huge = kind == "huge_shared"
    size = size if huge else PAGE
    fd = os.memfd_create("memory", MFD_HUGETLB | (size.bit_length() - 1) << 26 if huge else 0)
    os.ftruncate(fd, npages * size)
    mappings = [mmap.mmap(fd, npages * size, flags=mmap.MAP_SHARED) for _ in range(2)]
    return Memory(MemoryKind.HUGE_SHARED if huge else MemoryKind.SHARED, size, mappings[0], fd, mappings[1])


def leaked(kind: str, npages: int) -> tuple[int, int]:
    """The same as an address that a test may unmap by halves, and the size of its pages."""
    huge = MAP_HUGETLB if kind.startswith("huge") else 0
    shared = mmap.MAP_SHARED if kind.endswith("shared") else mmap.MAP_PRIVATE
    size = HUGE if huge else PAGE
    address = leaked_mapping(npages, size, shared | mmap.MAP_ANONYMOUS | huge)
    return address, size


def write_other(memory: Memory, index: int, data: bytes) -> None:
    """Put content into the page cache behind a mapping, through the second one."""
    assert memory.other is not None
    ctypes.memmove(address_of(memory.other) + index * memory.page_size, data, len(data))
