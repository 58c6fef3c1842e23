"""Userfaultfd: the descriptor, the regions registered with it, and the placing of runs of pages.

Facts about userfaultfd that this file relies on
-----------------------------------------------
Each was seen on a real kernel (6.18) or read in its source; tests/test_uffd*.py show those that a test can show.

1.  A placement (COPY, ZEROPAGE, POISON) that stops midway fails with EAGAIN and the bytes done in its last field; the
    real reason is lost and comes with the next call, made where it stopped. Waiters are woken for the bytes done alone.
2.  That last field is signed. With nothing done it holds -errno, or what the caller left there: it is not written when
    arguments are refused (EINVAL), when the process has ended (ESRCH), and before Linux 6.15 when the address space is
    changing. So it is zeroed first, believed only under EAGAIN, and progress only if it is positive (D6).
3.  EEXIST: the page is present. Nothing was overwritten and NOBODY was woken, so a waiter that another placement left
    asleep (DONTWAKE) sleeps on until somebody calls WAKE (D2, D10). WAKE works on anything, even while an event waits.
4.  EAGAIN without progress: the address space is changing, from the moment somebody calls madvise, munmap, mremap or
    fork with the matching event enabled until that event was read AND that thread has run again (5 ms were seen). Reading
    cannot be replaced by trying again, so a thread that must read must never wait here (D7).
5.  ENOENT: the range is not one registered mapping. That may be an unmapped page, an edge between two mappings that
    are both registered (mprotect and madvise split them), or a range of another descriptor. Nothing was placed,
    even where the first pages would have been good: the run is halved until the edge is found.
6.  ESRCH: the process whose memory it is has ended (Linux 4.13 and newer). UNREGISTER says ENOMEM then.
7.  COPY overwrites markers of poison, guard and write-protection as if the page were missing; ZEROPAGE and POISON give
    EEXIST on them. Whoever uses markers keeps placements away from them (D12).
8.  read() hands over all pending faults before any event, whatever came first (D4).
9.  Closing the last descriptor and UNREGISTER let every waiter go, and the missing pages then read as zeros (D12).
10. After fork the child's copy of the descriptor acts on the PARENT's memory; without EVENT_FORK the child itself sees
    zeros in pages that were missing. Descriptors are opened O_CLOEXEC; registering through an inherited one is refused.
11. poll() on a descriptor without O_NONBLOCK says POLLERR, and a blocked read cannot be cancelled: always O_NONBLOCK.
12. UFFDIO_API works once for each descriptor, and zeroes its argument when it fails: what the kernel can do is asked
    through a descriptor that is thrown away.
13. With UFFD_USER_MODE_ONLY (allowed to everyone) faults of the kernel itself on the memory, as by read(2) or KVM, are
    not delivered: they fail with EFAULT.
14. Source pages that cannot be read give EFAULT; if they are registered memory themselves, the ioctl sleeps on them.
"""

import logging
import os
import warnings

from pagecore._mappings import Backing, backing_of
from pagecore._uffd_types import FEATURE_SINCE, Event, EventKind, FaultFlag, Feature
from pagecore.errors import BusyError, ClosedError, UffdError, UnsupportedError, raise_for_errno

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.errno cimport EAGAIN, EBADF, EBUSY, EEXIST, EINTR, EINVAL, EIO, ENOENT, ENOSYS, EPERM, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport O_CLOEXEC, O_NONBLOCK, O_RDWR, open as os_open
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close as os_close, getpid, read as os_read

__all__ = ["PlaceResult", "Region", "Userfaultfd", "open_write_tracker", "query_access"]

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "unistd.h" nogil:
    long syscall(long number, ...)

cdef extern from "_atomic.h" nogil:
    uint64_t pagecore_load_acquire(const uint64_t *word)
    void pagecore_store_release(uint64_t *word, uint64_t value)
    uint64_t pagecore_fetch_or(uint64_t *word, uint64_t mask)
    uint64_t pagecore_fetch_add(uint64_t *word, uint64_t value)
    uint64_t pagecore_exchange(uint64_t *word, uint64_t value)
    int pagecore_compare_exchange(uint64_t *word, uint64_t *expected, uint64_t value)
    void pagecore_and(uint64_t *word, uint64_t mask)
    void pagecore_fence()

