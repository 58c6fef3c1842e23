"""The writers that no log of page tables sees: pinned pages, and other mappings of shared memory (S12).

Whoever makes such a log vouches for each that there is: that it calls ``PageTracker.mark`` after it writes.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagecore._mappings import pinned_kilobytes
from pagecore._uffd_types import MemoryKind
from pagecore.errors import UnsupportedError

__all__ = ["check_pins", "check_shared", "missed_in", "vouched_for"]

PINS = "pins"
MAPPINGS = "mappings"


def vouched_for(marked: Iterable[str]) -> frozenset[str]:
    """The writers that the caller vouches for, as it named them."""
    if isinstance(marked, str):
        raise TypeError(f"marked is a collection of names, not one name: use {{{marked!r}}}")
    vouched = frozenset(marked)
    if vouched - {PINS, MAPPINGS}:
        raise ValueError(f"marked names {sorted(vouched - {PINS, MAPPINGS})}: there are {PINS!r} and {MAPPINGS!r}")
    return vouched


def check_shared(kind: MemoryKind, vouched: frozenset[str]) -> bool:
    """Whether this memory is shared; refused where it is and nobody vouches for its other mappings."""
    if kind not in (MemoryKind.SHARED, MemoryKind.HUGE_SHARED):
        return False
    if MAPPINGS not in vouched:
        raise UnsupportedError(
            "tracking every write to shared memory",
            "writes through other mappings of it, and to its file, are not seen: have each such writer call"
            f" PageTracker.mark() after its writes, then say marked={{{MAPPINGS!r}}}",
        )
    return True


def check_pins(pid: int, vouched: frozenset[str], process: int | str = "self") -> None:
    """Refuse the memory of a process that has pinned any, unless somebody vouches for that; `process` as in /proc."""
    pinned = pinned_kilobytes(process)
    if pinned and PINS not in vouched:
        raise UnsupportedError(
            f"tracking every write to memory of process {pid}, which has pinned {pinned} kB of its memory,",
            "writes to pinned pages (io_uring's registered buffers, RDMA, VFIO) are not seen: have each such"
            f" writer call PageTracker.mark() after its writes, then say marked={{{PINS!r}}}",
        )


def missed_in(shared: bool) -> tuple[str, ...]:
    """The writers that a log of this memory misses."""
    return (PINS, MAPPINGS) if shared else (PINS,)
