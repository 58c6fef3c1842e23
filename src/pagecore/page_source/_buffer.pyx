"""BufferSource: pages that lie in memory already."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore.page_source._protocol cimport ANSWER_FAILED, ANSWER_PAGES, PageAnswer, PageSource


cdef class BufferSource(PageSource):
    """BufferSource(buffer, page_size=4096, *, region_id=0)
    --

    A pull source: page n of one region is the n-th page of a buffer.

    Parameters
    ----------
    buffer : bytes-like
        The content, in whole pages. It is pinned for the life of the source. It must be resident memory: never a mapping
        of a file (its faults would be served while a lock is held, D5) and never the memory that is being served.
    page_size : int
        Bytes.
    region_id : int
        The region that the buffer belongs to.

    Raises
    ------
    ValueError
        The length is not a multiple of the page size.

    Notes
    -----
    ``c_fetch`` does not take the GIL, and any number of threads may call it: the buffer is only read.
    """

    cdef Py_buffer _view
    cdef bint _pinned
    cdef uint32_t _region
    cdef readonly size_t size       # pages

    def __cinit__(self, buffer, size_t page_size=4096, *, uint32_t region_id=0):
        PyObject_GetBuffer(buffer, &self._view, PyBUF_SIMPLE)
        self._pinned = True
        if page_size == 0 or self._view.len % page_size:
            raise ValueError(f"length {self._view.len} is not a multiple of page size {page_size}")
        self._region = region_id
        self.page_size = page_size
        self.size = self._view.len // page_size

    def __dealloc__(self):
        if self._pinned:
            PyBuffer_Release(&self._view)

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        answer.region = region
        answer.first = first
        answer.count = count
        if region != self._region or count > self.size or first > self.size - count:
            answer.kind = ANSWER_FAILED
            answer.error = EINVAL
            answer.field = NULL
        else:
            answer.kind = ANSWER_PAGES
            answer.data = <const uint8_t *>self._view.buf + first * self.page_size
        return answer.kind
