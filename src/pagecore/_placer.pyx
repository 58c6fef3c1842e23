"""Placer: design rules D1 to D15 applied to one region, one run, fault or event at a time, without the GIL.

What arrives is placed by its base, Placing. Here is who waits for a page: what a fault needs, what is tried again, what is
asked for, and what becomes of pages that nobody has.
"""

from libc.errno cimport EAGAIN, EIO, ETIMEDOUT
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from pagecore._atomic cimport pagecore_fence, pagecore_fence_after_rmw, pagecore_fetch_add, pagecore_load_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._page_state cimport PageState
from pagecore._parking cimport CONTENT_FILL, Parked, content_of
from pagecore._shards cimport Shards
from pagecore._shared cimport (
    CLASS_RESIDENT,
    CLASS_ZERO,
    FAILURE_KERNEL,
    FAILURE_LOST,
    FAILURE_SOURCE,
    FAULT_PRESENT,
    FAULT_RELEASED,
    RESULT_ERROR,
    RESULT_INSTALLED,
    RESULT_PRESENT,
    PlacementShared,
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
from pagecore._uffd cimport PLACE_AGAIN, PLACE_DONE, PLACE_FAILED, PLACE_PEER_GONE, PLACE_PRESENT, PlaceStep
from pagecore._window cimport Window
from pagecore.page_source._protocol cimport ANSWER_FAILED, PageAnswer, PageSource

cdef extern int __builtin_ctzll(unsigned long long) nogil
cdef extern int __builtin_popcountll(unsigned long long) nogil

# Only a controller's thread waits so long for a source to take a request; the reader never does.
cdef uint64_t REQUEST_WAIT_NS = 5000000000


cdef class Placer(Placing):
    def __cinit__(self, Shards region, PageState state, PageSource source, PlacementObserver observer, uint32_t fill,
                  bint keep_removed):
        self._rewoken = Bitmap(region.size)
        self._pending = Bitmap(region.size)
        self._removed_first = UINT64_MAX
        self._keep_removed = keep_removed

    # Again, on a timer (D7) ----------------------------------------------------------------------------------------

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

    cdef void _serve_later(self, uint64_t page) noexcept nogil:
        """Have the retry thread call c_serve(page): the kernel or the source says "again"."""
        pagecore_fetch_add(&self._shared.counters.deferred, 1)
        self._pending.c_set(page)
        pagecore_monitor_enter(<pagecore_monitor *>self._shared.monitor)
        self._shared.pending = 1
        notify_inside(self._shared)
        pagecore_monitor_leave(<pagecore_monitor *>self._shared.monitor)

    # Faults --------------------------------------------------------------------------------------------------------

    cdef void c_note_fault(self, uint64_t page, uint64_t now) noexcept nogil:
        pagecore_fetch_add(&self._shared.counters.faults, 1)
        if not self._waiters.c_note(page, now):
            pagecore_fetch_add(&self._shared.counters.unsampled, 1)

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
        # D12: never COPY, which would undo a marker; where zeros would too, a marker again. EEXIST over a live marker:
        # wake, and the guest gets its SIGBUS.
        cdef PlaceStep step
        cdef bint again = self.region.c_zeros_undo
        cdef int outcome = self.region.c_poison(page, 1, &step) if again else self.region.c_zero(page, 1, &step)
        if self._is_again(outcome, &step):
            self._serve_later(page)
            return
        if again and outcome == PLACE_FAILED:
            # Its waiter stays asleep: woken, it would fault again, for ever.
            note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_POISON", page)
            return
        if again and outcome == PLACE_DONE:
            pagecore_fetch_add(&self._shared.counters.poisoned, 1)
        self.region.c_wake(page, 1)
        self._finish_waiting(page, 1, FAULT_PRESENT)

    cdef void _serve_released(self, uint64_t page) noexcept nogil:
        # D3: zeros, with no claim; it may repeat.
        cdef PlaceStep step
        cdef int outcome = self.region.c_zero(page, 1, &step)
        if self._is_again(outcome, &step):
            self._serve_later(page)
            return
        if outcome == PLACE_FAILED:
            note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_ZEROPAGE", page)
            return
        if outcome == PLACE_DONE:
            pagecore_fetch_add(&self._shared.counters.refilled, 1)
            pagecore_fetch_add(&self._shared.outcomes[CLASS_ZERO][RESULT_INSTALLED], 1)
        else:
            self.region.c_wake(page, 1)     # present, or no longer mapped: nobody else wakes (D10)
        self._finish_waiting(page, 1, FAULT_RELEASED)

    cdef bint _serve_received(self, uint64_t page) noexcept nogil:
        """Wake; true when it had been woken before and the kernel is to be asked whether the page is there (D15)."""
        if self._rewoken.c_test_and_set(page):
            return True
        self.region.c_wake(page, 1)
        pagecore_fetch_add(&self._shared.outcomes[CLASS_RESIDENT][RESULT_PRESENT], 1)
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
                pagecore_fetch_add(&self._shared.counters.ahead, __builtin_popcountll(won))
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
            pagecore_fetch_add(&self._shared.counters.fetches, 1)
            pagecore_fetch_add(&self._shared.counters.fetch_ns, pagecore_now_ns() - before)
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
        if self.state.received.c_test(page):
            # It came while it was found missing: received, and only then was the bit cleared (Placing._receive).
            self.state.requested.c_clear(page)
            self.region.c_wake(page, 1)
            return
        if self._slow:
            status = 0 if put_demand(self._shared, <void *>self, page, count) else -EAGAIN
            count = 1
        else:
            status = self._source.c_request(self.region.id, page, count, False)
        if status == 0:
            pagecore_fetch_add(&self._shared.counters.requested, count)
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
            pagecore_fetch_add(&self._shared.counters.requested, count)
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
            pagecore_fetch_add(&self._shared.counters.lost, 1)
            pagecore_fetch_add(&self._shared.outcomes[CLASS_RESIDENT][RESULT_ERROR], 1)
            pagecore_fetch_add(&self._shared.counters.poisoned, 1)
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

    cdef bint c_give_up(self, uint64_t first, uint64_t count, uint64_t until) noexcept nogil:
        """Nobody has these pages. By policy they stay missing (stall) or fail closed (poison); never zeros (D12).

        Until so long (pagecore_now_ns) it waits for a discard to be read, or until a stop.
        """
        cdef uint64_t page
        cdef PlaceStep step
        cdef int outcome
        cdef bint able = True
        if not self._shared.poison_lost:
            return True
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
                        able = False
                        # It carries no marker: it stays unsettled, and its waiters asleep. Woken, they would ask again.
                        note_failure(self._shared, FAILURE_KERNEL, step.error, b"UFFDIO_POISON", page)
                    elif outcome != PLACE_AGAIN:
                        if outcome == PLACE_DONE:
                            pagecore_fetch_add(&self._shared.counters.poisoned, 1)
                        self.region.c_wake(page, 1)     # D10: EEXIST wakes nobody
                        self._finish_waiting(page, 1, FAULT_PRESENT)
                self.state.c_unlock()
                if outcome == PLACE_PEER_GONE:
                    return False
                if outcome != PLACE_AGAIN or pagecore_load_relaxed(&self._shared.stopping):
                    break
                if pagecore_now_ns() >= until:
                    note_failure(self._shared, FAILURE_KERNEL, EAGAIN, b"UFFDIO_POISON", page)
                    break
                _pause(self._shared)        # a discard is pending; the reader is about to read it
        return able

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
