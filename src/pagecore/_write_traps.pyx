"""WriteTraps: memory whose writes stop at a native thread first (userfaultfd in synchronous write-protect mode).

What the dirty log and the background snapshot that stand on this have in common. Facts that they rely on, beside those
at the head of _uffd_ioctl.pyx:

1.  WRITEPROTECT leaves no mark on an anonymous page that was never populated, unless WP_UNPOPULATED is on (Linux 6.4),
    and MADV_DONTNEED takes the mark away, whatever is on: the next write would go through unseen. So anonymous memory
    is registered for missing pages too: whatever has no page traps for that reason, on every kernel. Shared memory
    keeps its marks, in place of pages that it does not have too.
2.  WRITEPROTECT is EAGAIN from the moment somebody calls madvise() to discard until that thread has been woken by the
    read of its event; the discard itself comes after that, at any time (D3, D7).
3.  A write to a protected huge page (THP) names the 4 KiB that were written, and taking the protection off them splits
    it.
4.  fork() waits for the lock that WRITEPROTECT needs, and takes nothing from the parent's protection; the child is not
    protected, and reads its missing pages as the zeros that they are. But it holds the descriptor: closing ours is not
    the last close then, so memory is unregistered first, which lets everybody go.
5.  read(2) and KVM write as the kernel: in user mode only their write would fail, so that is refused.
"""

import os
import threading
import time

from pagecore._mappings import check_registrable
from pagecore._uffd import Userfaultfd
from pagecore._uffd_types import Feature, MemoryKind, RegisterMode
from pagecore.errors import BusyError, UffdError, UnsupportedError

from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.errno cimport EAGAIN, EINTR, EIO, ENOENT, ENOMEM, errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memset
from posix.time cimport nanosleep, timespec
from posix.types cimport off_t
from posix.unistd cimport close as os_close, getpid

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_store_release,
)
from pagecore._descriptor cimport raise_unless_done
from pagecore._span cimport PLACE_AGAIN, PLACE_DONE, PLACE_FAILED, PLACE_GONE, PLACE_PRESENT, PlaceStep
from pagecore._uffd_ioctl cimport (
    OPERATION_COPY,
    OPERATION_PROTECT,
    OPERATION_UNPROTECT,
    OPERATION_ZERO,
    PLACE_PROTECT,
)

__all__ = ["WriteTraps"]

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    const short POLLIN
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *signals)

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t pread(int fd, void *buffer, size_t length, off_t offset)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef enum:
    PAGE = 4096
    PROTECT_PAGES = 16384       # of one call: 64 MiB, a millisecond or two
    STEP_NS = 50_000
    STEPS = 200_000             # how often one thread looks for the word of another: 10 s, where it takes an ioctl

cdef uint64_t PAGEMAP_HOLDS = <uint64_t>3 << 62      # present, or in swap
# How long starting tries to protect memory that somebody discards meanwhile, and how long a stop waits for its threads,
# which only ever wait for the kernel, or for the disk.
cdef double PROTECT_S = 10.0
cdef double JOIN_S = 60.0


