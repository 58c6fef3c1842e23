"""Placer: design rules D1 to D15 applied to one region, one run, fault or event at a time, without the GIL."""

from libc.errno cimport EAGAIN, EIO, ENOMEM, ETIMEDOUT
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pagecore._atomic cimport pagecore_fence, pagecore_fence_after_rmw, pagecore_fetch_add, pagecore_load_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._holes cimport HOLE_SIZE, Holes
from pagecore._move cimport BLOCK_PAGES, Mover
from pagecore._page_state cimport PageState
from pagecore._parking cimport Parked, Parking
from pagecore._shards cimport Shards
from pagecore._shared cimport (
    CLASS_NEW,
    CLASS_RESIDENT,
    CLASS_ZERO,
    FAILURE_DUPLICATE,
    FAILURE_FOREIGN,
    FAILURE_KERNEL,
    FAILURE_LOST,
    FAILURE_PEER_GONE,
    FAILURE_SOURCE,
    FAULT_HINTED,
    FAULT_OWED,
    FAULT_PRESENT,
    FAULT_RELEASED,
    RESULT_DEFERRED,
    RESULT_DISCARDED,
    RESULT_ERROR,
    RESULT_INSTALLED,
    RESULT_PRESENT,
    PlacementShared,
    count_resident,
    note_failure,
    notify_inside,
    notify_progress,
    put_demand,
)
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_enter,
    pagecore_monitor_leave,
    pagecore_monitor_wait,
    pagecore_now_ns,
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
from pagecore._window cimport Window
from pagecore.page_source._protocol cimport ANSWER_FAILED, PageAnswer, PageSource

cdef extern int __builtin_ctzll(unsigned long long) nogil
cdef extern int __builtin_popcountll(unsigned long long) nogil

# Only a controller's thread waits so long for a source to take a request; the reader never does.
cdef uint64_t REQUEST_WAIT_NS = 5000000000


