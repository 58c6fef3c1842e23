from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._holes cimport Holes
from pagecore._move cimport Mover
from pagecore._page_state cimport PageState
from pagecore._parking cimport (
    CONTENT_CONTINUE,
    CONTENT_DATA,
    CONTENT_FILL,
    CONTENT_ZERO,
    Parked,
    Parking,
    content_of,
    what_of,
)
from pagecore._shared cimport PlacementShared
from pagecore._shards cimport Shards
from pagecore._uffd cimport PlaceStep
from pagecore._waiters cimport Waiters
from pagecore._window cimport Window
from pagecore.page_source._protocol cimport PageAnswer, PageSource

cdef enum:
    CHUNK_BYTES = 65536         # D5: a hold of the shared side is one ioctl of at most so many, or of one huge page


cdef class PlacementObserver:
    """Told of every page at the moment the kernel has accepted it, on the placing thread, under the shared side."""

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil
    # Whether it has the two below; where not, nothing is moved while it observes.
    cdef bint c_follows_moves
    # Pages that nobody else may place are about to be moved: afterwards their content is the guest's to change. How many
    # of them went is told next, with none of them marked received yet; c_placed is told of the others, if they go.
    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil
    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil


cdef class Placer:
    """One region: rules D1 to D15 for one run, one fault, one event at a time. All methods are nogil."""

    cdef readonly Shards region
    cdef readonly PageState state
    cdef PageSource _source
    cdef PlacementObserver _observer
    cdef PlacementShared *_shared
    cdef uint64_t c_chunk           # pages of one hold
    cdef bint _keep_removed         # shared memory keeps its content under a REMOVE
    cdef Holes _holes               # None for pages of 4 KiB
    cdef int c_index       # of the region in its loop
    cdef bint _slow                 # the source may sleep: placing threads alone call it
    cdef Waiters _waiters
    cdef Bitmap _rewoken            # D15: a fault came for a received page, which was woken
    cdef Bitmap _again              # asked for `again`: a second copy is no fault of the peer's (S7)
    cdef Bitmap _pending            # serve the page again, by the retry thread (D7)
    cdef uint8_t *_fill             # a chunk of the fill; NULL where the fill is zeros
    cdef Parking _parking
    cdef int _retry_from            # the slot that the next turn of the retry thread begins with
    cdef uint64_t _removed_first    # hull of what the events of the current batch released
    cdef uint64_t _removed_end

    cdef void c_place(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    # A block in a stage of the mover, which is given back: by MOVE where nothing of it is here, else as c_place.
    cdef void c_place_block(self, uint64_t first, Mover mover, int stage) noexcept nogil
    # Before anything else: what all placers of a loop share.
    cdef void c_join(self, PlacementShared *shared, int index) noexcept nogil
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
    cdef void c_give_up(self, uint64_t first, uint64_t count) noexcept nogil
    cdef void c_request(self, uint64_t first, uint64_t count, bint again) noexcept nogil
    cdef void c_forget(self, uint64_t first, uint64_t count) noexcept nogil
    cdef bint c_retry(self) noexcept nogil          # true while something is left
    # While no thread runs.
    cdef void c_give_parked_back(self) noexcept nogil
    cdef void c_wake_all(self) noexcept nogil

    cdef void _place_chunk(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef uint64_t _place_won(self, uint64_t first, uint64_t won, const uint8_t *data, int content) noexcept nogil
    cdef int _issue(self, uint64_t first, uint64_t count, const uint8_t *data, int content,
                    PlaceStep *step) noexcept nogil
    cdef size_t _move_block(self, uint64_t first, Mover mover, int stage) noexcept nogil
    cdef void _accept(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef void _receive(self, uint64_t first, uint64_t count, int content) noexcept nogil
    cdef void _accept_foreign(self, uint64_t page) noexcept nogil
    cdef void _finish_waiting(self, uint64_t first, uint64_t count, int fault_class) noexcept nogil
    cdef bint _retry_parked(self, Parked *entry, const uint8_t *data) noexcept nogil
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
