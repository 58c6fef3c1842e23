"""Descriptor: a userfaultfd, opened or adopted, negotiated, read, and closed only when nothing uses it.

The facts of the kernel interface that this relies on stand at the head of _uffd_ioctl.pyx.
"""

import logging
import os
import warnings

from pagecore._uffd_ioctl import query_access
from pagecore._uffd_types import FEATURE_SINCE, Event, EventKind, FaultFlag, Feature, Handed, Waiting, read_fdinfo
from pagecore.errors import BusyError, ClosedError, UffdError, UnsupportedError, raise_for_errno

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, EBUSY, EINVAL, ENOSYS, EPERM
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close as os_close, getpid

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_exchange,
    pagecore_fence,
    pagecore_fence_after_rmw,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_store_release,
)
from pagecore._uffd_ioctl cimport (
    ACCESS_DEVICE,
    ACCESS_SYSCALL,
    ACCESS_USER_MODE,
    EVENT_FAULT,
    EVENT_FORK,
    MESSAGES,
    REGISTER_WP,
    UffdEvent,
    uffd_handshake,
    uffd_open,
    uffd_read,
    uffd_register,
    uffd_unregister,
    uffd_wake,
)

__all__ = ["Descriptor", "open_write_tracker", "query_access"]

cdef enum:
    OPEN = 1                    # not 0: an object whose constructor failed does not own descriptor 0
    CLOSING = 2
    CLOSED = 3

_ACCESSES = {"device": ACCESS_DEVICE, "syscall": ACCESS_SYSCALL, "user-mode": ACCESS_USER_MODE}
_REMEDY = (
    "run 'sysctl -w vm.unprivileged_userfaultfd=1', or give this user read and write permission on "
    "/dev/userfaultfd (Linux 6.1 and newer), or give the program CAP_SYS_PTRACE; in a container its seccomp "
    "profile must allow the call"
)
_log = logging.getLogger("pagecore.uffd")


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
        if isinstance(features, Handed):
            # adopt() has looked at everything, so that what fails there leaves the descriptor to its caller.
            self.c_fd = features.fd
            self.features = features.features
            self.remote = features.remote
        else:
            self._open(features, user_mode_only)
        self._state = OPEN

    cdef int _open(self, object features, object user_mode_only) except -1:
        cdef uint64_t wanted = features
        cdef uint64_t supported = 0, ioctls = 0
        cdef int rc
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
        rc = uffd_open(_ACCESSES[access])
        if rc < 0:
            raise UffdError(-rc, f"userfaultfd ({access})")
        self.c_fd = rc
        rc = uffd_handshake(self.c_fd, wanted, &supported, &ioctls)
        if rc < 0:
            os_close(self.c_fd)
            if rc == -EPERM and wanted & Feature.EVENT_FORK:
                raise UnsupportedError("EVENT_FORK for this user", "give the program CAP_SYS_PTRACE")
            raise UffdError(-rc, "UFFDIO_API")
        self.features = wanted
        self.user_mode_only = access == "user-mode"
        if self.user_mode_only and user_mode_only is None:
            _log.warning("userfaultfd in user mode only: read(2), KVM and others will fail on missing pages; "
                         "to change that, %s", _REMEDY)
        return 0

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
        pagecore_fence_after_rmw()
        if pagecore_load_acquire(&self._state) == OPEN:
            return 0
        self.c_leave()
        return -EBADF

    cdef void c_leave(self) noexcept nogil:
        # Its release pairs with the acquire in close(): what was done with c_fd is over before that is
        # closed.
        pagecore_fetch_add(&self._in_flight, <uint64_t>-1)

    cdef int c_register(self, uint64_t address, uint64_t length, uint64_t mode,
                        uint64_t *ioctls) noexcept nogil:
        cdef int rc = self.c_enter()
        if rc == 0:
            rc = uffd_register(self.c_fd, address, length, mode, ioctls)
            self.c_leave()
        return rc

    cdef int c_unregister(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef int rc = self.c_enter()
        if rc == 0:
            rc = uffd_unregister(self.c_fd, address, length)
            self.c_leave()
        return rc

    cdef int c_wake_range(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef int rc = self.c_enter()
        if rc == 0:
            rc = uffd_wake(self.c_fd, address, length)
            self.c_leave()
        return rc

    cdef int c_begin_reading(self) noexcept nogil:
        # acquire and release: the role carries what the last reader did with it.
        return -EBUSY if pagecore_exchange(&self._reader, 1) != 0 else 0

    cdef void c_end_reading(self) noexcept nogil:
        pagecore_store_release(&self._reader, 0)        # pairs with the exchange in c_begin_reading

    cdef int c_read(self, UffdEvent *events, int capacity) noexcept nogil:
        cdef int i
        cdef int taken = self.c_read_forks(events, capacity)
        for i in range(taken):
            if events[i].kind == EVENT_FORK:
                os_close(<int>events[i].thread)     # fact 17
                events[i].thread = 0
        return taken

    cdef int c_read_forks(self, UffdEvent *events, int capacity) noexcept nogil:
        cdef int taken = 0, got = 0
        cdef int rc = self.c_enter()
        if rc < 0:
            return rc
        while taken < capacity:
            got = uffd_read(self.c_fd, events + taken, capacity - taken)
            if got < 0:
                break
            taken += got
            if got < min(capacity, <int>MESSAGES):
                break
        self.c_leave()
        # EAGAIN is normal, right after poll() too: the fault was resolved meanwhile.
        return got if taken == 0 and got < 0 and got != -EAGAIN else taken

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
            faults. A FORK event brings the child's own Userfaultfd, which the caller has to close.

        Raises
        ------
        BusyError
            Another thread, or a PlacementLoop, reads this descriptor.
        ClosedError, UffdError
            After close(); the kernel refused (EMFILE: there is no number left for the child of a FORK; the event
            stays queued).

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
        cdef int made = 0
        count = 0
        result = []
        try:
            if events == NULL:
                raise MemoryError
            with nogil:
                count = self.c_read_forks(events, capacity)
            raise_unless_done(min(count, 0), "read", 0, 0)
            for made in range(count):
                result.append(self._event(&events[made]))
                events[made].kind = 0           # its descriptor, if it had one, is the object's now
            return result
        finally:
            for made in range(count):
                if events[made].kind == EVENT_FORK:
                    os_close(<int>events[made].thread)      # fact 17, on the way out of a failure
            free(events)
            self.c_end_reading()

    cdef object _event(self, const UffdEvent *event):
        child = None
        if event.kind == EVENT_FORK:
            # It was opened with the features of this one, and acts on the memory of the child that was just made.
            child = type(self)(Handed(event.thread, self.features, True))
        kind = EventKind(event.kind)
        flags = FaultFlag(event.flags) if event.kind == EVENT_FAULT else event.flags
        return Event(kind, event.start, event.end, flags, 0 if child else event.thread, child)

    def waiting(self):
        """How many threads wait for pages of this descriptor, as the kernel counts them.

        Returns
        -------
        Waiting
            ``pending``: messages that nobody has read; ``total``: those and the ones that were read and not woken.

        Raises
        ------
        ClosedError, OSError
            After close(); /proc is not there.

        Notes
        -----
        Holds the GIL. Thread-safe. Linux 4.3. Of all processes that share the descriptor; a snapshot.
        """
        self._check_open()
        found = read_fdinfo(self.c_fd)
        return Waiting(found.pending, found.total)


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
