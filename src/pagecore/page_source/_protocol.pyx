"""The PageSource protocol: what a placement loop draws pages from."""

import os

from pagecore.errors import SourceError

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport ENOSYS, EPROTO
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from pagecore._move cimport Mover


cdef class PageSource:
    """Base of every page source; Cython code implements the ``c_`` methods of ``pagecore/page_source/_protocol.pxd``.

    Attributes
    ----------
    lanes : int
        0 for a source that is pulled (``c_fetch`` answers), otherwise how many streams it pushes answers on.
    bulk_lanes : int
        How many of the lanes, the first ones, carry pages that nobody asked for.
    page_size : int
        Bytes of a page; 4096 unless the source says otherwise.
    slow : bool
        Pulling may sleep, as on a disk.

    Notes
    -----
    All native methods run without the GIL. ``c_next`` is called by one thread a lane, ``c_request`` and ``c_fetch`` by
    any thread.
    """

    def __cinit__(self, *args, **kwargs):
        self.lanes = 0
        self.bulk_lanes = 0
        self.page_size = 4096
        self.slow = False

    def accept(self, regions):
        """Check that this source can serve these regions; a placement loop does so before it starts.

        Parameters
        ----------
        regions : iterable of Region
            What is to be served.

        Raises
        ------
        ValueError
            A region has pages of another size, or more pages than the source.
        """
        cdef uint64_t have
        for region in regions:
            if region.page_size != self.page_size:
                raise ValueError(f"the source has pages of {self.page_size} bytes, region {region.id} of "
                                 f"{region.page_size}")
            have = self.c_pages_of(region.id)
            if have < region.size:
                raise ValueError(f"the source has {have} pages for region {region.id}, which has {region.size}")

    def gather(self, Mover mover, regions):
        """Bring whole blocks of 2 MiB in the stages of a mover, if this source can; each placement loop says so before it starts.

        Parameters
        ----------
        mover : Mover or None
            As many stages as there are bulk lanes. None: no block is to come so, whatever an earlier loop asked for.
        regions : iterable of Region
            Those whose blocks may be moved into; without a mover none.
        """

    def fetch(self, first_page, page_count, *, uint32_t region_id=0):
        """Pull a run of pages as a placement loop does.

        Parameters
        ----------
        first_page, page_count : int
            The run, in pages.
        region_id : int
            The region.

        Returns
        -------
        list of (int, int, bytes or None)
            First page, page count and content of consecutive runs; None stands for zeros.

        Raises
        ------
        IndexError
            The run is outside the region, as far as the source knows.
        SourceError
            The pages could not be had; it names the run.
        ValueError
            The source pushes: its pages are not fetched.

        Notes
        -----
        Releases the GIL while it fetches. Thread-safe. Needs nothing of the kernel.
        """
        cdef PageAnswer answer
        cdef uint64_t first, count
        cdef uint64_t have = self.c_pages_of(region_id)
        if self.lanes:
            raise ValueError("this source pushes its pages: they are not fetched")
        if first_page < 0 or page_count < 0 or first_page + page_count > have:
            raise IndexError(f"pages [{first_page}, {first_page + page_count}) are outside [0, {have})")
        first, count = first_page, page_count
        runs = []
        while count:
            answer.error = EPROTO
            answer.field = NULL
            answer.first = first
            answer.count = 0
            with nogil:
                self.c_fetch(region_id, first, count, &answer)
            if answer.kind not in (ANSWER_PAGES, ANSWER_ZEROS, ANSWER_CONTINUE) or not 0 < answer.count <= count:
                what = answer.field.decode() if answer.field != NULL else "fetch"
                end = first + count
                if first < answer.first < end:
                    first = answer.first
                raise SourceError(f"pages [{first}, {end}): {what}: {os.strerror(answer.error)}", first, end - first)
            content = None
            if answer.kind != ANSWER_ZEROS:
                content = PyBytes_FromStringAndSize(<const char *>answer.data, answer.count * self.page_size)
            runs.append((first, answer.count, content))
            first += answer.count
            count -= answer.count
        return runs

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        return _refuse(answer)

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        return -ENOSYS

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        return _refuse(answer)

    cdef uint64_t c_pages_of(self, uint32_t region) noexcept nogil:
        return UINT64_MAX


cdef int _refuse(PageAnswer *answer) noexcept nogil:
    answer.kind = ANSWER_FAILED
    answer.error = ENOSYS
    answer.field = NULL
    answer.count = 0
    return answer.kind
