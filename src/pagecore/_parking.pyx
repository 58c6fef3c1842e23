"""Parking: where pages wait that the kernel did not take yet."""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._shared cimport PlacementShared, notify_inside
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_enter,
    pagecore_monitor_leave,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore.page_source._protocol cimport ANSWER_CONTINUE, ANSWER_PAGES, ANSWER_ZEROS

cdef extern int __builtin_ctzll(unsigned long long) nogil

# Allocated once, so that a flood of events cannot make us allocate (trap 44).
cdef enum:
    PARKING_PAGES = 256
    PARKING_BYTES = 16 << 20
    PARKING_WAIT_NS = 100000000


cdef void _count_parked(PlacementShared *shared, int64_t by) noexcept nogil:
    # Inside the monitor, or after the threads, which orders writers. Relaxed for the last look of c_retry, outside it.
    pagecore_store_relaxed(&shared.parked, shared.parked + by)


cdef class Parking:
    def __cinit__(self, size_t page_size):
        self._page_size = page_size
        self.c_slots = max(min(<int>PARKING_PAGES, <int>(PARKING_BYTES // page_size)), 1)
        self._entries = <Parked *>calloc(self.c_slots, sizeof(Parked))
        self._pages = <uint8_t *>malloc(self.c_slots * page_size)
        if self._entries == NULL or self._pages == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self._entries)
        free(self._pages)

    cdef void c_put(self, PlacementShared *shared, Bitmap claimed, uint64_t first, uint64_t mask, const uint8_t *data,
                    int content) noexcept nogil:
        cdef pagecore_monitor *monitor = <pagecore_monitor *>shared.monitor
        cdef int slot = 0
        cdef uint64_t page
        pagecore_monitor_enter(monitor)
        while mask:
            if pagecore_load_relaxed(&shared.stopping):
                # Nobody will place them: the claims go back, so that the settled bitmap tells the truth.
                page = first + __builtin_ctzll(mask)
                claimed.c_clear(page)
                mask &= mask - 1
                continue
            if slot == self.c_slots:
                pagecore_monitor_wait(monitor, pagecore_now_ns() + PARKING_WAIT_NS)
                slot = 0
                continue
            if self._entries[slot].used:
                slot += 1
                continue
            page = first + __builtin_ctzll(mask)
            mask &= mask - 1
            if content == CONTENT_DATA:
                memcpy(self._pages + slot * self._page_size,
                       data + (page - first) * self._page_size, self._page_size)
            self._entries[slot].page = page
            self._entries[slot].content = content
            self._entries[slot].used = True
            _count_parked(shared, 1)
            pagecore_fetch_add(&shared.counters.deferred, 1)
        notify_inside(shared)
        pagecore_monitor_leave(monitor)

    cdef Parked *c_used(self, PlacementShared *shared, int slot) noexcept nogil:
        cdef bint used
        pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
        used = self._entries[slot].used
        pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)
        return &self._entries[slot] if used else NULL

    cdef const uint8_t *c_data(self, int slot) noexcept nogil:
        return self._pages + slot * self._page_size if self._entries[slot].content == CONTENT_DATA else NULL

    cdef void c_free(self, PlacementShared *shared, int slot) noexcept nogil:
        pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
        self._entries[slot].used = False
        _count_parked(shared, -1)
        notify_inside(shared)
        pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)

    cdef void c_clear(self, PlacementShared *shared, Bitmap claimed) noexcept nogil:
        cdef int slot
        for slot in range(self.c_slots):
            if self._entries[slot].used:
                self._entries[slot].used = False
                _count_parked(shared, -1)
                claimed.c_clear(self._entries[slot].page)


cdef int content_of(int answer) noexcept nogil:
    if answer == ANSWER_PAGES:
        return CONTENT_DATA
    if answer == ANSWER_ZEROS:
        return CONTENT_ZERO
    return CONTENT_CONTINUE if answer == ANSWER_CONTINUE else -1


cdef const char *what_of(int content) noexcept nogil:
    if content == CONTENT_CONTINUE:
        return b"UFFDIO_CONTINUE"
    return b"UFFDIO_COPY"
