cimport cython
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from pagecore._bitmap cimport Bitmap
from pagecore._descriptor cimport (
    EVENT_FAULT,
    EVENT_FORK,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    FAULT_MINOR,
    FAULT_WP,
    FAULT_WRITE,
    Descriptor,
    UffdEvent,
)


cdef enum PlaceOutcome:
    PLACE_DONE = 0          # the whole run was placed
    PLACE_PRESENT = 1       # EEXIST at page first + done; the kernel woke nobody
    PLACE_AGAIN = 2         # EAGAIN without progress: the address space is changing (an event is pending)
    PLACE_GONE = 3          # ENOENT: page first + done is no longer registered memory
    PLACE_PEER_GONE = 4     # ESRCH: the process has ended
    PLACE_FAILED = 5        # anything else; see error (EBADF: close() has begun)

cdef struct PlaceStep:
    uint64_t done           # pages placed (and woken, unless DONTWAKE) before the outcome
    int error               # positive errno behind PLACE_FAILED, else 0

cdef struct PlaceTally:
    uint64_t settled        # pages dealt with: placed, present or gone; the run ended there
    uint64_t placed         # accepted by the kernel in this call
    uint64_t present        # lost to another claim, or found present by the kernel
    uint64_t gone
    size_t limit            # pages that one ioctl may be given; shrinks while an edge is looked for
    int outcome             # PLACE_DONE, or what ended the run: PLACE_AGAIN, PLACE_PEER_GONE, PLACE_FAILED
    int error               # positive errno behind PLACE_FAILED, else 0


@cython.final
cdef class Userfaultfd(Descriptor):
    cdef list _ranges                   # (first byte, byte after, owner of the memory) of each region

    cdef Region _register(self, object address, object length, object page_size, object region_id,
                          object owner)


@cython.final
cdef class Region:
    cdef readonly Userfaultfd uffd
    cdef readonly int id
    cdef uintptr_t c_address
    cdef readonly size_t size           # pages
    cdef readonly size_t page_size      # bytes
    cdef readonly uint64_t ioctls       # the mask that UFFDIO_REGISTER returned
    cdef object _owner                  # keeps the buffer alive
    cdef bint _live                     # False once unregistered

    # One run, resumed over partial progress until it is done or something else than progress happens.
    # Nothing is counted and nothing is woken on PRESENT: the caller decides.
    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake,
                    PlaceStep *step) noexcept nogil
    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_wake(self, size_t first, size_t count) noexcept nogil      # 0 or -errno

    cdef int _check_live(self) except -1
    cdef int _check_ioctl(self, int bit, str name, str remedy) except -1
    cdef int _check_run(self, object first_page, object page_count, size_t *first, size_t *count) except -1
    cdef int _check_plane(self, Bitmap plane) except -1
    # `limit` (in and out): the most pages that one ioctl is given; it halves on ENOENT to find the edge.
    cdef int _fill(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                   size_t *limit, PlaceStep *step) noexcept nogil
    # A run that is ours to place: steps over present and gone pages, marks `received`, gives claims back.
    cdef void _place_span(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                          Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil
    # A run that others may be placing too: claims it word by word (D1) and places what it won.
    cdef void _place_run(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                         Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil
    cdef _place(self, int operation, object first_page, object page_count, const uint8_t *data, bint wake,
                Bitmap claimed, Bitmap received)


@cython.final
cdef class PlaceResult:
    cdef readonly uint64_t placed
    cdef readonly uint64_t present
    cdef readonly uint64_t zeroed
    cdef readonly uint64_t deferred
    cdef readonly uint64_t gone
    cdef readonly bint peer_gone
