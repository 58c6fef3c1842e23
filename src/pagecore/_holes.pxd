from libc.stdint cimport uint8_t, uint64_t

from pagecore._bitmap cimport Bitmap

cdef enum:
    HOLE_SIZE = 4096


cdef class Holes:
    """Parts of huge pages that the guest discarded before the page came (D3): they are zeros in whatever arrives."""

    cdef size_t _parts                  # of a page
    cdef Bitmap _bits
    cdef uint8_t *_room                 # one page, for what has holes
    cdef void *_monitor                 # guards it

    # Bytes [start, end) of the region; under the exclusive side.
    cdef void c_mark(self, uint64_t start, uint64_t end) noexcept nogil
    cdef bint c_has(self, uint64_t page) noexcept nogil
    # The page's content with its holes, which the caller owns until c_leave.
    cdef const uint8_t *c_enter(self, uint64_t page, const uint8_t *data) noexcept nogil
    cdef void c_leave(self) noexcept nogil
