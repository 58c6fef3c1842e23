from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t

from pagecore._bitmap cimport Bitmap
from pagecore._descriptor cimport Descriptor


cdef enum PlaceOutcome:
    PLACE_DONE = 0          # the whole run was placed
    PLACE_PRESENT = 1       # EEXIST at page first + done; the kernel woke nobody
    PLACE_AGAIN = 2         # EAGAIN without progress: the address space is changing (an event is pending)
    PLACE_GONE = 3          # page first + done is no longer memory that can be placed: unmapped, or cut off its file
    PLACE_PEER_GONE = 4     # ESRCH: the process has ended
    PLACE_FAILED = 5        # anything else; see error (EBADF: close() has begun; ENOMEM: try later; EFAULT: the source)
    PLACE_ABSENT = 6        # c_continue: the page cache has no page for first + done

cdef struct PlaceStep:
    uint64_t done           # pages placed (and woken, unless DONTWAKE) before the outcome
    int error               # positive errno behind PLACE_FAILED, else 0

cdef struct PlaceTally:
    uint64_t settled        # pages dealt with: placed, present, gone, absent or excluded; the run ended there
    uint64_t placed         # accepted by the kernel in this call
    uint64_t present        # lost to another claim, or found present by the kernel
    uint64_t gone
    uint64_t absent
    uint64_t excluded
    uint64_t moved          # of those placed, the ones that went by MOVE
    size_t limit            # pages that one ioctl may be given; shrinks while an edge is looked for
    int outcome             # PLACE_DONE, or what ended the run: PLACE_AGAIN, PLACE_PEER_GONE, PLACE_FAILED
    int error               # positive errno behind PLACE_FAILED, else 0


# Where zeros are copied from, for pages of that size: `npages` of them. Kept for the life of the process.
cdef const uint8_t *zero_source(size_t page_size, size_t *npages) except NULL


cdef class Span:
    cdef readonly Descriptor uffd
    cdef readonly int id
    cdef uintptr_t c_address
    cdef readonly size_t size           # pages
    cdef readonly size_t page_size      # bytes
    cdef readonly uint64_t ioctls       # the mask that UFFDIO_REGISTER returned
    cdef int c_kind                     # MemoryKind
    cdef int c_modes                    # RegisterMode
    cdef int c_flags                    # what every COPY and CONTINUE adds: PLACE_PROTECT where registered for WP
    cdef const uint8_t *c_zeros         # where zeros are copied from; NULL where ZEROPAGE does it (D11)
    cdef size_t c_zero_pages
    cdef uint64_t c_movable             # 1 while UFFDIO_MOVE may work here (see Mover)
    cdef object _owner                  # keeps the buffer alive
    cdef bint _live                     # False once unregistered

    # One run, resumed over partial progress until it is done or something else than progress happens.
    # Nothing is counted and nothing is woken on PRESENT: the caller decides.
    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake,
                    PlaceStep *step) noexcept nogil
    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_continue(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_wake(self, size_t first, size_t count) noexcept nogil      # 0 or -errno
    # The same for any operation and flags of _uffd_ioctl.pxd; a MOVE takes `data` as the address it moves from.
    # `limit` (in and out): the most pages that one ioctl is given; it halves on ENOENT to find the edge.
    cdef int c_place(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                     size_t *limit, PlaceStep *step) noexcept nogil
    cdef bint _is_out_of_huge_pages(self, uint64_t address) noexcept nogil
    cdef int _map_cached(self, uint64_t address, int flags) noexcept nogil
    cdef int _poison_marker(self, uint64_t address) noexcept nogil
    # A run that is ours to place: steps over present and gone pages, marks `received`, gives claims back.
    cdef void c_place_span(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                           Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil
    # A run that others may be placing too: claims it word by word (D1), leaves out what is excluded (D12), and places
    # what it won.
    cdef void c_place_run(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                          Bitmap claimed, Bitmap received, Bitmap excluded, PlaceTally *tally) noexcept nogil
