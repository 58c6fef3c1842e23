"""SnapshotTraps: the two threads of a background snapshot.

Everything is write-protected at the start. One thread saves the memory from its beginning to its end and takes the
protection off as it goes; another, the reader, hears of writers that wait, and saves the page of each first. Who saves
a page is decided by its bit in `claimed` (D1); `saved` is set once its content is out of the memory, and only then is
it unprotected, by whoever claimed it. Nobody waits for anybody: a fault on a page that the other thread has under way
is woken by that one (D10).

Discards
--------
MADV_DONTNEED waits until its event is read, and its zap comes at any time after that: what was not saved by then is
lost. Which pages it concerns only the read says. So no event is read before everything is saved: whoever discards
waits until then. While an event waits the kernel lets nothing be unprotected (EAGAIN), so who writes to a page that is
not saved yet waits as long: the price of a discard is that the snapshot is in the background no more. A caller who
minds holds discards back (a balloon, free page reporting), as QEMU does.

How the reader knows that an event waits: read() hands over faults before events (D4), so while a fault waits, a read
of one message brings a fault; and WRITEPROTECT, called on a page of our own, says by EAGAIN whether an event waits.
Asked in the order "is there anything", "is there an event", and then read: what there was in the first step is a
fault. By the third it can be gone only if somebody let its thread go. The other thread does not (`gate`). But a signal
that hits the writer in that microsecond, and a discard that arrives in it, together bring an event too early. Then the
snapshot fails and names the pages, unless they were all saved before: it is never wrong.

Before the moment nothing is promised: events that come before everything is protected are read and dropped, or the
protection would wait for them. Only a thread that holds the gate says that the moment has come.

Missing pages
-------------
Whoever touches one is given zeros, without protection: so its claim must be decided by then. The thread that saves all
looks which pages are there before it claims them. What it then wins and found missing is zeros in the image, and never
read; what was filled before it looked was claimed by the reader, which fills.

What MADV_FREE was given before the start may be reclaimed at any time. The thread that saves all then waits for the
reader, like any other, and gets zeros that are protected, so that nobody writes to them before it has read them; the
reader looks before it copies, because nobody would serve it.
"""

import mmap
from typing import NamedTuple

from pagecore.errors import ClosedError, PagecoreError, UnsupportedError

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport getpid

cimport cython

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_store_release,
)
from pagecore._bitmap cimport Bitmap
from pagecore._descriptor cimport raise_unless_done
from pagecore._span cimport PLACE_AGAIN
from pagecore._sync cimport (
    pagecore_fair_acquire,
    pagecore_fair_lock,
    pagecore_fair_lock_destroy,
    pagecore_fair_lock_init,
    pagecore_fair_release,
    pagecore_monitor,
    pagecore_monitor_destroy,
    pagecore_monitor_enter,
    pagecore_monitor_init,
    pagecore_monitor_leave,
    pagecore_monitor_notify,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore._uffd_ioctl cimport (
    EVENT_FAULT,
    EVENT_REMOVE,
    FAULT_WP,
    OPERATION_UNPROTECT,
    PLACE_DONTWAKE,
    REGISTER_WP,
    UffdEvent,
    uffd_place,
)
from pagecore._write_traps cimport WriteTraps

__all__ = ["SnapshotProgress", "SnapshotTraps"]

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    const short POLLIN
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from *:
    int count_ones "__builtin_popcountll"(uint64_t word) nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t word) nogil

cdef enum:
    PAGE = 4096
    UNIT = 8                # words that are saved and unprotected at once: 2 MiB, so that a huge page stays one
    MESSAGES = 64
    RUNNING = 0             # states; each of the others is for good
    COMPLETE = 1
    FAILED = 2
    CANCELLED = 3
    HELD_MS = 1

cdef uint64_t SLICE_NS = 100_000_000        # how long a wait goes without looking for signals
_STATES = ("running", "complete", "failed", "cancelled")


