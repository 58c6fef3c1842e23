"""What backs a piece of this process's memory: the kernel's list of mappings, read and judged.

The ioctl mask that UFFDIO_REGISTER returns cannot tell anonymous memory from shared memory (MOVE is
advertised on both and fails on the second), and the difference decides what a discard means (D3). The list of
mappings can: private anonymous memory has no device and no inode, and everything else has.
"""

from __future__ import annotations

import enum

__all__ = ["Backing", "backing_of"]


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
