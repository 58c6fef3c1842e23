from libc.stdint cimport int64_t, uint32_t, uint64_t


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

cdef enum UffdRegisterMode:
    REGISTER_MISSING = 1
    REGISTER_WP = 2
    REGISTER_MINOR = 4


# 0 or -errno. The only place that issues userfaultfd ioctls, so that faults can be injected there.
cdef int uffd_ioctl(int fd, unsigned long request, void *argument) noexcept nogil
# One placement ioctl: 0, or -errno with the bytes done, which are positive only under -EAGAIN (facts 1, 2).
cdef int uffd_place(int fd, int operation, uint64_t address, uint64_t source, uint64_t length, bint wake,
                    int64_t *moved) noexcept nogil
# 0, or the exception for -errno; -EBADF can only mean that close() has begun.
cdef int raise_unless_done(int rc, str operation, object address, object length) except -1


cdef class Descriptor:
    cdef int c_fd                   # to be used between c_enter and c_leave alone; -1 once closed
    cdef readonly uint64_t features
    cdef readonly bint user_mode_only
    cdef uint64_t _in_flight        # ioctls and reads under way; close() waits for them (D13)
    cdef uint64_t _state            # 0 never opened, 1 open, 2 close() has begun, 3 closed
    cdef uint64_t _reader           # 1 while somebody has the reader's role (D4)
    cdef int _process               # who opened it: it acts on that process's memory, after a fork too

    cdef int _check_open(self) except -1
    # Both return 0, or -EBADF once close() has begun. Every use of c_fd stands between them.
    cdef int c_enter(self) noexcept nogil
    cdef void c_leave(self) noexcept nogil
    # One ioctl between the two; 0 or -errno.
    cdef int c_call(self, unsigned long request, void *argument) noexcept nogil
    cdef int c_register(self, uint64_t address, uint64_t length, uint64_t mode,
                        uint64_t *ioctls) noexcept nogil
    cdef int c_unregister(self, uint64_t address, uint64_t length) noexcept nogil
    cdef int c_wake_range(self, uint64_t address, uint64_t length) noexcept nogil
    # D4, one reader for each descriptor: take the role (0, or -EBUSY), give it back. A loop holds it for its
    # whole life; c_read itself does not check.
    cdef int c_begin_reading(self) noexcept nogil
    cdef void c_end_reading(self) noexcept nogil
    # Up to `capacity` events; 0 when none is queued, -errno on failure. EINTR is retried.
    cdef int c_read(self, UffdEvent *events, int capacity) noexcept nogil
