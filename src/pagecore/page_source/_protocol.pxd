from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum AnswerKind:
    ANSWER_PAGES = 1        # `data` holds `count` pages
    ANSWER_ZEROS = 2        # the pages are zeros
    ANSWER_FILL = 3         # hinted pages: fill them with the session's pattern
    ANSWER_SENT = 4         # "already sent": on its way on another stream
    ANSWER_GONE = 5         # nobody has these pages
    ANSWER_END = 6          # this lane is at its end
    ANSWER_STOPPED = 7      # the stop descriptor became readable first
    ANSWER_FAILED = 8       # `error` is a positive errno, `field` says what failed; EPROTO: the field of a wrong frame
    ANSWER_CONTINUE = 9     # they are in the page cache of the region's own memory: map them. `data`: see, not copy

cdef struct PageAnswer:
    int kind
    uint32_t region
    uint64_t first
    uint64_t count          # of ANSWER_FAILED on a lane: the run that failed; 0: the lane itself, which is at its end
    const uint8_t *data     # valid until the lane's next call; from c_fetch: until the next c_fetch of the same thread
    bint urgent             # set by the caller: faults are coming, and nothing is to be held back for a whole block
    int block               # 0; or, after gather(), 1 + the stage of the mover that holds all of a block, to be given back
    int error
    const char *field


cdef class PageSource:
    """What a placement loop draws pages from. The c_ methods are the native form, all nogil, and return answer.kind.

    A source with lanes == 0 is pulled: c_fetch answers from memory that is resident and not registered (D5), at once
    unless the source is `slow`. It may answer for the first pages of the run alone (1 <= answer.count <= count): the
    caller asks again for the rest. On ANSWER_FAILED answer.first is the first page that could not be had.
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
    # How many pages of a region it has; UINT64_MAX where it cannot say.
    cdef uint64_t c_pages_of(self, uint32_t region) noexcept nogil