cdef extern from *:
    int popcount64 "__builtin_popcountll"(uint64_t word) nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t word) nogil
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
    const uint64_t MODE_MISSING "UFFDIO_REGISTER_MODE_MISSING"
    const uint64_t MODE_WP "UFFDIO_REGISTER_MODE_WP"
    const uint64_t COPY_DONTWAKE "UFFDIO_COPY_MODE_DONTWAKE"
    const uint64_t ZERO_DONTWAKE "UFFDIO_ZEROPAGE_MODE_DONTWAKE"
    const uint64_t POISON_DONTWAKE "PAGECORE_POISON_MODE_DONTWAKE"
    const int BIT_ZEROPAGE "_UFFDIO_ZEROPAGE"
    const int BIT_POISON "_UFFDIO_POISON"

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
    OPEN = 0
    CLOSING = 1
    CLOSED = 2
    MESSAGES = 64               # messages of one read(): 2 KiB of stack

cdef size_t PAGE_SIZE = 4096
_ACCESSES = {"device": ACCESS_DEVICE, "syscall": ACCESS_SYSCALL, "user-mode": ACCESS_USER_MODE}
_REMEDY = (
    "run 'sysctl -w vm.unprivileged_userfaultfd=1', or give this user read and write permission on /dev/userfaultfd "
    "(Linux 6.1 and newer), or give the program CAP_SYS_PTRACE; in a container its seccomp profile must allow the call"
)
_log = logging.getLogger(__name__)


cdef int _ioctl(int fd, unsigned long request, void *argument) noexcept nogil:
    """Issue one userfaultfd ioctl; 0 or -errno. The only place that does, so that faults can be injected here."""
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
    fd = ioctl(device, IOC_NEW, flags)          # returns a descriptor: the one ioctl that is not a request of ours
    if fd < 0:
        fd = -errno
    os_close(device)
    return fd


