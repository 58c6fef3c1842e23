from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum AnswerKind:
    ANSWER_PAGES = 1        # `data` holds `count` pages
    ANSWER_ZEROS = 2        # the pages are zeros
    ANSWER_FILL = 3         # hinted pages: fill them with the session's pattern
    ANSWER_SENT = 4         # "already sent": on its way on another stream
    ANSWER_GONE = 5         # nobody has these pages
    ANSWER_END = 6          # this lane is at its end
    ANSWER_STOPPED = 7      # the stop descriptor became readable first
    ANSWER_FAILED = 8       # `error` is a positive errno; EPROTO: `field` names what was wrong in a frame

cdef struct PageAnswer:
    int kind
    uint32_t region
    uint64_t first
    uint64_t count
    const uint8_t *data     # valid until the lane's next call
    int error
    const char *field


cdef class PageSource:
    """What a placement loop draws pages from. The c_ methods are the native form, all nogil, and return answer.kind.

    A source with lanes == 0 is pulled: c_fetch answers at once, from memory that is resident and not registered (D5).
    A source with lanes > 0 pushes: c_request asks (0 or -errno; -EAGAIN: ask later), and answers arrive in any order
    from c_next, which one thread a lane calls. The first `bulk_lanes` lanes carry pages that nobody asked for.
    """

    cdef readonly int lanes
    cdef readonly int bulk_lanes
    cdef readonly size_t page_size      # bytes of a page of every answer; 4096 unless the source says otherwise
    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil
    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil
    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil
    cdef readonly bint slow             # c_fetch may sleep, as on a disk: better not called by a reader
