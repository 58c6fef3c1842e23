"""PagemapDirtyLog: writes to memory as the kernel notes them, of this process or of another (PAGEMAP_SCAN).

Facts that the code rests on, each seen on a kernel:

1.  A page is "written" if its entry in the page table does not carry the protection of userfaultfd. A write takes
    that away, in the kernel and without a message (WP_ASYNC); a scan with WP_MATCHING puts it back on what it
    reports, in one step under the lock of the page table: fetching and re-arming are one (S2).
2.  So a page that nobody ever touched is "written" until it was armed; then it has a marker, which costs a page
    table, and shows as swapped. Whoever leaves such pages out of the scan does not see a page that MADV_DONTNEED
    has made zero, which is the same to the kernel. Hence everything is armed at the start, in a scan that tells
    at the same time which pages hold something.
3.  Without CHECK_WPASYNC a range that is not registered is "nothing written", silently; with it, it is EPERM. A
    hole in the range is silently nothing either way: PROCMAP_QUERY (Linux 6.11) finds it.
4.  A scan that fails half-way has re-armed pages and does not say which. They all count as written then.
5.  A full vector ends a scan early; it goes on at walk_end.
6.  The descriptor of /proc/PID/pagemap belongs to the memory, not to the number: when the process has ended, or
    replaced itself (exec), it is ESRCH, whoever has the number by then. In a forked child it is still the parent's.
7.  Writes are seen where they go through these page tables: stores, system calls, process_vm_writev, a KVM guest.
    What holds the pages by themselves is not: pinned buffers (io_uring, RDMA, VFIO), other mappings of shared
    memory, write(2) to a memfd.
"""

import contextlib
import errno as numbers
import os
import warnings
from operator import index

from pagecore._mappings import check_registrable
from pagecore._uffd import Userfaultfd
from pagecore._uffd_types import Feature, RegisterMode
from pagecore.dirty_log._writers import check_pins, check_shared, missed_in, vouched_for
from pagecore.errors import (
    BusyError,
    ClosedError,
    PagecoreError,
    PeerGoneError,
    UffdError,
    UnsupportedError,
)

cimport cython
from libc.errno cimport EBADF, EBUSY, ECHILD, EFAULT, ENOTTY, EPERM, ESRCH
from libc.limits cimport INT_MAX
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport close as os_close, getpid

from pagecore._atomic cimport pagecore_exchange, pagecore_store_release
from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._protocol cimport DirtyLog

__all__ = ["PagemapDirtyLog"]

cdef extern from *:
    int __builtin_ctzll(unsigned long long word) nogil

cdef extern from "dirty_log/_pagemap_scan.h" nogil:
    struct pagecore_page_region:
        pass
    struct pagecore_scan:
        int pagemap
        int maps
        int shift
        uint64_t start
        uint64_t end
        pagecore_page_region *regions
    const size_t REGIONS "PAGECORE_REGIONS"
    # 0 or -errno. Reports what was written in [start, end) and re-arms it; `arming`: arms all and reports what is held.
    # `words` NULL: nothing is reported, only re-armed.
    int pagecore_scan_into(const pagecore_scan *scan, uint64_t start, uint64_t end, bint arming, uint64_t *words,
                           uint64_t *newly)
    # 1 and the first piece that is not mapped, 0 where there is none (or the kernel cannot tell), or -errno.
    int pagecore_find_hole(const pagecore_scan *scan, uint64_t *first, uint64_t *past)
    # 1 and the first memory that is not registered for asynchronous write-protection, or 0.
    int pagecore_find_stranger(const pagecore_scan *scan, uint64_t *first, uint64_t *past)


