"""PlaceResult: what became of a run of pages."""

from pagecore.errors import ClosedError, OutOfMemoryError, UffdError, UnreadableError

cimport cython
from libc.errno cimport EBADF, EFAULT, ENOMEM
from libc.string cimport memset

from pagecore._span cimport PLACE_AGAIN, PLACE_DONE, PLACE_FAILED, PLACE_PEER_GONE, PlaceTally, Span
from pagecore._uffd_ioctl cimport OPERATION_COPY, OPERATION_ZERO

__all__ = ["PlaceResult"]

_NAMES = ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_POISON", "UFFDIO_CONTINUE", "UFFDIO_MOVE", "UFFDIO_WRITEPROTECT",
          "UFFDIO_WRITEPROTECT")


cdef void clear_tally(PlaceTally *tally, size_t count) noexcept nogil:
    memset(tally, 0, sizeof(PlaceTally))
    tally.outcome = PLACE_DONE
    tally.limit = count


cdef PlaceResult tell(Span span, int operation, size_t first, size_t count, const PlaceTally *tally):
    cdef PlaceResult result = PlaceResult.__new__(PlaceResult)
    if operation == OPERATION_ZERO:
        result.zeroed = tally.placed
    else:
        result.placed = tally.placed
    result.present = tally.present
    result.gone = tally.gone
    result.absent = tally.absent
    result.excluded = tally.excluded
    result.moved = tally.moved
    if tally.outcome == PLACE_AGAIN:
        result.deferred = count - tally.settled
    elif tally.outcome == PLACE_PEER_GONE:
        result.gone += count - tally.settled
        result.peer_gone = True
    elif tally.outcome == PLACE_FAILED:
        if tally.error == EBADF:
            raise ClosedError("the userfaultfd is closed")
        error = UffdError
        if tally.error == ENOMEM:
            error = OutOfMemoryError
        elif tally.error == EFAULT and operation == OPERATION_COPY:
            error = UnreadableError
        failure = error(tally.error, _NAMES[operation], span.c_address + (first + tally.settled) * span.page_size,
                        (count - tally.settled) * span.page_size)
        failure.add_note(f"{tally.settled} of {count} pages were dealt with before: {result!r}")
        raise failure
    return result


@cython.final
cdef class PlaceResult:
    """What became of a run, in pages; all but ``moved`` add up to its length.

    Attributes
    ----------
    placed : int
        Made present with the data, or poisoned, or (un)protected.
    present : int
        Present already, or claimed by another placement.
    zeroed : int
        Made present as zeros.
    deferred : int
        The address space was changing: the last pages of the run, to be tried again once the event was read.
    gone : int
        No longer registered memory, or cut off the file that it was.
    absent : int
        Not in the page cache, where that was to be mapped.
    excluded : int
        Left alone because the caller's plane says so.
    moved : int
        Of those placed, the ones that were moved and not copied.
    peer_gone : bool
        The process has ended; the rest of the run counts as gone.
    """

    def __init__(self):
        raise TypeError("a PlaceResult is made by Region.place()")

    def __repr__(self):
        names = ("placed", "present", "zeroed", "deferred", "gone", "absent", "excluded", "moved", "peer_gone")
        return f"PlaceResult({', '.join([f'{name}={getattr(self, name)}' for name in names])})"
