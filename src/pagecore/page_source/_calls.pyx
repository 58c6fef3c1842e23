"""Calls: runs of pages that wait for a slow thread, and its answers, under a time-out that no such thread can miss."""

import os

from libc.errno cimport EAGAIN, EINTR, ETIMEDOUT, errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.unistd cimport getpid, read, write

from pagecore._sync cimport (
    pagecore_monitor_destroy,
    pagecore_monitor_enter,
    pagecore_monitor_init,
    pagecore_monitor_leave,
    pagecore_monitor_notify,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore.page_source._protocol cimport (
    ANSWER_END,
    ANSWER_FAILED,
    ANSWER_PAGES,
    ANSWER_STOPPED,
    ANSWER_ZEROS,
    PageAnswer,
)

cdef extern from "<errno.h>" nogil:
    enum: ESHUTDOWN

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    enum: POLLIN

# A wait of the slow thread is cut short by every notification; this makes it bounded.
cdef uint64_t IDLE_NS = 1000000000


cdef class Calls:
    def __cinit__(self, uint64_t timeout_ns, size_t page_size, uint64_t max_pages):
        self._news = -1
        self._process = getpid()
        if pagecore_monitor_init(&self._monitor) != 0:
            raise MemoryError()
        self._ready = True
        self._timeout = timeout_ns
        self._page_size = page_size
        self._most = max_pages
        self._queue = <Call *>calloc(CALLS_QUEUED, sizeof(Call))
        self._data = <uint8_t *>malloc(page_size * max_pages)
        if self._queue == NULL or self._data == NULL:
            raise MemoryError()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        free(self._queue)
        free(self._data)
        if self._news >= 0:
            os.close(self._news)
        if self._ready:
            pagecore_monitor_destroy(&self._monitor)

    @property
    def pending(self):
        cdef size_t waiting
        if getpid() != self._process:
            return 0
        with nogil:
            pagecore_monitor_enter(&self._monitor)
            waiting = self._length + (self._calling and not self._written_off) + self._full
            pagecore_monitor_leave(&self._monitor)
        return waiting

    cdef int c_ask(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil:
        cdef Call *call
        cdef int status = 0
        if getpid() != self._process:
            return -ESHUTDOWN
        pagecore_monitor_enter(&self._monitor)
        if self._closed:
            status = -ESHUTDOWN
        elif self._length == CALLS_QUEUED:
            status = -EAGAIN
        else:
            call = &self._queue[(self._head + self._length) % CALLS_QUEUED]
            call.region = region
            call.first = first
            call.count = count
            call.since = pagecore_now_ns()
            self._length += 1
            pagecore_monitor_notify(&self._monitor)
            self._tell_lane()           # it has a deadline to keep now
        pagecore_monitor_leave(&self._monitor)
        return status

    cdef bint c_take(self, Call *call) noexcept nogil:
        cdef bint open
        pagecore_monitor_enter(&self._monitor)
        # The lane still reads the answer before this one: its buffer is the only one.
        while not self._closed and (self._length == 0 or self._full or self._lent):
            pagecore_monitor_wait(&self._monitor, pagecore_now_ns() + IDLE_NS)
        open = not self._closed
        if open:
            self._current = self._queue[self._head]
            if self._current.count > self._most:
                # A long run is asked for in pieces, so that each has the whole time-out.
                self._current.count = self._most
                self._queue[self._head].first += self._most
                self._queue[self._head].count -= self._most
            else:
                self._head = (self._head + 1) % CALLS_QUEUED
                self._length -= 1
            self._current.since = pagecore_now_ns()
            self._calling = True
            self._written_off = False
            call[0] = self._current
            self._tell_lane()
        pagecore_monitor_leave(&self._monitor)
        return open

    cdef void c_answer(self, const uint8_t *data, int error, const char *what) noexcept nogil:
        """Answer the call that c_take gave: `data` or, where it is NULL, zeros; an `error` says why there is neither."""
        pagecore_monitor_enter(&self._monitor)
        self._calling = False
        self._progress = pagecore_now_ns()
        if not self._written_off:
            self._answer.region = self._current.region
            self._answer.first = self._current.first
            self._answer.count = self._current.count
            self._answer.data = NULL
            self._answer.error = error
            self._answer.field = what
            if error:
                self._answer.kind = ANSWER_FAILED
            elif data == NULL:
                self._answer.kind = ANSWER_ZEROS
            else:
                self._answer.kind = ANSWER_PAGES
                self._answer.data = self._data
                memcpy(self._data, data, self._current.count * self._page_size)
            self._full = True
        self._tell_lane()
        pagecore_monitor_leave(&self._monitor)

    cdef int c_next(self, int stop_fd, PageAnswer *answer) noexcept nogil:
        cdef pollfd waits[2]
        cdef uint64_t now, deadline, token
        cdef int wait_ms
        answer.kind = 0
        while True:
            pagecore_monitor_enter(&self._monitor)
            self._lent = False
            now = pagecore_now_ns()
            if self._full:
                answer[0] = self._answer
                self._full = False
                self._lent = True
            elif self._closed:
                answer.kind = ANSWER_END
            elif not self._expire(now, answer):
                pagecore_monitor_notify(&self._monitor)
            deadline = self._deadline()
            pagecore_monitor_leave(&self._monitor)
            if answer.kind:
                return answer.kind
            wait_ms = -1
            if deadline != UINT64_MAX:
                wait_ms = <int>min((max(deadline, now) - now + 999999) // 1000000, <uint64_t>1000000)
            waits[0].fd = stop_fd
            waits[1].fd = self._news
            waits[0].events = waits[1].events = POLLIN
            waits[0].revents = waits[1].revents = 0
            if poll(waits, 2, wait_ms) < 0 and errno != EINTR:
                answer.kind = ANSWER_FAILED
                answer.error = errno
                answer.field = b"poll"
                answer.count = 0
                return answer.kind
            if waits[0].revents:
                answer.kind = ANSWER_STOPPED
                return answer.kind
            if waits[1].revents:
                read(self._news, &token, sizeof(token))

    cdef void c_close(self) noexcept nogil:
        if getpid() != self._process:
            return      # a forked child: no thread waits here, and one of the parent's may have the lock
        pagecore_monitor_enter(&self._monitor)
        self._closed = True
        pagecore_monitor_notify(&self._monitor)
        self._tell_lane()
        pagecore_monitor_leave(&self._monitor)

    cdef uint64_t _deadline(self) noexcept nogil:
        """When somebody has waited too long: the call under way, or behind one that was written off the next in the queue.

        The second covers a thread that never comes, too: Python code elsewhere may keep the GIL.
        """
        if self._calling and not self._written_off:
            return self._current.since + self._timeout
        if self._length:
            return max(self._queue[self._head].since, self._progress) + self._timeout
        return UINT64_MAX

    cdef bint _expire(self, uint64_t now, PageAnswer *answer) noexcept nogil:
        """Fail what has waited too long. The thread cannot be stopped; when it comes back, it goes on with the queue."""
        cdef Call *call
        if now < self._deadline():
            return False
        if self._calling and not self._written_off:
            call = &self._current
            self._written_off = True
        else:
            call = &self._queue[self._head]
            self._head = (self._head + 1) % CALLS_QUEUED
            self._length -= 1
        self._progress = now
        answer.kind = ANSWER_FAILED
        answer.region = call.region
        answer.first = call.first
        answer.count = call.count
        answer.data = NULL
        answer.error = ETIMEDOUT
        answer.field = b"the callable"
        return True

    cdef void _tell_lane(self) noexcept nogil:
        cdef uint64_t one = 1
        write(self._news, &one, sizeof(one))
