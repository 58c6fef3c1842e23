from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from pagecore._bitmap cimport Bitmap


cdef enum PlaceOutcome:
    PLACE_DONE = 0          # the whole run was placed
    PLACE_PRESENT = 1       # EEXIST at page first + done; the kernel woke nobody
    PLACE_AGAIN = 2         # EAGAIN without progress: the address space is changing (an event is pending)
    PLACE_GONE = 3          # ENOENT: page first + done is no longer registered memory
    PLACE_PEER_GONE = 4     # ESRCH: the process has ended
    PLACE_FAILED = 5        # anything else; see error

cdef struct PlaceStep:
    uint64_t done           # pages placed (and woken, unless DONTWAKE) before the outcome
    int error               # positive errno behind PLACE_FAILED, else 0

cdef struct UffdEvent:
    int kind                # EVENT_FAULT, EVENT_REMOVE, ... as the kernel numbers them
    uint64_t start          # the fault's address, or the first byte of the range (REMAP: the old address)
    uint64_t end            # the byte after the range; 0 for a fault; REMAP: the new address
    uint64_t flags          # of a fault: FAULT_WRITE, FAULT_WP, FAULT_MINOR; REMAP: the length in bytes
    uint32_t thread         # of a fault, with THREAD_ID; FORK: the new descriptor

cdef enum UffdEventKind:
    EVENT_FAULT = 0x12
    EVENT_FORK = 0x13
    EVENT_REMAP = 0x14
    EVENT_REMOVE = 0x15
    EVENT_UNMAP = 0x16

cdef enum UffdFaultFlag:
    FAULT_WRITE = 1
    FAULT_WP = 2
    FAULT_MINOR = 4

cdef enum UffdOperation:
    OPERATION_COPY = 0
    OPERATION_ZERO = 1
    OPERATION_POISON = 2

cdef struct PlaceTally:
    uint64_t settled        # pages dealt with: placed, present or gone; the run ended there
    uint64_t placed         # accepted by the kernel in this call
    uint64_t present        # lost to another claim, or found present by the kernel
    uint64_t gone
    size_t limit            # pages that one ioctl may be given; shrinks while an edge of the mapping is looked for
    int outcome             # PLACE_DONE, or what ended the run: PLACE_AGAIN, PLACE_PEER_GONE, PLACE_FAILED
    int error               # positive errno behind PLACE_FAILED, else 0


cdef class Region


cdef class Userfaultfd:
    cdef int c_fd                   # -1 once closed
    cdef readonly uint64_t features
    cdef readonly bint user_mode_only
    cdef uint64_t _in_flight        # ioctls and reads under way; close() waits for them (D13)
    cdef uint64_t _closing          # 0 open, 1 close() has begun, 2 closed
    cdef uint64_t _reader           # 1 while somebody has the reader's role (D4)
    cdef object _ranges             # (first byte, byte after) of each registered region
    cdef int _process               # who opened it: the descriptor acts on that process's memory, after a fork too

    cdef int _check_open(self) except -1
    cdef Region _register(self, object address, object length, object page_size, object region_id, object owner)
    # Both return 0, or -EBADF once close() has begun. Every use of c_fd stands between them.
    cdef int c_enter(self) noexcept nogil
    cdef void c_leave(self) noexcept nogil
    # D4: one reader for each descriptor. Both sides of c_read: take the role (0, or -EBUSY), give it back. A loop holds
    # it for its whole life; c_read itself does not check.
    cdef int c_begin_reading(self) noexcept nogil
    cdef void c_end_reading(self) noexcept nogil
    # Up to `capacity` events; 0 when none is queued, -errno on failure. EINTR is retried.
    cdef int c_read(self, UffdEvent *events, int capacity) noexcept nogil


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
    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_wake(self, size_t first, size_t count) noexcept nogil      # 0 or -errno

    # `limit` (in and out): the most pages that one ioctl is given; it halves on ENOENT until the edge is found.
    cdef int _fill(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake, size_t *limit,
                   PlaceStep *step) noexcept nogil
    # A run that is wholly ours to place: steps over present and gone pages, marks `received`, gives claims back.
    cdef void _place_span(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                          Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil
    # A run that others may be placing too: claims it word by word (D1) and places what it won.
    cdef void _place_run(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                         Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil
    cdef _place(self, int operation, object first_page, object page_count, const uint8_t *data, bint wake,
                Bitmap claimed, Bitmap received)
    cdef int _check_live(self) except -1
    cdef int _check_ioctl(self, int bit, str name, str remedy) except -1
    cdef int _check_run(self, object first_page, object page_count, size_t *first, size_t *count) except -1


cdef class PlaceResult:
    cdef readonly uint64_t placed
    cdef readonly uint64_t present
    cdef readonly uint64_t zeroed
    cdef readonly uint64_t deferred
    cdef readonly uint64_t gone
    cdef readonly bint peer_gone