cdef int _handshake(int fd, uint64_t features, uint64_t *supported, uint64_t *ioctls) noexcept nogil:
    cdef uffdio_api api
    api.api = API_VERSION
    api.features = features
    api.ioctls = 0
    cdef int rc = _ioctl(fd, API, &api)
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
    Holds the GIL (two short system calls). Thread-safe. Linux 4.11; the device since 6.1, user mode since 5.11.
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
    cdef uffdio_register request
    cdef Userfaultfd uffd = Userfaultfd(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
    cdef int rc
    with uffd:
        PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
        request.range.start = <uintptr_t>view.buf
        request.range.len = view.len
        request.mode = MODE_WP
        request.ioctls = 0
        with nogil:
            rc = _ioctl(uffd.c_fd, REGISTER, &request)
        PyBuffer_Release(&view)
        if rc < 0:
            raise_for_errno(-rc, "UFFDIO_REGISTER (write-protect)", request.range.start, request.range.len)
        return os.dup(uffd.c_fd)


cdef class Userfaultfd:
    """Userfaultfd(features=0, *, user_mode_only=None)
    --

    A userfaultfd of this process: the kernel reports missing pages of registered memory through it.

    Parameters
    ----------
    features : Feature
        What must be enabled (events, THREAD_ID, ...).
    user_mode_only : bool or None
        False: deliver the kernel's own faults too (read(2), KVM), or refuse. True: never deliver them, which everyone
        may. None: the first, and where this user may not, the second with a warning in the log.

    Raises
    ------
    UnsupportedError
        The kernel lacks a feature, or this user may not have a descriptor; the message names what enables it.
    UffdError
        The kernel refused for another reason (EMFILE, ENOMEM).

    Notes
    -----
    Releases the GIL in every call that may sleep; thread-safe, except that only one thread at a time may read.
    Linux 4.14. After fork() a child's copy acts on this process's memory (fact 10): placing works there, registering
    is refused.
    """

    def __cinit__(self, features=0, *, user_mode_only=None):
        self.c_fd = -1
        self._ranges = []
        self._process = getpid()
        cdef uint64_t wanted = _checked_features(features)
        cdef uint64_t supported = 0, ioctls = 0
        cdef int rc
        access = _find_access(user_mode_only)
        try:
            offered, _ = query_access(access)       # fact 12
        except UffdError as error:
            raise _unsupported_access(error) from error
        for feature in Feature:
            if wanted & feature & ~offered:
                raise UnsupportedError(
                    f"the userfaultfd feature {feature.name}", f"it needs Linux {FEATURE_SINCE[feature]} or newer")
        if wanted & ~offered:
            raise UnsupportedError(f"userfaultfd feature bits {wanted & ~offered:#x}", "this kernel has no such feature")
        rc = _open(_ACCESSES[access])
        if rc < 0:
            raise UffdError(-rc, f"userfaultfd ({access})")
        self.c_fd = rc
        rc = _handshake(self.c_fd, wanted, &supported, &ioctls)
        if rc < 0:
            os_close(self.c_fd)
            self.c_fd = -1
            raise UffdError(-rc, "UFFDIO_API")
        self.features = wanted
        self.user_mode_only = access == "user-mode"
        if self.user_mode_only and user_mode_only is None:
            _log.warning("userfaultfd in user mode only: faults of the kernel itself (read(2), KVM) will fail; %s", _REMEDY)

    def __del__(self):
        # A witness for leaks, never an exception: with -W error Python reports it as unraisable and goes on.
        if self.c_fd < 0:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)
        finally:
            self._closing = CLOSED          # no reference is left, so nothing is in flight
            os_close(self.c_fd)
            self.c_fd = -1

    def __reduce__(self):
        raise TypeError("a Userfaultfd is a descriptor of this process and cannot be pickled; "
                        "send fileno() over a Unix socket (SCM_RIGHTS) instead")

    def __repr__(self):
        state = "closed" if self.closed else f"fd={self.c_fd}"
        return f"<Userfaultfd {state} features={Feature(self.features)!s}{' user-mode-only' * self.user_mode_only}>"

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *_exception):
        self.close()

    cdef int _check_open(self) except -1:
        if pagecore_load_acquire(&self._closing) != OPEN or self.c_fd < 0:
            raise ClosedError("the Userfaultfd is closed")
        return 0

    cdef int c_enter(self) noexcept nogil:
        pagecore_fetch_add(&self._in_flight, 1)
        # Store, then load of another word, as in close(): without a full fence on both sides each could miss the other,
        # and the ioctl would hit a descriptor number that is closed, or worse, somebody else's by now (D13).
        pagecore_fence()
        if pagecore_load_acquire(&self._closing) == OPEN:
            return 0
        self.c_leave()
        return -EBADF

    cdef void c_leave(self) noexcept nogil:
        # The release in it pairs with the acquire in close(): whatever was done with c_fd is over before it is closed.
        pagecore_fetch_add(&self._in_flight, <uint64_t>-1)

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
        # Nothing queued is the normal answer of a descriptor that poll() called readable: the fault was resolved meanwhile.
        return rc if taken == 0 and rc != -EAGAIN else taken

    @property
    def closed(self):
        """Whether close() has begun."""
        return pagecore_load_acquire(&self._closing) != OPEN

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
        """Close the descriptor, after the calls in flight (D13). Idempotent; from any thread.

        Every waiter is let go, and missing pages then read as zeros, unless another descriptor of the same
        userfaultfd (a dup, one sent to another process) is open: see D12.

        Notes
        -----
        Releases the GIL while it waits. Thread-safe with everything. A signal handler that raises ends the wait; the
        descriptor then stays closing, and close() can be called again.
        """
        cdef uint64_t expected = OPEN
        cdef timespec pause
        pause.tv_sec = 0
        pause.tv_nsec = 50_000
        pagecore_compare_exchange(&self._closing, &expected, CLOSING)
        pagecore_fence()                                # pairs with the one in c_enter
        while pagecore_load_acquire(&self._in_flight) != 0:
            with nogil:
                nanosleep(&pause, NULL)
            PyErr_CheckSignals()
        expected = CLOSING
        # The exchange decides which of several closers closes the number.
        if pagecore_compare_exchange(&self._closing, &expected, CLOSED) and self.c_fd >= 0:
            os_close(self.c_fd)
            self.c_fd = -1

    def register(self, memory, *, page_size=4096, region_id=0):
        """Register a buffer: from now on, touching a missing page of it waits for a placement.

        Parameters
        ----------
        memory : writable buffer
            Page-aligned private anonymous memory, as ``mmap.mmap(-1, n, flags=MAP_PRIVATE | MAP_ANONYMOUS)``. It is kept
            alive, and cannot be closed, while the region lives. Pages that were touched before are present.
        page_size : int
            Bytes of a page; 4096.
        region_id : int
            The number that names the region in frames and page sources.

        Returns
        -------
        Region

        Raises
        ------
        ValueError
            The buffer is read-only, empty, misaligned, or overlaps a region of this descriptor.
        UnsupportedError
            Another page size, or memory of another kind.
        ClosedError, UffdError
            After close(); the kernel refused (EBUSY: registered with another descriptor).

        Notes
        -----
        Releases the GIL in the ioctl. Thread-safe. Linux 4.3.
        """
        view = memoryview(memory)
        if view.readonly or not view.c_contiguous:
            raise ValueError("memory must be a writable, contiguous buffer")
        return self._register(<uintptr_t>PyMemoryView_GET_BUFFER(view).buf, view.nbytes, page_size, region_id, view)

    def register_address(self, address, length, *, page_size=4096, region_id=0):
        """Register memory by address; as ``register``, but nothing keeps the memory alive.

        Parameters
        ----------
        address, length : int
            In bytes, both multiples of the page size.
        page_size, region_id : int
            As in ``register``.

        Returns
        -------
        Region

        Raises
        ------
        ValueError, UnsupportedError, ClosedError, UffdError
            As ``register``.

        Notes
        -----
        Releases the GIL in the ioctl. Thread-safe. Linux 4.3.
        """
        return self._register(address, length, page_size, region_id, None)

    cdef Region _register(self, object address, object length, object page_size, object region_id, object owner):
        cdef uffdio_register request
        cdef int rc
        _check_range(address, length, page_size)
        self._check_open()
        if getpid() != self._process:
            raise UnsupportedError("registering through a descriptor inherited over fork()",
                                   f"it acts on the memory of process {self._process}; open a Userfaultfd here")
        for first, last in self._ranges:
            if address < last and first < address + length:
                raise ValueError(f"[{address:#x}, {address + length:#x}) overlaps the region [{first:#x}, {last:#x})")
        backing = backing_of(address, length)
        if backing is Backing.HOLE:
            raise ValueError(f"[{address:#x}, {address + length:#x}) is not wholly mapped")
        if backing is not Backing.ANONYMOUS:
            raise UnsupportedError(f"registering {backing.value}", "use private anonymous memory, as "
                                   "mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)")
        cdef Region region = Region.__new__(Region)
        region.uffd = self
        region.id = region_id
        region.c_address = address
        region.page_size = page_size
        region.size = length // page_size
        region._owner = owner
        request.range.start = address
        request.range.len = length
        request.mode = MODE_MISSING
        request.ioctls = 0
        with nogil:
            rc = self.c_enter()
            if rc == 0:
                rc = _ioctl(self.c_fd, REGISTER, &request)
                self.c_leave()
        _raise_unless_done(rc, "UFFDIO_REGISTER", address, length)
        region.ioctls = request.ioctls
        region._live = True
        self._ranges.append((address, address + length))
        return region

    def unregister(self, Region region not None):
        """Let go of a region: its waiters go on, and its missing pages read as zeros (D12, D16).

        Parameters
        ----------
        region : Region
            A region of this descriptor; it is dead afterwards. Nobody else may be placing into it.

        Raises
        ------
        ValueError
            The region is another descriptor's.
        ClosedError, PeerGoneError, UffdError
            After close() or a second time; the process has ended; the kernel refused.

        Notes
        -----
        Releases the GIL. Thread-safe with other regions. Linux 4.3.
        """
        cdef uffdio_range request
        cdef int rc
        if region.uffd is not self:
            raise ValueError(f"region {region.id} belongs to another Userfaultfd")
        region._check_live()
        request.start = region.c_address
        request.len = region.size * region.page_size
        with nogil:
            rc = self.c_enter()
            if rc == 0:
                rc = _ioctl(self.c_fd, UNREGISTER, &request)
                self.c_leave()
        _raise_unless_done(rc, "UFFDIO_UNREGISTER", request.start, request.len)
        region._live = False
        region._owner = None
        self._ranges.remove((region.c_address, region.c_address + region.size * region.page_size))

    def read_events(self, max_events=64):
        """Take the events that are queued, without waiting.

        Parameters
        ----------
        max_events : int
            At most this many, 1 to 65536.

        Returns
        -------
        list of Event
            Empty where none is queued. All faults come before any other event, whatever came first (D4): a caller that
            handles REMOVE drains until the list is empty, applies those, and then serves the faults.

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
            _raise_unless_done(min(count, 0), "read", 0, 0)
            return [Event(EventKind(events[i].kind), events[i].start, events[i].end,
                          FaultFlag(events[i].flags) if events[i].kind == EVENT_FAULT else events[i].flags,
                          events[i].thread) for i in range(count)]
        finally:
            free(events)
            self.c_end_reading()


cdef uint64_t _checked_features(object features) except? 0xFFFFFFFFFFFFFFFF:
    if features & Feature.EVENT_FORK:
        raise UnsupportedError("the event of fork()", "pagecore does not follow a fork yet; serve each process on its own")
    return features


cdef object _find_access(object user_mode_only):
    """The first way in that is open; the last one where none is, so that its error is reported."""
    if user_mode_only:
        return "user-mode"
    for access in ("device", "syscall"):
        try:
            query_access(access)
            return access
        except UffdError as error:
            _log.debug("%s", error)
            last = error
    return "user-mode" if user_mode_only is None and last.errno == EPERM else "syscall"


cdef object _unsupported_access(object error):
    """What a user can do about it, where that is known; else the kernel's own words."""
    if error.errno == ENOSYS:
        return UnsupportedError("userfaultfd", "the kernel must be built with CONFIG_USERFAULTFD=y")
    if error.errno == EINVAL:
        return UnsupportedError("userfaultfd in user mode only", "it needs Linux 5.11 or newer")
    return UnsupportedError("userfaultfd for this user", _REMEDY) if error.errno == EPERM else error