@cython.final
cdef class PagemapDirtyLog(DirtyLog):
    """PagemapDirtyLog(memory, *, page_size=4096, marked=())
    --

    Writes to memory of this process as the kernel notes them (PAGEMAP_SCAN with a userfaultfd in WP_ASYNC mode).

    It re-arms at collect. It is armed when it is made: a collect reports each page that was written since, whoever
    wrote it by way of this process's page tables (stores, system calls, another process through
    ``process_vm_writev``, a KVM guest), and each page that was discarded (``MADV_DONTNEED``), which reads as zeros
    since. Whatever was in memory before is owed. What :attr:`populated` does not name reads as zeros, so that a
    destination whose memory is new needs it from nobody::

        log = PagemapDirtyLog(memory)
        tracker = PageTracker(log.size, dirty_log=log, all_dirty=False)
        tracker.mark(log.populated.runs())

    Of memory that is registered with another userfaultfd, such as for missing pages, see :meth:`of_process`.

    Parameters
    ----------
    memory : writable buffer
        Page-aligned: private anonymous memory, huge pages, or with `marked` shared memory. It cannot be closed before
        the log is.
    page_size : int
        Bytes of a page: 4096, or the size of the huge pages (hugetlb), which are then reported whole (S10).
        Transparent huge pages are memory of 4096; the first write to one splits it.
    marked : iterable of str
        The writers that the log misses and that call ``PageTracker.mark`` after each write (S12): by naming
        one here the caller vouches for it. ``"mappings"``: whoever writes to shared memory through another mapping of
        it or through its file; without it shared memory is refused. ``"pins"``: whoever writes to pages that
        were pinned before (io_uring's registered buffers, RDMA, VFIO); without it a process that has pinned any memory
        (VmPin in /proc/PID/status) is refused. Memory that is pinned later is not noticed.

    Attributes
    ----------
    pid : int
        Whose memory it is.
    page_size : int
    misses : frozenset of str
        ``{"pins"}``, and for shared memory ``"mappings"``.

    Raises
    ------
    UnsupportedError
        The kernel or this user lacks something (before Linux 6.7), or `marked` does not name a writer that there is.
    BusyError
        The memory is registered with another userfaultfd.
    ValueError
        The buffer is read-only, misaligned, or has pages of another size.
    UffdError
        The kernel refused for another reason.

    Notes
    -----
    Releases the GIL while it scans. Thread-safe with writers; one collect at a time. Linux 6.7; a hole in the memory
    is noticed since 6.11. The first write to a page after each collect costs a fault (about a microsecond); arming makes
    page tables for all of the memory, 2 MiB for each GiB. Two logs of the same memory take pages from one another.

    A collect of memory that is in part no longer mapped (EFAULT) or no longer registered (EPERM: mapped afresh, moved
    there by mremap, or its descriptor was closed) is an UffdError with the address, and every page that the kernel may
    have re-armed by then is set. Nobody needs ``rearm``: it forgets what was written to pages and not collected yet; a
    sender that calls it before it reads a page (S1) saves sending the page again for a write that came before.
    """

    cdef readonly int pid
    cdef readonly size_t page_size
    cdef object _populated          # Bitmap: the pages that may have held something when the log was armed
    cdef object _uffd               # what keeps the memory registered; None where somebody else does
    cdef object _region             # what close() unregisters
    cdef pagecore_scan _scan        # its descriptors are of the memory, not of the process's number; -1 once closed
    cdef int _process               # who made the log: a forked child would take the pages away from it
    cdef uint64_t _busy             # a scan or a close is under way

    def __cinit__(self, *args, **kwargs):
        self._scan.pagemap = self._scan.maps = -1
        self._process = getpid()

    def __init__(self, memory, *, page_size=4096, marked=()):
        if self._scan.pagemap >= 0 or self._busy:
            raise BusyError("this log was opened before")
        # User mode is enough, and open to everyone: the kernel resolves these faults itself.
        uffd = Userfaultfd(Feature.WP_ASYNC, user_mode_only=True)
        try:
            with _refusals():
                region = uffd.register(memory, page_size=page_size, mode=RegisterMode.WP)
            self._uffd = uffd
            self._open(os.getpid(), region.address, region.size * page_size, page_size, marked, None)
        except BaseException:
            self._uffd = None
            uffd.close()
            raise

    @classmethod
    def of_process(cls, pid, address, length, *, uffd=None, page_size=4096, marked=()):
        """A log of memory by its address, in another process or in this one.

        The kernel notes writes only where a userfaultfd of that process, opened with WP_ASYNC, write-protects the
        memory, and nobody but the process itself can open one. So it cooperates: either it has registered the memory,
        and keeps the descriptor open, or it hands the descriptor over (SCM_RIGHTS; ``pidfd_getfd`` takes it from a
        process that may be traced), which is then given here as ``Userfaultfd.adopt`` made it.

        Parameters
        ----------
        pid : int
            Whose memory it is. The number is looked at once: a process that has it later is not mistaken for this one.
        address, length : int
            In bytes, both multiples of the page size.
        uffd : Userfaultfd or None
            A descriptor of that process, opened with ``Feature.WP_ASYNC``: the memory is registered here, and unregistered
            by :meth:`close`. It stays the caller's, to be closed after the log. None: the memory is registered already,
            with a mode that has WP in it: so it is where somebody serves missing pages of it, too.
        page_size, marked
            As for the class.

        Returns
        -------
        PagemapDirtyLog

        Raises
        ------
        PeerGoneError
            There is no such process.
        UnsupportedError
            The memory is not registered so; this user may not look at that process; as for the class.
        BusyError
            The memory is registered with another descriptor than `uffd`.
        ValueError
            The memory is not mapped, or has pages of another size; `uffd` acts on another process's memory.
        ClosedError, UffdError
            `uffd` is closed; the kernel refused.

        Notes
        -----
        Releases the GIL while it scans. Thread-safe with writers. Linux 6.7.
        """
        cdef PagemapDirtyLog log = cls.__new__(cls)
        log._open(index(pid), index(address), index(length), index(page_size), marked, uffd)
        return log

    def __dealloc__(self):
        if self._scan.pagemap >= 0:
            os_close(self._scan.pagemap)
        if self._scan.maps >= 0:
            os_close(self._scan.maps)
        free(self._scan.regions)

    def __del__(self):
        if self._scan.pagemap >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def __enter__(self):
        self._check()
        return self

    def __exit__(self, *_exception):
        self.close()

    def __reduce__(self):
        raise TypeError("a PagemapDirtyLog holds descriptors of this process and cannot be pickled")

    cdef int _open(self, object pid, object address, object length, object page_size, object marked,
                   object uffd) except -1:
        cdef bint shared = False
        vouched = vouched_for(marked)
        if uffd is not None and not uffd.features & Feature.WP_ASYNC:
            raise UnsupportedError("tracking writes with a userfaultfd that was opened without WP_ASYNC",
                                   "a feature is chosen when it is opened: open one with Feature.WP_ASYNC")
        try:
            with _refusals(pid), contextlib.ExitStack() as stack:
                # Everything is looked up in this directory, which stays that of one process.
                own = "self" if pid == os.getpid() else pid
                directory = os.open(f"/proc/{own}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                self._scan.pagemap = os.open("pagemap", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
                self._scan.maps = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
                # An old kernel opens them for a process that has ended, and this one for a process that just did.
                if not os.pread(self._scan.maps, 1, 0):
                    raise ProcessLookupError(numbers.ESRCH, os.strerror(numbers.ESRCH))
                kind = check_registrable(address, length, page_size, f"self/fd/{directory}")
                shared = check_shared(kind, vouched)
                check_pins(pid, vouched, f"self/fd/{directory}")
            DirtyLog.__init__(self, length // page_size, rearms_at_collect=True, misses=missed_in(shared))
            self.pid = pid
            self.page_size = page_size
            self._scan.shift = __builtin_ctzll(page_size)
            self._scan.start = address
            self._scan.end = self._scan.start + (<uint64_t>self.size << self._scan.shift)
            self._scan.regions = <pagecore_page_region *>malloc(REGIONS * sizeof(pagecore_page_region))
            if self._scan.regions == NULL:
                raise MemoryError()
            if uffd is not None:
                with _refusals(pid):
                    self._region = uffd.register_address(address, length, page_size=page_size, mode=RegisterMode.WP,
                                                         kind=kind)
            self._arm(shared)
        except BaseException:
            self._let_go()
            raise
        return 0

    cdef int _arm(self, bint shared) except -1:
        cdef Bitmap populated = Bitmap(self.size)
        cdef uint64_t newly = 0
        cdef int rc
        with nogil:
            rc = pagecore_scan_into(&self._scan, self._scan.start, self._scan.end, True, populated.c_words, &newly)
            populated.c_words_changed(0, populated.size)
        if rc == -EPERM and self._region is not None:
            raise ValueError(f"the userfaultfd acts on another process's memory than that of process {self.pid}")
        if rc == -EPERM:
            raise UnsupportedError(
                f"tracking writes of process {self.pid} without its cooperation",
                f"[{self._scan.start:#x}, {self._scan.end:#x}) is not registered for write-protection (WP) with"
                " a userfaultfd of that process opened with WP_ASYNC; have it register the memory, or hand over such a"
                " descriptor (SCM_RIGHTS, or pidfd_getfd) for uffd=. Soft-dirty bits are no way round: where the kernel"
                " is built without them, clearing them succeeds and then no page is ever dirty",
            )
        if rc == -ENOTTY:
            raise UnsupportedError("PAGEMAP_SCAN", "boot Linux 6.7 or newer")
        if rc < 0:
            raise self._explained(-rc)
        if shared:
            populated.fill()            # what is in the file and was never touched here has no entry in the page table
        self._populated = populated
        return 0

    cdef int _let_go(self) except -1:
        """Undo what _open did, as far as it came; of a forked child, nothing that is the parent's."""
        region, self._region = self._region, None
        uffd, self._uffd = self._uffd, None
        if region is not None and getpid() == self._process:
            # The process may have ended, its memory be gone, the descriptor be closed: all end the tracking too.
            with contextlib.suppress(PagecoreError):
                region.uffd.unregister(region)
        if uffd is not None:
            uffd.close()
        for fd in (self._scan.pagemap, self._scan.maps):
            if fd >= 0:
                os.close(fd)
        self._scan.pagemap = self._scan.maps = -1
        return 0

    cdef int _check(self) except -1:
        if self._scan.pagemap < 0:
            raise ClosedError("this dirty log is closed")
        return 0

    @property
    def address(self):
        """int: where page 0 is in that process."""
        return self._scan.start

    @property
    def closed(self):
        """bool: whether :meth:`close` was called."""
        return self._scan.pagemap < 0

    @property
    def populated(self):
        """Bitmap: the pages that may have held something when the log was armed; a copy.

        The others read as zeros then, and do so until a collect reports them. Of shared memory, which others may have
        filled without a trace here, it is all.
        """
        self._check()
        return self._populated.copy()

    def close(self):
        """Stop tracking: what was registered for this log is registered no longer. Idempotent.

        Takes milliseconds for each GiB: the kernel clears its marks.

        Raises
        ------
        BusyError
            If a collect is under way.

        Notes
        -----
        Releases the GIL. Not thread-safe with a collect. Linux 6.7.
        """
        if self._scan.pagemap < 0:
            return
        # Never given back: a later collect finds the log busy, not a descriptor that is somebody else's (D13).
        # In a forked child that would be a thread of the parent's.
        if pagecore_exchange(&self._busy, 1) and getpid() == self._process:
            raise BusyError("a collect of this dirty log is under way")
        self._let_go()

    cdef int _fail(self, int number, str method) except -1:
        raise self._explained(number)

    cdef object _explained(self, int number):
        """The exception for an errno of a scan: which memory, if that is what is wrong."""
        cdef uint64_t first = self._scan.start, past = self._scan.end
        if number == EBUSY:
            return BusyError("another collect of this dirty log is under way")
        if number == EBADF:
            return ClosedError("this dirty log is closed")
        if number == ESRCH:
            return PeerGoneError(f"process {self.pid} has ended, or runs another program: its memory is gone")
        if number == ECHILD:
            return UnsupportedError(f"the dirty log of process {self._process} in its child",
                                    "it reads the parent's memory, and would take its pages away: make one here")
        what = "PAGEMAP_SCAN"
        if number == EFAULT and pagecore_find_hole(&self._scan, &first, &past) == 1:
            what = "PAGEMAP_SCAN of memory that is no longer mapped"
        elif number == EPERM and pagecore_find_stranger(&self._scan, &first, &past) == 1:
            what = "PAGEMAP_SCAN of memory that is not registered for write-protection any more"
        return UffdError(number, what, first, past - first)

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef uint64_t newly = 0, first, past
        cdef int rc
        if pagecore_exchange(&self._busy, 1):
            return -EBUSY if self._scan.pagemap >= 0 else -EBADF
        if getpid() != self._process:
            rc = -ECHILD
        else:
            rc = pagecore_scan_into(&self._scan, self._scan.start, self._scan.end, False, words, &newly)
            if rc == 0:
                # After the scan: memory that was there all the time has no hole now.
                rc = pagecore_find_hole(&self._scan, &first, &past)
                if rc == 1:
                    rc = -EFAULT
        # release: pairs with the exchange of the next collect, which overwrites the vector
        pagecore_store_release(&self._busy, 0)
        if rc < 0:
            return rc
        return <int>newly if newly < <uint64_t>INT_MAX else INT_MAX

    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil:
        cdef uint64_t start = self._scan.start + (<uint64_t>first << self._scan.shift)
        cdef int rc = 0
        if pagecore_exchange(&self._busy, 1):
            return -EBUSY if self._scan.pagemap >= 0 else -EBADF
        if getpid() != self._process:
            rc = -ECHILD
        elif count:
            rc = pagecore_scan_into(&self._scan, start, start + (<uint64_t>count << self._scan.shift), False, NULL, NULL)
        pagecore_store_release(&self._busy, 0)
        return rc


@contextlib.contextmanager
def _refusals(pid=None):
    """Say what a refusal of the kernel means here; `pid` is whose memory it is about, if not ours."""
    try:
        yield
    except UffdError as error:
        if error.errno != numbers.EBUSY:
            raise
        raise BusyError(
            f"[{error.address:#x}, {error.address + error.length:#x}) is registered with another userfaultfd: open that"
            " one with Feature.WP_ASYNC, register with mode=MISSING | WP, and use PagemapDirtyLog.of_process without uffd"
        ) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerGoneError(f"there is no process {pid}, or it has ended") from error
    except PermissionError as error:
        remedy = (
            "start the program as this user, instead of changing user ids in it" if pid == os.getpid() else
            "run as root, or as its user where /proc/sys/kernel/yama/ptrace_scope lets that trace it"
        )
        raise UnsupportedError(f"reading /proc/{pid}/pagemap as user {os.geteuid()}", remedy) from error
