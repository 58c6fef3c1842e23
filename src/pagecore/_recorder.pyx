"""Recorder: which pages are touched first, in which order."""

from pagecore.errors import BusyError

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_acquire, pagecore_store_release
from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport Pinned, new_runs


cdef class Recorder:
    def __dealloc__(self):
        free(self._planes)
        free(self._touches)

    def begin(self, sizes):
        """Record from now on; `sizes` are the pages of each region. Each page is recorded once."""
        cdef int index
        if self._seen is not None:
            raise BusyError("the working set is being recorded")
        seen = tuple([Bitmap(size) for size in sizes])
        self._capacity = sum(sizes)
        free(self._planes)          # of a begin() that failed
        free(self._touches)
        self._planes = <void **>calloc(len(seen), sizeof(void *))
        self._touches = <Touch *>calloc(self._capacity, sizeof(Touch))
        if self._planes == NULL or self._touches == NULL:
            raise MemoryError(f"no memory to record {self._capacity} pages")
        self._seen = seen
        for index in range(len(seen)):
            self._planes[index] = <void *>seen[index]
        pagecore_store_release(&self.c_active, 1)       # pairs with c_touched: whoever sees it sees the tables

    @property
    def active(self):
        """Whether begin() was called."""
        return self._seen is not None

    def touches(self):
        """An int64 array of shape (n, 2): index of the region, and page, in the order of the first touch."""
        cdef uint64_t count = min(pagecore_load_acquire(&self._used), self._capacity)
        cdef uint64_t index
        cdef Pinned pairs = new_runs(count)
        for index in range(count):
            if pagecore_load_acquire(&self._touches[index].ready) == 0:
                break                       # its writer is at it
            pairs.numbers()[2 * index] = self._touches[index].ready - 1
            pairs.numbers()[2 * index + 1] = self._touches[index].page
            pairs.used = index + 1
        return pairs.filled()

    cdef void c_touched(self, int index, uint64_t page) noexcept nogil:
        cdef uint64_t slot
        if pagecore_load_acquire(&self.c_active) == 0 or (<Bitmap>self._planes[index]).c_test_and_set(page):
            return
        slot = pagecore_fetch_add(&self._used, 1)       # a page comes once: it cannot run over
        self._touches[slot].page = page
        pagecore_store_release(&self._touches[slot].ready, index + 1)
