"""Placing: what arrives is placed by the rules D1 to D11, or parked and tried again; one region, without the GIL."""

from libc.errno cimport ENOMEM
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._holes cimport HOLE_SIZE, Holes
from pagecore._move cimport BLOCK_PAGES, Mover
from pagecore._page_state cimport PageState
from pagecore._parking cimport CONTENT_CONTINUE, CONTENT_DATA, CONTENT_FILL, CONTENT_ZERO, Parked, Parking, what_of
from pagecore._shards cimport Shards
from pagecore._shared cimport (
    CLASS_NEW,
    CLASS_ZERO,
    FAILURE_DUPLICATE,
    FAILURE_FOREIGN,
    FAILURE_KERNEL,
    FAILURE_PEER_GONE,
    FAULT_HINTED,
    FAULT_OWED,
    FAULT_PRESENT,
    RESULT_DEFERRED,
    RESULT_DISCARDED,
    RESULT_ERROR,
    RESULT_INSTALLED,
    RESULT_PRESENT,
    PlacementShared,
    count_resident,
    note_failure,
)
from pagecore._uffd cimport (
    PLACE_AGAIN,
    PLACE_DONE,
    PLACE_FAILED,
    PLACE_GONE,
    PLACE_PEER_GONE,
    PLACE_PRESENT,
    PlaceStep,
    Region,
)
from pagecore._waiters cimport Waiters
from pagecore.page_source._protocol cimport PageSource

cdef extern int __builtin_ctzll(unsigned long long) nogil


cdef inline const uint8_t *_advance(const uint8_t *data, uint64_t length) noexcept nogil:
    if data == NULL:
        return NULL
    return data + length


cdef inline uint64_t _run_mask(uint64_t offset, uint64_t length) noexcept nogil:
    return (UINT64_MAX >> (64 - length)) << offset


cdef inline void _tally(PlacementShared *shared, int content, int result, uint64_t pages) noexcept nogil:
    cdef bint new = content == CONTENT_DATA or content == CONTENT_CONTINUE
    pagecore_fetch_add(&shared.outcomes[CLASS_NEW if new else CLASS_ZERO][result], pages)


cdef class PlacementObserver:
    """Base of what is told of every placed page; Cython code overrides ``c_placed``.

    Notes
    -----
    ``c_placed(region, first, count, data)`` runs without the GIL, on the placing thread, after the kernel accepted the
    pages and before they are marked received; ``data`` is NULL for zeros. It must be short: a reader of the descriptor
    may be waiting.

    While an observer watches, whole blocks go by MOVE only if it sets ``c_follows_moves``: it gets ``c_moving`` before, while
    their content can still be read, and ``c_moved`` in place of ``c_placed``.
    """

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        pass

    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        pass

    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count, uint64_t moved,
                      const uint8_t *data) noexcept nogil:
        pass


