"""The native half of the soak: a source that pushes from memory, and threads that touch and discard without the GIL."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from pagecore._atomic cimport (
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_store_relaxed,
    pagecore_store_release,
)
from pagecore._placement cimport PlacementLoop
from pagecore._parking cimport CONTENT_DATA
from pagecore._placer cimport Placer
from pagecore.page_source._protocol cimport (
    ANSWER_END,
    ANSWER_PAGES,
    ANSWER_STOPPED,
    PageAnswer,
    PageSource,
)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    enum: MADV_DONTNEED

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    enum: POLLIN

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *delay, timespec *left)

cdef enum:
    PAUSE_NS = 200000
    PAGE = 4096
    WORDS = 512
    RING = 1 << 16
    LANES = 4


cdef inline uint64_t _random(uint64_t *state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0]


cdef inline uint64_t _word(uint64_t page) noexcept nogil:
    """Every word of a page's content; never 0."""
    return (page + 1) * <uint64_t>0x9E3779B97F4A7C15 | 1


def fill(uint64_t[::1] words):
    """The content of all pages."""
    cdef uint64_t index
    with nogil:
        for index in range(<uint64_t>len(words)):
            words[index] = _word(index // WORDS)


cdef class SoakSource(PageSource):
    """Two bulk lanes that send every page, one forwards and one as a second link that sends it all again, and two lanes that
    answer requests."""

    cdef Py_buffer _view
    cdef uint64_t _npages
    cdef uint64_t _sent[LANES]
    cdef uint64_t _asked            # requests put into the ring, and taken from it
    cdef uint64_t _answered
    cdef uint64_t _ring[RING]       # first page + 1, and the count in the upper bits; 0: not written yet

    def __cinit__(self, buffer):
        PyObject_GetBuffer(buffer, &self._view, PyBUF_SIMPLE)
        self._npages = self._view.len // PAGE
        self.lanes = LANES
        self.bulk_lanes = 2

    def __dealloc__(self):
        PyBuffer_Release(&self._view)

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        cdef uint64_t slot
        if pagecore_load_relaxed(&self._asked) - pagecore_load_relaxed(&self._answered) > RING - 64:
            return -EAGAIN
        slot = pagecore_fetch_add(&self._asked, 1)
        pagecore_store_release(&self._ring[slot % RING], first + 1 | count << 40)
        return 0

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        cdef pollfd wait
        cdef uint64_t slot, entry
        wait.fd = stop_fd
        wait.events = POLLIN
        answer.region = 0
        answer.kind = ANSWER_PAGES
        answer.count = 1 + (self._sent[lane] * 7) % 23
        if lane < 2:
            if self._sent[lane] >= self._npages:
                answer.kind = ANSWER_END
                return answer.kind
            answer.first = self._sent[lane]
            answer.count = min(answer.count, self._npages - answer.first)
            self._sent[lane] += answer.count
            wait.revents = 0
            # A little at a time, so that the guest is faster somewhere.
            if poll(&wait, 1, 1) > 0:
                answer.kind = ANSWER_STOPPED
                return answer.kind
        else:
            while True:
                # The lanes 2 and 3 take every other slot.
                slot = self._sent[lane] * 2 + <uint64_t>(lane - 2)
                entry = pagecore_load_acquire(&self._ring[slot % RING]) if slot < pagecore_load_acquire(&self._asked) else 0
                if entry:
                    break
                wait.revents = 0
                if poll(&wait, 1, 1) > 0:
                    answer.kind = ANSWER_STOPPED
                    return answer.kind
            pagecore_store_relaxed(&self._ring[slot % RING], 0)
            self._sent[lane] += 1
            pagecore_fetch_add(&self._answered, 1)
            answer.first = (entry & ((<uint64_t>1 << 40) - 1)) - 1
            answer.count = entry >> 40
        answer.data = <const uint8_t *>self._view.buf + answer.first * PAGE
        return answer.kind


def touch(uintptr_t base, uint64_t npages, uint64_t seed, uint64_t touches, uint64_t[::1] begun, uint64_t[::1] ended):
    """Read pages at random; returns (pages with wrong bytes, the last of them).

    `begun` and `ended` say how many discards of each page were begun, and had returned. A page whose discard had returned
    before it was read must be zeros, one that was never discarded must not, and no page is half of each.
    """
    cdef uint64_t state = seed | 1
    cdef uint64_t page, first, last, middle, over
    cdef uint64_t wrong = 0, which = 0
    cdef const volatile uint64_t *words
    with nogil:
        while touches:
            touches -= 1
            page = _random(&state) % npages
            over = pagecore_load_acquire(&ended[page])
            words = <const volatile uint64_t *>(base + page * PAGE)
            first = words[0]
            middle = words[_random(&state) % WORDS]
            last = words[WORDS - 1]
            if over:
                if first or middle or last:
                    wrong += 1
                    which = page
            elif first != _word(page) or middle != first or last != first:
                # A discard may have begun, and cut in anywhere.
                if pagecore_load_acquire(&begun[page]) == 0 or not _each_is_right(page, first, middle, last):
                    wrong += 1
                    which = page
    return wrong, which


cdef bint _each_is_right(uint64_t page, uint64_t first, uint64_t middle, uint64_t last) noexcept nogil:
    return ((first == 0 or first == _word(page)) and (middle == 0 or middle == _word(page))
            and (last == 0 or last == _word(page)))


def discard(uintptr_t base, uint64_t npages, uint64_t seed, uint64_t[::1] over, uint64_t[::1] begun,
            uint64_t[::1] ended):
    """Discard runs of up to 8 pages, of every third group of 16 pages, until `over`; returns how many calls it made."""
    cdef uint64_t state = seed | 1
    cdef uint64_t page, count, index
    cdef uint64_t calls = 0
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = PAUSE_NS
    with nogil:
        while pagecore_load_acquire(&over[0]) == 0:
            page = _random(&state) % (npages // 48) * 48 + _random(&state) % 8
            count = 1 + _random(&state) % 8
            for index in range(page, page + count):
                pagecore_fetch_add(&begun[index], 1)
            if madvise(<void *>(base + page * PAGE), count * PAGE, MADV_DONTNEED) != 0:
                break
            for index in range(page, page + count):
                pagecore_fetch_add(&ended[index], 1)
            calls += 1
            # With discards back to back the address space is changing at all times, and nothing can be placed at all.
            nanosleep(&pause, NULL)
    return calls


def duplicate(PlacementLoop loop, const uint8_t[::1] content, uint64_t seed, uint64_t[::1] over):
    """A second link that sends what was sent, in runs of up to 16 pages anywhere, until `over`."""
    cdef Placer placer = loop._placer_objects[0]
    cdef uint64_t npages = len(content) // PAGE
    cdef uint64_t state = seed | 1
    cdef uint64_t page, count
    cdef uint64_t runs = 0
    with nogil:
        while pagecore_load_acquire(&over[0]) == 0:
            count = 1 + _random(&state) % 16
            page = _random(&state) % (npages - count)
            placer.c_place(page, count, &content[page * PAGE], CONTENT_DATA)
            runs += 1
            poll(NULL, 0, 1)
    return runs