cdef int _check_range(object address, object length, object page_size) except -1:
    if page_size != PAGE_SIZE or os.sysconf("SC_PAGESIZE") != PAGE_SIZE:
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is not 4096, nor the size of a huge page")
        raise UnsupportedError(f"page size {page_size}", "regions of 4096-byte pages alone can be registered so far")
    if not 0 < length < 1 << 63 or length % page_size:
        raise ValueError(f"length {length} is not a positive multiple of page size {page_size}")
    if not 0 <= address < (1 << 64) - length or address % page_size:
        raise ValueError(f"address {address:#x} is not a multiple of page size {page_size}, or beyond any memory")
    return 0


cdef int _raise_unless_done(int rc, str operation, object address, object length) except -1:
    """0, or the exception for -errno; EBADF can only mean that close() has begun."""
    if rc == -EBADF:
        raise ClosedError("the Userfaultfd is closed")
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


cdef int _issue(int fd, int operation, uint64_t address, uint64_t source, uint64_t length, bint wake,
                int64_t *moved) noexcept nogil:
    """One placement ioctl: 0, or -errno with the bytes done, which are positive only under -EAGAIN (facts 1, 2)."""
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
        rc = _ioctl(fd, COPY, &copy)
        moved[0] = copy.copy
    elif operation == OPERATION_ZERO:
        zero.range.start = address
        zero.range.len = length
        zero.mode = 0 if wake else ZERO_DONTWAKE
        zero.zeropage = 0
        rc = _ioctl(fd, ZEROPAGE, &zero)
        moved[0] = zero.zeropage
    else:
        poison.range.start = address
        poison.range.len = length
        poison.mode = 0 if wake else POISON_DONTWAKE
        poison.updated = 0
        rc = _ioctl(fd, POISON, &poison)
        moved[0] = poison.updated
    if rc != -EAGAIN or moved[0] < 0:
        moved[0] = 0
    return rc


