# cython: language_level=3, freethreading_compatible=True
"""Page sources as another project would write them against the .pxd: compiled and run by tests/conftest.py."""

import os

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport read, write

from pagecore.page_source cimport (
    ANSWER_CONTINUE,
    ANSWER_FAILED,
    ANSWER_PAGES,
    ANSWER_STOPPED,
    ANSWER_ZEROS,
    PageAnswer,
    PageSource,
)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    enum: POLLIN

cdef enum:
    PAGE = 4096

cdef struct Run:
    uint64_t first
    uint64_t count


cdef class PulledSource(PageSource):
    """Every 64-bit word of page n is n + 1; every fifth page is zeros; page `broken` cannot be had."""

    cdef uint64_t *_pages
    cdef readonly uint64_t size
    cdef readonly uint64_t fetches
    cdef public uint64_t broken

    def __cinit__(self, uint64_t size):
        cdef uint64_t word
        self.size = self.broken = size
        self._pages = <uint64_t *>malloc(size * PAGE)
        if self._pages == NULL:
            raise MemoryError()
        for word in range(size * PAGE // 8):
            self._pages[word] = word * 8 // PAGE + 1

    def __dealloc__(self):
        free(self._pages)

    cdef uint64_t c_pages_of(self, uint32_t region) noexcept nogil:
        return self.size if region == 0 else 0

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        self.fetches += 1
        answer.region = region
        answer.first = first
        answer.count = 1
        if first == self.broken:
            answer.kind = ANSWER_FAILED
            answer.error = EIO
            answer.field = b"the consumer's source"
        elif first % 5 == 4:
            answer.kind = ANSWER_ZEROS
        else:
            # The rest of a run up to the next page of zeros, or what is left of the run.
            answer.kind = ANSWER_PAGES
            answer.count = min(count, 4 - first % 5)
            answer.data = <const uint8_t *>(self._pages + first * PAGE // 8)
        return answer.kind


cdef class PushedSource(PageSource):
    """One lane; requests go through a pipe, and come back as pages of which every byte is 7 * n + 1.

    With `mapped`: as pages that the page cache has.
    """

    cdef int _reader
    cdef int _writer
    cdef uint8_t _page[PAGE]
    cdef Run _run
    cdef public bint mapped

    def __cinit__(self):
        self._reader = self._writer = -1
        self.lanes = 1
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def __dealloc__(self):
        os.close(self._reader)
        os.close(self._writer)

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        cdef Run run = Run(first, count)
        return 0 if write(self._writer, &run, sizeof(run)) == sizeof(run) else -errno

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        cdef pollfd waits[2]
        cdef size_t index
        cdef uint8_t value
        while self._run.count == 0:
            if read(self._reader, &self._run, sizeof(self._run)) > 0:
                continue
            if errno != EAGAIN and errno != EINTR:
                answer.kind = ANSWER_FAILED
                answer.error = errno
                answer.count = 0
                return answer.kind
            waits[0].fd = self._reader
            waits[1].fd = stop_fd
            waits[0].events = waits[1].events = POLLIN
            waits[1].revents = 0
            poll(waits, 2, -1)
            if waits[1].revents:
                answer.kind = ANSWER_STOPPED
                return answer.kind
        value = <uint8_t>(7 * self._run.first + 1)
        for index in range(PAGE):
            self._page[index] = value
        answer.kind = ANSWER_CONTINUE if self.mapped else ANSWER_PAGES
        answer.region = 0
        answer.first = self._run.first
        answer.count = 1
        answer.data = self._page
        self._run.first += 1
        self._run.count -= 1
        return answer.kind


cdef class Lane:
    """One lane of a pushing source, driven from Python a step at a time."""

    STOPPED = ANSWER_STOPPED
    FAILED = ANSWER_FAILED

    cdef PageSource _source
    cdef PageAnswer _answer
    cdef int _stop_fd

    def __cinit__(self, PageSource source):
        self._source = source
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        os.close(self._stop_fd)

    def ask(self, uint64_t first, uint64_t count):
        """0 or -errno."""
        cdef int status
        with nogil:
            status = self._source.c_request(0, first, count, False)
        return status

    def next(self):
        """(kind, first page, page count, error) of the next answer."""
        with nogil:
            self._source.c_next(0, self._stop_fd, &self._answer)
        return self._answer.kind, self._answer.first, self._answer.count, self._answer.error

    def data(self):
        """The content of the last answer, as it stands now."""
        return self._answer.data[:self._answer.count * PAGE]

    def stop(self):
        os.eventfd_write(self._stop_fd, 1)


cdef class BoldSource(PageSource):
    """Says of every page that the page cache has it."""

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        answer.kind = ANSWER_CONTINUE
        answer.count = count
        return answer.kind
