"""Waiters: who waits for a page, and how long it took to wake them."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport pagecore_fence_after_rmw
from pagecore._bitmap cimport Bitmap
from pagecore._sync cimport pagecore_monitor, pagecore_monitor_enter, pagecore_monitor_leave, pagecore_now_ns

cdef extern int __builtin_clzll(unsigned long long) nogil


cdef class Waiters:
    def __cinit__(self, size_t size):
        self._size = size
        self._waiting = Bitmap(size)
        self._faults = <Fault *>calloc(FAULT_TABLE, sizeof(Fault))
        if self._faults == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self._faults)

    cdef bint c_note(self, uint64_t page, uint64_t now) noexcept nogil:
        cdef int slot
        cdef bint kept = False
        if self._waiting.c_test_and_set(page):
            return True     # a second thread, or the same after a signal: the first message counts
        pagecore_monitor_enter(<pagecore_monitor *>self._monitor)
        for slot in range(FAULT_TABLE):
            if not self._faults[slot].used:
                self._faults[slot].page = page
                self._faults[slot].read_ns = now
                self._faults[slot].used = kept = True
                break
        pagecore_monitor_leave(<pagecore_monitor *>self._monitor)
        return kept

    cdef void c_finish(self, uint64_t first, uint64_t count, Latency *histogram) noexcept nogil:
        cdef uint64_t page, latency
        cdef int slot
        # The placer sets `received` and then looks for waiters; the reader marks the waiter and then looks at
        # `received`. With this fence, and its twin in Placer.c_serve, one of the two sees the other. Both follow a
        # read-modify-write.
        pagecore_fence_after_rmw()
        for page in range(first, first + count):
            if self._waiting.c_test(page) and self._waiting.c_test_and_clear(page):
                latency = 0
                pagecore_monitor_enter(<pagecore_monitor *>self._monitor)
                for slot in range(FAULT_TABLE):
                    if self._faults[slot].used and self._faults[slot].page == page:
                        latency = pagecore_now_ns() - self._faults[slot].read_ns
                        self._faults[slot].used = False
                        break
                if latency:
                    histogram.buckets[min(63 - __builtin_clzll(latency), LATENCY_BUCKETS - 1)] += 1
                    histogram.total_ns += latency
                    histogram.max_ns = max(histogram.max_ns, latency)
                pagecore_monitor_leave(<pagecore_monitor *>self._monitor)

    cdef uint64_t c_find(self, uint64_t start) noexcept nogil:
        return self._waiting.c_find_set(start)

    cdef size_t c_list(self, uint64_t *pairs) noexcept nogil:
        cdef size_t found = 0
        cdef int slot
        cdef uint64_t now
        pagecore_monitor_enter(<pagecore_monitor *>self._monitor)
        now = pagecore_now_ns()
        for slot in range(FAULT_TABLE):
            if self._faults[slot].used:
                pairs[2 * found] = self._faults[slot].page
                pairs[2 * found + 1] = now - self._faults[slot].read_ns if now > self._faults[slot].read_ns else 0
                found += 1
        pagecore_monitor_leave(<pagecore_monitor *>self._monitor)
        return found
