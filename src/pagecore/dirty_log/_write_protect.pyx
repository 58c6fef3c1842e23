"""WriteProtectDirtyLog: writes as they trap (userfaultfd in synchronous write-protect mode).

The order that loses no write
-----------------------------
A page is *pending* from its first write until a collect. Two threads take part, the handler of faults and whoever
collects, and a lock (``LogTraps.c_lock``) makes a step of each one step for the other:

* The handler marks the page pending, then takes its protection off, which wakes the writer.
* A collect takes pending bits out of a piece of the words, protects those pages again, and after that hands the bits
  over (S2). A write before the protection is in what a sender reads afterwards, because the kernel has flushed every
  processor's translation of the page by the time the ioctl returns; a later one traps.

So outside the lock a page that can be written without a trap is pending. Without the lock, marked first, the collect
could take the bit and protect the page before the handler unprotects it: the write that was waiting goes through and
nobody reports it. Marked last, a write of another thread to the page goes through unmarked, and if the guest stops
there and the last collect comes before the handler goes on, it is lost as well.

The same lock is held from before the descriptor is read until discards are marked (D5): read() is what lets the thread
that discards go on, and a collect between the two would be told nothing.

A discarded page (anonymous memory) is zeros from the moment when the kernel zaps it, which is after its event was
read, at a time that nobody is told. It is reported by every collect until the zap is seen: because the page is
touched, and missing, or because the page table has nothing there any more. What MADV_FREE was given may stay for long,
and is reported as long.
"""

import warnings

from pagecore._uffd_types import Feature
from pagecore.dirty_log._writers import check_pins, check_shared, missed_in, vouched_for
from pagecore.errors import BusyError, ClosedError, UnsupportedError

cimport cython
from libc.errno cimport EBADF, ECHILD, EFAULT, ENOENT
from libc.limits cimport INT_MAX
from libc.stdint cimport uint64_t
from posix.time cimport nanosleep, timespec
from posix.unistd cimport getpid

from pagecore._atomic cimport (
    pagecore_exchange,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_or,
)
from pagecore._bitmap cimport Bitmap
from pagecore._span cimport PLACE_AGAIN, PLACE_DONE, PLACE_GONE
from pagecore._sync cimport (
    pagecore_fair_acquire,
    pagecore_fair_lock,
    pagecore_fair_lock_destroy,
    pagecore_fair_lock_init,
    pagecore_fair_release,
)
from pagecore._uffd_ioctl cimport EVENT_FAULT, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, FAULT_WP, UffdEvent
from pagecore._write_traps cimport WriteTraps
from pagecore.dirty_log._protocol cimport DirtyLog

__all__ = ["WriteProtectDirtyLog"]

cdef extern from *:
    int count_ones "__builtin_popcountll"(uint64_t word) nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t word) nogil

cdef enum:
    PIECE = 16              # words that a collect deals with under the lock: 1024 pages, a few hundred microseconds
    MESSAGES = 256
    # Protecting a protected page again costs less than a call of its own for what comes after it.
    GAP = 16
    # D7: how often a collect tries to protect a run while an event waits, before it leaves the run pending.
    ATTEMPTS = 20
    PAUSE_NS = 100_000
    RETRY_NS = 200_000


