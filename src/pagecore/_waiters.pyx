"""Waiters: who waits for a page, and how long it took to wake them."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_exchange,
    pagecore_fence_after_rmw,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_store_relaxed,
)
from pagecore._bitmap cimport Bitmap
from pagecore._sync cimport pagecore_now_ns

cdef extern int __builtin_clzll(unsigned long long) nogil


cdef enum:
    FREE = 0
    BUSY = 1
    HELD = 2


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
        cdef uint64_t expected
        cdef bint kept = False
        if self._waiting.c_test_and_set(page):
            return True     # a second thread, or the same after a signal: the first message counts
        for slot in range(FAULT_TABLE):
            expected = FREE
            if (pagecore_load_relaxed(&self._faults[slot].state) == FREE
                    and pagecore_compare_exchange(&self._faults[slot].state, &expected, BUSY)):
                pagecore_store_relaxed(&self._faults[slot].page, page)
                pagecore_store_relaxed(&self._faults[slot].read_ns, now)
                # Pairs with the loads of HELD. Whoever finished this waiter before it was there did not find it.
                pagecore_exchange(&self._faults[slot].state, HELD)
                pagecore_fence_after_rmw()
                expected = HELD
                if not self._waiting.c_test(page):
                    pagecore_compare_exchange(&self._faults[slot].state, &expected, FREE)
                kept = True
                break
        return kept

    cdef void c_finish(self, uint64_t first, uint64_t count, Latency *histogram) noexcept nogil:
        cdef uint64_t page
        # The placer sets `received` and then looks for waiters; the reader marks the waiter and then looks at
        # `received`. With this fence, and its twin in Placer.c_serve, one of the two sees the other. Both follow a
        # read-modify-write.
        pagecore_fence_after_rmw()
        for page in range(first, first + count):
            if self._waiting.c_test(page) and self._waiting.c_test_and_clear(page):
                self._count(page, histogram)

    cdef void _count(self, uint64_t page, Latency *histogram) noexcept nogil:
        cdef uint64_t expected, latency, seen
        cdef int slot
        for slot in range(FAULT_TABLE):
            if (pagecore_load_acquire(&self._faults[slot].state) != HELD
                    or pagecore_load_relaxed(&self._faults[slot].page) != page):
                continue
            # The page's bit is ours, so no other thread takes this slot, and nobody else writes one for this page.
            latency = max(pagecore_now_ns() - pagecore_load_relaxed(&self._faults[slot].read_ns), <uint64_t>1)
            expected = HELD
            if not pagecore_compare_exchange(&self._faults[slot].state, &expected, FREE):
                continue
            pagecore_fetch_add(&histogram.buckets[min(63 - __builtin_clzll(latency), LATENCY_BUCKETS - 1)], 1)
            pagecore_fetch_add(&histogram.total_ns, latency)
            seen = pagecore_load_relaxed(&histogram.max_ns)
            while seen < latency and not pagecore_compare_exchange(&histogram.max_ns, &seen, latency):
                pass
            return

    cdef uint64_t c_find(self, uint64_t start) noexcept nogil:
        return self._waiting.c_find_set(start)

    cdef size_t c_list(self, uint64_t *pairs) noexcept nogil:
        cdef size_t found = 0
        cdef int slot
        cdef uint64_t page, read_ns, now = pagecore_now_ns()
        for slot in range(FAULT_TABLE):
            if pagecore_load_acquire(&self._faults[slot].state) != HELD:
                continue
            page = pagecore_load_relaxed(&self._faults[slot].page)
            read_ns = pagecore_load_relaxed(&self._faults[slot].read_ns)
            if self._waiting.c_test(page):          # else it was taken meanwhile
                pairs[2 * found] = page
                pairs[2 * found + 1] = now - read_ns if now > read_ns else 0
                found += 1
        return found