cdef inline void _add(uint64_t *counter, uint64_t amount) noexcept nogil:
    pagecore_fetch_add(counter, amount)


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
    """

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        pass

    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        pass

    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil:
        pass


cdef class Placer:
    def __cinit__(self, Shards region, PageState state, PageSource source, PlacementObserver observer, uint32_t fill,
                  bint keep_removed):
        cdef size_t index
        if state.size != region.size:
            raise ValueError(f"the planes have {state.size} pages, the region has {region.size}")
        self.region = region
        self.state = state
        self._source = source
        self._slow = source.lanes == 0 and source.slow
        self._observer = observer
        self._waiters = Waiters(region.size)
        self._rewoken = Bitmap(region.size)
        self._again = Bitmap(region.size)
        self._pending = Bitmap(region.size)
        self._removed_first = UINT64_MAX
        self._removed_end = 0
        self._parking = Parking(region.page_size)
        self._keep_removed = keep_removed
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
        """Place one run of pages; `data` is NULL unless content is CONTENT_DATA. The caller checked the bounds."""
        cdef uint64_t done = 0
        cdef uint64_t length
        while done < count and not pagecore_load_relaxed(&self._shared.stopping):
            length = min(self.c_chunk, count - done)
            self._place_chunk(first + done, length, _advance(data, done * self.region.page_size), content)
            done += length

    cdef void c_place_block(self, uint64_t first, Mover mover, int stage) noexcept nogil:
        cdef uint64_t moved = self._move_block(first, mover, stage)
        # What was not moved is in the stage still. Its claims are given back: each chunk is decided anew.
        self.c_place(first + moved, BLOCK_PAGES - moved, mover.c_stage(stage) + moved * self.region.page_size, CONTENT_DATA)
        mover.c_give_back(stage)

    cdef size_t _move_block(self, uint64_t first, Mover mover, int stage) noexcept nogil:
        cdef size_t moved = 0
        self.state.c_lock_shared()
        if (not self.state.released.c_count_range(first, BLOCK_PAGES)
                and mover.c_claim_block(first, self.state.claimed, self.state.received, self.state.excluded)):
            if self._observer is not None:
                self._observer.c_moving(self.region.id, first, BLOCK_PAGES, mover.c_stage(stage))
            moved = mover.c_move(stage, <Region>self.region._pieces[0], first, True)
            if moved:
                if self._observer is not None:
                    self._observer.c_moved(self.region.id, first, moved)
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
                _add(&self._shared.counters.duplicates, 1)
                if self._shared.strict and not self._again.c_test(page):
                    note_failure(self._shared, FAILURE_DUPLICATE, 0, b"duplicate", page)
                if self.state.received.c_test(page):
                    self.region.c_wake(page, 1)         # D10: a duplicate wakes too
            else:
                # D3: whoever waited for it was given zeros when it was released (c_serve_removed), and is when it faults.
                _add(&self._shared.counters.dropped, 1)
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
                    _add(&self._shared.counters.gone, 1)
                    _tally(self._shared, content, RESULT_DISCARDED, 1)
                    offset += 1
                    length -= 1
                elif outcome == PLACE_AGAIN or step.error == ENOMEM:
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
        if self._holes is not None and data != NULL and self._holes.c_has(first):
            outcome = self.region.c_copy(first, 1, self._holes.c_enter(first, data), step)     # a chunk is one page then
            self._holes.c_leave()
            return outcome
        if data != NULL:
            return self.region.c_copy(first, count, data, step)
        if content == CONTENT_CONTINUE:
            return self.region.c_continue(first, count, step)
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
            _add(&self._shared.counters.placed, count)
        elif content == CONTENT_ZERO:
            _add(&self._shared.counters.zeroed, count)
        else:
            _add(&self._shared.counters.filled, count)
        _tally(self._shared, content, RESULT_INSTALLED, count)
        self._finish_waiting(first, count, FAULT_HINTED if content == CONTENT_FILL else FAULT_OWED)
        count_resident(self._shared, count)

    cdef void _accept_foreign(self, uint64_t page) noexcept nogil:
        """EEXIST on a page that we claimed: something else made it present. Never overwrite; wake (D2)."""
        self.state.received.c_set(page)
        self.state.requested.c_clear(page)
        self.region.c_wake(page, 1)
        _add(&self._shared.counters.foreign, 1)
        if self._shared.strict:
            note_failure(self._shared, FAILURE_FOREIGN, 0, b"foreign", page)
        self._finish_waiting(page, 1, FAULT_PRESENT)
        count_resident(self._shared, 1)

    # Parking (D7) --------------------------------------------------------------------------------------------------

    cdef bint c_retry(self) noexcept nogil:
        """Try everything again that was parked or could not be served, once. The retry thread alone calls this."""
        cdef Parked *entry
        cdef int number, slot
        cdef uint64_t page = 0
        cdef uint64_t done
        for number in range(self._parking.c_slots):
            slot = (self._retry_from + number) % self._parking.c_slots
            # A used slot changes no more until we free it.
            entry = self._parking.c_used(self._shared, slot)
            if entry == NULL:
                continue
            if not self._retry_parked(entry, self._parking.c_data(slot)):
                # What the kernel says to one page it says to all: the next turn begins here.
                self._retry_from = slot
                return True
            self._parking.c_free(self._shared, slot)
        while True:
            page = self._pending.c_find_set(page)
            if page >= self.region.size:
                break
            self._pending.c_clear(page)
            self.c_serve(page, None, 1, &done)
            if self._pending.c_test(page):
                break
            page += 1
        return pagecore_load_relaxed(&self._shared.parked) != 0 or self._pending.c_find_set(0) < self.region.size

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
            _add(&self._shared.counters.dropped, 1)
            _tally(self._shared, entry.content, RESULT_DISCARDED, 1)
        return again == 0

    cdef void _serve_later(self, uint64_t page) noexcept nogil:
        """Have the retry thread call c_serve(page): the kernel or the source says "again"."""
        _add(&self._shared.counters.deferred, 1)
        self._pending.c_set(page)
        pagecore_monitor_enter(<pagecore_monitor *>self._shared.monitor)
        self._shared.pending = 1
        notify_inside(self._shared)
        pagecore_monitor_leave(<pagecore_monitor *>self._shared.monitor)

    # Faults --------------------------------------------------------------------------------------------------------

    cdef void c_note_fault(self, uint64_t page, uint64_t now) noexcept nogil:
        _add(&self._shared.counters.faults, 1)
        if not self._waiters.c_note(page, now):
            _add(&self._shared.counters.unsampled, 1)

    cdef void _finish_waiting(self, uint64_t first, uint64_t count, int fault_class) noexcept nogil:
        self._waiters.c_finish(first, count, &self._shared.latency[fault_class])

    cdef uint64_t c_serve(self, uint64_t page, Window window, uint64_t around, uint64_t *done) noexcept nogil:
        """Decide what a missing page needs, in the order of D9, under the shared side."""
        cdef bint probe = False
        done[0] = 1
        pagecore_fence_after_rmw()      # see Waiters.c_finish
        self.state.c_lock_shared()
        if self.state.excluded.c_test(page):
            self._serve_excluded(page)
        elif self.state.released.c_test(page):
            self._serve_released(page)
        elif self.state.received.c_test(page):
            probe = self._serve_received(page)
        elif self.state.claimed.c_test(page):
            pass                # under way: whoever has the claim places it, which wakes
        elif self.state.hinted.c_test(page):
            self._fill_hinted(page)
        else:
            if window is not None and self._source.lanes == 0:
                around = min(window.c_faulted(page), self.state.size - page)
            if self._source.lanes or self._slow:
                done[0] = around
                self._ask(page, around)
            elif window is not None and around > self.c_chunk:
                done[0] = 0         # the guest walks on: what lies behind the page is placed before it is woken
            else:
                # Here, on the reader: waking a placer costs more than the copy.
                done[0] = self._place_at_hand(page, min(around, self.c_chunk), True)
        self.state.c_unlock()
        if probe:
            self._probe_lost(page)
        return around

    cdef void _serve_excluded(self, uint64_t page) noexcept nogil:
        # D12: never COPY, which would undo a marker. EEXIST over a live marker: wake, and the guest gets its SIGBUS.
        cdef PlaceStep step
        cdef int outcome = self.region.c_zero(page, 1, &step)
        if outcome == PLACE_AGAIN:
            self._serve_later(page)
            return
        self.region.c_wake(page, 1)
        self._finish_waiting(page, 1, FAULT_PRESENT)

    cdef void _serve_released(self, uint64_t page) noexcept nogil:
        # D3: zeros, with no claim; it may repeat.
        cdef PlaceStep step
        cdef int outcome = self.region.c_zero(page, 1, &step)
        if outcome == PLACE_AGAIN or step.error == ENOMEM:
            self._serve_later(page)
            return
        if outcome == PLACE_FAILED:
            note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_ZEROPAGE", page)
            return
        if outcome == PLACE_DONE:
            _add(&self._shared.counters.refilled, 1)
            _tally(self._shared, CONTENT_ZERO, RESULT_INSTALLED, 1)
        else:
            self.region.c_wake(page, 1)     # present, or no longer mapped: nobody else wakes (D10)
        self._finish_waiting(page, 1, FAULT_RELEASED)

    cdef bint _serve_received(self, uint64_t page) noexcept nogil:
        """Wake; true when it had been woken before and the kernel is to be asked whether the page is there (D15)."""
        if self._rewoken.c_test_and_set(page):
            return True
        self.region.c_wake(page, 1)
        _add(&self._shared.outcomes[CLASS_RESIDENT][RESULT_PRESENT], 1)
        self._finish_waiting(page, 1, FAULT_PRESENT)
        return False

    cdef void _fill_hinted(self, uint64_t page) noexcept nogil:
        if not self.state.claimed.c_test_and_set(page):     # else somebody was faster, and places it
            self._give_back(page, self._place_won(page, 1, NULL, CONTENT_FILL))

    cdef void _give_back(self, uint64_t first, uint64_t mask) noexcept nogil:
        """Pages that met EAGAIN, on a thread that must not wait for a place to park. Whoever waits is served later."""
        cdef uint64_t page
        while mask:
            page = first + __builtin_ctzll(mask)
            mask &= mask - 1
            self.state.claimed.c_clear(page)
            # The reader marks the waiter and then looks at `claimed`; here it is the other way round.
            pagecore_fence()
            if self._waiters._waiting.c_test(page):
                self._serve_later(page)

    cdef uint64_t _place_at_hand(self, uint64_t first, uint64_t count, bint wanted) noexcept nogil:
        """Place a chunk from a source that never sleeps, under the shared side. Returns how many pages it looked at."""
        cdef PageAnswer answer
        cdef uint64_t won, dropped, lost, again
        self._fetch(first, count, &answer)
        if answer.kind == ANSWER_FAILED and count > 1:
            # The guess may reach beyond what the source has; the page itself does not.
            self._fetch(first, 1, &answer)
        if answer.kind == ANSWER_FAILED:
            if wanted:
                # Never zeros for what the source cannot give (D12): the page stays missing.
                note_failure(self._shared, FAILURE_SOURCE, answer.error, answer.field, first)
            return count
        count = answer.count
        # Of a page that was asked for and is lost to another claim, that one wakes the waiter.
        won = self.state.c_claim(first, count, &dropped, &lost)
        if won:
            again = self._place_won(first, won, answer.data, content_of(answer.kind))
            self._give_back(first, again)
            won &= ~again
            if wanted:
                won &= ~<uint64_t>1
            if won:
                _add(&self._shared.counters.ahead, __builtin_popcountll(won))
        return count

    cdef void c_place_ahead(self, uint64_t first, uint64_t count) noexcept nogil:
        self.state.c_lock_shared()
        self._place_at_hand(first, count, False)
        self.state.c_unlock()

    cdef uint64_t c_fetch_and_place(self, uint64_t first, uint64_t count, bint guess) noexcept nogil:
        cdef PageAnswer answer
        cdef uint64_t before = pagecore_now_ns() if self._slow else 0
        self._fetch(first, count, &answer)
        if self._slow:
            _add(&self._shared.counters.fetches, 1)
            _add(&self._shared.counters.fetch_ns, pagecore_now_ns() - before)
        if answer.kind != ANSWER_FAILED:
            self.c_place(first, answer.count, answer.data, content_of(answer.kind))
        elif count > 1:
            return self.c_fetch_and_place(first, 1, guess)      # one of the others may be what it cannot give
        else:
            if not guess:
                note_failure(self._shared, FAILURE_SOURCE, answer.error, answer.field, answer.first)
            return 0
        return answer.count

    cdef void _fetch(self, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        """ANSWER_PAGES, _ZEROS or _CONTINUE for the first pages of a run, 1 to `count` of them, or ANSWER_FAILED."""
        answer.data = NULL
        answer.error = EIO
        answer.field = b"fetch"
        answer.first = first
        answer.count = count
        self._source.c_fetch(self.region.id, first, count, answer)
        # It may answer for a part: up to the next hole, or as much as it reads at once.
        answer.count = min(answer.count, count)
        if content_of(answer.kind) < 0 or answer.count == 0:
            answer.kind = ANSWER_FAILED
        if answer.field == NULL:
            answer.field = b"fetch"

    cdef void _ask(self, uint64_t page, uint64_t count) noexcept nogil:
        cdef int status
        if self.state.requested.c_test_and_set(page):
            return              # D9: asked already
        if self._slow:
            status = 0 if put_demand(self._shared, <void *>self, page, count) else -EAGAIN
            count = 1
        else:
            status = self._source.c_request(self.region.id, page, count, False)
        if status == 0:
            _add(&self._shared.counters.requested, count)
        elif status == -EAGAIN:
            self.state.requested.c_clear(page)
            self._serve_later(page)
        else:
            # The bit stays: what is still requested is asked again after a reconnect.
            note_failure(self._shared, FAILURE_SOURCE, -status, b"request", page)

    cdef void c_request(self, uint64_t first, uint64_t count, bint again) noexcept nogil:
        """Ask the source for a run, `again` where it came and could not be placed (S7). Waits while it takes nothing."""
        cdef int status = -EAGAIN
        cdef uint64_t deadline = pagecore_now_ns() + REQUEST_WAIT_NS
        self.state.requested.c_set_range(first, count)
        if again:
            self._again.c_set_range(first, count)
        while status == -EAGAIN and not pagecore_load_relaxed(&self._shared.stopping):
            status = self._source.c_request(self.region.id, first, count, again)
            if status == -EAGAIN:
                if pagecore_now_ns() > deadline:
                    status = -ETIMEDOUT
                else:
                    _pause(self._shared)
        if status == 0:
            _add(&self._shared.counters.requested, count)
        elif status != -EAGAIN:     # that is a stop, which is no failure of the source
            note_failure(self._shared, FAILURE_SOURCE, -status, b"request", first)

    cdef void c_ask_anew(self) noexcept nogil:
        """D9: what an earlier loop over these planes asked for, and did not get, is asked again by the retry thread."""
        cdef uint64_t page = self.state.requested.c_find_set(0)
        while page < self.region.size:
            self.state.requested.c_clear(page)
            if not self.state.c_settled(page):
                self._pending.c_set(page)
                self._shared.pending = 1
            page = self.state.requested.c_find_set(page + 1)

    cdef void _probe_lost(self, uint64_t page) noexcept nogil:
        """D15: faults keep coming for a received page. Ask the kernel, once, with the exclusive side held."""
        cdef PlaceStep step
        cdef uint64_t done
        cdef int outcome
        self.state.c_lock_exclusive()
        if self.state.released.c_test(page) or self.state.excluded.c_test(page):
            self.state.c_unlock()
            self.c_serve(page, None, 1, &done)
            return
        self.state.excluded.c_set(page)
        # Without minor faults an empty entry over shared content is normal: a marker there would be the loss itself.
        outcome = self.region.c_poison(page, 1, &step) if self.region.c_tells_loss else PLACE_PRESENT
        if outcome == PLACE_DONE:
            # It was lost. The marker stays: SIGBUS instead of zeros.
            _add(&self._shared.counters.lost, 1)
            _add(&self._shared.outcomes[CLASS_RESIDENT][RESULT_ERROR], 1)
            _add(&self._shared.counters.poisoned, 1)
            note_failure(self._shared, FAILURE_LOST, 0, b"lost", page)
        else:
            self.state.excluded.c_clear(page)
        if outcome == PLACE_AGAIN:
            self._serve_later(page)
        elif outcome == PLACE_FAILED:
            # Nobody can say whether it is there. Woken, its waiter would fault and be woken for ever.
            note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_POISON", page)
        else:
            self.region.c_wake(page, 1)
            self._finish_waiting(page, 1, FAULT_PRESENT)
        self.state.c_unlock()

    # Events, under the exclusive side ------------------------------------------------------------------------------

    cdef void c_serve_removed(self, uint64_t first, uint64_t end) noexcept nogil:
        """After a batch, with neither side held: who waited for a page that was released gets zeros there and then (D3)."""
        self._serve_waiting(first, end)
        notify_progress(self._shared)       # released pages count as settled

    cdef void _serve_waiting(self, uint64_t page, uint64_t end) noexcept nogil:
        cdef uint64_t done
        page = self._waiters.c_find(page)
        while page < end:
            self.c_serve(page, None, 1, &done)
            page = self._waiters.c_find(page + 1)

    cdef void c_forget(self, uint64_t first, uint64_t count) noexcept nogil:
        """The owner is about to punch a hole where the kernel sends no event (D3)."""
        self.state.c_lock_exclusive()
        self.state.c_release(first, count)
        self.state.c_unlock()
        self._serve_waiting(first, first + count)

    cdef void c_give_up(self, uint64_t first, uint64_t count) noexcept nogil:
        """Nobody has these pages. By policy they stay missing (stall) or fail closed (poison); never zeros (D12)."""
        cdef uint64_t page
        cdef PlaceStep step
        cdef int outcome
        if not self._shared.poison_lost:
            return
        for page in range(first, first + count):
            while True:
                self.state.c_lock_exclusive()
                outcome = PLACE_DONE
                # A page that is claimed is settled, or under way: not ours to poison, nor its waiters ours to forget.
                if not self.state.released.c_test(page) and not self.state.claimed.c_test(page):
                    # `excluded` and `claimed` first: a late COPY would undo the poison. c_serve sees neither meanwhile.
                    self.state.c_exclude(page, 1)
                    outcome = self.region.c_poison(page, 1, &step)
                    if outcome == PLACE_AGAIN or outcome == PLACE_FAILED:
                        self.state.excluded.c_clear(page)
                        self.state.claimed.c_clear(page)
                    if outcome == PLACE_FAILED:
                        # It carries no marker: it stays unsettled, and its waiters asleep. Woken, they would ask again.
                        note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_POISON", page)
                    elif outcome != PLACE_AGAIN:
                        if outcome == PLACE_DONE:
                            _add(&self._shared.counters.poisoned, 1)
                        self.region.c_wake(page, 1)     # D10: EEXIST wakes nobody
                        self._finish_waiting(page, 1, FAULT_PRESENT)
                self.state.c_unlock()
                if outcome != PLACE_AGAIN or pagecore_load_relaxed(&self._shared.stopping):
                    break
                _pause(self._shared)        # a discard is pending; the reader is about to read it

    cdef void c_give_parked_back(self) noexcept nogil:
        """The loop has stopped: what is parked gives its claim back, so that the settled bitmap is exact (D8)."""
        self._parking.c_clear(self._shared, self.state.claimed)

    cdef void c_wake_all(self) noexcept nogil:
        """Before the threads run, and after: every waiter is woken, to fault again (D10)."""
        if self.region.size:
            self.region.c_wake(0, self.region.size)


cdef void _pause(PlacementShared *shared) noexcept nogil:
    """Wait a moment for the address space to settle (D7), cut short by a notification."""
    cdef pagecore_monitor *monitor = <pagecore_monitor *>shared.monitor
    pagecore_monitor_enter(monitor)
    pagecore_monitor_wait(monitor, pagecore_now_ns() + 50000)
    pagecore_monitor_leave(monitor)