@cython.final
cdef class LogTraps(WriteTraps):
    """The handler of one log, and its words. What the threads hold: the log itself can be dropped."""

    cdef Bitmap c_pending
    cdef Bitmap c_discarded         # an event was read, and no zap seen
    cdef Bitmap c_deferred          # a writer waits, and the kernel said EAGAIN
    cdef uint64_t c_deferrals       # at least as many as bits of it; the handler's own
    cdef uint64_t c_discards        # the same of c_discarded; under the lock
    cdef uint64_t c_faults
    cdef pagecore_fair_lock c_lock
    cdef bint _has_lock

    def __cinit__(self):
        if pagecore_fair_lock_init(&self.c_lock):
            raise MemoryError
        self._has_lock = True

    def __dealloc__(self):
        if self._has_lock:
            pagecore_fair_lock_destroy(&self.c_lock)

    def plan(self):
        """The planes, once it is open."""
        self.c_pending = Bitmap(self.size)
        self.c_discarded = Bitmap(self.size)
        self.c_deferred = Bitmap(self.size)
        self.c_pending.c_share_words()

    cdef void c_run(self) noexcept nogil:
        cdef bint readable
        while not pagecore_load_acquire(&self.c_stopping):
            readable = self.c_poll(RETRY_NS if self.c_deferrals else -1)
            pagecore_fair_acquire(&self.c_lock)
            if readable:
                self.c_read()
            if self.c_deferrals:
                self.c_retry()
            pagecore_fair_release(&self.c_lock)
        # Nobody traps any more; but who discarded at the last moment waits for a reader.
        self.c_read()

    cdef void c_read(self) noexcept nogil:
        cdef UffdEvent events[MESSAGES]
        cdef int index
        cdef size_t page
        cdef int got = self.uffd.c_read(events, MESSAGES)
        if got < 0:
            self.c_fail(-got, b"read", 0, 0)
            return
        # D4. Faults came first out of the descriptor; what events say goes first.
        for index in range(got):
            if events[index].kind == EVENT_REMOVE:
                self.c_note_discard(events[index].start, events[index].end)
            elif events[index].kind == EVENT_UNMAP:
                self.c_fail(EFAULT, b"munmap of memory whose writes are logged", events[index].start,
                            events[index].end - events[index].start)
            elif events[index].kind == EVENT_REMAP:
                self.c_fail(EFAULT, b"mremap of memory whose writes are logged", events[index].start,
                            events[index].flags)
                # The registration and the protection have moved along.
                self.uffd.c_unregister(events[index].end, events[index].flags)
        for index in range(got):
            if events[index].kind == EVENT_FAULT:
                pagecore_fetch_add(&self.c_faults, 1)       # for whoever looks meanwhile
                page = self.c_page_of(events[index].start)
                if page < self.size:
                    self.c_serve(page, not events[index].flags & FAULT_WP)
                else:
                    # Moved, and the event is still to come; or what it grew by, which the event does not name.
                    self.c_let_go(events[index].start & ~<uint64_t>4095)

    cdef void c_let_go(self, uint64_t address) noexcept nogil:
        # Woken alone it would fault again. Where the page is gone meanwhile, so is the way to unregister it (D10).
        if self.uffd.c_unregister(address, 4096) < 0:
            self.uffd.c_wake_range(address, 4096)

    cdef void c_note_discard(self, uint64_t start, uint64_t end) noexcept nogil:
        cdef uint64_t low = self.region.c_address
        cdef uint64_t high = low + self.size * self.region.page_size
        start = max(start, low)
        end = min(end, high)
        if start >= end:
            return
        cdef size_t first = self.c_page_of(start)
        cdef size_t count = self.c_page_of(end) - first
        self.c_pending.c_set_range(first, count)
        if self.c_fills:
            self.c_discards += self.c_discarded.c_set_range(first, count)

    cdef void c_serve(self, size_t page, bint missing) noexcept nogil:
        cdef int outcome
        # Marked before it can be written, and both under the lock: see above. A missing page that is only read counts
        # as written too: it is not protected afterwards, and nobody would be told of its first write.
        self.c_pending.c_set(page)
        if self.c_discards and self.c_discarded.c_test_and_clear(page):
            # Missing: it was zapped. Protected: somebody uses it again before the zap, or has it back from MADV_FREE;
            # such a write and the discard come in either order, and this is one.
            self.c_discards -= 1
        outcome = self.c_fill(page, False) if missing else self.c_unprotect(page, 1)
        if outcome == PLACE_AGAIN:
            # D7: it sleeps on, and the reader must not wait here.
            if not self.c_deferred.c_test_and_set(page):
                self.c_deferrals += 1

    cdef void c_retry(self) noexcept nogil:
        cdef size_t page = 0
        cdef uint64_t left = self.c_deferrals
        cdef uint64_t bits = 0
        while left:
            page = self.c_deferred.c_find_set(page)
            if page >= self.size:
                break
            left -= 1
            self.c_deferred.c_clear(page)
            self.c_deferrals -= 1
            self.c_populated(page, 1, &bits)
            self.c_serve(page, bits & 1 == 0)
            page += 1

    cdef long long c_collect(self, uint64_t *words) noexcept nogil:
        """Pages newly set in `words`, which are the caller's own (S11)."""
        cdef size_t word = 0
        cdef long long newly = 0
        while word < self.c_pending.c_nwords:
            newly += self.c_collect_piece(word, min(self.c_pending.c_nwords - word, <size_t>PIECE), words)
            word += PIECE
        return newly

    cdef long long c_collect_piece(self, size_t first, size_t count, uint64_t *words) noexcept nogil:
        cdef uint64_t taken[PIECE]
        cdef uint64_t any = 0
        cdef size_t word
        cdef long long newly = 0
        pagecore_fair_acquire(&self.c_lock)
        for word in range(count):
            # acquire and release: what a writer that was let go before did is seen by whoever is told of its page.
            taken[word] = pagecore_exchange(&self.c_pending.c_words[first + word], 0) \
                if pagecore_load_relaxed(&self.c_pending.c_words[first + word]) else 0
            any |= taken[word]
        if self.c_discards:
            any |= self.c_take_discarded(first, count, taken)
        if any:
            self.c_rearm_piece(first, count, taken)
        pagecore_fair_release(&self.c_lock)
        if any:
            for word in range(count):
                newly += count_ones(taken[word] & ~words[first + word])
                words[first + word] |= taken[word]
        return newly

    cdef uint64_t c_take_discarded(self, size_t first, size_t count, uint64_t *taken) noexcept nogil:
        cdef uint64_t discarded, holds
        cdef uint64_t any = 0
        cdef size_t word, page
        for word in range(count):
            discarded = self.c_discarded.c_words[first + word]      # under the lock, which its writers hold
            if discarded == 0:
                continue
            any |= discarded
            taken[word] |= discarded
            page = (first + word) << 6
            if self.c_populated(page, min(self.size - page, <size_t>64), &holds) == 0 and discarded & ~holds:
                # Zapped, before this collect reports it: for the last time. Whoever touches it finds it missing.
                self.c_discards -= count_ones(self.c_discarded.c_clear_word(first + word, discarded & ~holds))
        return any

    cdef void c_rearm_piece(self, size_t first, size_t count, const uint64_t *taken) noexcept nogil:
        # Under the lock, what is not pending is protected already, or missing: a run may have gaps.
        cdef size_t page = 0, end = count << 6, start = 0, stop = 0
        cdef bint open_run = False
        cdef uint64_t bits
        end = min(end, self.size - (first << 6))
        while True:
            bits = 0
            while page < end:
                bits = taken[page >> 6] >> (page & 63)
                if bits:
                    page += trailing_zeros(bits)
                    break
                page = (page | 63) + 1
            if open_run and (page >= end or page - stop > GAP):
                self.c_rearm_run(first, taken, start, stop)
                open_run = False
            if page >= end:
                return
            if not open_run:
                start = page
                open_run = True
            bits = ~(taken[page >> 6] >> (page & 63))
            page += min(<size_t>trailing_zeros(bits), 64 - (page & 63)) if bits else 64 - (page & 63)
            stop = page

    cdef void c_rearm_run(self, size_t first, const uint64_t *taken, size_t start, size_t stop) noexcept nogil:
        cdef timespec pause
        cdef int _attempt, outcome
        cdef size_t word
        cdef uint64_t mask
        pause.tv_sec = 0
        pause.tv_nsec = PAUSE_NS
        for _attempt in range(ATTEMPTS):
            outcome = self.c_protect((first << 6) + start, stop - start)
            if outcome == PLACE_DONE:
                return
            if outcome != PLACE_AGAIN:
                if outcome == PLACE_GONE:
                    self.c_fail(ENOENT, b"UFFDIO_WRITEPROTECT", self.region.c_address + ((first << 6) + start) * 4096,
                                (stop - start) * 4096)
                return
            # Until the handler has read the event, which takes the lock, nothing can be protected. What it marks and
            # lets go meanwhile stays pending, protected or not.
            pagecore_fair_release(&self.c_lock)
            nanosleep(&pause, NULL)
            pagecore_fair_acquire(&self.c_lock)
        # Still pending: these can be written without a trap, and the next collect reports them whether they were or
        # not.
        for word in range(start >> 6, ((stop - 1) >> 6) + 1):
            mask = <uint64_t>-1
            if word == start >> 6:
                mask &= <uint64_t>-1 << (start & 63)
            if word == (stop - 1) >> 6:
                mask &= <uint64_t>-1 >> (63 - ((stop - 1) & 63))
            pagecore_or(&self.c_pending.c_words[first + word], taken[word] & mask)

    def fail_if_failed(self):
        self._raise_failure()

    @property
    def faults(self):
        return pagecore_load_relaxed(&self.c_faults)


