from libc.stdint cimport uint64_t

from pagecore._bitmap cimport Bitmap

cdef enum:
    LATENCY_BUCKETS = 40        # bucket b counts latencies in [2**b, 2**(b+1)) ns
    # A guest thread has one outstanding fault, so this is generous. Allocated once (trap 44).
    FAULT_TABLE = 256

cdef struct Latency:
    uint64_t buckets[LATENCY_BUCKETS]
    uint64_t total_ns
    uint64_t max_ns

cdef struct Fault:
    uint64_t state              # 0 free, 1 one thread is at it, 2 `page` and `read_ns` hold
    uint64_t page
    uint64_t read_ns


cdef class Waiters:
    """Who waits for a page of one region, and since when. All methods are nogil, and any thread may call them."""

    cdef size_t _size
    cdef Bitmap _waiting            # a fault was read for the page and nobody was woken since
    cdef Fault *_faults

    # The reader has read a fault. False: the table is full, and the latency of this one will not be known.
    cdef bint c_note(self, uint64_t page, uint64_t now) noexcept nogil
    # Whoever waited for these pages was woken: counts how long that took.
    cdef void c_finish(self, uint64_t first, uint64_t count, Latency *histogram) noexcept nogil
    # The first page at or after `start` that somebody waits for, or the size of the region.
    cdef uint64_t c_find(self, uint64_t start) noexcept nogil
    # (page, nanoseconds since its fault was read) of everybody who waits; returns how many there are. Room for FAULT_TABLE.
    cdef size_t c_list(self, uint64_t *pairs) noexcept nogil

    cdef void _count(self, uint64_t page, Latency *histogram) noexcept nogil
