"""SourcePlanes: the planes of design section 3 for one region, and their counts; nogil from end to end."""

cimport cython
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap


cdef extern from "_bitscan.h" nogil:
    size_t pagecore_count_runs(const uint64_t *words, size_t first, size_t end)

cdef extern from "_planes.h" nogil:
    int PAGECORE_OWED
    ctypedef struct pagecore_change:
        int64_t dirty
        int64_t hinted
    ctypedef struct pagecore_hint_place:
        size_t run
        size_t page
    void pagecore_fold(const uint64_t *fine, size_t nfine, uint64_t *pages, unsigned shift)
    pagecore_change pagecore_publish(uint64_t *fetched, uint64_t *dirty, uint64_t *hinted, size_t npages)
    size_t pagecore_take_pages(uint64_t *words, size_t start, size_t end, size_t max_pages, int64_t *pairs,
                               size_t capacity, size_t *next, size_t *taken)
    size_t pagecore_take_units(uint64_t *words, size_t start, size_t end, size_t unit, size_t max_pages,
                               int64_t *pairs, size_t capacity, size_t *next, size_t *taken)
    size_t pagecore_put_back(uint64_t *dirty, const uint64_t *hinted, size_t npages, size_t unit,
                             const int64_t *runs, size_t n, size_t *done, uint64_t *mixed)
    pagecore_change pagecore_hint_runs(uint64_t *dirty, uint64_t *hinted, size_t npages, size_t unit,
                                       const int64_t *runs, size_t n, pagecore_hint_place *place, size_t budget)
    size_t pagecore_resolve(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end, int64_t *runs,
                            pagecore_change *change)
    void pagecore_resolve_again(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end,
                                pagecore_change *change)
    pagecore_change pagecore_reload(uint64_t *dirty, uint64_t *hinted, const uint64_t *settled, size_t npages)
    pagecore_change pagecore_owe_all(uint64_t *dirty, uint64_t *hinted, size_t npages)
    pagecore_change pagecore_owe_hinted(uint64_t *dirty, uint64_t *hinted, size_t npages)
    size_t pagecore_settle_owed(uint64_t *dirty, uint64_t *hinted, size_t npages)
    pagecore_change pagecore_whole_units(uint64_t *dirty, uint64_t *hinted, size_t npages, size_t unit)
    void pagecore_copy_free(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy, size_t npages)
    void pagecore_see(const uint64_t *fetched, uint64_t *seen, uint64_t *pending, size_t nlog, unsigned chunk_shift)
    size_t pagecore_chunk_mask(const uint64_t *seen, const uint64_t *dirty, uint64_t *wanted, size_t nlog,
                               unsigned shift, unsigned chunk_shift, size_t chunk, size_t *low, size_t *high)
    void pagecore_chunk_armed(uint64_t *seen, uint64_t *wanted, uint64_t *pending, size_t nlog,
                              unsigned chunk_shift, size_t chunk)
    size_t pagecore_pending_chunk(const uint64_t *pending, size_t low, size_t high, unsigned shift,
                                  unsigned chunk_shift)


cdef inline void add(uint64_t *count, int64_t change) noexcept nogil:
    if change:
        pagecore_fetch_add(count, <uint64_t>change)


cdef inline void count_change(SourcePlanes planes, pagecore_change change) noexcept nogil:
    add(&planes._dirty_pages, change.dirty)
    add(&planes._hinted_pages, change.hinted)


cdef inline size_t count_in(uint64_t *count, size_t bound) noexcept nogil:
    # Beside a call that has changed the plane and not the count yet it may be off, but never absurd.
    cdef int64_t value = <int64_t>pagecore_load_relaxed(count)
    return 0 if value < 0 else min(<size_t>value, bound)


