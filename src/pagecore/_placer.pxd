from libc.stdint cimport uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._placing cimport PlacementObserver, Placing
from pagecore._window cimport Window
from pagecore.page_source._protocol cimport PageAnswer


cdef class Placer(Placing):
    """One region: rules D1 to D15 for one run, one fault, one event at a time. All methods are nogil."""

    cdef bint _keep_removed         # shared memory keeps its content under a REMOVE
    cdef Bitmap _rewoken            # D15: a fault came for a received page, which was woken
    cdef Bitmap _pending            # serve the page again, by the retry thread (D7)
    cdef int _retry_from            # the slot that the next turn of the retry thread begins with
    cdef uint64_t _removed_first    # hull of what the events of the current batch released
    cdef uint64_t _removed_end

    # The reader, under the exclusive side.
    cdef void c_note_fault(self, uint64_t page, uint64_t now) noexcept nogil
    # Anyone, holding neither side.
    # The window, if there is one, says how many pages from this one on are worth placing, otherwise `around` does; that is
    # the return value. How many were dealt with is *done. 0: the caller places what lies behind the first chunk, and then
    # calls again without a window.
    cdef uint64_t c_serve(self, uint64_t page, Window window, uint64_t around, uint64_t *done) noexcept nogil
    # Pages that nobody waits for, from a source that never sleeps: what meets EAGAIN is left for later.
    cdef void c_place_ahead(self, uint64_t first, uint64_t count) noexcept nogil
    # One chunk, on a thread that may sleep: fetch, then place. The pages that were dealt with; 0: the source failed, which
    # is no failure of the loop where it is a guess.
    cdef uint64_t c_fetch_and_place(self, uint64_t first, uint64_t count, bint guess) noexcept nogil
    cdef void c_serve_removed(self, uint64_t first, uint64_t end) noexcept nogil
    cdef void c_ask_anew(self) noexcept nogil
    # False where the kernel refused, or the process has ended.
    cdef bint c_give_up(self, uint64_t first, uint64_t count, uint64_t until) noexcept nogil
    cdef void c_request(self, uint64_t first, uint64_t count, bint again) noexcept nogil
    cdef void c_forget(self, uint64_t first, uint64_t count) noexcept nogil
    cdef bint c_retry(self) noexcept nogil          # true while something is left
    # While no thread runs.
    cdef void c_wake_all(self) noexcept nogil

    cdef void _serve_waiting(self, uint64_t page, uint64_t end) noexcept nogil
    cdef void _serve_later(self, uint64_t page) noexcept nogil
    cdef void _serve_released(self, uint64_t page) noexcept nogil
    cdef void _serve_excluded(self, uint64_t page) noexcept nogil
    cdef bint _serve_received(self, uint64_t page) noexcept nogil
    cdef void _fetch(self, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil
    cdef void _fill_hinted(self, uint64_t page) noexcept nogil
    cdef void _give_back(self, uint64_t first, uint64_t mask) noexcept nogil
    cdef uint64_t _place_at_hand(self, uint64_t first, uint64_t count, bint wanted) noexcept nogil
    cdef void _ask(self, uint64_t page, uint64_t count) noexcept nogil
    cdef void _probe_lost(self, uint64_t page) noexcept nogil
