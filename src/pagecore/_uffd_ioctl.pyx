"""uffd_ioctl and its kin: the one place where a userfaultfd is called, and what is known of its answers.

Facts about userfaultfd that everything above relies on
-------------------------------------------------
Each was seen on a real kernel (6.18) or read in its source; tests/test_uffd*.py show what a test can show.

1.  A placement (COPY, ZEROPAGE, POISON) that stops midway fails with EAGAIN and the bytes done in its last
    field; the real reason is lost and comes with the next call, made where it stopped. Waiters are woken
    for the bytes done alone.
2.  That last field is signed. With nothing done it holds -errno, or what the caller left there: it is not
    written when arguments are refused (EINVAL), when the process has ended (ESRCH), and before Linux 6.15
    when the address space is changing. So it is zeroed first, believed only under EAGAIN, and progress only
    if it is positive (D6).
3.  EEXIST: the page is present. Nothing was overwritten and NOBODY was woken, so a waiter that another
    placement left asleep (DONTWAKE) sleeps on until somebody calls WAKE (D2, D10). WAKE works on anything,
    even while an event waits.
4.  EAGAIN without progress: the address space is changing, from the moment somebody calls madvise, munmap,
    mremap or fork with the matching event enabled until that event was read AND that thread has run again
    (5 ms were seen). Reading cannot be replaced by trying again, so a thread that must read must never wait
    here (D7).
5.  ENOENT: the range is not one registered mapping. That may be an unmapped page, an edge between two
    mappings that are both registered (mprotect and madvise split them), or a range of another descriptor.
    Nothing was placed, even where the first pages would have been good: the run is halved until the edge is
    found.
6.  ESRCH: the process whose memory it is has ended (Linux 4.13 and newer). REGISTER and UNREGISTER say ENOMEM then.
7.  COPY overwrites markers of poison, guard and write-protection as if the page were missing, and in shared memory
    so does ZEROPAGE; ZEROPAGE elsewhere and POISON give EEXIST on them. Whoever uses markers keeps placements away
    from them (D12).
8.  read() hands over all pending faults before any event, whatever came first (D4).
9.  Closing the last descriptor and UNREGISTER let every waiter go, and the missing pages then read as zeros
    (D12).
10. After fork the child's copy of the descriptor acts on the PARENT's memory; without EVENT_FORK the child
    itself sees zeros in pages that were missing. Descriptors are opened O_CLOEXEC; registering through an
    inherited one is refused.
11. poll() on a descriptor without O_NONBLOCK says POLLERR, and a blocked read cannot be cancelled:
    O_NONBLOCK always.
12. UFFDIO_API works once for each descriptor, and zeroes its argument when it fails: what the kernel can do
    is asked through a descriptor that is thrown away.
13. With UFFD_USER_MODE_ONLY (allowed to everyone) faults of the kernel itself on the memory, as by read(2)
    or KVM, are not delivered: they fail with EFAULT.
14. Source pages that cannot be read give EFAULT; if they are registered memory themselves, the ioctl sleeps
    on them.
15. UNREGISTER wakes the waiters BEFORE it takes the mapping's lock for writing: a fault that comes in between
    (under the per-mapping lock of Linux 6.4 and newer) falls asleep after the wake, and nobody is left who
    would be told of it. One in seven of the faults that were aimed at that moment did. A WAKE afterwards lets
    them go. Closing is not affected: it wakes last.
16. /proc/PID/fdinfo of a descriptor tells the features it was opened with, whether UFFDIO_API was done (bit 31),
    and the ioctls that this kernel has; any process that holds the descriptor can read it. Whose memory it acts on
    is not said anywhere, but MOVE works in one's own alone: for another process it is EINVAL before its last field
    is written, at home it looks further.
17. Reading a FORK event installs the child's descriptor in the reading process, whether it looks or not.
18. COPY into huge pages says EEXIST where the page is missing and the pool is empty (Linux 6.18: it mistakes the
    page table that it has just made for a page). Believed, it would mark a missing page as received. mincore() tells
    which it is, in one's own memory.
19. POISON: a fault that was under way when the page was poisoned may fall asleep after the wake of POISON, because the
    kernel takes the marker for a missing page (3 of 8114 faults aimed at that moment; unprotecting has no such gap).
    Its message is queued, so a reader hears of it and must wake; where nobody reads any more, closing lets it go.
"""

