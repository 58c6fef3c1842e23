cimport cython
from libc.stdint cimport uint8_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._region cimport Region
from pagecore._span cimport PlaceStep, PlaceTally, Span


cdef enum:
    BLOCK_PAGES = 512           # pages of a block: one transparent huge page
    MOST_STAGES = 64


@cython.final
cdef class Mover:
    cdef readonly int stages
    cdef uint8_t *_first        # the stages, one huge page each, aligned
    cdef void *_mapping         # what they were cut from
    cdef int _pagemap           # /proc/self/pagemap, or -1
    cdef uint64_t _states[MOST_STAGES]
    cdef int _remains[MOST_STAGES]      # what is in a stage that somebody has taken: theirs
    cdef uint64_t _moved
    cdef uint64_t _huge
    cdef uint64_t _split
    cdef uint64_t _refused
    cdef uint64_t _without

    # Whether the block that begins at page `first` may be moved into: aligned, of a region where MOVE works.
    cdef bint c_can_move(self, Span span, size_t first) noexcept nogil
    # One block whose 512 pages are the caller's to place: by MOVE, and what that leaves by COPY. As Span.c_copy;
    # *moved is set to the pages that went by MOVE. `data` is BLOCK_PAGES pages.
    cdef int c_place_block(self, Span span, size_t first, const uint8_t *data, bint wake, PlaceStep *step,
                           size_t *moved) noexcept nogil
    # The same in steps, for whoever can read its data straight into a huge page: take one (its index, or -1 where there is
    # none), fill all of c_stage(index), move it (the pages that went, the first ones; the others are in the stage still),
    # and give it back, moved or not.
    cdef int c_take(self) noexcept nogil
    cdef uint8_t *c_stage(self, int index) noexcept nogil
    cdef size_t c_move(self, int index, Span span, size_t first, bint wake) noexcept nogil
    cdef void c_give_back(self, int index) noexcept nogil
    # Win all claims of a block in which nothing is known to be present; or none.
    cdef bint c_claim_block(self, size_t first, Bitmap claimed, Bitmap received, Bitmap excluded) noexcept nogil
    # Make empty stages ready; how many.
    cdef int c_prepare(self) noexcept nogil

    cdef bint _exchange(self, int index, uint64_t old, uint64_t new) noexcept nogil
    cdef size_t _move(self, Span span, size_t first, const uint8_t *data, bint wake) noexcept nogil
    cdef int _clear_stage(self, int index) noexcept nogil
    cdef bint _fault_in(self, int index) noexcept nogil
    cdef bint _is_huge(self, uint64_t address) noexcept nogil
    cdef void _place_run(self, Region region, size_t first, size_t count, const uint8_t *data, int flags, Bitmap claimed,
                         Bitmap received, Bitmap excluded, PlaceTally *tally) noexcept nogil
