from libc.stdint cimport uint32_t, uint64_t

from pagecore.page_source._protocol cimport PageAnswer, PageSource

cdef struct Extent:
    uint32_t region
    uint64_t offset         # bytes
    uint64_t pages


cdef class FileSource(PageSource):
    cdef int _fd
    cdef Extent *_extents
    cdef int _count
    cdef readonly bint sparse       # it had holes when it was opened
    cdef uint64_t _known            # a run without holes: its first 4 KiB unit in the high half, its length in the low

    cdef const Extent *_find(self, uint32_t region) noexcept nogil
    # The place of a run in the file, or EINVAL where it has no such pages.
    cdef int _locate(self, uint32_t region, uint64_t first, uint64_t count, uint64_t *position) noexcept nogil
    # How many whole pages from here are a hole; if none is, how many there are before the next whole hole page. 0 or errno.
    cdef int _split(self, uint64_t position, uint64_t count, uint64_t *holes, uint64_t *data) noexcept nogil
    # 0, or ENODATA where the file ends before.
    cdef int _check_size(self, uint64_t end) noexcept nogil
    cdef int _read(self, void *into, size_t length, uint64_t position, uint64_t *page) noexcept nogil


cdef int fail(PageAnswer *answer, int error, const char *what) noexcept nogil
