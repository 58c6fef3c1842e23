from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._holes cimport Holes
from pagecore._move cimport Mover
from pagecore._page_state cimport PageState
from pagecore._parking cimport Parked, Parking
from pagecore._shared cimport PlacementShared
from pagecore._shards cimport Shards
from pagecore._uffd cimport PlaceStep
from pagecore._waiters cimport Waiters
from pagecore.page_source._protocol cimport PageSource

cdef enum:
    CHUNK_BYTES = 65536         # D5: a hold of the shared side is one ioctl of at most so many, or of one huge page


cdef class PlacementObserver:
    """Told of every page at the moment the kernel has accepted it, on the placing thread, under the shared side."""

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil
    # Whether it has the two below. Where not, nothing is moved while it observes.
    cdef bint c_follows_moves
    # Pages that nobody else may place are about to be moved: afterwards their content is the guest's to change.
    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil
    # The first `moved` of them went, as in c_placed. `data` still holds the others, which c_placed may be told of later.
    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count, uint64_t moved,
                      const uint8_t *data) noexcept nogil


cdef class Placing:
    """The half of a Placer that places what arrived. All methods are nogil."""

    cdef readonly Shards region
    cdef readonly PageState state
    cdef PageSource _source
    cdef PlacementObserver _observer
    cdef PlacementShared *_shared
    cdef uint64_t c_chunk           # pages of one hold
    cdef Holes _holes               # None for pages of 4 KiB
    cdef int c_index                # of the region in its loop
    cdef bint _slow                 # the source may sleep: placing threads alone call it
    cdef Waiters _waiters
    cdef Bitmap _again              # asked for `again`: a second copy is no fault of the peer's (S7)
    cdef uint8_t *_fill             # a chunk of the fill; NULL where the fill is zeros
    cdef Parking _parking

    # Before anything else: what all placers of a loop share.
    cdef void c_join(self, PlacementShared *shared, int index) noexcept nogil
    # One run of pages; `data` is NULL unless content is CONTENT_DATA. The caller checked the bounds.
    cdef void c_place(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    # A block in a stage of the mover, which is given back: by MOVE where nothing of it is here yet, else as above.
    cdef void c_place_block(self, uint64_t first, Mover mover, int stage) noexcept nogil
    # While no thread runs.
    cdef void c_give_parked_back(self) noexcept nogil

    cdef void _place_chunk(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef uint64_t _place_won(self, uint64_t first, uint64_t won, const uint8_t *data, int content) noexcept nogil
    cdef int _issue(self, uint64_t first, uint64_t count, const uint8_t *data, int content,
                    PlaceStep *step) noexcept nogil
    cdef uint64_t _move_block(self, uint64_t first, Mover mover, int stage) noexcept nogil
    cdef void _receive(self, uint64_t first, uint64_t count, int content) noexcept nogil
    cdef void _accept(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef void _accept_foreign(self, uint64_t page) noexcept nogil
    cdef void _finish_waiting(self, uint64_t first, uint64_t count, int fault_class) noexcept nogil
    cdef bint _retry_parked(self, Parked *entry, const uint8_t *data) noexcept nogil
    cdef bint _is_again(self, int outcome, const PlaceStep *step) noexcept nogil
