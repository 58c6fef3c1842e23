"""Descriptor: a userfaultfd, opened, negotiated, read, and closed only when nothing uses it.

Facts about userfaultfd that this file and _uffd.pyx rely on
------------------------------------------------------------
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
6.  ESRCH: the process whose memory it is has ended (Linux 4.13 and newer). UNREGISTER says ENOMEM then.
7.  COPY overwrites markers of poison, guard and write-protection as if the page were missing; ZEROPAGE and
    POISON give EEXIST on them. Whoever uses markers keeps placements away from them (D12).
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
"""

import logging
import os
import warnings

from pagecore._uffd_types import FEATURE_SINCE, Event, EventKind, FaultFlag, Feature
from pagecore.errors import BusyError, ClosedError, UffdError, UnsupportedError, raise_for_errno

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, EBUSY, EINTR, EINVAL, ENOSYS, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport O_CLOEXEC, O_NONBLOCK, O_RDWR, open as os_open
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close as os_close, getpid, read as os_read

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_exchange,
    pagecore_fence,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_store_release,
)

__all__ = ["Descriptor", "open_write_tracker", "query_access"]

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, ...)

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
    const uint64_t API_VERSION "UFFD_API"
    const uint64_t COPY_DONTWAKE "UFFDIO_COPY_MODE_DONTWAKE"
    const uint64_t ZERO_DONTWAKE "UFFDIO_ZEROPAGE_MODE_DONTWAKE"
    const uint64_t POISON_DONTWAKE "PAGECORE_POISON_MODE_DONTWAKE"

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
    ACCESS_DEVICE = 0           # /dev/userfaultfd: the permissions of the file decide
    ACCESS_SYSCALL = 1          # the sysctl or CAP_SYS_PTRACE decides
    ACCESS_USER_MODE = 2        # everyone may, without the kernel's own faults
    OPEN = 1                    # not 0: an object whose constructor failed does not own descriptor 0
    CLOSING = 2
    CLOSED = 3
    MESSAGES = 64               # messages of one read(): 2 KiB of stack

_ACCESSES = {"device": ACCESS_DEVICE, "syscall": ACCESS_SYSCALL, "user-mode": ACCESS_USER_MODE}
_REMEDY = (
    "run 'sysctl -w vm.unprivileged_userfaultfd=1', or give this user read and write permission on "
    "/dev/userfaultfd (Linux 6.1 and newer), or give the program CAP_SYS_PTRACE; in a container its seccomp "
    "profile must allow the call"
)
_log = logging.getLogger("pagecore.uffd")


cdef int uffd_ioctl(int fd, unsigned long request, void *argument) noexcept nogil:
    return 0 if ioctl(fd, request, argument) >= 0 else -errno


cdef int _open(int access) noexcept nogil:
    """A new descriptor by one of the ways in, or -errno."""
    cdef int flags = O_CLOEXEC | O_NONBLOCK     # fact 11
    cdef int device, fd
    if access != ACCESS_DEVICE:
        fd = <int>syscall(NR_USERFAULTFD, flags | (USER_MODE_ONLY if access == ACCESS_USER_MODE else 0))
        return fd if fd >= 0 else -errno
    device = os_open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)
    if device < 0:
        return -errno
    fd = ioctl(device, IOC_NEW, flags)      # not uffd_ioctl's business: of the device, and returns a number
    if fd < 0:
        fd = -errno
    os_close(device)
    return fd


cdef int _handshake(int fd, uint64_t features, uint64_t *supported, uint64_t *ioctls) noexcept nogil:
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
    cdef int fd = _open(_ACCESSES[access])
    if fd < 0:
        raise UffdError(-fd, f"userfaultfd ({access})")
    cdef int rc = _handshake(fd, 0, &features, &ioctls)
    os_close(fd)
    if rc < 0:
        raise UffdError(-rc, "UFFDIO_API")
    return features, ioctls