class SnapshotProgress(NamedTuple):
    """How far a snapshot is, in pages; a snapshot of the figures.

    Attributes
    ----------
    saved : int
        In the sink.
    size : int
        In all.
    populated : int
        Those of `saved` that held something; the others are zeros, and holes of a file.
    faults : int
        Those of `saved` that a writer waited for.
    held : bool
        A discard waits for the end of the snapshot, and so does every write to a page that is not saved yet.
    """

    saved: int
    size: int
    populated: int
    faults: int
    held: bool


@cython.final
cdef class SnapshotTraps(WriteTraps):
    """Both threads of one snapshot. What they hold: the snapshot itself can be dropped."""

    cdef Bitmap c_claimed
    cdef Bitmap c_saved             # the content is out of the memory
    cdef uint64_t c_written         # pages in the sink
    cdef uint64_t c_populated_pages
    cdef uint64_t c_faults
    cdef uint64_t c_held
    cdef uint64_t c_armed           # the moment has come; set under the gate
    cdef uint64_t c_state
    cdef uint64_t c_lost_first, c_lost_count
    cdef uint8_t *c_sink            # a buffer, or NULL and a file
    cdef int c_file
    cdef bint _denied               # before the moment, somebody could not be let go; the reader's own
    cdef uint8_t *_staging          # what the thread that saves all has taken out of the memory
    cdef uint64_t _probe            # the address of a page of our own
    cdef object _probe_memory
    cdef object _sink               # keeps the buffer
    cdef pagecore_fair_lock _gate   # between "there is a fault" and reading it nobody else wakes
    cdef pagecore_monitor c_changed
    cdef int _locks

    def __cinit__(self):
        self.c_file = -1
        if pagecore_fair_lock_init(&self._gate):
            raise MemoryError
        self._locks = 1
        if pagecore_monitor_init(&self.c_changed):
            raise MemoryError
        self._locks = 2

    def __dealloc__(self):
        if self._locks > 1:
            pagecore_monitor_destroy(&self.c_changed)
        if self._locks > 0:
            pagecore_fair_lock_destroy(&self._gate)
        free(self._staging)

    def plan(self, sink, int file):
        """The planes and the sink, a writable buffer or None and a file, once it is open."""
        cdef uint64_t ioctls = 0
        cdef uint64_t target = 0 if sink is None else _address(sink)
        cdef uint64_t memory = self.region.c_address
        if target < memory + self.size * PAGE and memory < target + self.size * PAGE:
            raise ValueError("the sink overlaps the memory")
        self.c_claimed = Bitmap(self.size)
        self.c_saved = Bitmap(self.size)
        self.c_sink = <uint8_t *>target
        self._sink = sink
        self.c_file = file
        if sink is None:
            self._staging = <uint8_t *>malloc(UNIT * 64 * PAGE)
            if self._staging == NULL:
                raise MemoryError
        self._probe_memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._probe_memory[0] = 1
        self._probe = _address(self._probe_memory)
        raise_unless_done(self.uffd.c_register(self._probe, PAGE, REGISTER_WP, &ioctls), "UFFDIO_REGISTER", self._probe,
                          PAGE)

    def arm(self):
        WriteTraps.arm(self)
        with nogil:
            pagecore_fair_acquire(&self._gate)
            pagecore_store_release(&self.c_armed, 1)
            pagecore_fair_release(&self._gate)

    def save_all(self):
        """The body of the thread that saves from the beginning to the end."""
        with nogil:
            self.c_started()
            self.c_save_all()

    # ---- the end, whichever it is

    cdef void c_end(self, uint64_t state) noexcept nogil:
        cdef uint64_t running = RUNNING
        if pagecore_load_acquire(&self.c_error) or pagecore_load_acquire(&self.c_lost_count):
            state = FAILED
        self.c_release()
        if pagecore_compare_exchange(&self.c_state, &running, state):
            pagecore_monitor_enter(&self.c_changed)
            pagecore_monitor_notify(&self.c_changed)
            pagecore_monitor_leave(&self.c_changed)

    cdef bint c_over(self) noexcept nogil:
        if pagecore_load_acquire(&self.c_error):
            self.c_end(FAILED)
        return pagecore_load_acquire(&self.c_state) != RUNNING

    # ---- the thread that reads

    cdef void c_run(self) noexcept nogil:
        cdef UffdEvent events[MESSAGES]
        cdef pollfd wait
        self._denied = False
        wait.fd = self.c_stop_fd
        wait.events = POLLIN
        while not pagecore_load_acquire(&self.c_stopping):
            if self.c_over():
                # Nothing traps any more, and whoever discarded meanwhile goes on.
                if self.c_poll(-1):
                    self.uffd.c_read(events, MESSAGES)
            elif pagecore_load_relaxed(&self.c_held):
                poll(&wait, 1, HELD_MS)
            elif self.c_poll(-1):
                while self.c_take(&events[0]):
                    self.c_handle(&events[0])
                if self._denied:
                    # The event that was in their way is read: they come again.
                    self._denied = False
                    self.region.c_wake(0, self.size)
        self.uffd.c_read(events, MESSAGES)

    cdef bint c_take(self, UffdEvent *event) noexcept nogil:
        """One message, which is a fault (see above) once it is armed; False: there is none, or an event waits."""
        cdef pollfd wait
        cdef int64_t moved = 0
        cdef int got = 0
        cdef bint armed
        wait.fd = self.uffd.c_fd
        wait.events = POLLIN
        wait.revents = 0
        pagecore_fair_acquire(&self._gate)
        armed = pagecore_load_acquire(&self.c_armed)
        if poll(&wait, 1, 0) > 0:
            if armed and uffd_place(self.uffd.c_fd, OPERATION_UNPROTECT, self._probe, 0, PAGE, PLACE_DONTWAKE,
                                    &moved) == -EAGAIN:
                pagecore_store_release(&self.c_held, 1)
            else:
                got = self.uffd.c_read(event, 1)
                if got > 0 and not armed and event.kind == EVENT_REMOVE:
                    event.start = event.end     # nothing of what is promised
        pagecore_fair_release(&self._gate)
        if got < 0:
            self.c_fail(-got, b"read", 0, 0)
        return got > 0 and not self.c_over()

    cdef void c_handle(self, const UffdEvent *event) noexcept nogil:
        cdef size_t page
        if event.kind == EVENT_REMOVE:
            self.c_note_discard(event.start, event.end)
            return
        if event.kind != EVENT_FAULT:
            return
        page = self.c_page_of(event.start)
        if page >= self.size:
            return
        self.c_serve(page, not event.flags & FAULT_WP)

    cdef void c_serve(self, size_t page, bint missing) noexcept nogil:
        cdef uint8_t content[PAGE]
        cdef uint8_t *target
        cdef uint64_t holds = 0
        cdef bint protected = False
        cdef bint won = not self.c_claimed.c_test_and_set(page)
        if won:
            pagecore_fetch_add(&self.c_faults, 1)
            if not missing:
                # Asked again: what MADV_FREE was given may be gone since, and this thread must not be caught itself.
                self.c_populated(page, 1, &holds)
            if holds & 1:
                target = &content[0] if self.c_sink == NULL else self.c_sink + page * PAGE
                memcpy(target, <const uint8_t *>(self.region.c_address + page * PAGE), PAGE)
            elif self.c_sink != NULL:
                memset(self.c_sink + page * PAGE, 0, PAGE)
            # Release: pairs with the acquire of whoever tests it before unprotecting.
            self.c_saved.c_set(page)
        elif not self.c_saved.c_test(page):
            if not missing:
                return      # the other thread has it, and wakes when it is saved
            protected = True        # it may be about to read it
        if (self.c_fill(page, protected) if missing else self.c_unprotect(page, 1)) == PLACE_AGAIN:
            if pagecore_load_acquire(&self.c_armed):
                # It sleeps until the end, which wakes everybody: see Discards.
                pagecore_store_release(&self.c_held, 1)
            else:
                self._denied = True
        if won:
            if holds & 1 and self.c_sink == NULL:
                self.c_write(&content[0], page, 1)
            self.c_count(1, holds & 1)

    cdef void c_note_discard(self, uint64_t start, uint64_t end) noexcept nogil:
        cdef uint64_t low = self.region.c_address
        start = max(start, low)
        end = min(end, low + self.size * PAGE)
        if start >= end:
            return
        cdef size_t first = self.c_saved.c_find_clear(self.c_page_of(start))
        cdef size_t last = self.c_page_of(end)
        if first < last:
            self.c_lost_first = first
            # Release: pairs with the acquire of whoever ends it, which may be another thread.
            pagecore_store_release(&self.c_lost_count, last - first)
            self.c_end(FAILED)

    # ---- the thread that saves all

    cdef void c_save_all(self) noexcept nogil:
        cdef size_t word = 0
        while word < self.c_claimed.c_nwords and not self.c_over():
            self.c_save_unit(word, min(self.c_claimed.c_nwords - word, <size_t>UNIT))
            word += UNIT
        # The reader may have the last pages under way.
        pagecore_monitor_enter(&self.c_changed)
        while pagecore_load_acquire(&self.c_written) < self.size and not pagecore_load_acquire(&self.c_error) \
                and pagecore_load_acquire(&self.c_state) == RUNNING:
            pagecore_monitor_wait(&self.c_changed, pagecore_now_ns() + SLICE_NS)
        pagecore_monitor_leave(&self.c_changed)
        if pagecore_load_acquire(&self.c_written) == self.size:
            self.c_end(COMPLETE)
        else:
            self.c_over()

    cdef void c_save_unit(self, size_t first, size_t count) noexcept nogil:
        cdef uint64_t won[UNIT]
        cdef uint64_t holds[UNIT]
        cdef uint64_t mask
        cdef size_t word, page, run
        cdef uint64_t pages = 0, populated = 0
        cdef int rc
        memset(won, 0, sizeof(won))
        for word in range(count):
            page = (first + word) << 6
            run = min(self.size - page, <size_t>64)
            mask = <uint64_t>-1 >> (64 - run)
            # Before the claim: see Missing pages.
            rc = self.c_populated(page, run, &holds[word])
            if rc < 0:
                self.c_fail(-rc, b"read of /proc/self/pagemap", self.region.c_address + page * PAGE, run * PAGE)
                return
            # acquire and release: see D1. What the reader has under way is its own to unprotect.
            won[word] = self.c_claimed.c_set_word(first + word, mask)
            holds[word] &= won[word]
            self.c_copy_word(page, won[word], holds[word], word)
            pages += count_ones(won[word])
            populated += count_ones(holds[word])
        for word in range(count):
            self.c_saved.c_set_word(first + word, won[word])
        self.c_unprotect_words(first, count, won)
        if self.c_sink == NULL:
            page = 0
            while page < count << 6:
                run = _next_run(holds, count << 6, &page)
                if run and not self.c_write(self._staging + page * PAGE, (first << 6) + page, run):
                    return
                page += run
        self.c_count(pages, populated)

    cdef void c_copy_word(self, size_t page, uint64_t won, uint64_t holds, size_t word) noexcept nogil:
        cdef uint8_t *target = self._staging + (word << 6) * PAGE if self.c_sink == NULL else self.c_sink + page * PAGE
        cdef const uint8_t *source = <const uint8_t *>(self.region.c_address + page * PAGE)
        cdef size_t at = 0, run
        while at < 64:
            run = _next_run(&holds, 64, &at)
            memcpy(target + at * PAGE, source + at * PAGE, run * PAGE)
            at += run
        if self.c_sink != NULL:
            won &= ~holds
            at = 0
            while at < 64:
                run = _next_run(&won, 64, &at)
                memset(target + at * PAGE, 0, run * PAGE)
                at += run

    cdef void c_unprotect_words(self, size_t first, size_t count, const uint64_t *won) noexcept nogil:
        cdef size_t page = 0, run
        cdef int outcome
        while page < count << 6:
            run = _next_run(won, count << 6, &page)
            if run == 0 or pagecore_load_relaxed(&self.c_held):
                return          # the end unprotects
            pagecore_fair_acquire(&self._gate)
            outcome = self.c_unprotect((first << 6) + page, run)
            pagecore_fair_release(&self._gate)
            if outcome == PLACE_AGAIN:
                pagecore_store_release(&self.c_held, 1)
                return
            page += run

    cdef bint c_write(self, const uint8_t *data, size_t page, size_t count) noexcept nogil:
        cdef size_t done = 0, length = count * PAGE
        cdef Py_ssize_t got
        while done < length:
            got = pwrite(self.c_file, data + done, length - done, <off_t>(page * PAGE + done))
            if got > 0:
                done += got
            elif got == 0 or errno != EINTR:
                # One error, and the guest goes on.
                self.c_fail(EIO if got == 0 else errno, b"writing the snapshot", page * PAGE + done, length - done)
                self.c_end(FAILED)
                return False
        return True

    cdef void c_count(self, uint64_t pages, uint64_t populated) noexcept nogil:
        pagecore_fetch_add(&self.c_populated_pages, populated)
        # Release: whoever sees all of them counted sees them in the sink.
        if pagecore_fetch_add(&self.c_written, pages) + pages == self.size:
            pagecore_monitor_enter(&self.c_changed)
            pagecore_monitor_notify(&self.c_changed)
            pagecore_monitor_leave(&self.c_changed)

    # ---- for Python

    def cancel(self):
        # In a forked child it is not the parent's that ends, and a thread that is not here may have the lock.
        if self.closed or getpid() != self._process:
            return
        with nogil:
            self.c_end(CANCELLED)

    def wait(self, double seconds):
        """Whether it has ended, at the latest after so many seconds; bounded by a slice."""
        if pagecore_load_acquire(&self.c_state) == RUNNING and getpid() != self._process:
            raise UnsupportedError(f"the snapshot of process {self._process} in its child",
                                   "its threads are the parent's: wait there, or take one here")
        cdef uint64_t until = pagecore_now_ns() + <uint64_t>min(max(seconds, 0.0) * 1e9, <double>SLICE_NS)
        with nogil:
            pagecore_monitor_enter(&self.c_changed)
            while pagecore_load_acquire(&self.c_state) == RUNNING and pagecore_now_ns() < until:
                pagecore_monitor_wait(&self.c_changed, until)
            pagecore_monitor_leave(&self.c_changed)
        PyErr_CheckSignals()
        return pagecore_load_acquire(&self.c_state) != RUNNING

    def check(self):
        """Raise why it failed, or that it was cancelled."""
        cdef uint64_t state = pagecore_load_acquire(&self.c_state)
        if state == CANCELLED:
            raise ClosedError("the snapshot was cancelled: what was saved is no image")
        if state == FAILED:
            if self.c_lost_count:
                end = self.c_lost_first + self.c_lost_count
                raise PagecoreError(f"pages [{self.c_lost_first}, {end}) were discarded before they were saved: hold "
                                    "discards back, and take the snapshot again")
            self._raise_failure()
            raise PagecoreError("the snapshot failed: what was saved is no image")

    @property
    def state(self):
        return _STATES[pagecore_load_acquire(&self.c_state)]

    @property
    def progress(self):
        held = pagecore_load_relaxed(&self.c_held) and pagecore_load_acquire(&self.c_state) == RUNNING
        return SnapshotProgress(pagecore_load_acquire(&self.c_written), self.size,
                                pagecore_load_relaxed(&self.c_populated_pages), pagecore_load_relaxed(&self.c_faults),
                                bool(held))


cdef size_t _next_run(const uint64_t *words, size_t end, size_t *page) noexcept nogil:
    """The length of the first run of bits at or after *page, which becomes its begin; 0 and `end`: there is none."""
    cdef size_t at = page[0], start
    cdef uint64_t bits
    while at < end:
        bits = words[at >> 6] >> (at & 63)
        if bits:
            at += trailing_zeros(bits)
            break
        at = (at | 63) + 1
    page[0] = start = min(at, end)
    while at < end:
        bits = ~(words[at >> 6] >> (at & 63))
        bits &= <uint64_t>-1 >> (at & 63)
        if bits:
            at += trailing_zeros(bits)
            break
        at = (at | 63) + 1
    return min(at, end) - start


cdef uint64_t _address(object buffer) except? 0:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    cdef uint64_t address = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return address
