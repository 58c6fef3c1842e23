from libc.stdint cimport uint64_t


cdef struct Touch:
    uint64_t page
    uint64_t ready              # index of the region, plus 1; 0: its writer is not done


cdef class Recorder:
    """The order in which pages were touched first. Everything is allocated at begin()."""

    cdef uint64_t c_active
    cdef tuple _seen                # a Bitmap for each region
    cdef void **_planes             # borrowed
    cdef Touch *_touches
    cdef uint64_t _capacity
    cdef uint64_t _used

    cdef void c_touched(self, int index, uint64_t page) noexcept nogil
