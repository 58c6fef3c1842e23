from libc.stdint cimport uint64_t


cdef class Bitmap:
    """See the stub for the Python face. The c_ methods are nogil, atomic per word, and trust their arguments."""

    cdef uint64_t *c_words          # (size + 63) // 64 words, LSB first; bits past size are zero
    cdef size_t c_nwords
    cdef readonly size_t size       # pages
    cdef object _owner              # keeps the memory of from_buffer alive; None where the words are ours
    cdef size_t _exports

    cdef bint c_test(self, size_t page) noexcept nogil
    cdef void c_set(self, size_t page) noexcept nogil
    cdef void c_clear(self, size_t page) noexcept nogil
    cdef bint c_test_and_set(self, size_t page) noexcept nogil
    cdef bint c_test_and_clear(self, size_t page) noexcept nogil
    # Ranges return how many bits changed.
    cdef size_t c_set_range(self, size_t first, size_t count) noexcept nogil
    cdef size_t c_clear_range(self, size_t first, size_t count) noexcept nogil
    cdef size_t c_count(self) noexcept nogil
    cdef size_t c_count_range(self, size_t first, size_t count) noexcept nogil
    # The first set (clear) page at or after `start`, or `size` where there is none.
    cdef size_t c_find_set(self, size_t start) noexcept nogil
    cdef size_t c_find_clear(self, size_t start) noexcept nogil
    # Same sizes; return how many bits of dest were newly set.
    cdef size_t c_drain_into(self, Bitmap dest) noexcept nogil
    cdef size_t c_merge(self, Bitmap other) noexcept nogil
