from libc.stdint cimport uint8_t, uint64_t

from pagecore._uffd cimport PlaceStep, Region, Userfaultfd


cdef class Shards:
    """One logical region in one or more pieces, each registered with a descriptor of its own. All methods are nogil."""

    cdef readonly tuple regions
    cdef readonly int id
    cdef readonly size_t size           # pages of all pieces
    cdef readonly size_t page_size      # bytes
    cdef void **_pieces                 # borrowed; `regions` owns the objects
    cdef size_t *_starts                # first page of each piece, and `size` at the end
    cdef int c_count
    cdef bint c_tells_loss              # the kernel can be asked whether a page is there (D15)
    cdef bint c_zeros_undo              # c_zero undoes markers (fact 7)
    cdef bint _minor                    # CONTINUE comes first (D2)

    # As those of Region; a run over several pieces is cut at their edges. Wakes go through the descriptor that owns the
    # address (D10).
    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, PlaceStep *step) noexcept nogil
    cdef int c_zero(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_continue(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_wake(self, size_t first, size_t count) noexcept nogil
    cdef bint c_served_by(self, Userfaultfd uffd) noexcept nogil
    # The page at an address that a message of this descriptor names; False where it is none of ours.
    cdef bint c_find(self, Userfaultfd uffd, uint64_t address, uint64_t *page) noexcept nogil
    # The bytes of piece `index`, counted from page 0 of the region, in the range of an event of this descriptor.
    cdef bint c_clip(self, Userfaultfd uffd, int index, uint64_t start, uint64_t end,
                     uint64_t *from_byte, uint64_t *to_byte) noexcept nogil

    cdef int _piece_of(self, size_t page) noexcept nogil
    cdef int _place(self, int operation, size_t first, size_t count, const uint8_t *data,
                    PlaceStep *step) noexcept nogil
    cdef int _place_minor(self, Region piece, int operation, size_t first, size_t count, const uint8_t *data,
                          PlaceStep *step) noexcept nogil
