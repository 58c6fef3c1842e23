"""SourcePlanes: the planes of design section 3 for one region, under one lock; nogil from end to end."""

from cpython.pythread cimport (
    WAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
)
from libc.stdint cimport int64_t, uint64_t

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport count_of


cdef extern from "_planes.h" nogil:
    int PAGECORE_OWED
    size_t pagecore_drain_private(uint64_t *source, uint64_t *words, size_t npages)
    size_t pagecore_publish(uint64_t *fetched, uint64_t *dirty, uint64_t *hinted, size_t npages)
    size_t pagecore_hint_runs(uint64_t *dirty, uint64_t *hinted, size_t npages, const int64_t *runs, size_t n)
    size_t pagecore_resolve(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end, int64_t *runs)
    void pagecore_resolve_again(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end)
    size_t pagecore_reload(uint64_t *dirty, uint64_t *hinted, const uint64_t *settled, size_t npages)
    void pagecore_owe_all(uint64_t *dirty, uint64_t *hinted, size_t npages)
    size_t pagecore_owe_hinted(uint64_t *dirty, uint64_t *hinted, size_t npages)
    void pagecore_settle_owed(uint64_t *dirty, uint64_t *hinted, size_t npages)
    size_t pagecore_copy_free(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy, size_t npages)


cdef class SourcePlanes:
    # A subclass's other arguments are its own affair.
    def __cinit__(self, npages, *, all_dirty=True, **_):
        self.size = count_of(npages, "npages")
        self._lock = PyThread_allocate_lock()
        if self._lock == NULL:
            raise MemoryError("there is no lock to be had")
        self._dirty = Bitmap(self.size)
        self._hinted = Bitmap(self.size)
        self._side = Bitmap(self.size)
        self._fetched = Bitmap(self.size)
        # _planes.h writes their words.
        self._dirty.c_share_words()
        self._hinted.c_share_words()
        self._side.c_share_words()
        self._fetched.c_share_words()
        if all_dirty:
            self._dirty.c_set_range(0, self.size)

    def __dealloc__(self):
        if self._lock != NULL:
            PyThread_free_lock(self._lock)

    @property
    def epoch(self):
        """The open hint epoch; 0 where none is open."""
        return pagecore_load_relaxed(&self._epoch)

    @property
    def dirty(self):
        """The pages owed: a new Bitmap, a snapshot."""
        return self._dirty.copy()

    @property
    def dirty_count(self):
        """Pages owed; a snapshot, exact while nothing changes them."""
        return self._dirty.count()

    @property
    def hinted(self):
        """The pages that are free: a new Bitmap, a snapshot."""
        cdef Bitmap copy = Bitmap(self.size)
        with nogil:
            pagecore_copy_free(self._dirty.c_words, self._hinted.c_words, copy.c_words, self.size)
            copy.c_words_changed(0, self.size)
        return copy

    @property
    def hinted_count(self):
        """Pages that are free; a snapshot, exact while nothing changes them."""
        cdef size_t count
        with nogil:
            count = pagecore_copy_free(self._dirty.c_words, self._hinted.c_words, NULL, self.size)
        return count

    def __len__(self):
        return self.size

    cdef void c_acquire(self) noexcept nogil:
        PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void c_release(self) noexcept nogil:
        PyThread_release_lock(self._lock)

    cdef size_t c_take(self, int64_t *runs, size_t max_runs, uint64_t max_pages) noexcept nogil:
        # Relaxed: two takers may start at one cursor, and share the words out between them.
        cdef size_t start = pagecore_load_relaxed(&self._cursor)
        cdef size_t next_page = 0
        cdef size_t n, i
        if start >= self.size:
            start = 0
        n = self._dirty.c_take_runs(start, self.size, max_pages, runs, max_runs, &next_page)
        if next_page >= self.size and start > 0:
            for i in range(n):
                max_pages -= <uint64_t>runs[2 * i + 1]
            if max_pages > 0 and n < max_runs:
                n += self._dirty.c_take_runs(0, start, max_pages, runs + 2 * n, max_runs - n, &next_page)
        pagecore_store_relaxed(&self._cursor, next_page)
        return n

    cdef void c_put_back(self, size_t first, size_t count) noexcept nogil:
        self._dirty.c_set_range(first, count)

    cdef void c_mark(self, size_t first, size_t count) noexcept nogil:
        self._side.c_set_range(first, count)

    cdef int64_t c_hint_runs(self, const int64_t *runs, size_t n, uint64_t epoch) noexcept nogil:
        cdef int64_t taken = -1
        self.c_acquire()
        # S4: the look at the epoch and the clearing are one step against a sync, which ends it under this lock.
        if epoch != 0 and epoch == self._epoch:
            taken = <int64_t>pagecore_hint_runs(self._dirty.c_words, self._hinted.c_words, self.size, runs, n)
        self.c_release()
        return taken

    cdef size_t c_resolve(self, size_t first, size_t count, bint again, int64_t *answers) noexcept nogil:
        cdef size_t n = 1
        self.c_acquire()
        if again:
            pagecore_resolve_again(self._dirty.c_words, self._hinted.c_words, first, first + count)
            answers[0] = PAGECORE_OWED
            answers[1] = <int64_t>first
            answers[2] = <int64_t>count
        else:
            n = pagecore_resolve(self._dirty.c_words, self._hinted.c_words, first, first + count, answers)
        self.c_release()
        return n

    cdef uint64_t c_open_epoch(self) noexcept nogil:
        cdef uint64_t epoch = 0
        self.c_acquire()
        # S4: under the lock, so never between a sync's fetch and its publishing; and not after one that failed.
        if self._armed:
            self._last_epoch += 1
            epoch = self._last_epoch
            pagecore_store_relaxed(&self._epoch, epoch)
        self.c_release()
        return epoch

    cdef bint c_close_epoch(self, uint64_t epoch) noexcept nogil:
        cdef bint was_open
        # Ids are never used twice, so one that is not open now stays ended: a look is enough, and a destructor that
        # runs inside a sync does not wait for that sync.
        if epoch == 0 or pagecore_load_relaxed(&self._epoch) != epoch:
            return False
        self.c_acquire()
        was_open = self._epoch == epoch
        if was_open:
            pagecore_store_relaxed(&self._epoch, 0)
        self.c_release()
        return was_open

    cdef void c_begin_sync(self) noexcept nogil:
        # S4: a sync ends the epoch, before anything is fetched.
        pagecore_store_relaxed(&self._epoch, 0)
        self._armed = False

    cdef void c_mask_fetched(self) noexcept nogil:
        # Foreign words may carry bits past the end (KVM pads to 64 pages).
        cdef size_t tail = self.size & 63
        cdef uint64_t *words = self._fetched.c_words
        if tail:
            words[self.size >> 6] &= (<uint64_t>1 << tail) - 1

    cdef void c_drain_side(self) noexcept nogil:
        pagecore_drain_private(self._side.c_words, self._fetched.c_words, self.size)
        self._armed = True

    cdef size_t c_publish(self) noexcept nogil:
        return pagecore_publish(self._fetched.c_words, self._dirty.c_words, self._hinted.c_words, self.size)

    cdef void c_owe_all(self) noexcept nogil:
        pagecore_owe_all(self._dirty.c_words, self._hinted.c_words, self.size)

    cdef size_t c_copy_unsent(self, Bitmap copy) noexcept nogil:
        cdef size_t marked
        self.c_acquire()
        marked = self._side.c_count()
        pagecore_settle_owed(self._dirty.c_words, self._hinted.c_words, self.size)
        self._dirty.c_copy_into(copy)
        copy.c_merge(self._hinted)
        self.c_release()
        return marked

    cdef void c_copy_free(self, Bitmap copy) noexcept nogil:
        self.c_acquire()
        pagecore_settle_owed(self._dirty.c_words, self._hinted.c_words, self.size)
        self._hinted.c_copy_into(copy)
        self.c_release()

    cdef size_t c_owe_hinted(self) noexcept nogil:
        cdef size_t owed
        self.c_acquire()
        owed = pagecore_owe_hinted(self._dirty.c_words, self._hinted.c_words, self.size)
        self.c_release()
        return owed

    cdef size_t c_reload(self, Bitmap settled) noexcept nogil:
        cdef size_t owed
        self.c_acquire()
        pagecore_store_relaxed(&self._epoch, 0)
        owed = pagecore_reload(self._dirty.c_words, self._hinted.c_words, settled.c_words, self.size)
        self.c_release()
        return owed
