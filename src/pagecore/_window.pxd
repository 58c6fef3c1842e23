from libc.stdint cimport uint64_t

cdef enum:
    STREAMS = 8

cdef struct Stream:
    uint64_t end                # the page after what was placed last
    uint64_t size               # pages of that window
    uint64_t hits               # faults that followed it
    uint64_t used               # when, in faults


cdef class Window:
    """How many pages are worth placing around a fault, for one region and one reader. Nothing in it is locked: that reader
    alone writes, and the two counts are stored relaxed, so that statistics may be taken meanwhile."""

    cdef readonly uint64_t limit        # pages; 1: never guess
    cdef readonly uint64_t cap          # what guesses were worth lately; at most `limit`
    cdef uint64_t _right                # windows that the guest walked through to their end
    cdef uint64_t _wrong                # windows that it left behind
    cdef Stream _streams[STREAMS]
    cdef uint64_t _clock

    # A fault came for this page, which nobody has placed: how many pages to place from here on, 1 to `limit`.
    cdef uint64_t c_faulted(self, uint64_t page) noexcept nogil
