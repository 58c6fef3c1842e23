"""Background: which pages are placed while nobody asks, and how fast."""

from libc.stdint cimport UINT64_MAX, uint64_t

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._page_state cimport PageState
from pagecore._placer cimport Placer
from pagecore._shared cimport PlacementShared, QueuedRun
from pagecore._sync cimport pagecore_now_ns


cdef class Background:
    def __cinit__(self, bint enabled):
        self.c_enabled = enabled
        self._step = self._left = STEP_FIRST

    @property
    def step(self):
        # Read outside the monitor that the steps are taken in: a snapshot.
        return pagecore_load_relaxed(&self._step)

    cdef void _begin_step(self, uint64_t pages, uint64_t now) noexcept nogil:
        self._left = pages
        pagecore_store_relaxed(&self._step, pages)
        self._resume_ns = now + STEP_PAUSE_NS

    cdef bint c_take(self, PlacementShared *shared, void **placers, int count,
                     QueuedRun *run, uint64_t *until) noexcept nogil:
        cdef uint64_t faults, now, unit
        until[0] = UINT64_MAX
        if not self.c_enabled or self._done:
            return False
        faults = pagecore_load_relaxed(&shared.counters.faults)
        now = pagecore_now_ns()
        if faults != self._faults:
            # Somebody waits, or did a moment ago: the processor and the kernel's locks are theirs.
            self._faults = faults
            self._begin_step(STEP_FIRST, now)
        elif self._left == 0:
            self._begin_step(min(self._step * 2, <uint64_t>STEP_LAST), now)
        if now < self._resume_ns:
            until[0] = self._resume_ns
            return False
        while True:
            if self._index == count:
                # Pages that a failed placement gave back are found by the next pass.
                self._index = 0
                self._done = not self._found
                self._found = False
                if self._done:
                    return False
            unit = max((<Placer>placers[self._index]).region.page_size // 4096, <size_t>1)
            run.count = _find_missing((<Placer>placers[self._index]).state, self._page,
                                      min((<Placer>placers[self._index]).c_chunk, max(self._left // unit, <uint64_t>1)),
                                      &run.first)
            if run.count:
                break
            self._index += 1
            self._page = 0
        run.placer = placers[self._index]
        self._page = run.first + run.count
        self._left -= min(self._left, run.count * unit)
        self._found = True
        return True


cdef uint64_t _find_missing(PageState state, uint64_t page, uint64_t limit, uint64_t *first) noexcept nogil:
    """The next run that is owed and nobody is placing. Hinted pages are filled when they are touched, if ever."""
    cdef uint64_t count = 0
    while page < state.size:
        page = state.claimed.c_find_clear(page)
        if page >= state.size:
            break
        if not (state.released.c_test(page) or state.excluded.c_test(page) or state.hinted.c_test(page)):
            break
        page += 1
    first[0] = page
    while (count < limit and page + count < state.size
           and not (state.claimed.c_test(page + count) or state.released.c_test(page + count)
                    or state.excluded.c_test(page + count) or state.hinted.c_test(page + count))):
        count += 1
    return count