cdef class Region:
    """A registered piece of memory, made by ``Userfaultfd.register``; pages are numbered from 0."""

    def __init__(self):
        raise TypeError("a Region is made by Userfaultfd.register()")

    def __reduce__(self):
        raise TypeError("a Region is memory of this process and cannot be pickled")

    def __len__(self):
        return self.size

    def __repr__(self):
        where = f"[{self.c_address:#x}, {self.c_address + self.size * self.page_size:#x})"
        return f"<Region {self.id} {where} of {self.size} pages{'' if self._live else ' unregistered'}>"

    @property
    def address(self):
        """The address of page 0."""
        return self.c_address

    @property
    def nbytes(self):
        """The size in bytes."""
        return self.size * self.page_size

    cdef int _check_live(self) except -1:
        if self.uffd is None or not self._live:
            raise ClosedError("the region is not registered")
        return self.uffd._check_open()

    cdef int _check_run(self, object first_page, object page_count, size_t *first, size_t *count) except -1:
        if page_count < 0:
            raise ValueError(f"page count {page_count} is negative")
        if not 0 <= first_page <= self.size or page_count > self.size - first_page:
            if page_count <= 1:
                raise IndexError(f"page {first_page} is outside [0, {self.size})")
            raise IndexError(f"pages [{first_page}, {first_page + page_count}) are outside [0, {self.size})")
        first[0] = first_page
        count[0] = page_count
        return 0

    cdef int _fill(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake, size_t *limit,
                   PlaceStep *step) noexcept nogil:
        cdef size_t pages
        cdef int64_t moved = 0
        cdef int rc = self.uffd.c_enter()
        cdef int outcome = PLACE_DONE
        step.done = 0
        step.error = 0
        if rc < 0:
            step.error = -rc
            return PLACE_FAILED
        while step.done < count:
            pages = min(count - step.done, limit[0])
            rc = _issue(self.uffd.c_fd, operation, self.c_address + (first + step.done) * self.page_size,
                        <uintptr_t>data + step.done * self.page_size, pages * self.page_size, wake, &moved)
            if rc == 0:
                step.done += pages
                limit[0] = max(limit[0], min(limit[0] * 2, count))
            elif moved > 0:
                if moved % <int64_t>self.page_size or <uint64_t>moved >= pages * self.page_size:
                    step.error = EIO            # D14: not even the kernel's numbers go unchecked
                    outcome = PLACE_FAILED
                    break
                step.done += moved // self.page_size
            elif rc == -ENOENT and pages > 1:
                limit[0] = pages // 2           # fact 5: the edge lies in here
            else:
                if rc == -EEXIST:
                    outcome = PLACE_PRESENT
                elif rc == -EAGAIN:
                    outcome = PLACE_AGAIN
                elif rc == -ENOENT:
                    outcome = PLACE_GONE
                elif rc == -ESRCH:
                    outcome = PLACE_PEER_GONE
                else:
                    outcome = PLACE_FAILED
                    step.error = -rc
                break
        self.uffd.c_leave()
        return outcome

    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_COPY, first, count, data, wake, &limit, step)

    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_ZERO, first, count, NULL, wake, &limit, step)

    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_POISON, first, count, NULL, True, &limit, step)

    cdef int c_wake(self, size_t first, size_t count) noexcept nogil:
        cdef uffdio_range request
        cdef int rc
        if count == 0:          # the kernel calls an empty range EINVAL
            return 0
        request.start = self.c_address + first * self.page_size
        request.len = count * self.page_size
        rc = self.uffd.c_enter()
        if rc == 0:
            rc = _ioctl(self.uffd.c_fd, WAKE, &request)
            self.uffd.c_leave()
        return rc

    cdef void _place_span(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                          Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil:
        cdef PlaceStep step
        cdef size_t done = 0
        cdef int outcome
        while done < count:
            outcome = self._fill(operation, first + done, count - done, data + done * self.page_size, wake,
                                 &tally.limit, &step)
            if received is not None and step.done:
                # D8, after the kernel accepted. Release: pairs with the acquire of whoever tests the bit.
                received.c_set_range(first + done, step.done)
            tally.placed += step.done
            done += step.done
            if outcome == PLACE_PRESENT:
                # D2, D10: a page that is there is settled, and fact 3: its waiters would sleep on, DONTWAKE or not.
                if received is not None:
                    received.c_set(first + done)
                self.c_wake(first + done, 1)
                tally.present += 1
                done += 1
            elif outcome == PLACE_GONE:
                # A waiter on memory that went away must run on to its SIGSEGV.
                if claimed is not None:
                    claimed.c_clear(first + done)
                self.c_wake(first + done, 1)
                tally.gone += 1
                tally.limit = 1
                done += 1
            elif outcome != PLACE_DONE:
                if claimed is not None:
                    claimed.c_clear_range(first + done, count - done)       # D8: so that another can place them
                tally.outcome = outcome
                tally.error = step.error
                break
        tally.settled += done

    cdef void _place_run(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                         Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil:
        cdef size_t page = first, end = first + count, stop, run
        cdef uint64_t mask, won
        while page < end and tally.outcome == PLACE_DONE:
            stop = min(end, (page | 63) + 1)
            mask = (<uint64_t>-1 << (page & 63)) & (<uint64_t>-1 >> (63 - ((stop - 1) & 63)))
            # acquire and release: one placer wins each bit, and sees what a loser that gave it back had done (D1).
            won = mask & ~pagecore_fetch_or(&claimed.c_words[page >> 6], mask)
            while page < stop:
                # The pages of this word that are left, bit 0 being `page`.
                mask = won >> (page & 63)
                if mask & 1 == 0:
                    # Lost. No ioctl: whoever has the claim places the page, or gives it back, and wakes (D1, D10).
                    run = stop - page if mask == 0 else min(stop - page, <size_t>trailing_zeros(mask))
                    tally.present += run
                    tally.settled += run
                else:
                    run = stop - page if ~mask == 0 else min(stop - page, <size_t>trailing_zeros(~mask))
                    self._place_span(operation, page, run, data + (page - first) * self.page_size, wake,
                                     claimed, received, tally)
                    if tally.outcome != PLACE_DONE:
                        # What this word's claims won beyond the run is given back too.
                        page += run
                        mask = won & (<uint64_t>-1 << (page & 63)) if page < stop else 0
                        pagecore_and(&claimed.c_words[(stop - 1) >> 6], ~mask)
                        break
                page += run

    cdef _place(self, int operation, object first_page, object page_count, const uint8_t *data, bint wake,
                Bitmap claimed, Bitmap received):
        cdef size_t first, count
        cdef PlaceTally tally
        cdef PlaceResult result = PlaceResult.__new__(PlaceResult)
        self._check_live()
        self._check_run(first_page, page_count, &first, &count)
        for plane in (claimed, received):
            if plane is not None and (<Bitmap>plane).size != self.size:
                raise ValueError(f"a bitmap of {(<Bitmap>plane).size} pages does not fit a region of {self.size}")
        tally.settled = tally.placed = tally.present = tally.gone = 0
        tally.outcome = PLACE_DONE
        tally.error = 0
        tally.limit = count
        with nogil:
            if claimed is None:
                self._place_span(operation, first, count, data, wake, None, received, &tally)
            else:
                self._place_run(operation, first, count, data, wake, claimed, received, &tally)
            if tally.outcome == PLACE_FAILED:
                # D10: those who wait for the rest fault again, and whoever reads the descriptor hears of it.
                self.c_wake(first + tally.settled, count - tally.settled)
        if operation == OPERATION_ZERO:
            result.zeroed = tally.placed
        else:
            result.placed = tally.placed
        result.present = tally.present
        result.gone = tally.gone
        if tally.outcome == PLACE_AGAIN:
            result.deferred = count - tally.settled
        elif tally.outcome == PLACE_PEER_GONE:
            result.gone += count - tally.settled
            result.peer_gone = True
        elif tally.outcome == PLACE_FAILED:
            if tally.error == EBADF:
                raise ClosedError("the Userfaultfd is closed")
            error = UffdError(tally.error, ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_POISON")[operation],
                              self.c_address + (first + tally.settled) * self.page_size,
                              (count - tally.settled) * self.page_size)
            error.add_note(f"{tally.settled} of {count} pages were dealt with before: {result!r}")
            raise error
        return result

    def place(self, first_page, data, *, wake=True, Bitmap claimed=None, Bitmap received=None):
        """Make a run of missing pages present, each atomically, with the content of `data`.

        Parameters
        ----------
        first_page : int
            The run's first page.
        data : buffer
            Whole pages, contiguous. It is pinned for the call. It must not be registered memory itself: the call would
            sleep on its missing pages.
        wake : bool
            False leaves the waiters of the pages that were placed asleep, for one ``wake`` of the whole range later.
            Waiters of pages that were found present, gone or failed are woken in any case.
        claimed, received : Bitmap or None
            Planes of the region. Each page is claimed first; one that is claimed already counts as ``present`` and costs
            no system call: whoever holds its claim wakes. A page is marked received once the kernel has accepted it or
            has it already; the claims of the others are given back.

        Returns
        -------
        PlaceResult
            Its counts add up to the run; where some are ``deferred``, they are the run's last pages.

        Raises
        ------
        IndexError, ValueError
            The run is outside the region; the length is not a multiple of the page size.
        UffdError
            The kernel failed (EFAULT, EINVAL, ENOMEM). ``address`` is that of the first page that was not dealt with,
            and a note tells the counts of those before it.
        ClosedError
            After ``unregister`` or ``close``.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 4.3.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len % <Py_ssize_t>PAGE_SIZE:
                raise ValueError(f"length {view.len} is not a multiple of page size {PAGE_SIZE}")
            return self._place(OPERATION_COPY, first_page, view.len // <Py_ssize_t>PAGE_SIZE, <const uint8_t *>view.buf,
                               wake, claimed, received)
        finally:
            PyBuffer_Release(&view)

    def place_zeros(self, first_page, count, *, wake=True, Bitmap claimed=None, Bitmap received=None):
        """Make a run of missing pages present as zeros; as ``place``, over ten times cheaper than placing zero data.

        Parameters
        ----------
        first_page, count : int
            The run.
        wake, claimed, received
            As in ``place``.

        Returns
        -------
        PlaceResult
            The pages placed count as ``zeroed``.

        Raises
        ------
        IndexError, ValueError, UffdError, ClosedError
            As ``place``.
        UnsupportedError
            This kind of memory has no ZEROPAGE.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 4.3.
        """
        self._check_ioctl(BIT_ZEROPAGE, "UFFDIO_ZEROPAGE", "the memory must be anonymous, with pages of 4096 bytes")
        return self._place(OPERATION_ZERO, first_page, count, NULL, wake, claimed, received)

    def poison(self, first_page, count):
        """Make a run of missing pages fail: touching one raises SIGBUS instead of waiting (D12).

        Parameters
        ----------
        first_page, count : int
            The run.

        Returns
        -------
        PlaceResult
            ``placed`` counts the pages poisoned, ``present`` those that were present or poisoned already.

        Raises
        ------
        IndexError, ValueError, UffdError, ClosedError
            As ``place``.
        UnsupportedError
            The kernel has no UFFDIO_POISON.

        Notes
        -----
        Releases the GIL. Thread-safe, but a later ``place`` undoes it: the caller keeps placements away. Linux 6.6.
        """
        self._check_ioctl(BIT_POISON, "UFFDIO_POISON", "it needs Linux 6.6 or newer")
        return self._place(OPERATION_POISON, first_page, count, NULL, True, None, None)

    cdef int _check_ioctl(self, int bit, str name, str remedy) except -1:
        self._check_live()
        if not (self.ioctls >> bit) & 1:
            raise UnsupportedError(name, remedy)
        return 0

    def wake(self, first_page, count):
        """Wake whoever waits for a page of the run; on a page that is still missing it faults again.

        Parameters
        ----------
        first_page, count : int
            The run; it may be empty.

        Raises
        ------
        IndexError, ValueError
            The run is outside the region.
        ClosedError, PeerGoneError, UffdError
            After close(); the process has ended; the kernel refused.

        Notes
        -----
        Releases the GIL. Thread-safe with everything. Linux 4.3.
        """
        cdef size_t first, pages
        cdef int rc
        self._check_live()
        self._check_run(first_page, count, &first, &pages)
        with nogil:
            rc = self.c_wake(first, pages)
        _raise_unless_done(rc, "UFFDIO_WAKE", self.c_address + first * self.page_size, pages * self.page_size)


cdef class PlaceResult:
    """What became of a run, in pages; the counts add up to its length.

    Attributes
    ----------
    placed : int
        Made present with the data, or poisoned.
    present : int
        Present already, or claimed by another placement.
    zeroed : int
        Made present as zeros.
    deferred : int
        The address space was changing: the last pages of the run, to be tried again once the event was read.
    gone : int
        No longer registered memory.
    peer_gone : bool
        The process has ended; the rest of the run counts as gone.
    """

    def __init__(self):
        raise TypeError("a PlaceResult is made by Region.place()")

    def __repr__(self):
        return (f"PlaceResult(placed={self.placed}, present={self.present}, zeroed={self.zeroed}, "
                f"deferred={self.deferred}, gone={self.gone}, peer_gone={self.peer_gone})")
