from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef struct UffdEvent:
    int kind                # EVENT_FAULT, EVENT_REMOVE, ... as the kernel numbers them
    uint64_t start          # the fault's address, or the first byte of the range (REMAP: the old address)
    uint64_t end            # the byte after the range; 0 for a fault; REMAP: the new address
    uint64_t flags          # of a fault: FAULT_WRITE, FAULT_WP, FAULT_MINOR; REMAP: the length in bytes
    uint32_t thread         # of a fault, with THREAD_ID; FORK: the new descriptor, see Descriptor.c_read

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
    OPERATION_CONTINUE = 3
    OPERATION_MOVE = 4
    OPERATION_PROTECT = 5
    OPERATION_UNPROTECT = 6

cdef enum UffdPlaceFlag:
    PLACE_DONTWAKE = 1      # leave the waiters asleep
    PLACE_PROTECT = 2       # COPY and CONTINUE: write-protect in the same step

cdef enum UffdRegisterMode:
    REGISTER_MISSING = 1
    REGISTER_WP = 2
    REGISTER_MINOR = 4

cdef enum UffdAccess:
    ACCESS_DEVICE = 0       # /dev/userfaultfd: the permissions of the file decide
    ACCESS_SYSCALL = 1      # the sysctl or CAP_SYS_PTRACE decides
    ACCESS_USER_MODE = 2    # everyone may, without the kernel's own faults

cdef enum:
    MESSAGES = 64           # messages of one read(): 2 KiB of stack


# 0 or -errno. The only place that issues userfaultfd ioctls, so that faults can be injected there.
cdef int uffd_ioctl(int fd, unsigned long request, void *argument) noexcept nogil
# A new descriptor by one of the ways in, or -errno.
cdef int uffd_open(int access) noexcept nogil
# UFFDIO_API: 0 or -errno; fills in what the kernel has.
cdef int uffd_handshake(int fd, uint64_t features, uint64_t *supported, uint64_t *ioctls) noexcept nogil
cdef int uffd_register(int fd, uint64_t address, uint64_t length, uint64_t mode, uint64_t *ioctls) noexcept nogil
cdef int uffd_unregister(int fd, uint64_t address, uint64_t length) noexcept nogil
cdef int uffd_wake(int fd, uint64_t address, uint64_t length) noexcept nogil
# One placement ioctl: 0, or -errno with the bytes done, which are positive only under -EAGAIN (facts 1, 2).
# `source` is the address to copy or to move from; the other operations have none.
cdef int uffd_place(int fd, int operation, uint64_t address, uint64_t source, uint64_t length, int flags,
                    int64_t *moved) noexcept nogil
# read(): how many of up to `capacity` (and MESSAGES) events it gave, or -errno. A FORK event carries an open descriptor.
cdef int uffd_read(int fd, UffdEvent *events, int capacity) noexcept nogil
# Whether the descriptor acts on this process's memory: 1, 0, or -errno where it cannot be told.
cdef int uffd_is_own(int fd) noexcept nogil