@cython.final
cdef class SourcePlanes:
    """SourcePlanes(spec)\n--\n
    The planes of one region, made by the tracker.

    Parameters
    ----------
    spec : TrackedRegion
        Checked by itself.
    """

    def __cinit__(self, spec):
        cdef size_t nlog
        self.spec = spec
        self.size = spec.npages
        self.page_size = spec.page_size
        self.unit = spec.unit
        self.dirty_log = spec.dirty_log
        self.lazy = spec.rearm == "lazy"
        self._log_shift = (self.page_size // <size_t>spec.log_page_size).bit_length() - 1
        self._chunk_shift = spec.chunk_shift
        self._dirty = Bitmap(self.size)
        self._hinted = Bitmap(self.size)
        self._side = Bitmap(self.size)
        self._fetched = Bitmap(self.size)
        # _planes.h writes their words.
        self._dirty.c_share_words()
        self._hinted.c_share_words()
        self._fetched.c_share_words()
        nlog = self.size << self._log_shift
        self._log_fetched = Bitmap(nlog) if self._log_shift else self._fetched
        if self.lazy:
            self._seen = Bitmap(nlog)
            self._wanted = Bitmap(nlog)
            self._pending = Bitmap((nlog >> self._chunk_shift) + 1)
            self._seen.c_share_words()
            self._wanted.c_share_words()
            self._pending.c_share_words()
        self._log_fetched.c_share_words()
        if spec.all_dirty:
            self._dirty_pages = self._dirty.c_set_range(0, self.size)

    @property
    def dirty(self):
        """The pages owed: a new Bitmap, a snapshot."""
        return self._dirty.copy()

    @property
    def hinted(self):
        """The pages that are free: a new Bitmap, a snapshot."""
        cdef Bitmap copy = Bitmap(self.size)
        with nogil:
            self.c_copy_free(copy)
        return copy

    def __repr__(self):
        return f"<SourcePlanes of {self.spec!r}>"

    # Relaxed, both: whoever must not miss the change is quiet while it comes, or finds it under the lock.
    cdef bint c_whole_units(self) noexcept nogil:
        return pagecore_load_relaxed(&self._whole_units) != 0

    cdef bint c_rearms_late(self) noexcept nogil:
        return self.lazy and pagecore_load_relaxed(&self._rearm_over) == 0

    cdef size_t c_take(self, size_t start, size_t stop, int64_t *runs, size_t max_runs, uint64_t max_pages,
                       size_t *next, size_t *taken) noexcept nogil:
        cdef size_t n
        if self.c_whole_units():
            n = pagecore_take_units(self._dirty.c_words, start, stop, self.unit, max_pages, runs, max_runs, next, taken)
        else:
            n = pagecore_take_pages(self._dirty.c_words, start, stop, max_pages, runs, max_runs, next, taken)
        add(&self._dirty_pages, -<int64_t>taken[0])
        return n

    cdef size_t c_count_runs(self, size_t start, size_t stop) noexcept nogil:
        return pagecore_count_runs(self._dirty.c_words, start, stop)

    cdef size_t c_put_back(self, const int64_t *runs, size_t n) noexcept nogil:
        cdef size_t done = 0
        cdef uint64_t mixed = 0
        cdef size_t newly = pagecore_put_back(
            self._dirty.c_words, self._hinted.c_words, self.size, self.unit if self.c_whole_units() else 1,
            runs, n, &done, &mixed,
        )
        if mixed:
            pagecore_store_relaxed(&self._mixed, 1)
        add(&self._dirty_pages, <int64_t>newly)
        return done

    cdef size_t c_mark(self, const int64_t *runs, size_t n) noexcept nogil:
        cdef size_t done = 0
        self._side.c_apply_runs(runs, n, True, &done)
        return done

    cdef size_t c_hint(self, const int64_t *runs, size_t n, size_t *run, size_t *page, size_t budget) noexcept nogil:
        cdef pagecore_hint_place place
        cdef pagecore_change change
        place.run = run[0]
        place.page = page[0]
        change = pagecore_hint_runs(
            self._dirty.c_words, self._hinted.c_words, self.size, self.unit, runs, n, &place, budget
        )
        run[0] = place.run
        page[0] = place.page
        count_change(self, change)
        return <size_t>-change.dirty

    cdef size_t c_resolve(self, size_t first, size_t count, bint again, int64_t *answers) noexcept nogil:
        cdef size_t n = 1
        cdef pagecore_change change
        change.dirty = 0
        change.hinted = 0
        if again:
            pagecore_resolve_again(self._dirty.c_words, self._hinted.c_words, first, first + count, &change)
            answers[0] = PAGECORE_OWED
            answers[1] = <int64_t>first
            answers[2] = <int64_t>count
        else:
            n = pagecore_resolve(self._dirty.c_words, self._hinted.c_words, first, first + count, answers, &change)
        count_change(self, change)
        return n

    cdef void c_receive(self, bint last) noexcept nogil:
        # Foreign words may carry bits past the end (KVM pads to 64 pages).
        cdef size_t nlog = self._log_fetched.size
        cdef uint64_t *words = self._log_fetched.c_words
        if nlog & 63:
            words[nlog >> 6] &= (<uint64_t>1 << (nlog & 63)) - 1
        if self.lazy:
            # Before the pages are published, so that nobody finds one of them in a chunk that looks armed (S1). After
            # the last sync nothing is re-armed: no sync will follow that could miss a write. What was seen is kept,
            # for the guest that runs on here after all.
            pagecore_store_relaxed(&self._rearm_over, last)
            pagecore_see(words, self._seen.c_words, self._pending.c_words, nlog, self._chunk_shift)
        if self._log_shift:
            pagecore_fold(words, nlog, self._fetched.c_words, self._log_shift)

    cdef size_t c_publish(self) noexcept nogil:
        cdef pagecore_change change
        self._side.c_drain_into_owned(self._fetched)
        change = pagecore_publish(self._fetched.c_words, self._dirty.c_words, self._hinted.c_words, self.size)
        if self._log_shift:
            memset(self._log_fetched.c_words, 0, self._log_fetched.c_nwords * sizeof(uint64_t))
        count_change(self, change)
        return <size_t>change.dirty

    cdef size_t c_pending_chunk(self, size_t low, size_t high) noexcept nogil:
        if not self.c_rearms_late():
            return <size_t>-1
        return pagecore_pending_chunk(self._pending.c_words, low, high, self._log_shift, self._chunk_shift)

    cdef size_t c_want(self, size_t chunk, size_t *first, size_t *count) noexcept nogil:
        cdef size_t low = 0, high = 0
        cdef size_t wanted = pagecore_chunk_mask(
            self._seen.c_words, self._dirty.c_words, self._wanted.c_words, self._seen.size, self._log_shift,
            self._chunk_shift, chunk, &low, &high,
        )
        first[0] = low
        count[0] = high - low
        return wanted

    cdef void c_armed(self, size_t chunk) noexcept nogil:
        pagecore_chunk_armed(
            self._seen.c_words, self._wanted.c_words, self._pending.c_words, self._seen.size, self._chunk_shift, chunk
        )

    cdef size_t c_end_of_chunk(self, size_t page) noexcept nogil:
        cdef size_t chunk = (page << self._log_shift) >> self._chunk_shift
        cdef size_t end = ((chunk + 1) << self._chunk_shift) >> self._log_shift
        # A page may be larger than a chunk.
        return min(max(end, page + 1), self.size)

    cdef void c_settle(self) noexcept nogil:
        # Cleared first: a put_back beside this sets it again.
        if pagecore_load_relaxed(&self._mixed):
            pagecore_store_relaxed(&self._mixed, 0)
            add(&self._hinted_pages,
                -<int64_t>pagecore_settle_owed(self._dirty.c_words, self._hinted.c_words, self.size))

    cdef void c_prepare_lists(self) noexcept nogil:
        self.c_settle()
        if self.unit > 1:
            pagecore_store_relaxed(&self._whole_units, 1)
            count_change(self, pagecore_whole_units(self._dirty.c_words, self._hinted.c_words, self.size, self.unit))

    cdef void c_copy_unsent(self, Bitmap copy) noexcept nogil:
        self._dirty.c_copy_into(copy)
        copy.c_merge(self._hinted)

    cdef void c_copy_free(self, Bitmap copy) noexcept nogil:
        pagecore_copy_free(self._dirty.c_words, self._hinted.c_words, copy.c_words, self.size)
        copy.c_words_changed(0, self.size)

    cdef size_t c_owe_hinted(self) noexcept nogil:
        cdef pagecore_change change = pagecore_owe_hinted(self._dirty.c_words, self._hinted.c_words, self.size)
        count_change(self, change)
        return <size_t>change.dirty

    cdef void c_owe_all(self) noexcept nogil:
        # Back in precopy: parts of units may go out again (S10).
        pagecore_store_relaxed(&self._whole_units, 0)
        count_change(self, pagecore_owe_all(self._dirty.c_words, self._hinted.c_words, self.size))

    cdef void c_reload(self, Bitmap settled) noexcept nogil:
        count_change(self, pagecore_reload(self._dirty.c_words, self._hinted.c_words, settled.c_words, self.size))
        if self.c_whole_units():
            count_change(self, pagecore_whole_units(self._dirty.c_words, self._hinted.c_words, self.size, self.unit))

    cdef size_t c_dirty_count(self) noexcept nogil:
        return count_in(&self._dirty_pages, self.size)

    cdef size_t c_hinted_count(self) noexcept nogil:
        return count_in(&self._hinted_pages, self.size)

    cdef size_t c_marked_count(self) noexcept nogil:
        return self._side.c_count()