cdef class WriteTraps:
    def __cinit__(self, *args, **kwargs):
        self.c_stop_fd = self._pagemap = -1
        self._threads = []
        self._process = getpid()

    def __dealloc__(self):
        if self.c_stop_fd >= 0:
            os_close(self.c_stop_fd)
        if self._pagemap >= 0:
            os_close(self._pagemap)

    def open(self, memory, features):
        """A descriptor for `memory` (a writable, page-aligned buffer), with EVENT_REMOVE and `features`; see arm()."""
        view = memoryview(memory)
        if view.readonly or not view.c_contiguous:
            raise ValueError("memory must be a writable, contiguous buffer")
        address = <uintptr_t>PyMemoryView_GET_BUFFER(view).buf
        kind = check_registrable(address, view.nbytes, PAGE)
        self.c_fills = kind == MemoryKind.ANONYMOUS
        mode = RegisterMode.WP
        wanted = Feature(features) | Feature.EVENT_REMOVE | Feature.PAGEFAULT_FLAG_WP
        if self.c_fills:
            mode |= RegisterMode.MISSING
            try:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UnsupportedError("telling which pages hold something",
                                       f"/proc/self/pagemap: {error.strerror}; mount /proc, or start the program as "
                                       "this user") from error
        else:
            wanted |= Feature.WP_HUGETLBFS_SHMEM
        self.c_stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.uffd = Userfaultfd(wanted, user_mode_only=False)       # fact 5
        self.uffd.c_begin_reading()
        # Known before it is registered: whatever traps then finds a thread that knows where.
        self.region = self.uffd.region_at(address, view.nbytes, mode=mode, kind=kind)
        self._memory = view
        self.size = self.region.size
        if self.c_fills:
            # Span avoids ZEROPAGE where memory is registered for write-protection. Here it is right, and costs no
            # memory: without WP_UNPOPULATED no mark stands in place of an anonymous page (fact 1).
            self.region.c_zeros = NULL
        return kind

    def start(self, name, body):
        """Start a thread, and wait until it has let go of the GIL for good: a thread of Python that touches the memory
        with the GIL held waits for it."""
        cdef uint64_t before = pagecore_load_acquire(&self._running)
        thread = threading.Thread(target=body, name=f"pagecore-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)
        while pagecore_load_acquire(&self._running) == before:
            time.sleep(0.00005)

    def run(self):
        """The body of the thread that reads the descriptor."""
        with nogil:
            self.c_started()
            self.c_run()

    def arm(self):
        """Register, and protect everything; the thread that reads must be running already."""
        cdef uint64_t ioctls = 0
        cdef size_t first = 0, count
        cdef int outcome
        with nogil:
            outcome = self.uffd.c_register(self.region.c_address, self.size * PAGE, self.region.c_modes, &ioctls)
        raise_unless_done(outcome, "UFFDIO_REGISTER", self.region.c_address, self.size * PAGE)
        deadline = time.monotonic() + PROTECT_S
        while first < self.size:
            count = min(self.size - first, <size_t>PROTECT_PAGES)
            with nogil:
                outcome = self.c_protect(first, count)
            if outcome == PLACE_DONE:
                first += count
            elif outcome == PLACE_AGAIN and time.monotonic() < deadline:
                time.sleep(0.0001)      # D7
            else:
                self._raise_failure()
                raise UffdError(EAGAIN if outcome == PLACE_AGAIN else ENOENT, "UFFDIO_WRITEPROTECT",
                                self.region.c_address + first * PAGE, count * PAGE)

    cdef void c_started(self) noexcept nogil:
        pagecore_fetch_add(&self._running, 1)       # release: pairs with the acquire in start()

    cdef void c_run(self) noexcept nogil:
        pass

    cdef int c_protect(self, size_t first, size_t count) noexcept nogil:
        cdef PlaceStep step
        cdef size_t limit = count
        cdef int outcome = self.region.c_place(OPERATION_PROTECT, first, count, NULL, 0, &limit, &step)
        if outcome == PLACE_FAILED:
            self.c_fail(step.error, b"UFFDIO_WRITEPROTECT", self.region.c_address + first * PAGE, count * PAGE)
        return outcome

    cdef int c_unprotect(self, size_t first, size_t count) noexcept nogil:
        cdef PlaceStep step
        cdef size_t limit = count
        cdef int outcome = self.region.c_place(OPERATION_UNPROTECT, first, count, NULL, 0, &limit, &step)
        if outcome == PLACE_GONE:
            self.region.c_wake(first, count)        # to their SIGSEGV (D10)
        elif outcome == PLACE_FAILED:
            self.c_fail(step.error, b"UFFDIO_WRITEPROTECT", self.region.c_address + first * PAGE, count * PAGE)
        return outcome

    cdef int c_fill(self, size_t page, bint protected) noexcept nogil:
        cdef uint8_t zeros[PAGE]
        cdef PlaceStep step
        cdef size_t limit = 1
        cdef int outcome
        if protected:
            memset(zeros, 0, PAGE)
            outcome = self.region.c_place(OPERATION_COPY, page, 1, zeros, PLACE_PROTECT, &limit, &step)
        else:
            outcome = self.region.c_place(OPERATION_ZERO, page, 1, NULL, 0, &limit, &step)
        if outcome == PLACE_PRESENT or outcome == PLACE_GONE:
            self.region.c_wake(page, 1)             # neither woke anybody (D2, D10)
        elif outcome == PLACE_FAILED and step.error != ENOMEM:
            self.c_fail(step.error, b"UFFDIO_COPY" if protected else b"UFFDIO_ZEROPAGE",
                        self.region.c_address + page * PAGE, PAGE)
        # Without memory for a page table it is tried again, as while an event waits.
        return PLACE_AGAIN if outcome == PLACE_FAILED and step.error == ENOMEM else outcome

    cdef int c_populated(self, size_t first, size_t count, uint64_t *bits) noexcept nogil:
        cdef uint64_t entries[64]
        cdef size_t index
        cdef off_t where = <off_t>((self.region.c_address // PAGE + first) * sizeof(uint64_t))
        cdef Py_ssize_t got
        bits[0] = <uint64_t>-1
        if not self.c_fills:
            return 0            # what shared memory holds does not stand in the page table
        while True:
            got = pread(self._pagemap, entries, count * sizeof(uint64_t), where)
            if got >= 0 or errno != EINTR:
                break
        if got != <Py_ssize_t>(count * sizeof(uint64_t)):
            return -errno if got < 0 else -EIO
        for index in range(count):
            if not entries[index] & PAGEMAP_HOLDS:
                bits[0] &= ~(<uint64_t>1 << index)
        return 0

    cdef bint c_poll(self, long timeout_ns) noexcept nogil:
        cdef pollfd waits[2]
        cdef timespec timeout
        timeout.tv_sec = 0
        timeout.tv_nsec = timeout_ns
        waits[0].fd = self.uffd.c_fd        # not closed before the threads have ended
        waits[1].fd = self.c_stop_fd
        waits[0].events = waits[1].events = POLLIN
        waits[0].revents = waits[1].revents = 0
        ppoll(waits, 2, NULL if timeout_ns < 0 else &timeout, NULL)
        return waits[0].revents != 0 and waits[1].revents == 0

    cdef size_t c_page_of(self, uint64_t address) noexcept nogil:
        return (address - self.region.c_address) // PAGE

    cdef void c_release(self) noexcept nogil:
        cdef uint64_t none = 0
        if getpid() != self._process:
            return
        if pagecore_compare_exchange(&self._released, &none, 1):
            # It fails where the memory was unmapped meanwhile, and that is as good.
            self.uffd.c_unregister(self.region.c_address, self.size * PAGE)
            pagecore_store_release(&self._released, 2)      # whoever finds it done finds nobody protected
        else:
            _await(&self._released, 2)

    cdef void c_fail(self, int error, const char *operation, uint64_t where, uint64_t length) noexcept nogil:
        cdef uint64_t none = 0
        if pagecore_compare_exchange(&self._failing, &none, 1):
            self.c_operation = operation
            self.c_where = where
            self.c_length = length
            pagecore_store_release(&self.c_error, error)        # pairs with the acquire in _raise_failure
        else:
            _await(&self.c_error, 1)        # or the caller would say that it failed, and nobody why
        self.c_release()

    cdef int _raise_failure(self) except -1:
        cdef uint64_t error = pagecore_load_acquire(&self.c_error)
        if error:
            raise UffdError(error, self.c_operation.decode(), self.c_where, self.c_length)
        return 0

    cdef void c_ask_to_stop(self) noexcept nogil:
        pagecore_store_release(&self.c_stopping, 1)
        eventfd_write(self.c_stop_fd, 1)

    def close(self):
        """Let everybody go, end the threads and close the descriptor. Idempotent."""
        if self.uffd is None or self.uffd.closed:
            return
        if getpid() == self._process:
            with nogil:
                # First: nobody can be caught after this, and what was queued is still read.
                self.c_release()
                self.c_ask_to_stop()
            end = time.monotonic() + JOIN_S
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))
                if thread.is_alive():
                    raise BusyError(f"{thread.name} has not ended within {JOIN_S:.0f} s: it waits for the kernel or "
                                    "for a disk; nothing is protected any more, and close() may be called again")
        # Releases whoever discards at this moment. In a forked child there is nothing else to do: the memory that the
        # descriptor acts on is the parent's.
        self.uffd.close()
        self._memory = None

    @property
    def closed(self):
        return self.uffd is None or self.uffd.closed


cdef void _await(const uint64_t *word, uint64_t least) noexcept nogil:
    """Until another thread, which is about to, has made it so large; bounded."""
    cdef timespec pause
    cdef int _step
    pause.tv_sec = 0
    pause.tv_nsec = STEP_NS
    for _step in range(STEPS):
        if pagecore_load_acquire(word) >= least:
            return
        nanosleep(&pause, NULL)
