"""Region: registered memory, and placing runs of pages into it, for Python.

What it does is in Span; here are arguments, results and exceptions. The facts of the kernel interface that this relies
on stand at the head of _uffd_ioctl.pyx.
"""

from pagecore._uffd_types import MemoryKind, RegisterMode
from pagecore.errors import ClosedError, UnsupportedError

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t

from pagecore._bitmap cimport Bitmap
from pagecore._descriptor cimport raise_unless_done
from pagecore._place_result cimport PlaceResult, clear_tally, tell
from pagecore._span cimport (
    PLACE_FAILED,
    PlaceTally,
    Span,
)
from pagecore._uffd_ioctl cimport (
    OPERATION_CONTINUE,
    OPERATION_COPY,
    OPERATION_POISON,
    OPERATION_PROTECT,
    OPERATION_UNPROTECT,
    OPERATION_ZERO,
    PLACE_DONTWAKE,
    PLACE_PROTECT,
    REGISTER_MINOR,
    REGISTER_WP,
)

__all__ = ["Region"]

cdef enum:
    BIT_POISON = 0x08           # of the mask that UFFDIO_REGISTER returned


@cython.final
cdef class Region(Span):
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

    @property
    def kind(self):
        """What stands behind it: a MemoryKind; UNKNOWN for memory of another process that nobody described."""
        return MemoryKind(self.c_kind)

    @property
    def modes(self):
        """Which faults it reports: a RegisterMode."""
        return RegisterMode(self.c_modes)

    def pages_at(self, address, length):
        """The pages that a range of addresses touches, cut to the region.

        Parameters
        ----------
        address, length : int
            In bytes; a page of which it has one byte counts.

        Returns
        -------
        first_page, count : int
            (0, 0) where it has none of the region.

        Notes
        -----
        Holds the GIL. Thread-safe. No system call.
        """
        begin = max(address, self.c_address) - self.c_address
        end = min(address + length, self.c_address + self.size * self.page_size) - self.c_address
        if length <= 0 or begin >= end:
            return 0, 0
        first = begin // self.page_size
        return first, -(-end // self.page_size) - first

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

    cdef PlaceResult _place(self, int operation, object first_page, object page_count, const uint8_t *data, int flags,
                            Bitmap claimed, Bitmap received, Bitmap excluded):
        cdef size_t first, count
        cdef PlaceTally tally
        self._check_live()
        self._check_run(first_page, page_count, &first, &count)
        self._check_plane(claimed)
        self._check_plane(received)
        self._check_plane(excluded)
        clear_tally(&tally, count)
        with nogil:
            if claimed is None and excluded is None:
                self.c_place_span(operation, first, count, data, flags, None, received, &tally)
            else:
                self.c_place_run(operation, first, count, data, flags, claimed, received, excluded, &tally)
            if tally.outcome == PLACE_FAILED:
                # D10: those who wait for the rest fault again, and whoever reads the descriptor hears of it.
                self.c_wake(first + tally.settled, count - tally.settled)
        return tell(self, operation, first, count, &tally)

    cdef int _flags(self, bint wake, object protect) except -1:
        """The flags of a COPY or CONTINUE; where nothing is said, what was registered for write-protection gets it (D11)."""
        cdef int flags = 0 if wake else PLACE_DONTWAKE
        if protect is None:
            return flags | self.c_flags
        if protect and not self.c_modes & REGISTER_WP:
            raise ValueError(f"region {self.id} was not registered for write-protection")
        return flags | (PLACE_PROTECT if protect else 0)

    def place(self, first_page, data, *, wake=True, protect=None, Bitmap claimed=None, Bitmap received=None,
              Bitmap excluded=None):
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
        protect : bool or None
            Write-protect the pages in the same step. None: where the region was registered for write-protection.
        claimed, received : Bitmap or None
            Planes of the region. Each page is claimed first; one that is claimed already counts as
            ``present`` and costs no system call: whoever holds its claim wakes. A page is marked received
            once the kernel has accepted it or has it already; the claims of the others are given back.
        excluded : Bitmap or None
            Pages that are left alone, whatever the kernel would say: it undoes poison and guard pages without a word
            (D12). Each counts as ``excluded``.

        Returns
        -------
        PlaceResult
            Its counts add up to the run; where some are ``deferred``, they are the run's last pages.

        Raises
        ------
        IndexError, ValueError
            The run is outside the region; the length is not a multiple of the page size; `protect` where the region is
            not registered for it.
        UnreadableError
            The data cannot be read. ``address`` is that of the first page that was not dealt with, and a note tells the
            counts of those before it; so for the next two.
        OutOfMemoryError
            No memory, or no huge page, is left. It may be tried again later; the guest waits meanwhile.
        UffdError
            The kernel refused for a reason that it should not have.
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
                               <const uint8_t *>view.buf, self._flags(wake, protect), claimed, received, excluded)
        finally:
            PyBuffer_Release(&view)

    def place_zeros(self, first_page, count, *, wake=True, Bitmap claimed=None, Bitmap received=None,
                    Bitmap excluded=None):
        """Make a run of missing pages present as zeros: ``place`` of zeros, over ten times cheaper.

        Huge pages and regions registered for write-protection have no use for the cheap way (D11): there it is a
        ``place`` from memory that is zero, write-protected if so registered.

        Parameters
        ----------
        first_page, count : int
            The run.
        wake, claimed, received, excluded
            As in ``place``.

        Returns
        -------
        PlaceResult
            The pages placed count as ``zeroed``.

        Raises
        ------
        IndexError, ValueError, OutOfMemoryError, UffdError, ClosedError
            As ``place``.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 4.3.
        """
        return self._place(OPERATION_ZERO, first_page, count, NULL, 0 if wake else PLACE_DONTWAKE, claimed, received,
                           excluded)

    def place_continue(self, first_page, count, *, wake=True, protect=None, Bitmap claimed=None, Bitmap received=None,
                       Bitmap excluded=None):
        """Map pages that the page cache has: what resolves a minor fault, once their content is complete.

        Parameters
        ----------
        first_page, count : int
            The run. Its content was written through another mapping of the same memory, or with ``pwrite``; all of it,
            before this call.
        wake, protect, claimed, received, excluded
            As in ``place``.

        Returns
        -------
        PlaceResult
            Pages that the page cache does not have count as ``absent``.

        Raises
        ------
        IndexError, ValueError, OutOfMemoryError, UffdError, ClosedError
            As ``place``.
        UnsupportedError
            The region was not registered for minor faults.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 5.13 for huge pages, 5.14
        for other shared memory.
        """
        self._check_live()
        if not self.c_modes & REGISTER_MINOR:
            raise UnsupportedError(f"mapping pages of the page cache in region {self.id}",
                                   "register shared memory with RegisterMode.MINOR")
        return self._place(OPERATION_CONTINUE, first_page, count, NULL, self._flags(wake, protect), claimed, received,
                           excluded)

    def protect(self, first_page, count):
        """Write-protect a run: the next write to a page is reported, or with WP_ASYNC noted.

        Parameters
        ----------
        first_page, count : int
            The run. Of pages that were never populated the kernel keeps no note, unless Feature.WP_UNPOPULATED is on or
            the memory is shared: arm those when they are placed.

        Returns
        -------
        PlaceResult
            ``placed``: the pages of the run; or all ``deferred``; pages that are not memory count as ``gone``.

        Raises
        ------
        IndexError, ValueError, UffdError, ClosedError
            As ``place``.
        UnsupportedError
            The region was not registered for write-protection.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering this region. Linux 5.7; 5.19 for other than
        anonymous memory.
        """
        self._check_protectable()
        return self._place(OPERATION_PROTECT, first_page, count, NULL, 0, None, None, None)

    def unprotect(self, first_page, count, *, wake=True):
        """Let a run be written to, and go on whoever waits to do so; parameters and the rest as in ``protect``.

        Where it is ``deferred`` the writers sleep on: it must be tried again.
        """
        self._check_protectable()
        return self._place(OPERATION_UNPROTECT, first_page, count, NULL, 0 if wake else PLACE_DONTWAKE, None, None, None)

    cdef int _check_protectable(self) except -1:
        self._check_live()
        if not self.c_modes & REGISTER_WP:
            raise UnsupportedError(f"write-protecting region {self.id}", "register it with RegisterMode.WP")
        return 0

    def poison(self, first_page, count, *, Bitmap claimed=None, Bitmap excluded=None):
        """Make a run of missing pages fail: touching one raises SIGBUS instead of waiting (D12).

        Parameters
        ----------
        first_page, count : int
            The run.
        claimed : Bitmap or None
            As in ``place``: a page that another placement has under way is left to it.
        excluded : Bitmap or None
            The pages that were poisoned are added to it, so that no ``place`` that is given it undoes them; without a
            claim, see that none is under way.

        Returns
        -------
        PlaceResult
            ``placed`` counts the pages poisoned, ``present`` those that were present, poisoned already or claimed.

        Raises
        ------
        IndexError, ValueError, OutOfMemoryError, UffdError, ClosedError
            As ``place``.
        UnsupportedError
            The kernel has no UFFDIO_POISON.

        Notes
        -----
        Releases the GIL. Thread-safe, but a later ``place`` undoes it: keep placements away. Linux 6.6. A fault that was
        under way may be reported afterwards, and waits for a ``wake``. Where the region is registered for writes, a page
        that is missing under its protection is told from a present one; in another process that needs
        ``Feature.WP_ASYNC`` (else it counts as present), and those that are present may then read as written.
        """
        self._check_ioctl(BIT_POISON, "UFFDIO_POISON", "it needs Linux 6.6 or newer")
        return self._place(OPERATION_POISON, first_page, count, NULL, 0, claimed, excluded, None)

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
