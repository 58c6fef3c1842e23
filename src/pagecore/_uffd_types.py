"""The names of userfaultfd's features, modes and events, and its line of /proc, as Python sees them."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

__all__ = [
    "FEATURE_SINCE",
    "Event",
    "EventKind",
    "FaultFlag",
    "Feature",
    "Handed",
    "MemoryKind",
    "RegisterMode",
    "Waiting",
    "read_fdinfo",
]


class Feature(enum.IntFlag):
    """What ``UFFDIO_API`` can be asked for; the values are the kernel's.

    The bits that change what the descriptor does must be requested (events, SIGBUS, THREAD_ID, EXACT_ADDRESS,
    WP_UNPOPULATED, WP_ASYNC). The others only say that the kernel can do something, which then works anyway.
    """

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


# The first kernel that has it, for messages alone: what the running kernel can do is asked of it.
FEATURE_SINCE: dict[Feature, str] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
}


class RegisterMode(enum.IntFlag):
    """Which faults a region reports; they can be combined. The values are the kernel's.

    MISSING: there is no page. WP: there is one, write-protected (with Feature.WP_ASYNC nobody is told: the write is
    noted for PAGEMAP_SCAN and goes on). MINOR: the page cache has one and this mapping does not (shared memory only).
    """

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class MemoryKind(enum.IntEnum):
    """What stands behind a region; it decides what a discard means (D3) and which placements exist."""

    UNKNOWN = 0
    ANONYMOUS = 1
    SHARED = 2
    HUGE = 3
    HUGE_SHARED = 4


class EventKind(enum.IntEnum):
    """What a message of the descriptor reports; the values are the kernel's."""

    FAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(enum.IntFlag):
    """How the page was touched; 0 is a read of a missing page."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Event(NamedTuple):
    """One message of the descriptor.

    Attributes
    ----------
    kind : EventKind
        What happened.
    start : int
        The fault's address, or the first byte of the range (REMAP: its old address).
    end : int
        The byte after the range; 0 for a fault; the new address for REMAP.
    flags : int
        FaultFlag of a fault; the length in bytes for REMAP; else 0.
    thread : int
        The faulting thread where THREAD_ID is enabled, else 0. A hint: the number is of that thread's pid
        namespace, and with asynchronous page faults of KVM it is a worker's.
    child : Userfaultfd or None
        FORK: a descriptor for the child's memory, where the same ranges are registered; to be served, by
        ``region_at``, or closed.
    """

    kind: EventKind
    start: int
    end: int
    flags: int
    thread: int
    child: Any = None


class Waiting(NamedTuple):
    """Threads that wait for pages of a descriptor.

    Attributes
    ----------
    pending : int
        Those whose fault nobody has read.
    total : int
        All of them. ``total - pending`` faults were handed out and their waiters not woken: if that stays above what is
        under way, somebody was forgotten.
    """

    pending: int
    total: int


class Handed(NamedTuple):
    """A descriptor that somebody else opened, and what is known of it."""

    fd: int
    features: int
    remote: bool


class Fdinfo(NamedTuple):
    """The kernel's own account of a descriptor."""

    pending: int
    total: int
    features: int
    ioctls: int


_INITIALIZED = 1 << 31  # beside the features, once UFFDIO_API was called


def read_fdinfo(fd: int) -> Fdinfo:
    """Read ``/proc/self/fdinfo`` of a userfaultfd.

    Parameters
    ----------
    fd : int
        A userfaultfd of this process.

    Returns
    -------
    Fdinfo
        ``features`` it was opened with, and ``ioctls`` that this kernel has for ranges.

    Raises
    ------
    OSError
        /proc is not mounted, or there is no such descriptor.
    ValueError
        It is no userfaultfd.
    """
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    try:
        _version, features, ioctls = (int(part, 16) for part in fields["API"].split(":"))
        pending, total = int(fields["pending"]), int(fields["total"])
    except (KeyError, ValueError):
        raise ValueError(f"descriptor {fd} is not a userfaultfd") from None
    return Fdinfo(pending, total, features & ~_INITIALIZED, ioctls)
