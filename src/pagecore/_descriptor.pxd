from libc.stdint cimport uint64_t

from pagecore._uffd_ioctl cimport UffdEvent


# 0, or the exception for -errno; -EBADF can only mean that close() has begun.
cdef int raise_unless_done(int rc, str operation, object address, object length) except -1


cdef class Descriptor:
    cdef int c_fd                   # to be used between c_enter and c_leave alone; -1 once closed
    cdef readonly uint64_t features
    cdef readonly bint user_mode_only       # False where it was adopted and that cannot be told
    cdef readonly bint remote       # acts on another process's memory, so far as can be told
    cdef uint64_t _in_flight        # ioctls and reads under way; close() waits for them (D13)
    cdef uint64_t _state            # 0 never opened, 1 open, 2 close() has begun, 3 closed
    cdef uint64_t _reader           # 1 while somebody has the reader's role (D4)
    cdef int _process               # who opened it: unless remote, it acts on that process's memory, after a fork too

    cdef int _check_open(self) except -1
    # Both return 0, or -EBADF once close() has begun. Every use of c_fd stands between them.
    cdef int c_enter(self) noexcept nogil
    cdef void c_leave(self) noexcept nogil
    # 0 or -errno.
    cdef int c_register(self, uint64_t address, uint64_t length, uint64_t mode,
                        uint64_t *ioctls) noexcept nogil
    cdef int c_unregister(self, uint64_t address, uint64_t length) noexcept nogil
    cdef int c_wake_range(self, uint64_t address, uint64_t length) noexcept nogil
    # D4, one reader for each descriptor: take the role (0, or -EBUSY), give it back. A loop holds it for its
    # whole life; c_read itself does not check.
    cdef int c_begin_reading(self) noexcept nogil
    cdef void c_end_reading(self) noexcept nogil
    # Up to `capacity` events; 0 when none is queued, -errno on failure. EINTR is retried. The first closes the
    # descriptors that FORK events bring (the child's waiters then go on, and read zeros); the second leaves them to its
    # caller, in `thread`.
    cdef int c_read(self, UffdEvent *events, int capacity) noexcept nogil
    cdef int c_read_forks(self, UffdEvent *events, int capacity) noexcept nogil
    cdef int _open(self, object features, object user_mode_only) except -1
    cdef object _event(self, const UffdEvent *event)
