from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore._sync cimport pagecore_monitor
from pagecore.page_source._protocol cimport PageAnswer

cdef enum:
    CALLS_QUEUED = 1024         # runs that wait; one more is asked for again later

cdef struct Call:
    uint32_t region
    uint64_t first
    uint64_t count
    uint64_t since              # when it was asked for, or began: CLOCK_MONOTONIC, ns


cdef class Calls:
    """Runs on their way to a slow thread, and its answers on their way back; each side waits without the GIL."""

    cdef pagecore_monitor _monitor      # guards all below
    cdef bint _ready
    cdef bint _closed
    cdef int _news                      # eventfd: something for the lane to look at
    cdef uint64_t _timeout              # ns
    cdef size_t _page_size
    cdef uint64_t _most                 # pages of one call
    cdef Call *_queue                   # a ring
    cdef size_t _head
    cdef size_t _length
    cdef Call _current                  # the call that the thread is in
    cdef bint _calling
    cdef bint _written_off              # its time is over: whatever it answers is dropped
    cdef uint64_t _progress             # when a call last ended or was written off
    cdef PageAnswer _answer             # the one that waits for the lane, or that the lane has
    cdef bint _full
    cdef bint _lent                     # the lane has it until its next call
    cdef uint8_t *_data
    cdef int _process                   # whose threads these are: a forked child has none of them

    # Any thread: 0, -EAGAIN when the queue is full, -ESHUTDOWN once closed, and in a forked child.
    cdef int c_ask(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil
    # The slow thread: the next call, False once closed; then exactly one of the answers.
    cdef bint c_take(self, Call *call) noexcept nogil
    cdef void c_answer(self, const uint8_t *data, int error, const char *what) noexcept nogil
    # The lane.
    cdef int c_next(self, int stop_fd, PageAnswer *answer) noexcept nogil
    cdef void c_close(self) noexcept nogil

    cdef uint64_t _deadline(self) noexcept nogil
    cdef bint _expire(self, uint64_t now, PageAnswer *answer) noexcept nogil
    cdef void _tell_lane(self) noexcept nogil