from pagecore.errors import UffdError

from libc.errno cimport EAGAIN, EINTR, ENOMEM, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.fcntl cimport O_CLOEXEC, O_NONBLOCK, O_RDWR, open as os_open
from posix.unistd cimport close as os_close, read as os_read

__all__ = ["query_access"]

cdef extern from "_inject.h" nogil:
    int pagecore_ioctl(int fd, unsigned long request, void *argument)

cdef extern from "sys/ioctl.h" nogil:
    int device_ioctl "ioctl"(int fd, unsigned long request, ...)

cdef extern from "unistd.h" nogil:
    long syscall(long number, ...)

cdef extern from "_kernel_abi.h" nogil:
    const long NR_USERFAULTFD "__NR_userfaultfd"
    const int USER_MODE_ONLY "UFFD_USER_MODE_ONLY"
    const unsigned long IOC_NEW "USERFAULTFD_IOC_NEW"
    const unsigned long API "UFFDIO_API"
    const unsigned long REGISTER "UFFDIO_REGISTER"
    const unsigned long UNREGISTER "UFFDIO_UNREGISTER"
    const unsigned long WAKE "UFFDIO_WAKE"
    const unsigned long COPY "UFFDIO_COPY"
    const unsigned long ZEROPAGE "UFFDIO_ZEROPAGE"
    const unsigned long POISON "PAGECORE_UFFDIO_POISON"
    const unsigned long CONTINUE "PAGECORE_UFFDIO_CONTINUE"
    const unsigned long MOVE "PAGECORE_UFFDIO_MOVE"
    const unsigned long WRITEPROTECT "UFFDIO_WRITEPROTECT"
    const uint64_t API_VERSION "UFFD_API"
    const uint64_t COPY_DONTWAKE "UFFDIO_COPY_MODE_DONTWAKE"
    const uint64_t COPY_WP "UFFDIO_COPY_MODE_WP"
    const uint64_t ZERO_DONTWAKE "UFFDIO_ZEROPAGE_MODE_DONTWAKE"
    const uint64_t POISON_DONTWAKE "PAGECORE_POISON_MODE_DONTWAKE"
    const uint64_t CONTINUE_DONTWAKE "PAGECORE_CONTINUE_MODE_DONTWAKE"
    const uint64_t CONTINUE_WP "PAGECORE_CONTINUE_MODE_WP"
    const uint64_t MOVE_DONTWAKE "PAGECORE_MOVE_MODE_DONTWAKE"
    const uint64_t PROTECT_WP "UFFDIO_WRITEPROTECT_MODE_WP"
    const uint64_t PROTECT_DONTWAKE "UFFDIO_WRITEPROTECT_MODE_DONTWAKE"

    cdef struct uffdio_api:
        uint64_t api
        uint64_t features
        uint64_t ioctls
    cdef struct uffdio_range:
        uint64_t start
        uint64_t len
    cdef struct uffdio_register:
        uffdio_range range
        uint64_t mode
        uint64_t ioctls
    cdef struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    cdef struct uffdio_zeropage:
        uffdio_range range
        uint64_t mode
        int64_t zeropage
    cdef struct pagecore_uffdio_poison:
        uffdio_range range
        uint64_t mode
        int64_t updated
    cdef struct pagecore_uffdio_continue:
        uffdio_range range
        uint64_t mode
        int64_t mapped
    cdef struct pagecore_uffdio_move:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t move
    cdef struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode

    # The C types of these members have no names; Cython needs some.
    cdef struct msg_feat:
        uint32_t ptid
    cdef struct msg_pagefault:
        uint64_t flags
        uint64_t address
        msg_feat feat
    cdef struct msg_fork:
        uint32_t ufd
    cdef struct msg_remap:
        uint64_t old_start "from"
        uint64_t to
        uint64_t len
    cdef struct msg_remove:
        uint64_t start
        uint64_t end
    cdef union msg_arg:
        msg_pagefault pagefault
        msg_fork fork
        msg_remap remap
        msg_remove remove
    cdef struct uffd_msg:
        uint8_t event
        msg_arg arg

cdef enum:
    PROBE_ADDRESS = 0x10000         # the lowest address that may be mapped; programs start far above it
    PROBE_LENGTH = 4096

_ACCESSES = {"device": ACCESS_DEVICE, "syscall": ACCESS_SYSCALL, "user-mode": ACCESS_USER_MODE}


