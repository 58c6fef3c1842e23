"""Window: the adaptive fault-around, one stream for each sequence of faults that is being followed."""

from libc.stdint cimport UINT64_MAX, uint64_t

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed

cdef enum:
    FIRST_WINDOW = 4
    CONVINCING = 4              # faults in sequence, one page each, after which guessing is tried again


cdef class Window:
    """Window(limit)

    A fault right behind the last window means that the guest walked through all of it: the next one is twice as
    large. A fault anywhere else begins a new stream with a window of one page, in the place of the stream that was
    followed least recently; if that one ended in a window which the guest never reached the end of, the guess was wrong, and
    the largest window allowed to anybody is halved, until right guesses double it again. Where that ended guessing
    altogether, a few faults in sequence begin it anew.
    """

    def __cinit__(self, uint64_t limit):
        cdef int index
        self.limit = max(limit, <uint64_t>1)
        self.cap = self.limit
        for index in range(STREAMS):
            self._streams[index].end = UINT64_MAX
            self._streams[index].size = 1

    # Whoever takes statistics reads these beside the reader that counts: relaxed, as a snapshot is.
    @property
    def right(self):
        return pagecore_load_relaxed(&self._right)

    @property
    def wrong(self):
        return pagecore_load_relaxed(&self._wrong)

    def faulted(self, uint64_t page):
        """The native form's Python face, for tests."""
        return self.c_faulted(page)

    cdef uint64_t c_faulted(self, uint64_t page) noexcept nogil:
        cdef int index
        cdef int oldest = 0
        cdef uint64_t size
        if self.limit == 1:
            return 1
        self._clock += 1
        for index in range(STREAMS):
            # Inside the window too: what was to be placed there was not, or was discarded.
            if page <= self._streams[index].end and self._streams[index].end - page < self._streams[index].size:
                size = min(max(self._streams[index].size * 2, <uint64_t>FIRST_WINDOW), self.cap)
                if self._streams[index].end == page:
                    self._streams[index].hits += 1
                    if self._streams[index].size > 1:
                        pagecore_store_relaxed(&self._right, self._right + 1)
                        self.cap = min(self.limit, self.cap * 2)
                    elif self._streams[index].hits >= CONVINCING:
                        self.cap = min(self.limit, max(self.cap, <uint64_t>FIRST_WINDOW))
                else:
                    size = min(self._streams[index].size, self.cap)
                self._streams[index].size = size
                self._streams[index].end = page + size
                self._streams[index].used = self._clock
                return size
            if self._streams[index].used < self._streams[oldest].used:
                oldest = index
        if self._streams[oldest].size > 1:
            pagecore_store_relaxed(&self._wrong, self._wrong + 1)
            self.cap = max(self.cap // 2, <uint64_t>1)
        self._streams[oldest].end = page + 1
        self._streams[oldest].size = 1
        self._streams[oldest].hits = 0
        self._streams[oldest].used = self._clock
        return 1
