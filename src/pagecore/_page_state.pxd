from libc.stdint cimport uint64_t

from pagecore._bitmap cimport Bitmap


cdef class PageState:
    """The destination planes of one region (design section 4) and the lock of rule D5 that guards their transitions."""

    cdef readonly size_t size           # pages
    cdef readonly Bitmap claimed
    cdef readonly Bitmap received
    cdef readonly Bitmap released
    cdef readonly Bitmap hinted
    cdef readonly Bitmap requested
    cdef readonly Bitmap excluded
    cdef readonly Bitmap zero
    cdef void *_lock

    # The shared side goes from "is it released or excluded?" over the ioctl to the marking; the exclusive side over
    # read() and the marking of what was read.
    cdef void c_lock_shared(self) noexcept nogil
    cdef void c_lock_exclusive(self) noexcept nogil
    cdef void c_unlock(self) noexcept nogil
    # Of `count` <= 64 pages, the mask of those that the caller may place now: neither excluded nor released, and won by
    # setting their claim. `dropped` and `lost` get the masks of the released or excluded, and of the already claimed.
    cdef uint64_t c_claim(self, size_t first, size_t count, uint64_t *dropped, uint64_t *lost) noexcept nogil
    cdef void c_release(self, size_t first, size_t count) noexcept nogil
    cdef void c_exclude(self, size_t first, size_t count) noexcept nogil
    cdef bint c_settled(self, size_t page) noexcept nogil
