"""A test door into the placement loop: single steps of its threads, so that interleavings are chosen and not hoped for."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport read

from pagecore._page_state cimport PageState
from pagecore._placement cimport PlacementLoop
from pagecore._parking cimport CONTENT_DATA, CONTENT_FILL, CONTENT_ZERO
from pagecore._placer cimport Placer
from pagecore._placing cimport PlacementObserver
from pagecore._reader cimport Reader
from pagecore.page_source._protocol cimport ANSWER_FAILED, ANSWER_PAGES, PageAnswer, PageSource


def place(PlacementLoop loop, uint64_t first, const uint8_t[::1] data):
    """What a lane does with an answer that carries pages."""
    cdef Placer placer = loop._placer_objects[0]
    cdef uint64_t count = len(data) // placer.region.page_size
    with nogil:
        placer.c_place(first, count, &data[0], CONTENT_DATA)


def place_zeros(PlacementLoop loop, uint64_t first, uint64_t count):
    cdef Placer placer = loop._placer_objects[0]
    with nogil:
        placer.c_place(first, count, NULL, CONTENT_ZERO)


def place_fill(PlacementLoop loop, uint64_t first, uint64_t count):
    cdef Placer placer = loop._placer_objects[0]
    with nogil:
        placer.c_place(first, count, NULL, CONTENT_FILL)


def ask(PlacementLoop loop, uint64_t page):
    """What serving a page does once it has found it missing, and not under way."""
    cdef Placer placer = loop._placer_objects[0]
    with nogil:
        placer._ask(page, 1)


def begin_reading(PlacementLoop loop):
    """Have the reader's role without its thread, or any other."""
    loop._begin_reading()


def read_batch(PlacementLoop loop):
    """What the reader does when the descriptor is readable."""
    cdef bint alive
    with nogil:
        alive = loop.c_read_batch()
    return alive


def read_batch_of(uint8_t[::1] begun, PlacementLoop loop, int index):
    """The same for one of its readers; `begun` says that the GIL is held no more."""
    cdef Reader reader = loop._reader_objects[index]
    with nogil:
        begun[0] = 1
        reader.c_read_batch()


def place_ahead(PlacementLoop loop, uint64_t first, uint64_t count):
    """A chunk of what the reader places while no fault comes."""
    cdef Placer placer = loop._placer_objects[0]
    with nogil:
        placer.c_place_ahead(first, count)


def give_back(PlacementLoop loop, uint64_t first, uint64_t count):
    """What a placement that must not park does with its claims after EAGAIN."""
    cdef Placer placer = loop._placer_objects[0]
    with nogil:
        placer._give_back(first, (1 << count) - 1)


def retry(PlacementLoop loop):
    """One turn of the retry thread; True while something is left."""
    cdef Placer placer
    cdef bint left = False
    for placer in loop._placer_objects:
        with nogil:
            left |= placer.c_retry()
    return left


def serve(PlacementLoop loop, uint64_t page):
    cdef Placer placer = loop._placer_objects[0]
    cdef uint64_t done
    with nogil:
        placer.c_serve(page, None, 1, &done)


def parked(PlacementLoop loop):
    return loop._shared.parked


def pending(PlacementLoop loop):
    cdef Placer placer = loop._placer_objects[0]
    return placer._pending.c_count()


def waiting(PlacementLoop loop):
    """Pages whose fault was read and whose waiters nobody woke."""
    cdef Placer placer = loop._placer_objects[0]
    return placer._waiters._waiting.c_count()


def touch_when(uintptr_t flag, uintptr_t address, uint64_t spins):
    """Read the byte at `address` some `spins` rounds after the byte at `flag` has become 1."""
    cdef volatile uint8_t *go = <volatile uint8_t *>flag
    cdef volatile uint64_t left = spins
    cdef uint8_t found
    with nogil:
        go[0] = 2       # spinning
        while go[0] != 1:
            pass
        while left:
            left -= 1
        found = (<volatile uint8_t *>address)[0]
    return found


def lock_shared(PageState state):
    with nogil:
        state.c_lock_shared()


def unlock(PageState state):
    with nogil:
        state.c_unlock()


def hold_exclusive(uint8_t[::1] begun, PageState state, int gate):
    """Take the exclusive side, and keep it until a byte comes out of a pipe: only its holder may give it back."""
    cdef uint8_t token
    cdef ssize_t got
    with nogil:
        begun[0] = 1
        state.c_lock_exclusive()
        got = read(gate, &token, 1)
        state.c_unlock()
    return got


cdef class RecordingObserver(PlacementObserver):
    """Keeps (first, count, first byte or -1) of each call."""

    cdef uint64_t _log[3 * 256]
    cdef int _used

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        if self._used < 256:
            self._log[3 * self._used] = first
            self._log[3 * self._used + 1] = count
            self._log[3 * self._used + 2] = <uint64_t>-1 if data == NULL else data[0]
            self._used += 1

    def calls(self):
        return [(self._log[3 * i], self._log[3 * i + 1], <long>self._log[3 * i + 2]) for i in range(self._used)]


cdef class GatedSource(PageSource):
    """A slow source over a buffer: each fetch takes one byte from a pipe first, and sleeps while there is none.

    Fetches of pages below `free` do not wait. Every fetch is logged. It answers for `limit` pages at most.
    """

    cdef Py_buffer _view
    cdef int _gate
    cdef uint64_t _free
    cdef uint64_t _limit
    cdef uint64_t _log[2 * 4096]
    cdef readonly int used

    def __cinit__(self, buffer, int gate, uint64_t free=0, uint64_t limit=<uint64_t>-1, bint slow=True):
        PyObject_GetBuffer(buffer, &self._view, PyBUF_SIMPLE)
        self._gate = gate
        self._free = free
        self._limit = limit
        self.slow = slow

    def __dealloc__(self):
        PyBuffer_Release(&self._view)

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        cdef uint8_t token
        if self.used < 4096:
            self._log[2 * self.used] = first
            self._log[2 * self.used + 1] = count
            self.used += 1
        answer.kind = ANSWER_FAILED
        answer.error = EIO
        if first >= self._free and read(self._gate, &token, 1) != 1:
            return answer.kind
        answer.first = first
        answer.count = min(count, self._limit)
        if (first + count) * self.page_size <= <uint64_t>self._view.len:
            answer.kind = ANSWER_PAGES
            answer.data = <const uint8_t *>self._view.buf + first * self.page_size
        return answer.kind

    def fetches(self):
        return [(self._log[2 * i], self._log[2 * i + 1]) for i in range(self.used)]
