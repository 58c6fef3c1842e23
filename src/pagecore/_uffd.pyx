"""Userfaultfd and Region: registering memory, and placing runs of pages into it.

The facts of the kernel interface that this relies on stand at the head of _descriptor.pyx.
"""

from pagecore._mappings import check_registrable
from pagecore.errors import ClosedError, UffdError, UnsupportedError

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.errno cimport EAGAIN, EBADF, EEXIST, EIO, ENOENT, ESRCH
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from posix.unistd cimport getpid

from pagecore._bitmap cimport Bitmap
from pagecore._descriptor cimport (
    OPERATION_COPY,
    OPERATION_POISON,
    OPERATION_ZERO,
    REGISTER_MISSING,
    Descriptor,
    raise_unless_done,
    uffd_place,
)

__all__ = ["PlaceResult", "Region", "Userfaultfd"]

cdef extern from *:
    int trailing_zeros "__builtin_ctzll"(uint64_t word) nogil

cdef enum:
    BIT_ZEROPAGE = 0x04         # of the mask that UFFDIO_REGISTER returned
    BIT_POISON = 0x08


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

    def register(self, memory, *, page_size=4096, region_id=0):
        """Register a buffer: from now on, touching a missing page of it waits for a placement.

        Parameters
        ----------
        memory : writable buffer
            Page-aligned private anonymous memory, as ``mmap.mmap(-1, n, flags=MAP_PRIVATE |
            MAP_ANONYMOUS)``. It is kept alive, and cannot be closed, while it is registered and while the
            region lives. Pages touched before are present.
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
        address = <uintptr_t>PyMemoryView_GET_BUFFER(view).buf
        return self._register(address, view.nbytes, page_size, region_id, view)

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

    cdef Region _register(self, object address, object length, object page_size, object region_id,
                          object owner):
        cdef int rc
        cdef uint64_t start, size, ioctls = 0
        self._check_open()
        if getpid() != self._process:
            raise UnsupportedError("registering through a descriptor inherited over fork()",
                                   f"it acts on the memory of process {self._process}; open one here")
        if not 0 <= region_id < 1 << 16:
            raise ValueError(f"region id {region_id} is outside [0, {1 << 16})")
        check_registrable(address, length, page_size)
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
        region._owner = owner
        start, size = address, length
        with nogil:
            rc = self.c_register(start, size, REGISTER_MISSING, &ioctls)
        raise_unless_done(rc, "UFFDIO_REGISTER", address, length)
        region.ioctls = ioctls
        region._live = True
        # Memory that is freed while it is registered leaves a registration behind for whatever is mapped there
        # next, and with EVENT_UNMAP its munmap would sleep, with the GIL, until the event is read.
        self._ranges.append((address, address + length, owner))
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
        cdef int rc
        if region.uffd is not self:
            raise ValueError(f"region {region.id} belongs to another Userfaultfd")
        region._check_live()
        with nogil:
            rc = self.c_unregister(region.c_address, region.size * region.page_size)
        raise_unless_done(rc, "UFFDIO_UNREGISTER", region.c_address, region.size * region.page_size)
        region._live = False
        region._owner = None
        self._ranges = [span for span in self._ranges if span[0] != region.c_address]


@cython.final
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

    cdef int _check_plane(self, Bitmap plane) except -1:
        if plane is not None and plane.size != self.size:
            raise ValueError(f"a bitmap of {plane.size} pages does not fit a region of {self.size}")
        return 0

    cdef int _fill(self, int operation, size_t first, size_t count, const uint8_t *data, bint wake,
                   size_t *limit, PlaceStep *step) noexcept nogil:
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
            rc = uffd_place(self.uffd.c_fd, operation, self.c_address + (first + step.done) * self.page_size,
                            <uintptr_t>data + step.done * self.page_size, pages * self.page_size, wake,
                            &moved)
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

    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake,
                    PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_COPY, first, count, data, wake, &limit, step)

    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_ZERO, first, count, NULL, wake, &limit, step)

    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self._fill(OPERATION_POISON, first, count, NULL, True, &limit, step)

    cdef int c_wake(self, size_t first, size_t count) noexcept nogil:
        return self.uffd.c_wake_range(self.c_address + first * self.page_size, count * self.page_size)

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
                # D2, D10: a page that is there is settled; fact 3: its waiters would sleep on, DONTWAKE or
                # not.
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
                    claimed.c_clear_range(first + done, count - done)       # D8: another may place them
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
            # acquire and release: one placer wins each bit, and sees what one that gave it back had done
            # (D1).
            won = claimed.c_set_word(page >> 6, mask)
            while page < stop:
                # The pages of this word that are left, bit 0 being `page`.
                mask = won >> (page & 63)
                if mask & 1 == 0:
                    # Lost. No ioctl: whoever has the claim settles the page or gives it back, and wakes
                    # (D1, D10).
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
                        claimed.c_clear_word((stop - 1) >> 6, mask)
                        break
                page += run

    cdef _place(self, int operation, object first_page, object page_count, const uint8_t *data, bint wake,
                Bitmap claimed, Bitmap received):
        cdef size_t first, count
        cdef PlaceTally tally
        cdef PlaceResult result = PlaceResult.__new__(PlaceResult)
        self._check_live()
        self._check_run(first_page, page_count, &first, &count)
        self._check_plane(claimed)
        self._check_plane(received)
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
                raise ClosedError("the userfaultfd is closed")
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
            Whole pages, contiguous. It is pinned for the call. It must not be registered memory itself: the
            call would sleep on its missing pages.
        wake : bool
            False leaves the waiters of the pages that were placed asleep, for one ``wake`` of the whole run
            later. Waiters of pages that were found present, gone or failed are woken in any case (D10).
        claimed, received : Bitmap or None
            Planes of the region. Each page is claimed first; one that is claimed already counts as
            ``present`` and costs no system call: whoever holds its claim wakes. A page is marked received
            once the kernel has accepted it or has it already; the claims of the others are given back.

        Returns
        -------
        PlaceResult
            Its counts add up to the run; where some are ``deferred``, they are the run's last pages.

        Raises
        ------
        IndexError, ValueError
            The run is outside the region; the length is not a multiple of the page size.
        UffdError
            The kernel failed (EFAULT, EINVAL, ENOMEM). ``address`` is that of the first page that was not
            dealt with, and a note tells the counts of those before it.
        ClosedError
            After ``unregister`` or ``close``.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 4.3.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._check_live()
            if view.len % <Py_ssize_t>self.page_size:
                raise ValueError(f"length {view.len} is not a multiple of page size {self.page_size}")
            return self._place(OPERATION_COPY, first_page, view.len // <Py_ssize_t>self.page_size,
                               <const uint8_t *>view.buf, wake, claimed, received)
        finally:
            PyBuffer_Release(&view)

    def place_zeros(self, first_page, count, *, wake=True, Bitmap claimed=None, Bitmap received=None):
        """Make a run of missing pages present as zeros: ``place`` of zeros, over ten times cheaper.

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
        self._check_ioctl(BIT_ZEROPAGE, "UFFDIO_ZEROPAGE", "the memory must be anonymous, of 4096-byte pages")
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
        Releases the GIL. Thread-safe, but a later ``place`` undoes it: keep placements away. Linux 6.6.
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
        raise_unless_done(rc, "UFFDIO_WAKE", self.c_address + first * self.page_size, pages * self.page_size)


@cython.final
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
