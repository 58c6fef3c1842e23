"""The PageSource protocol: what a placement loop draws pages from."""

from libc.errno cimport ENOSYS
from libc.stdint cimport uint32_t, uint64_t


cdef class PageSource:
    """Base of every page source; Cython code implements the ``c_`` methods of ``pagecore/page_source/_protocol.pxd``.

    Attributes
    ----------
    lanes : int
        0 for a source that is pulled (``c_fetch`` answers at once), otherwise how many streams it pushes answers on.
    bulk_lanes : int
        How many of the lanes, the first ones, carry pages that nobody asked for.
    page_size : int
        Bytes of a page; 4096 unless the source says otherwise.

    Notes
    -----
    All native methods run without the GIL. ``c_next`` is called by one thread a lane, ``c_request`` by any thread.
    """

    def __cinit__(self, *args, **kwargs):
        self.lanes = 0
        self.bulk_lanes = 0
        self.page_size = 4096

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        return _refuse(answer)

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        return -ENOSYS

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        return _refuse(answer)


cdef int _refuse(PageAnswer *answer) noexcept nogil:
    answer.kind = ANSWER_FAILED
    answer.error = ENOSYS
    answer.field = NULL
    return answer.kind
