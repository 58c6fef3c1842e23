from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t


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
    uint64_t flags          # of a fault: FAULT_WRITE, FAULT_WP, FAULT_MINOR
    uint32_t thread         # of a fault, with THREAD_ID; FORK: the new descriptor

cdef enum UffdEventKind:
    EVENT_FAULT = 0x12
    EVENT_FORK = 0x13
    EVENT_REMAP = 0x14
    EVENT_REMOVE = 0x15
    EVENT_UNMAP = 0x16


cdef class Userfaultfd:
    cdef int c_fd                   # -1 once closed
    cdef readonly uint64_t features
    cdef readonly bint user_mode_only
    cdef uint64_t _in_flight        # ioctls and reads under way; close() waits for them (D13)
    cdef uint64_t _closing

    # Both return 0, or -EBADF once close() has begun. Every use of c_fd stands between them.
    cdef int c_enter(self) noexcept nogil
    cdef void c_leave(self) noexcept nogil
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

    # One run, resumed over partial progress until it is done or something else than progress happens.
    # Nothing is counted and nothing is woken on PRESENT: the caller decides.
    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil
    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil
    cdef int c_wake(self, size_t first, size_t count) noexcept nogil      # 0 or -errno
