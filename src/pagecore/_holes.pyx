"""Holes: which parts of a huge page are zeros although the page has not come yet."""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pagecore._bitmap cimport Bitmap
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_destroy,
    pagecore_monitor_enter,
    pagecore_monitor_init,
    pagecore_monitor_leave,
)


cdef class Holes:
    def __cinit__(self, size_t npages, size_t page_size):
        self._parts = page_size // HOLE_SIZE
        self._bits = Bitmap(npages * self._parts)
        self._room = <uint8_t *>malloc(page_size)
        self._monitor = malloc(sizeof(pagecore_monitor))
        if self._monitor == NULL or pagecore_monitor_init(<pagecore_monitor *>self._monitor) != 0:
            free(self._monitor)
            self._monitor = NULL
            raise MemoryError()
        if self._room == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self._room)
        if self._monitor != NULL:
            pagecore_monitor_destroy(<pagecore_monitor *>self._monitor)
            free(self._monitor)

    cdef void c_mark(self, uint64_t start, uint64_t end) noexcept nogil:
        cdef uint64_t first = (start + HOLE_SIZE - 1) // HOLE_SIZE
        if end // HOLE_SIZE > first:
            self._bits.c_set_range(first, end // HOLE_SIZE - first)

    cdef bint c_has(self, uint64_t page) noexcept nogil:
        return self._bits.c_count_range(page * self._parts, self._parts) != 0

    cdef const uint8_t *c_enter(self, uint64_t page, const uint8_t *data) noexcept nogil:
        cdef size_t part
        pagecore_monitor_enter(<pagecore_monitor *>self._monitor)
        memcpy(self._room, data, self._parts * HOLE_SIZE)
        for part in range(self._parts):
            if self._bits.c_test(page * self._parts + part):
                memset(self._room + part * HOLE_SIZE, 0, HOLE_SIZE)
        return self._room

    cdef void c_leave(self) noexcept nogil:
        pagecore_monitor_leave(<pagecore_monitor *>self._monitor)
