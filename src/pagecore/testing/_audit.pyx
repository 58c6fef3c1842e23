"""PlacementAudit: what each page held when it was placed, for comparison with the frozen source."""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._page_state cimport PageState
from pagecore._placer cimport PlacementObserver
from pagecore._runs cimport Pinned, count_of

import numpy


cdef extern from "_page_hash.h" nogil:
    uint64_t pagecore_page_hash(const uint8_t *page)


@cython.final
cdef class PlacementAudit(PlacementObserver):
    """PlacementAudit(npages, *, region_id=0, state=None)
    --

    An observer of a placement loop that records the checksum of each page as it was placed.

    What the guest's memory holds later proves nothing about placement: the guest may have written the page since.
    This is the other half of "verified": :meth:`compare` holds each page, as placed, against the frozen source.

    Parameters
    ----------
    npages : int
        Pages of 4 KiB of the region.
    region_id : int
        Pages of other regions are not recorded.
    state : PageState, optional
        The planes of the loop: with them it is recorded which pages had been asked for when they were placed.

    Attributes
    ----------
    placed : Bitmap
        Pages that were placed, zeros and fills included.
    zeros : Bitmap
        Those of them that were placed as zeros, at least once.
    requested : Bitmap
        Those that the source had been asked for (D9); none without `state`.
    placements : int
        Pages placed, those placed twice counted twice.
    twice : int
        Pages placed again (a released page may be filled with zeros again, D3).

    Raises
    ------
    ValueError
        If `npages` is negative, or `state` has another number of pages.

    Notes
    -----
    Recording takes no lock and no GIL; it costs one pass over the page.
    Any number of placers may record at once; one page is placed by one of them (D1).
    Needs no kernel interface.
    """

    cdef readonly Bitmap placed
    cdef readonly Bitmap zeros
    cdef readonly Bitmap requested
    cdef Bitmap _asked
    cdef readonly size_t size
    cdef uint32_t _region
    cdef uint64_t *_sums
    cdef uint64_t _placements
    cdef uint64_t _twice
    cdef uint64_t _zero_sum

    def __init__(self, npages, *, region_id=0, PageState state=None):
        cdef uint8_t *page
        cdef Py_ssize_t pages = count_of(npages, "npages")
        if self._sums != NULL:
            raise ValueError("this audit is in use")
        if state is not None and state.size != <size_t>pages:
            raise ValueError(f"planes of {state.size} pages do not fit an audit of {pages} pages")
        self.size = pages
        self._region = region_id
        self.c_follows_moves = True
        self.placed = Bitmap(pages)
        self.zeros = Bitmap(pages)
        self.requested = Bitmap(pages)
        self._asked = None if state is None else state.requested
        self._sums = <uint64_t *>calloc(self.size + 1, 8)
        page = <uint8_t *>calloc(1, 4096)
        if self._sums == NULL or page == NULL:
            free(page)
            raise MemoryError()
        self._zero_sum = pagecore_page_hash(page)
        free(page)

    def __dealloc__(self):
        free(self._sums)

    @property
    def placements(self):
        """int: pages placed, those placed twice counted twice."""
        return pagecore_load_relaxed(&self._placements)

    @property
    def twice(self):
        """int: pages placed again."""
        return pagecore_load_relaxed(&self._twice)

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        cdef uint64_t page
        self.c_moving(region, first, count, data)
        if data == NULL and region == self._region and first + count <= self.size:
            for page in range(first, first + count):
                self.zeros.c_set(page)
        self.c_moved(region, first, count)

    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        cdef uint64_t page
        if region != self._region or first + count > self.size:
            return
        for page in range(first, first + count):
            # relaxed: the bit that c_moved sets is the release that publishes the sum to who tests it
            pagecore_store_relaxed(
                &self._sums[page],
                self._zero_sum if data == NULL else pagecore_page_hash(data + (page - first) * 4096),
            )

    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil:
        cdef uint64_t page, again = 0
        if region != self._region or first + count > self.size:
            return
        for page in range(first, first + count):
            # The loop clears its bit only after it has told us of the placement.
            if self._asked is not None and self._asked.c_test(page):
                self.requested.c_set(page)
            again += self.placed.c_test_and_set(page)
        pagecore_fetch_add(&self._placements, count)
        if again:
            pagecore_fetch_add(&self._twice, again)

    def checksums(self):
        """checksums()
        --

        The checksum of every page as it was placed last.

        Returns
        -------
        ndarray of uint64
            Shape (npages,); 0 where :attr:`placed` is clear. The sums are those of
            :func:`pagecore.testing.page_checksums`.

        Notes
        -----
        Holds the GIL; touches no guest memory.
        Thread-safe; a snapshot while pages are placed.
        Needs no kernel interface.
        """
        cdef size_t page
        cdef Pinned sums = Pinned(numpy.zeros(self.size, dtype=numpy.uint64), True, sizeof(uint64_t))
        for page in range(self.size):
            if self.placed.c_test(page):
                (<uint64_t *>sums.numbers())[page] = pagecore_load_relaxed(&self._sums[page])
        return sums.array

    def compare(self, source, Bitmap ignore=None):
        """compare(source, ignore=None)
        --

        Pages that were placed with another content than the frozen source has.

        Parameters
        ----------
        source : ndarray of uint64
            :func:`pagecore.testing.page_checksums` of all of the source's memory, taken while its guest stood still.
        ignore : Bitmap, optional
            Pages whose content is undefined: those that the guest held free at the switch, and those it discarded.

        Returns
        -------
        ndarray of int64
            The pages, ascending.

        Raises
        ------
        ValueError
            If the sizes differ.

        Notes
        -----
        Holds the GIL; touches no guest memory.
        Thread-safe; a snapshot while pages are placed.
        Needs no kernel interface.
        """
        wanted = numpy.asarray(source, dtype=numpy.uint64)
        if wanted.shape != (self.size,):
            raise ValueError(f"checksums of shape {wanted.shape}, need ({self.size},)")
        if ignore is not None and ignore.size != self.size:
            raise ValueError(f"a bitmap of {ignore.size} pages does not fit an audit of {self.size} pages")
        placed = self.placed if ignore is None else self.placed.copy()
        if ignore is not None:
            placed.andnot(ignore)
        pages = placed.indices()
        return pages[self.checksums()[pages] != wanted[pages]]
