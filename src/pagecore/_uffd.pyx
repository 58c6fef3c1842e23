"""Userfaultfd: opening or adopting a descriptor, and registering memory with it.

The facts of the kernel interface that this relies on stand at the head of _uffd_ioctl.pyx.
"""

import fcntl
import os

from pagecore._mappings import check_range, check_registrable
from pagecore._uffd_types import Handed, MemoryKind, RegisterMode, read_fdinfo
from pagecore.errors import UnsupportedError

cimport cython
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.stdint cimport uint64_t, uintptr_t
from posix.unistd cimport getpid

from pagecore._descriptor cimport Descriptor, raise_unless_done
from pagecore._region cimport Region
from pagecore._span cimport zero_source
from pagecore._uffd_ioctl cimport PLACE_PROTECT, REGISTER_MINOR, REGISTER_MISSING, REGISTER_WP, uffd_is_own, uffd_wake

__all__ = ["Userfaultfd"]

cdef enum:
    # Of the mask that UFFDIO_REGISTER returns, and of the kernel's whole mask.
    BIT_WAKE = 0x02
    BIT_COPY = 0x03
    BIT_ZEROPAGE = 0x04
    BIT_MOVE = 0x05
    BIT_WRITEPROTECT = 0x06
    BIT_CONTINUE = 0x07
    BIT_POISON = 0x08
    PROBE_ADDRESS = 0x10000         # nothing is mapped, or harmed by a wake, there