@cython.final
cdef class WriteProtectDirtyLog(DirtyLog):
    """WriteProtectDirtyLog(memory, *, marked=())
    --

    Writes to memory of this process, each stopped once by userfaultfd until a native thread has noted it.

    For kernels without WP_ASYNC (before Linux 6.7); where there is a choice, ``PagemapDirtyLog`` puts a tenth of the
    cost on the guest's writes. It is armed when it is made: a collect reports each page that was written since, by
    whatever goes through this process's page tables (stores, system calls, a KVM guest), each page that was discarded,
    and each page that was touched for the first time, if only to read it. It re-arms at collect.

    Parameters
    ----------
    memory : writable buffer
        Page-aligned: private anonymous memory, or with `marked` shared memory. It cannot be closed before the log is.
    marked : iterable of str
        The writers that the log misses and that call ``PageTracker.mark`` after each write (S12): by naming one here
        the caller vouches for it. ``"mappings"``: whoever writes to shared memory through another mapping of it or
        through its file, or discards it (MADV_REMOVE, hole punching); without it shared memory is refused. ``"pins"``:
        whoever writes to pages that were pinned before (io_uring's registered buffers, RDMA, VFIO); without it a
        process that has pinned any memory is refused. Memory that is pinned later is not noticed.

    Attributes
    ----------
    misses : frozenset of str
        ``{"pins"}``, and for shared memory ``"mappings"``.

    Raises
    ------
    UnsupportedError
        The kernel or this user lacks something, or `marked` does not name a writer that there is.
    ValueError
        The buffer is read-only, misaligned, or has pages of another size (huge pages).
    UffdError
        The kernel refused for another reason (EBUSY: registered with another userfaultfd).

    Notes
    -----
    Collecting releases the GIL, and stops writers for some hundred microseconds at a time. Thread-safe with writers,
    discards and forks; one collect at a time. Linux 5.7; 5.19 for shared memory. Memory that is unmapped or moved
    meanwhile is an error of every later collect. Pages given to MADV_FREE are reported by every collect until they are
    used again, or freed for good.
    """

    def __init__(self, memory, *, marked=()):
        if self._traps is not None:
            raise BusyError("this log was opened before")
        vouched = vouched_for(marked)
        check_pins(getpid(), vouched)
        cdef LogTraps traps = LogTraps()
        try:
            # Memory that goes away must be known to have gone, or a page would be lost without a word.
            kind = traps.open(memory, Feature.EVENT_UNMAP | Feature.EVENT_REMAP)
            DirtyLog.__init__(self, traps.size, rearms_at_collect=True, misses=missed_in(check_shared(kind, vouched)))
            traps.plan()
            traps.start("write-log", traps.run)
            traps.arm()
        except BaseException:
            traps.close()
            raise
        self._traps = traps

    def __enter__(self):
        self._check()
        return self

    def __exit__(self, *_exception):
        self.close()

    def __del__(self):
        if self._traps is None or self._traps.closed:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)
        finally:
            self._traps.close()

    def __reduce__(self):
        raise TypeError("a WriteProtectDirtyLog is memory of this process and cannot be pickled")

    cdef int _check(self) except -1:
        if self._traps is None or self._traps.closed:
            raise ClosedError("the log is closed")
        return 0

    @property
    def closed(self):
        """bool: close() was called; nothing is logged any more."""
        return self._traps is None or self._traps.closed

    @property
    def faults(self):
        """int: how often a thread was stopped so far."""
        return 0 if self._traps is None else self._traps.faults

    cdef int _fail(self, int number, str method) except -1:
        if number == ECHILD:
            raise UnsupportedError(f"the dirty log of process {(<LogTraps>self._traps)._process} in its child",
                                   "it protects the parent's memory, and would take its pages away: make one here")
        self._traps.fail_if_failed()        # which says more
        return DirtyLog._fail(self, number, method)

    def close(self):
        """Let every writer go, unprotect everything, and end the thread. Idempotent.

        Raises
        ------
        BusyError
            The thread has not ended within a minute. Nothing is protected by then; it may be called again.

        Notes
        -----
        Releases the GIL while it waits. Thread-safe with writers. In a forked child it closes the child's copy alone.
        """
        if self._traps is not None:
            self._traps.close()

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef long long newly
        if self._traps is None:
            return -EBADF
        if getpid() != (<LogTraps>self._traps)._process:
            return -ECHILD
        newly = (<LogTraps>self._traps).c_collect(words)
        if pagecore_load_acquire(&(<LogTraps>self._traps).c_error):
            return -<int>(<LogTraps>self._traps).c_error
        return <int>min(newly, <long long>INT_MAX)
