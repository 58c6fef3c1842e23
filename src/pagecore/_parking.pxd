from libc.stdint cimport uint8_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._shared cimport PlacementShared

cdef enum Content:
    CONTENT_DATA = 0            # bytes that came from the source
    CONTENT_ZERO = 1            # the page is zeros
    CONTENT_FILL = 2            # a hinted page: the session's fill
    CONTENT_CONTINUE = 3        # the page cache of shared memory has it: only to be mapped

# Of what a source answers; -1 where it is none of these.
cdef int content_of(int answer) noexcept nogil
# The call that places it.
cdef const char *what_of(int content) noexcept nogil

cdef struct Parked:
    uint64_t page
    int content
    bint used


cdef class Parking:
    """Pages that the kernel did not take yet, with their data (D7). All methods are nogil."""

    cdef int c_slots
    cdef size_t _page_size
    cdef Parked *_entries
    cdef uint8_t *_pages

    # Keep pages whose claim is the caller's, for the retry thread; the caller holds neither side of the lock (D5). Waits
    # where the lot is full, and gives the claims back where the loop stops.
    cdef void c_put(self, PlacementShared *shared, Bitmap claimed, uint64_t first, uint64_t mask, const uint8_t *data,
                    int content) noexcept nogil
    # The retry thread alone: what is in a slot, or NULL; its data, NULL for zeros and fills; have it used anew.
    cdef Parked *c_used(self, PlacementShared *shared, int slot) noexcept nogil
    cdef const uint8_t *c_data(self, int slot) noexcept nogil
    cdef void c_free(self, PlacementShared *shared, int slot) noexcept nogil
    # After the threads have ended: drop everything.
    cdef void c_clear(self, PlacementShared *shared, Bitmap claimed) noexcept nogil