cdef int uffd_ioctl(int fd, unsigned long request, void *argument) noexcept nogil:
    cdef int rc
    while True:
        rc = 0 if pagecore_ioctl(fd, request, argument) >= 0 else -errno
        # A signal ended the wait for a lock, and nothing was done: none of these calls can be told to stop early.
        if rc != -EINTR:
            return rc


cdef int uffd_open(int access) noexcept nogil:
    cdef int flags = O_CLOEXEC | O_NONBLOCK     # fact 11
    cdef int device, fd
    if access != ACCESS_DEVICE:
        fd = <int>syscall(NR_USERFAULTFD, flags | (USER_MODE_ONLY if access == ACCESS_USER_MODE else 0))
        return fd if fd >= 0 else -errno
    device = os_open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)
    if device < 0:
        return -errno
    fd = device_ioctl(device, IOC_NEW, flags)       # not uffd_ioctl's business: of the device, and returns a number
    if fd < 0:
        fd = -errno
    os_close(device)
    return fd


cdef int uffd_handshake(int fd, uint64_t features, uint64_t *supported, uint64_t *ioctls) noexcept nogil:
    cdef uffdio_api api
    api.api = API_VERSION
    api.features = features
    api.ioctls = 0
    cdef int rc = uffd_ioctl(fd, API, &api)
    supported[0] = api.features
    ioctls[0] = api.ioctls
    return rc


def query_access(access):
    """What the kernel offers through one way in, without keeping anything open.

    Parameters
    ----------
    access : {"device", "syscall", "user-mode"}
        /dev/userfaultfd, the system call, or the system call with UFFD_USER_MODE_ONLY.

    Returns
    -------
    features, ioctls : int
        The kernel's masks; bits that this version of pagecore does not know are kept.

    Raises
    ------
    UffdError
        The way is closed to this user, or the kernel does not have it; ``errno`` says which.

    Notes
    -----
    Holds the GIL (short system calls). Thread-safe. Linux 4.11; the device since 6.1, user mode since 5.11.
    """
    cdef uint64_t features = 0, ioctls = 0
    cdef int fd = uffd_open(_ACCESSES[access])
    if fd < 0:
        raise UffdError(-fd, f"userfaultfd ({access})")
    cdef int rc = uffd_handshake(fd, 0, &features, &ioctls)
    os_close(fd)
    if rc < 0:
        raise UffdError(-rc, "UFFDIO_API")
    return features, ioctls


cdef int uffd_register(int fd, uint64_t address, uint64_t length, uint64_t mode, uint64_t *ioctls) noexcept nogil:
    cdef uffdio_register request
    request.range.start = address
    request.range.len = length
    request.mode = mode
    request.ioctls = 0
    cdef int rc = uffd_ioctl(fd, REGISTER, &request)
    ioctls[0] = request.ioctls
    return _gone_or(fd, rc)


cdef int uffd_unregister(int fd, uint64_t address, uint64_t length) noexcept nogil:
    cdef uffdio_range request
    request.start = address
    request.len = length
    cdef int rc = uffd_ioctl(fd, UNREGISTER, &request)
    if rc == 0:
        # Fact 15: whoever fell asleep while it was under way. Nobody can any more.
        uffd_ioctl(fd, WAKE, &request)
    return _gone_or(fd, rc)


cdef int _gone_or(int fd, int rc) noexcept nogil:
    """Fact 6: these two calls say ENOMEM where COPY says ESRCH."""
    cdef uffdio_copy copy
    if rc != -ENOMEM:
        return rc
    # Both addresses are unmapped with certainty on one side at least, so nothing can be copied.
    copy.dst = copy.src = PROBE_ADDRESS
    copy.len = PROBE_LENGTH
    copy.mode = 0
    copy.copy = 0
    return -ESRCH if uffd_ioctl(fd, COPY, &copy) == -ESRCH else rc


cdef int uffd_wake(int fd, uint64_t address, uint64_t length) noexcept nogil:
    cdef uffdio_range request
    request.start = address
    request.len = length
    return uffd_ioctl(fd, WAKE, &request) if length else 0      # the kernel calls an empty range EINVAL