def open_write_tracker(memory):
    """A descriptor that write-protects `memory` asynchronously, so that PAGEMAP_SCAN can report writes to it.

    Parameters
    ----------
    memory : writable buffer
        Page-aligned anonymous memory.

    Returns
    -------
    int
        The descriptor. The caller closes it, which ends the protection.

    Raises
    ------
    UnsupportedError, UffdError
        The kernel or this user cannot.

    Notes
    -----
    Releases the GIL. Thread-safe. Linux 6.7.
    """
    cdef Py_buffer view
    cdef uint64_t ioctls = 0
    cdef int rc
    # User mode is enough, and open to everyone: the kernel resolves these faults itself.
    cdef Descriptor uffd = Descriptor(Feature.WP_ASYNC | Feature.WP_UNPOPULATED, user_mode_only=True)
    with uffd:
        PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
        with nogil:
            rc = uffd.c_register(<uintptr_t>view.buf, view.len, REGISTER_WP, &ioctls)
        PyBuffer_Release(&view)
        raise_unless_done(rc, "UFFDIO_REGISTER (WP)", <uintptr_t>view.buf, view.len)
        return os.dup(uffd.c_fd)


cdef class Descriptor:
    """The descriptor alone: what Userfaultfd is without its regions; see there for the parameters."""

    def __cinit__(self, features=0, *, user_mode_only=None):
        self._process = getpid()
        cdef uint64_t wanted = features
        cdef uint64_t supported = 0, ioctls = 0
        cdef int rc
        if features & Feature.EVENT_FORK:
            raise UnsupportedError("EVENT_FORK", "pagecore cannot follow a fork; serve each process alone")
        access = _find_access(user_mode_only)
        try:
            offered, _ = query_access(access)       # fact 12
        except UffdError as error:
            raise _unsupported_access(error) from error
        for feature in Feature:
            if wanted & feature & ~offered:
                raise UnsupportedError(f"the userfaultfd feature {feature.name}",
                                       f"it needs Linux {FEATURE_SINCE[feature]} or newer")
        if wanted & ~offered:
            raise UnsupportedError(f"the userfaultfd feature {wanted & ~offered:#x}", "no kernel has it")
        rc = _open(_ACCESSES[access])
        if rc < 0:
            raise UffdError(-rc, f"userfaultfd ({access})")
        self.c_fd = rc
        rc = _handshake(self.c_fd, wanted, &supported, &ioctls)
        if rc < 0:
            os_close(self.c_fd)
            raise UffdError(-rc, "UFFDIO_API")
        self._state = OPEN
        self.features = wanted
        self.user_mode_only = access == "user-mode"
        if self.user_mode_only and user_mode_only is None:
            _log.warning("userfaultfd in user mode only: read(2), KVM and others will fail on missing pages; "
                         "to change that, %s", _REMEDY)

    def __del__(self):
        # A witness for leaks, never an exception: with -W error Python reports it as unraisable and goes on.
        if self._state != OPEN and self._state != CLOSING:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)
        finally:
            self._state = CLOSED            # no reference is left, so nothing is in flight
            os_close(self.c_fd)

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} is a descriptor of this process and cannot be pickled; "
                        "send fileno() over a Unix socket (SCM_RIGHTS) instead")

    def __repr__(self):
        state = "closed" if self.closed else f"fd={self.c_fd}"
        mode = " user-mode-only" if self.user_mode_only else ""
        return f"<{type(self).__name__} {state} features={self.features:#x}{mode}>"

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *_exception):
        self.close()

    cdef int _check_open(self) except -1:
        if pagecore_load_acquire(&self._state) != OPEN:
            raise ClosedError("the userfaultfd is closed")
        return 0

    cdef int c_enter(self) noexcept nogil:
        pagecore_fetch_add(&self._in_flight, 1)
        # Store, then load of another word, as in close(): without a full fence on both sides each could
        # miss the other, and the ioctl would hit a descriptor number that is closed, or worse, somebody
        # else's by now (D13).
        pagecore_fence()
        if pagecore_load_acquire(&self._state) == OPEN:
            return 0
        self.c_leave()
        return -EBADF

    cdef void c_leave(self) noexcept nogil:
        # Its release pairs with the acquire in close(): what was done with c_fd is over before that is
        # closed.
        pagecore_fetch_add(&self._in_flight, <uint64_t>-1)

    cdef int c_call(self, unsigned long request, void *argument) noexcept nogil:
        cdef int rc = self.c_enter()
        if rc == 0:
            rc = uffd_ioctl(self.c_fd, request, argument)
            self.c_leave()
        return rc

    cdef int c_register(self, uint64_t address, uint64_t length, uint64_t mode,
                        uint64_t *ioctls) noexcept nogil:
        cdef uffdio_register request
        request.range.start = address
        request.range.len = length
        request.mode = mode
        request.ioctls = 0
        cdef int rc = self.c_call(REGISTER, &request)
        ioctls[0] = request.ioctls
        return rc

    cdef int c_unregister(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef uffdio_range request
        request.start = address
        request.len = length
        cdef int rc = self.c_call(UNREGISTER, &request)
        if rc < 0:
            return rc
        # Fact 15: whoever fell asleep while it was under way. Nobody can any more.
        self.c_call(WAKE, &request)
        return 0

    cdef int c_wake_range(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef uffdio_range request
        request.start = address
        request.len = length
        return self.c_call(WAKE, &request) if length else 0     # the kernel calls an empty range EINVAL

    cdef int c_begin_reading(self) noexcept nogil:
        # acquire and release: the role carries what the last reader did with it.
        return -EBUSY if pagecore_exchange(&self._reader, 1) != 0 else 0

    cdef void c_end_reading(self) noexcept nogil:
        pagecore_store_release(&self._reader, 0)        # pairs with the exchange in c_begin_reading

    cdef int c_read(self, UffdEvent *events, int capacity) noexcept nogil:
        cdef uffd_msg messages[MESSAGES]
        cdef int taken = 0, room, i
        cdef Py_ssize_t length
        cdef int rc = self.c_enter()
        if rc < 0:
            return rc
        while taken < capacity:
            room = min(capacity - taken, <int>MESSAGES)
            length = os_read(self.c_fd, messages, room * sizeof(uffd_msg))
            if length < 0:
                rc = -errno
                if rc == -EINTR:
                    continue
                break
            length //= <Py_ssize_t>sizeof(uffd_msg)
            for i in range(<int>length):
                _decode(&messages[i], &events[taken + i])
            taken += <int>length
            if length < room:
                break
        self.c_leave()
        # EAGAIN is normal, right after poll() too: the fault was resolved meanwhile.
        return rc if taken == 0 and rc != -EAGAIN else taken

    @property
    def closed(self):
        """Whether close() has begun."""
        return pagecore_load_acquire(&self._state) != OPEN

    def fileno(self):
        """The descriptor's number, for poll() and SCM_RIGHTS.

        Raises
        ------
        ClosedError
            After close().
        """
        self._check_open()
        return self.c_fd

    def close(self):
        """Close the descriptor, after the calls in flight (D13). Idempotent; from any thread."""
        # In a forked child the threads that the counter speaks of do not exist, and its number is a copy of its own.
        cdef bint inherited = getpid() != self._process
        cdef uint64_t expected = OPEN
        cdef timespec pause
        pause.tv_sec = 0
        pause.tv_nsec = 50_000
        pagecore_compare_exchange(&self._state, &expected, CLOSING)
        pagecore_fence()                                # pairs with the one in c_enter
        while not inherited and pagecore_load_acquire(&self._in_flight) != 0:
            with nogil:
                nanosleep(&pause, NULL)
            PyErr_CheckSignals()
        expected = CLOSING
        # The exchange decides which of several closers closes the number.
        if pagecore_compare_exchange(&self._state, &expected, CLOSED):
            os_close(self.c_fd)
            self.c_fd = -1

    def read_events(self, max_events=64):
        """Take the events that are queued, without waiting.

        Parameters
        ----------
        max_events : int
            At most this many, 1 to 65536.

        Returns
        -------
        list of Event
            Empty where none is queued. All faults come before any other event, whatever came first (D4): a
            caller that handles REMOVE drains until the list is empty, applies those, and then serves the
            faults.

        Raises
        ------
        BusyError
            Another thread, or a PlacementLoop, reads this descriptor.
        ClosedError, UffdError
            After close(); the kernel refused.

        Notes
        -----
        Releases the GIL. One reader at a time. Linux 4.3; events since 4.11.
        """
        if not 1 <= max_events <= 65536:
            raise ValueError(f"max_events {max_events} is outside [1, 65536]")
        cdef int capacity = max_events
        cdef int count
        if self.c_begin_reading() < 0:
            raise BusyError("another reader has this descriptor: there can be only one (D4)")
        cdef UffdEvent *events = <UffdEvent *>malloc(capacity * sizeof(UffdEvent))
        try:
            if events == NULL:
                raise MemoryError
            with nogil:
                count = self.c_read(events, capacity)
            raise_unless_done(min(count, 0), "read", 0, 0)
            return [Event(EventKind(events[i].kind), events[i].start, events[i].end,
                          FaultFlag(events[i].flags) if events[i].kind == EVENT_FAULT else events[i].flags,
                          events[i].thread) for i in range(count)]
        finally:
            free(events)
            self.c_end_reading()


cdef object _find_access(object user_mode_only):
    """The first way in that is open; the last one where none is, so that its error is reported."""
    if user_mode_only:
        return "user-mode"
    for access in ("device", "syscall"):
        try:
            query_access(access)
            return access
        except UffdError as error:
            _log.debug("%s", error)     # why the next way in is tried
            last = error
    return "user-mode" if user_mode_only is None and last.errno == EPERM else "syscall"


cdef object _unsupported_access(object error):
    """What a user can do about it, where that is known; else the kernel's own words."""
    if error.errno == ENOSYS:
        return UnsupportedError("userfaultfd", "the kernel must be built with CONFIG_USERFAULTFD=y")
    if error.errno == EINVAL:
        return UnsupportedError("userfaultfd in user mode only", "it needs Linux 5.11 or newer")
    return UnsupportedError("userfaultfd for this user", _REMEDY) if error.errno == EPERM else error


cdef int raise_unless_done(int rc, str operation, object address, object length) except -1:
    if rc == -EBADF:
        raise ClosedError("the userfaultfd is closed")
    if rc < 0:
        raise_for_errno(-rc, operation, address, length)
    return 0


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


cdef int uffd_place(int fd, int operation, uint64_t address, uint64_t source, uint64_t length, bint wake,
                    int64_t *moved) noexcept nogil:
    cdef uffdio_copy copy
    cdef uffdio_zeropage zero
    cdef pagecore_uffdio_poison poison
    cdef int rc
    if operation == OPERATION_COPY:
        copy.dst = address
        copy.src = source
        copy.len = length
        copy.mode = 0 if wake else COPY_DONTWAKE
        copy.copy = 0
        rc = uffd_ioctl(fd, COPY, &copy)
        moved[0] = copy.copy
    elif operation == OPERATION_ZERO:
        zero.range.start = address
        zero.range.len = length
        zero.mode = 0 if wake else ZERO_DONTWAKE
        zero.zeropage = 0
        rc = uffd_ioctl(fd, ZEROPAGE, &zero)
        moved[0] = zero.zeropage
    else:
        poison.range.start = address
        poison.range.len = length
        poison.mode = 0 if wake else POISON_DONTWAKE
        poison.updated = 0
        rc = uffd_ioctl(fd, POISON, &poison)
        moved[0] = poison.updated
    if rc != -EAGAIN or moved[0] < 0:
        moved[0] = 0
    return rc
