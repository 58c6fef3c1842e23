"""What backs a piece of a process's memory: the kernel's list of mappings, read and judged.

The ioctl mask that UFFDIO_REGISTER returns cannot tell anonymous memory from shared memory (MOVE is
advertised on both and fails on the second), and the difference decides what a discard means (D3). The list of
mappings can: private anonymous memory has no device and no inode, and everything else has. The size of the pages
behind a mapping stands in the longer list alone, which is read only where it is not plain memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from pagecore._uffd_types import MemoryKind
from pagecore.errors import UnsupportedError

__all__ = ["Backing", "Mapping", "backing_of", "check_range", "check_registrable", "mappings_of", "pinned_kilobytes"]

PAGE_SIZE = 4096
_SHARED_NAMES = ("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV", "/anon_hugepage", "/dev/hugepages/")


class Backing(NamedTuple):
    """What stands behind a range of addresses.

    Attributes
    ----------
    kind : MemoryKind
        UNKNOWN where it cannot be registered.
    page_size : int
        Bytes of a page.
    name : str
        Its name in messages.
    """

    kind: MemoryKind
    page_size: int
    name: str


class Mapping(NamedTuple):
    """One line of the kernel's list.

    Attributes
    ----------
    first, last : int
        Addresses: ``[first, last)``.
    permissions : str
        ``rwxp``, with dashes; the last is ``s`` where it is shared.
    anonymous : bool
        Private memory without a file behind it.
    name : str
        As the kernel gives it; empty where it has none.
    """

    first: int
    last: int
    permissions: str
    anonymous: bool
    name: str


HOLE = Backing(MemoryKind.UNKNOWN, 0, "nothing (it is not wholly mapped)")
ANONYMOUS = Backing(MemoryKind.ANONYMOUS, PAGE_SIZE, "private anonymous memory")


def backing_of(address: int, length: int, process: int | str = "self") -> Backing:
    """Say what backs ``[address, address + length)``.

    Parameters
    ----------
    address, length : int
        The range, in bytes.
    process : int or "self"
        Whose.

    Returns
    -------
    Backing
        The first thing found that cannot be registered, or differs from what comes before it (its name then says so).

    Raises
    ------
    OSError
        The list cannot be read.

    Notes
    -----
    A snapshot: another thread may map anew at any time. Takes time in proportion to the process's mappings.
    """
    position, end = address, address + length
    found: Backing | None = None
    for mapping in mappings_of(process):
        if mapping.last <= position:
            continue
        if mapping.first > position:
            return HOLE
        one = ANONYMOUS if mapping.anonymous else _named(mapping, process)
        if one.kind is MemoryKind.UNKNOWN:
            return one
        if found is not None and one != found:
            return Backing(MemoryKind.UNKNOWN, 0, f"{found.name} together with {one.name}")
        found = one
        position = mapping.last
        if position >= end:
            return found
    return HOLE


def mappings_of(process: int | str = "self") -> Iterator[Mapping]:
    """Read the list of a process's mappings, in the order of their addresses.

    Parameters
    ----------
    process : int or "self"
        Whose.

    Yields
    ------
    Mapping

    Raises
    ------
    OSError
        The list cannot be read.
    """
    with open(f"/proc/{process}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, permissions, _offset, device, inode, *name = line.split(maxsplit=5)
            first, last = (int(edge, 16) for edge in span.split("-"))
            anonymous = device == "00:00" and inode == "0" and permissions[3] == "p"
            yield Mapping(first, last, permissions, anonymous, name[0].strip() if name else "")


def _named(mapping: Mapping, process: int | str) -> Backing:
    """Tell huge pages, shared memory and files apart by the name that the kernel gives the mapping."""
    shared = mapping.permissions[3] == "s"
    name = mapping.name
    if not name.startswith(_SHARED_NAMES) and (name or not shared):
        return Backing(MemoryKind.UNKNOWN, 0, "a file")
    page_size = _page_size(mapping, process)
    if page_size > PAGE_SIZE:
        if shared:
            return Backing(MemoryKind.HUGE_SHARED, page_size, "shared huge pages")
        if name.startswith("/anon_hugepage"):
            return Backing(MemoryKind.HUGE, page_size, "huge pages")
    elif shared:
        return Backing(MemoryKind.SHARED, page_size, "shared memory")
    return Backing(MemoryKind.UNKNOWN, 0, "a private mapping of shared memory")


def _page_size(mapping: Mapping, process: int | str) -> int:
    """Bytes of a page of the mapping."""
    span = f"{mapping.first:08x}-{mapping.last:08x}"
    with open(f"/proc/{process}/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.startswith(f"{span} "):
                break
        for line in lines:
            if line.startswith("KernelPageSize:"):
                return int(line.split()[1]) * 1024
    return PAGE_SIZE


def check_range(address: int, length: int, page_size: int) -> None:
    """Refuse a range that no memory can have.

    Parameters
    ----------
    address, length, page_size : int
        In bytes.

    Raises
    ------
    ValueError
        The range is empty, misaligned or beyond any memory; the page size is no page size.
    UnsupportedError
        This kernel's own pages are of another size than 4096.
    """
    if page_size < PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is neither {PAGE_SIZE} nor that of a huge page")
    if (system := os.sysconf("SC_PAGESIZE")) != PAGE_SIZE:
        raise UnsupportedError(f"page size {PAGE_SIZE}", f"this kernel has pages of {system} bytes")
    if length <= 0 or length % page_size:
        raise ValueError(f"length {length} is not a positive multiple of page size {page_size}")
    if address % page_size:
        raise ValueError(f"address {address:#x} is not a multiple of page size {page_size}")
    if not 0 <= address <= 2**64 - length:
        raise ValueError(f"[{address:#x}, {address + length:#x}) is outside [0, {2**64:#x})")


def check_registrable(address: int, length: int, page_size: int, process: int | str = "self") -> MemoryKind:
    """Refuse what cannot be registered, with the number and the bound; say of what kind the rest is.

    Parameters
    ----------
    address, length : int
        The range, in bytes.
    page_size : int
        Bytes of a page.
    process : int or "self"
        Whose memory it is.

    Returns
    -------
    MemoryKind

    Raises
    ------
    ValueError
        As ``check_range``; or the range is not wholly mapped, or its pages are of another size.
    UnsupportedError
        Memory that userfaultfd has no use for (files), or of two kinds.
    """
    check_range(address, length, page_size)
    backing = backing_of(address, length, process)
    if backing is HOLE:
        raise ValueError(f"[{address:#x}, {address + length:#x}) is not wholly mapped")
    if backing.kind is MemoryKind.UNKNOWN:
        remedy = "use anonymous memory, or map a memfd with MAP_SHARED"
        raise UnsupportedError(f"registering {backing.name}", remedy)
    if backing.page_size != page_size:
        raise ValueError(f"page size {page_size} is not that of {backing.name} of {backing.page_size} bytes a page")
    return backing.kind


def pinned_kilobytes(process: int | str = "self") -> int:
    """Memory that the process has pinned (VmPin in /proc/PID/status), in kB: io_uring's buffers, RDMA, VFIO."""
    with open(f"/proc/{process}/status", encoding="utf-8", errors="surrogateescape") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("VmPin:")), 0)
