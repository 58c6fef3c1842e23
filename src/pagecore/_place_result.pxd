cimport cython
from libc.stdint cimport uint64_t

from pagecore._span cimport PlaceTally, Span


cdef void clear_tally(PlaceTally *tally, size_t count) noexcept nogil
# The result of a run, or its exception.
cdef PlaceResult tell(Span span, int operation, size_t first, size_t count, const PlaceTally *tally)


@cython.final
cdef class PlaceResult:
    cdef readonly uint64_t placed
    cdef readonly uint64_t present
    cdef readonly uint64_t zeroed
    cdef readonly uint64_t deferred
    cdef readonly uint64_t gone
    cdef readonly uint64_t absent
    cdef readonly uint64_t excluded
    cdef readonly uint64_t moved
    cdef readonly bint peer_gone
