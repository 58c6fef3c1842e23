"""What backs a piece of this process's memory: the kernel's list of mappings, read and judged.

The ioctl mask that UFFDIO_REGISTER returns cannot tell anonymous memory from shared memory (MOVE is
advertised on both and fails on the second), and the difference decides what a discard means (D3). The list of
mappings can: private anonymous memory has no device and no inode, and everything else has.
"""

from __future__ import annotations

import enum
import os

from pagecore.errors import UnsupportedError

__all__ = ["Backing", "backing_of", "check_registrable"]

PAGE_SIZE = 4096


class Backing(enum.Enum):
    """What stands behind a range of addresses; the value names it in messages."""

    ANONYMOUS = "private anonymous memory"
    SHARED = "shared memory"
    HUGE = "huge pages"
    FILE = "a file"
    HOLE = "nothing (it is not wholly mapped)"


def backing_of(address: int, length: int, maps: str = "/proc/self/maps") -> Backing:
    """Say what backs ``[address, address + length)``.

    Parameters
    ----------
    address, length : int
        The range, in bytes.
    maps : str
        Where to read the mappings.

    Returns
    -------
    Backing
        The first thing found that is not private anonymous memory, else ``ANONYMOUS``.

    Notes
    -----
    A snapshot: another thread may map anew at any time. Takes time in proportion to the process's mappings.
    """
    position, end = address, address + length
    with open(maps, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, permissions, _offset, device, inode, *name = line.split(maxsplit=5)
            first, last = (int(edge, 16) for edge in span.split("-"))
            if last <= position:
                continue
            if first > position:
                return Backing.HOLE
            if not (device == "00:00" and inode == "0" and permissions[3] == "p"):
                return _named(name[0].strip() if name else "", permissions)
            position = last
            if position >= end:
                return Backing.ANONYMOUS
    return Backing.HOLE


def _named(name: str, permissions: str) -> Backing:
    """Tell huge pages, shared memory and files apart by the name that the kernel gives the mapping."""
    if name.startswith(("/anon_hugepage", "/dev/hugepages/")):
        return Backing.HUGE
    shared_names = ("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV")
    if name.startswith(shared_names) or (not name and permissions[3] == "s"):
        return Backing.SHARED
    return Backing.FILE


def check_registrable(address: int, length: int, page_size: int) -> None:
    """Refuse what cannot be registered, or not yet, with the number and the bound.

    Parameters
    ----------
    address, length : int
        The range, in bytes.
    page_size : int
        Bytes of a page.

    Raises
    ------
    ValueError
        The range is empty, misaligned, beyond any memory or not wholly mapped.
    UnsupportedError
        Another page size, or memory of another kind than private anonymous.
    """
    if page_size != PAGE_SIZE:
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is neither {PAGE_SIZE} nor that of a huge page")
        raise UnsupportedError(f"page size {page_size}", f"use memory in pages of {PAGE_SIZE} bytes")
    if (system := os.sysconf("SC_PAGESIZE")) != PAGE_SIZE:
        raise UnsupportedError(f"page size {PAGE_SIZE}", f"this kernel has pages of {system} bytes")
    if length <= 0 or length % page_size:
        raise ValueError(f"length {length} is not a positive multiple of page size {page_size}")
    if address % page_size:
        raise ValueError(f"address {address:#x} is not a multiple of page size {page_size}")
    if not 0 <= address <= 2**64 - length:
        raise ValueError(f"[{address:#x}, {address + length:#x}) is outside [0, {2**64:#x})")
    backing = backing_of(address, length)
    if backing is Backing.HOLE:
        raise ValueError(f"[{address:#x}, {address + length:#x}) is not wholly mapped")
    if backing is not Backing.ANONYMOUS:
        remedy = "use mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"
        raise UnsupportedError(f"registering {backing.value}", remedy)