@cython.final
cdef class Userfaultfd(Descriptor):
    """Userfaultfd(features=0, *, user_mode_only=None)
    --

    A userfaultfd of this process: the kernel reports missing pages of registered memory through it.

    Parameters
    ----------
    features : Feature
        What must be enabled (events, THREAD_ID, ...).
    user_mode_only : bool or None
        False: deliver the kernel's own faults too (read(2), KVM), or refuse. True: never deliver them, which
        everyone may. None: the first, and where this user may not, the second with a warning in the log.

    Raises
    ------
    UnsupportedError
        The kernel lacks a feature, or this user may not have a descriptor; the message names what enables it.
    UffdError
        The kernel refused for another reason (EMFILE, ENOMEM).

    Notes
    -----
    Releases the GIL in every call that may sleep. Thread-safe, except that only one thread at a time may
    read. Linux 4.14. After fork() a child's copy acts on this process's memory: placing works there,
    registering is refused.

    Attributes
    ----------
    features : int
        What it was opened with.
    user_mode_only : bool
        Whether the kernel's own faults fail; False where it was adopted and that cannot be told.
    remote : bool
        Whether it acts on another process's memory, so far as can be told.
    """

    def __cinit__(self, features=0, *, user_mode_only=None):
        self._ranges = []

    def close(self):
        """Close the descriptor, after the calls in flight (D13). Idempotent; from any thread.

        Every waiter is let go, and missing pages then read as zeros, unless another descriptor of the same
        userfaultfd (a dup, one sent to another process) is open: see D12.

        Notes
        -----
        Releases the GIL while it waits. Thread-safe with everything. Linux 4.3. A signal handler that raises
        ends the wait; the descriptor then stays closing, and close() can be called again.
        """
        Descriptor.close(self)
        self._ranges = []

    @classmethod
    def adopt(cls, fd, *, features=None):
        """Take over a descriptor that another process opened and sent (SCM_RIGHTS, ``pidfd_getfd``), or this one by itself.

        Parameters
        ----------
        fd : int
            A userfaultfd that has been through UFFDIO_API. It is the object's from here on, which closes it; if this
            fails it stays the caller's. Its file is set non-blocking, for everybody who shares it, and its number is
            closed over exec.
        features : Feature or None
            What it was opened with. None: what the kernel says of it.

        Returns
        -------
        Userfaultfd
            Whether it acts on another process's memory says ``remote``. Which memory is registered nobody says: see
            ``region_at``.

        Raises
        ------
        ValueError
            It is no userfaultfd, or has not been through UFFDIO_API.
        UnsupportedError
            /proc is not mounted, so that its features cannot be told: give them.
        OSError
            There is no such descriptor.

        Notes
        -----
        Holds the GIL (short system calls). Thread-safe. Linux 4.11. Before Linux 6.8 every one counts as ``remote``.
        """
        cdef int number = fd
        cdef int own
        os.fstat(number)
        # Before UFFDIO_API this is EINVAL, and afterwards it succeeds wherever it points.
        if uffd_wake(number, PROBE_ADDRESS, 4096) < 0:
            raise ValueError(f"descriptor {number} is no userfaultfd that has been through UFFDIO_API: whoever opened it "
                             "must do that")
        if features is None:
            try:
                features = read_fdinfo(number).features
            except OSError as error:
                raise UnsupportedError("telling the features of an adopted userfaultfd",
                                       "mount /proc, or say features=") from error
        own = uffd_is_own(number)
        os.set_inheritable(number, False)
        # Fact 11. Whoever sent it may have wanted to block in read(): nobody can, now that there are two of us.
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_NONBLOCK)
        return cls(Handed(number, int(features), own != 1))

    def register(self, memory, *, page_size=4096, region_id=0, mode=RegisterMode.MISSING):
        """Register a buffer: from now on, touching a missing page of it waits for a placement.

        Parameters
        ----------
        memory : writable buffer
            Page-aligned: private anonymous memory, as ``mmap.mmap(-1, n, flags=MAP_PRIVATE | MAP_ANONYMOUS)``; a memfd
            or other shared memory; huge pages of hugetlb, private or shared. It is kept alive, and cannot be closed,
            while it is registered and while the region lives. Pages touched before are present.
        page_size : int
            Bytes of a page: 4096, or the size of the huge pages.
        region_id : int
            The number that names the region in frames and page sources.
        mode : RegisterMode
            Which faults to report.

        Returns
        -------
        Region

        Raises
        ------
        ValueError
            The buffer is read-only, empty, misaligned, overlaps a region of this descriptor, or has pages of another
            size.
        UnsupportedError
            Memory that cannot be registered, or not so; a descriptor of another process's memory.
        ClosedError, UffdError
            After close(); the kernel refused (EBUSY: registered with another descriptor).

        Notes
        -----
        Releases the GIL in the ioctl. Thread-safe. Linux 4.3; shared memory and huge pages since 4.11, WP since 5.7
        (5.19 for those two), MINOR since 5.13 for huge pages and 5.14 for shared memory.
        """
        view = memoryview(memory)
        if view.readonly or not view.c_contiguous:
            raise ValueError("memory must be a writable, contiguous buffer")
        self._check_open()
        if self.remote:
            raise UnsupportedError("registering this process's memory with another's descriptor",
                                   "it acts on the memory of whoever opened it: open one here")
        address = <uintptr_t>PyMemoryView_GET_BUFFER(view).buf
        return self._register(address, view.nbytes, page_size, region_id, mode, None, view)

    def register_address(self, address, length, *, page_size=4096, region_id=0, mode=RegisterMode.MISSING, kind=None):
        """Register memory by address; as ``register``, but nothing keeps the memory alive.

        Parameters
        ----------
        address, length : int
            In bytes, both multiples of the page size; of the process whose memory the descriptor acts on.
        page_size, region_id, mode
            As in ``register``.
        kind : MemoryKind or None
            What stands behind it. None: what /proc says, or UNKNOWN where the descriptor is ``remote``.

        Returns
        -------
        Region

        Raises
        ------
        ValueError, UnsupportedError, ClosedError, UffdError
            As ``register``.
        PeerGoneError
            The process has ended.

        Notes
        -----
        Releases the GIL in the ioctl. Thread-safe. Linux 4.3.
        """
        return self._register(address, length, page_size, region_id, mode, kind, None)

    def region_at(self, address, length, *, page_size=4096, region_id=0, mode=RegisterMode.MISSING,
                  kind=MemoryKind.UNKNOWN, process=None):
        """The region of memory that whoever opened the descriptor has registered already; no ioctl is issued.

        Parameters
        ----------
        address, length, page_size, region_id
            As in ``register_address``.
        mode : RegisterMode
            How it was registered.
        kind : MemoryKind
            What stands behind it. With UNKNOWN, pages larger than 4096 bytes are taken for huge ones, and others for
            memory that can do what anonymous and shared memory can both do.
        process : int or None
            The process whose memory it is, if this user may read its mappings: then the range, the page size and the kind
            are checked and found there.

        Returns
        -------
        Region
            As if ``register_address`` had made it; ``unregister`` works on it too.

        Raises
        ------
        ValueError, UnsupportedError, ClosedError
            As ``register``.
        OSError
            The mappings of `process` cannot be read.

        Notes
        -----
        Holds the GIL. Thread-safe. Linux 4.11. A range that is not what it is said to be shows when pages are placed.
        """
        cdef uint64_t ioctls, whole
        self._check_open()
        if process is not None:
            kind = check_registrable(address, length, page_size, process)
        cdef Region region = self._region(address, length, page_size, region_id, mode, kind, None)
        try:
            whole = read_fdinfo(self.c_fd).ioctls
        except OSError:
            whole = <uint64_t>-1            # the calls themselves will say
        ioctls = 1 << BIT_WAKE | 1 << BIT_COPY | 1 << BIT_POISON
        if page_size == 4096:
            ioctls |= 1 << BIT_ZEROPAGE | 1 << BIT_MOVE
        if region.c_modes & REGISTER_WP:
            ioctls |= 1 << BIT_WRITEPROTECT
        if region.c_modes & REGISTER_MINOR:
            ioctls |= 1 << BIT_CONTINUE
        self._remember(region, ioctls & whole)
        return region

    cdef Region _region(self, object address, object length, object page_size, object region_id, int modes, int kind,
                        object owner):
        if not 0 <= region_id < 1 << 16:
            raise ValueError(f"region id {region_id} is outside [0, {1 << 16})")
        if not 0 < modes < 8:
            raise ValueError(f"mode {modes} is no combination of MISSING, WP and MINOR")
        check_range(address, length, page_size)
        if modes & REGISTER_MINOR and kind == <int>MemoryKind.ANONYMOUS:
            raise UnsupportedError("minor faults of private anonymous memory", "they exist for shared memory alone")
        for first, last, _owner in self._ranges:
            if address < last and first < address + length:
                raise ValueError(f"[{address:#x}, {address + length:#x}) overlaps the region "
                                 f"[{first:#x}, {last:#x})")
        cdef Region region = Region.__new__(Region)
        region.uffd = self
        region.id = region_id
        region.c_address = address
        region.page_size = page_size
        region.size = length // page_size
        region.c_kind = kind
        region.c_modes = modes
        region.c_flags = PLACE_PROTECT if modes & REGISTER_WP else 0
        if page_size != 4096 or modes & REGISTER_WP:
            region.c_zeros = zero_source(page_size, &region.c_zero_pages)      # D11
        region.c_movable = (kind == <int>MemoryKind.ANONYMOUS and modes == REGISTER_MISSING and page_size == 4096
                            and not self.remote)
        region._owner = owner
        return region

    cdef Region _register(self, object address, object length, object page_size, object region_id, object mode,
                          object kind, object owner):
        cdef int rc
        cdef uint64_t start, size, modes, ioctls = 0
        self._check_open()
        if not self.remote:
            if getpid() != self._process:
                raise UnsupportedError("registering through a descriptor inherited over fork()",
                                       f"it acts on the memory of process {self._process}; open one here")
            found = check_registrable(address, length, page_size)
            kind = found if kind is None else kind
        elif kind is None:
            kind = MemoryKind.UNKNOWN
        cdef Region region = self._region(address, length, page_size, region_id, mode, kind, owner)
        start, size, modes = address, length, mode
        with nogil:
            rc = self.c_register(start, size, modes, &ioctls)
        raise_unless_done(rc, "UFFDIO_REGISTER", address, length)
        self._remember(region, ioctls)
        return region

    cdef int _remember(self, Region region, uint64_t ioctls) except -1:
        region.ioctls = ioctls
        region._live = True
        # Memory that is freed while it is registered leaves a registration behind for whatever is mapped there
        # next, and with EVENT_UNMAP its munmap would sleep, with the GIL, until the event is read.
        with cython.critical_section(self):
            self._ranges.append((region.c_address, region.c_address + region.size * region.page_size, region._owner))
        return 0

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
        cdef int rc
        if region.uffd is not self:
            raise ValueError(f"region {region.id} belongs to another Userfaultfd")
        region._check_live()
        with nogil:
            rc = self.c_unregister(region.c_address, region.size * region.page_size)
        raise_unless_done(rc, "UFFDIO_UNREGISTER", region.c_address, region.size * region.page_size)
        region._live = False
        region._owner = None
        # Without the GIL of other builds a region that is registered meanwhile would get lost.
        with cython.critical_section(self):
            self._ranges = [span for span in self._ranges if span[0] != region.c_address]