cdef class Placing:
    def __cinit__(self, Shards region, PageState state, PageSource source, PlacementObserver observer, uint32_t fill,
                  *args):
        cdef size_t index
        if state.size != region.size:
            raise ValueError(f"the planes have {state.size} pages, the region has {region.size}")
        self.region = region
        self.state = state
        self._source = source
        self._slow = source.lanes == 0 and source.slow
        self._observer = observer
        self._waiters = Waiters(region.size)
        self._again = Bitmap(region.size)
        self._parking = Parking(region.page_size)
        self.c_chunk = max(<size_t>1, CHUNK_BYTES // region.page_size)
        if region.page_size > HOLE_SIZE:
            self._holes = Holes(region.size, region.page_size)
        if fill:
            self._fill = <uint8_t *>malloc(self.c_chunk * region.page_size)
            if self._fill == NULL:
                raise MemoryError()
            for index in range(self.c_chunk * region.page_size // sizeof(fill)):
                (<uint32_t *>self._fill)[index] = fill

    def __dealloc__(self):
        free(self._fill)

    cdef void c_join(self, PlacementShared *shared, int index) noexcept nogil:
        self._shared = shared
        self.c_index = index

    # Placing what arrives ------------------------------------------------------------------------------------------

    cdef void c_place(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint64_t length
        while done < count and not pagecore_load_relaxed(&self._shared.stopping):
            length = min(self.c_chunk, count - done)
            self._place_chunk(first + done, length, _advance(data, done * self.region.page_size), content)
            done += length

    cdef void c_place_block(self, uint64_t first, Mover mover, int stage) noexcept nogil:
        cdef uint64_t moved = self._move_block(first, mover, stage)
        # What did not go is in the stage still, and its claims are given back: each chunk is decided anew.
        self.c_place(first + moved, BLOCK_PAGES - moved, mover.c_stage(stage) + moved * self.region.page_size, CONTENT_DATA)
        mover.c_give_back(stage)

    cdef uint64_t _move_block(self, uint64_t first, Mover mover, int stage) noexcept nogil:
        cdef const uint8_t *data = mover.c_stage(stage)
        cdef uint64_t moved = 0
        self.state.c_lock_shared()
        # D5: all of it, or nothing by MOVE.
        if (not self.state.released.c_count_range(first, BLOCK_PAGES)
                and mover.c_claim_block(first, self.state.claimed, self.state.received, self.state.excluded)):
            if self._observer is not None:
                self._observer.c_moving(self.region.id, first, BLOCK_PAGES, data)
            moved = mover.c_move(stage, <Region>self.region._pieces[0], first, True)
            if self._observer is not None:
                self._observer.c_moved(self.region.id, first, BLOCK_PAGES, moved,
                                       data + moved * self.region.page_size)
            if moved:
                pagecore_fetch_add(&self._shared.counters.moved, moved)
                self._receive(first, moved, CONTENT_DATA)
            self.state.claimed.c_clear_range(first + moved, BLOCK_PAGES - moved)
        self.state.c_unlock()
        return moved

    cdef void _place_chunk(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil:
        cdef uint64_t won, dropped, lost, mask
        cdef uint64_t again = 0
        cdef uint64_t page
        self.state.c_lock_shared()
        won = self.state.c_claim(first, count, &dropped, &lost)
        if won:
            again = self._place_won(first, won, data, content)
        self.state.c_unlock()
        if again:
            self._parking.c_put(self._shared, self.state.claimed, first, again, data, content)     # with neither side held (D5)
        mask = dropped | lost
        while mask:
            page = first + __builtin_ctzll(mask)
            mask &= mask - 1
            if (lost >> (page - first)) & 1:
                _tally(self._shared, content, RESULT_PRESENT, 1)
                if self._source.lanes == 0:
                    continue            # nobody sent it: a fault was faster than the prefetch, and has been woken
                pagecore_fetch_add(&self._shared.counters.duplicates, 1)
                if self._shared.strict and not self._again.c_test(page):
                    note_failure(self._shared, FAILURE_DUPLICATE, 0, b"duplicate", page)
                if self.state.received.c_test(page):
                    self.region.c_wake(page, 1)         # D10: a duplicate wakes too
            else:
                # D3: whoever waited for it was given zeros when it was released (c_serve_removed), and is when it faults.
                pagecore_fetch_add(&self._shared.counters.dropped, 1)
                _tally(self._shared, content, RESULT_DISCARDED, 1)

    cdef uint64_t _place_won(self, uint64_t first, uint64_t won, const uint8_t *data, int content) noexcept nogil:
        """Place the pages of a mask, whose claims are ours, under the shared side. Returns those to be tried again."""
        cdef uint64_t again = 0
        cdef uint64_t offset, length
        cdef const uint8_t *bytes
        cdef PlaceStep step
        cdef int outcome
        while won:
            offset = __builtin_ctzll(won)
            length = __builtin_ctzll(~(won >> offset))
            won &= ~_run_mask(offset, length)
            while length:
                bytes = _advance(data, offset * self.region.page_size)
                outcome = self._issue(first + offset, length, bytes, content, &step)
                if step.done:
                    self._accept(first + offset, step.done, bytes, content)
                    offset += step.done
                    length -= step.done
                if outcome == PLACE_DONE:
                    continue
                if outcome == PLACE_PRESENT:
                    self._accept_foreign(first + offset)
                    _tally(self._shared, content, RESULT_PRESENT, 1)
                    offset += 1
                    length -= 1
                elif outcome == PLACE_GONE:
                    # No memory at this page (trap 21: the region found the edge). Nobody is to place it, and the
                    # claim that we keep says so.
                    self.state.excluded.c_set(first + offset)
                    self.state.requested.c_clear(first + offset)    # D9
                    self.region.c_wake(first + offset, 1)
                    self._finish_waiting(first + offset, 1, FAULT_PRESENT)
                    pagecore_fetch_add(&self._shared.counters.gone, 1)
                    _tally(self._shared, content, RESULT_DISCARDED, 1)
                    offset += 1
                    length -= 1
                elif self._is_again(outcome, &step):
                    again |= _run_mask(offset, length)
                    _tally(self._shared, content, RESULT_DEFERRED, length)
                    break
                else:
                    # D8: a placement that failed gives its claims back.
                    self.state.claimed.c_clear_range(first + offset, length)
                    _tally(self._shared, content, RESULT_ERROR, length)
                    if outcome == PLACE_PEER_GONE:
                        note_failure(self._shared, FAILURE_PEER_GONE, 0, b"place", first + offset)
                    else:
                        note_failure(self._shared, FAILURE_KERNEL, step.error, what_of(content), first + offset)
                    break
        return again

    cdef int _issue(self, uint64_t first, uint64_t count, const uint8_t *data, int content,
                    PlaceStep *step) noexcept nogil:
        cdef int outcome
        if content == CONTENT_FILL and self._fill != NULL:
            data = self._fill
        # Before the bytes, which are there for who looks on: copied, a page that has vanished would come back as zeros.
        if content == CONTENT_CONTINUE:
            return self.region.c_continue(first, count, step)
        if self._holes is not None and data != NULL and self._holes.c_has(first):
            outcome = self.region.c_copy(first, 1, self._holes.c_enter(first, data), step)     # a chunk is one page then
            self._holes.c_leave()
            return outcome
        if data != NULL:
            return self.region.c_copy(first, count, data, step)
        return self.region.c_zero(first, count, step)     # D11: zeros never go through COPY

    cdef void _accept(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil:
        """The kernel has accepted the pages, and woken who waited for them."""
        if self._observer is not None:
            if content == CONTENT_FILL and self._fill != NULL:
                data = self._fill
            self._observer.c_placed(self.region.id, first, count, data)
        self._receive(first, count, content)

    cdef void _receive(self, uint64_t first, uint64_t count, int content) noexcept nogil:
        # D8: only now. D9: asked for is nothing where the reader places at once.
        if count == 1:
            self.state.received.c_set(first)
        else:
            self.state.received.c_set_range(first, count)
        if self._source.lanes or self._slow:
            self.state.requested.c_clear_range(first, count)
        if content == CONTENT_DATA or content == CONTENT_CONTINUE:
            pagecore_fetch_add(&self._shared.counters.placed, count)
        elif content == CONTENT_ZERO:
            pagecore_fetch_add(&self._shared.counters.zeroed, count)
        else:
            pagecore_fetch_add(&self._shared.counters.filled, count)
        _tally(self._shared, content, RESULT_INSTALLED, count)
        self._finish_waiting(first, count, FAULT_HINTED if content == CONTENT_FILL else FAULT_OWED)
        count_resident(self._shared, count)

    cdef void _accept_foreign(self, uint64_t page) noexcept nogil:
        """EEXIST on a page that we claimed: something else made it present. Never overwrite; wake (D2)."""
        self.state.received.c_set(page)
        self.state.requested.c_clear(page)
        self.region.c_wake(page, 1)
        pagecore_fetch_add(&self._shared.counters.foreign, 1)
        if self._shared.strict:
            note_failure(self._shared, FAILURE_FOREIGN, 0, b"foreign", page)
        self._finish_waiting(page, 1, FAULT_PRESENT)
        count_resident(self._shared, 1)

    cdef bint _is_again(self, int outcome, const PlaceStep *step) noexcept nogil:
        """D7: nothing is wrong with the page, nor with the call; it is made again later."""
        if outcome == PLACE_FAILED and step.error == ENOMEM:
            pagecore_fetch_add(&self._shared.counters.shortages, 1)
            return True
        return outcome == PLACE_AGAIN

    cdef void _finish_waiting(self, uint64_t first, uint64_t count, int fault_class) noexcept nogil:
        self._waiters.c_finish(first, count, &self._shared.latency[fault_class])

    # Parking (D7) --------------------------------------------------------------------------------------------------

    cdef bint _retry_parked(self, Parked *entry, const uint8_t *data) noexcept nogil:
        """True when the page needs its slot no longer: placed, or dropped."""
        cdef uint64_t again = 0
        cdef bint dropped
        self.state.c_lock_shared()
        dropped = self.state.released.c_test(entry.page) or self.state.excluded.c_test(entry.page)
        if not dropped:
            again = self._place_won(entry.page, 1, data, entry.content)
        self.state.c_unlock()
        if dropped:
            pagecore_fetch_add(&self._shared.counters.dropped, 1)
            _tally(self._shared, entry.content, RESULT_DISCARDED, 1)
        return again == 0

    cdef void c_give_parked_back(self) noexcept nogil:
        """The loop has stopped: what is parked gives its claim back, so that the settled bitmap is exact (D8)."""
        self._parking.c_clear(self._shared, self.state.claimed)