cdef int uffd_place(int fd, int operation, uint64_t address, uint64_t source, uint64_t length, int flags,
                    int64_t *moved) noexcept nogil:
    cdef uffdio_copy copy
    cdef uffdio_zeropage zero
    cdef pagecore_uffdio_poison poison
    cdef pagecore_uffdio_continue map
    cdef pagecore_uffdio_move move
    cdef uffdio_writeprotect protect
    cdef bint asleep = flags & PLACE_DONTWAKE
    cdef int rc
    if operation == OPERATION_COPY:
        copy.dst = address
        copy.src = source
        copy.len = length
        copy.mode = (COPY_DONTWAKE if asleep else 0) | (COPY_WP if flags & PLACE_PROTECT else 0)
        copy.copy = 0
        rc = uffd_ioctl(fd, COPY, &copy)
        moved[0] = copy.copy
    elif operation == OPERATION_ZERO:
        zero.range.start = address
        zero.range.len = length
        zero.mode = ZERO_DONTWAKE if asleep else 0
        zero.zeropage = 0
        rc = uffd_ioctl(fd, ZEROPAGE, &zero)
        moved[0] = zero.zeropage
    elif operation == OPERATION_POISON:
        poison.range.start = address
        poison.range.len = length
        poison.mode = POISON_DONTWAKE if asleep else 0
        poison.updated = 0
        rc = uffd_ioctl(fd, POISON, &poison)
        moved[0] = poison.updated
    elif operation == OPERATION_CONTINUE:
        map.range.start = address
        map.range.len = length
        map.mode = (CONTINUE_DONTWAKE if asleep else 0) | (CONTINUE_WP if flags & PLACE_PROTECT else 0)
        map.mapped = 0
        rc = uffd_ioctl(fd, CONTINUE, &map)
        moved[0] = map.mapped
    elif operation == OPERATION_MOVE:
        move.dst = address
        move.src = source
        move.len = length
        move.mode = MOVE_DONTWAKE if asleep else 0
        move.move = 0
        rc = uffd_ioctl(fd, MOVE, &move)
        moved[0] = move.move
    else:
        protect.range.start = address
        protect.range.len = length
        # Protecting wakes nobody, and DONTWAKE beside it is EINVAL.
        protect.mode = PROTECT_WP if operation == OPERATION_PROTECT else (PROTECT_DONTWAKE if asleep else 0)
        rc = uffd_ioctl(fd, WRITEPROTECT, &protect)
        moved[0] = 0
    if rc != -EAGAIN or moved[0] < 0:
        moved[0] = 0
    return rc


cdef int uffd_is_own(int fd) noexcept nogil:
    # Of another process, MOVE refuses before it looks at anything, and leaves its last field alone; at home it gets as
    # far as these addresses, where nothing can be registered, and says so in it (fact 16).
    cdef pagecore_uffdio_move move
    move.dst = PROBE_ADDRESS
    move.src = PROBE_ADDRESS + 2 * PROBE_LENGTH
    move.len = PROBE_LENGTH
    move.mode = 0
    move.move = 1
    cdef int rc = uffd_ioctl(fd, MOVE, &move)
    if rc == -EAGAIN:
        return rc
    return move.move != 1


cdef int uffd_read(int fd, UffdEvent *events, int capacity) noexcept nogil:
    cdef uffd_msg messages[MESSAGES]
    cdef Py_ssize_t length
    cdef int i
    while True:
        length = os_read(fd, messages, min(capacity, <int>MESSAGES) * sizeof(uffd_msg))
        if length >= 0:
            break
        if errno != EINTR:
            return -errno
    length //= <Py_ssize_t>sizeof(uffd_msg)
    for i in range(<int>length):
        _decode(&messages[i], &events[i])
    return <int>length


cdef void _decode(const uffd_msg *message, UffdEvent *event) noexcept nogil:
    event.kind = message.event
    event.end = 0
    event.flags = 0
    event.thread = 0
    if message.event == EVENT_FAULT:
        event.start = message.arg.pagefault.address
        event.flags = message.arg.pagefault.flags
        event.thread = message.arg.pagefault.feat.ptid
    elif message.event == EVENT_FORK:
        event.start = 0
        event.thread = message.arg.fork.ufd
    elif message.event == EVENT_REMAP:
        event.start = message.arg.remap.old_start
        event.end = message.arg.remap.to
        event.flags = message.arg.remap.len
    else:
        event.start = message.arg.remove.start
        event.end = message.arg.remove.end
