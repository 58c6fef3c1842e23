"""PlacementAudit: what each page held when it was placed, for comparison with the frozen source."""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._page_state cimport PageState
from pagecore._placing cimport PlacementObserver
from pagecore._runs cimport Pinned, count_of

import numpy


cdef extern from "_page_hash.h" nogil:
    uint64_t pagecore_page_hash(const uint8_t *page)
    uint64_t pagecore_placed_hash(const uint8_t *page, uint64_t number)

cdef enum:
    PAGE = 4096
    BLOCK_PAGES = 64                # of one sum; a sum for each page would take eight bytes of memory a page


@cython.final
cdef class PlacementAudit(PlacementObserver):
    """PlacementAudit(npages, *, region_id=0, state=None)
    --

    An observer of a placement loop that records what each page held when it was placed.

    What the guest's memory holds later proves nothing about placement: the guest may have written the page since.
    This is the other half of "verified": :func:`pagecore.testing.compare_placed` holds the pages, as placed, against
    the frozen source. The checksums of 64 pages are added up to one number.

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
    content : Bitmap
        Pages that were placed with content.
    zeros : Bitmap
        Pages that were placed as zeros, fills of hinted pages included. What fills a page that the guest discarded (D3)
        is not recorded.
    requested : Bitmap
        Those that the source had been asked for (D9); none without `state`.
    placements : int
        Pages placed, those placed twice counted twice.
    twice : int
        Pages placed again.

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

    cdef readonly Bitmap content
    cdef readonly Bitmap zeros
    cdef readonly Bitmap requested
    cdef Bitmap _asked
    cdef readonly size_t size
    cdef uint32_t _region
    cdef uint64_t *_sums
    cdef uint64_t _placements
    cdef uint64_t _twice

    def __init__(self, npages, *, region_id=0, PageState state=None):
        cdef Py_ssize_t pages = count_of(npages, "npages")
        if self._sums != NULL:
            raise ValueError("this audit is in use")
        if state is not None and state.size != <size_t>pages:
            raise ValueError(f"planes of {state.size} pages do not fit an audit of {pages} pages")
        self.size = pages
        self._region = region_id
        self.c_follows_moves = True
        self.content = Bitmap(pages)
        self.zeros = Bitmap(pages)
        self.requested = Bitmap(pages)
        self._asked = None if state is None else state.requested
        self._sums = <uint64_t *>calloc(self.size // BLOCK_PAGES + 1, 8)
        if self._sums == NULL:
            raise MemoryError()

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
        if not self._records(region, first, count):
            return
        if data == NULL:
            self._mark(first, count, self.zeros, self.content)
        else:
            self._add(first, count, data)
            self._mark(first, count, self.content, self.zeros)

    cdef void c_moving(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        if self._records(region, first, count):
            self._add(first, count, data)

    cdef void c_moved(self, uint32_t region, uint64_t first, uint64_t count, uint64_t moved,
                      const uint8_t *data) noexcept nogil:
        cdef uint64_t page
        if not self._records(region, first, count):
            return
        for page in range(first + moved, first + count):
            # What did not go is taken back: of unsigned numbers a sum forgets it wholly.
            pagecore_fetch_add(&self._sums[page // BLOCK_PAGES],
                               0 - pagecore_placed_hash(data + (page - first - moved) * PAGE, page))
        self._mark(first, moved, self.content, self.zeros)

    cdef bint _records(self, uint32_t region, uint64_t first, uint64_t count) noexcept nogil:
        return region == self._region and first + count <= self.size

    cdef void _add(self, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil:
        cdef uint64_t page
        for page in range(first, first + count):
            # relaxed: read when nothing is placed any more
            pagecore_fetch_add(&self._sums[page // BLOCK_PAGES],
                               pagecore_placed_hash(data + (page - first) * PAGE, page))

    cdef void _mark(self, uint64_t first, uint64_t count, Bitmap as_this, Bitmap not_that) noexcept nogil:
        cdef uint64_t page, again = 0
        for page in range(first, first + count):
            again += as_this.c_test_and_set(page) or not_that.c_test(page)
            # The loop clears its bit only after it has told us of the placement.
            if self._asked is not None and self._asked.c_test(page):
                self.requested.c_set(page)
        pagecore_fetch_add(&self._placements, count)
        if again:
            pagecore_fetch_add(&self._twice, again)

    def sums(self):
        """sums()
        --

        What was placed with content, as a sum for each block of 64 pages.

        Returns
        -------
        ndarray of uint64
            Shape (blocks,).

        Notes
        -----
        Holds the GIL; touches no guest memory.
        Thread-safe; while pages are placed it may fit :attr:`content` not yet or no more.
        Needs no kernel interface.
        """
        cdef size_t block, blocks = (self.size + BLOCK_PAGES - 1) // BLOCK_PAGES
        cdef Pinned sums = Pinned(numpy.empty(blocks, dtype=numpy.uint64), True, sizeof(uint64_t))
        for block in range(blocks):
            (<uint64_t *>sums.numbers())[block] = pagecore_load_relaxed(&self._sums[block])
        return sums.array


cdef int _compare(const uint8_t *memory, size_t size, Bitmap content, Bitmap zeros, const uint64_t *sums,
                  Bitmap wrong) noexcept nogil:
    cdef uint8_t *page_of_zeros = <uint8_t *>calloc(1, PAGE)
    cdef uint64_t zero, sum
    cdef size_t block, page, end
    if page_of_zeros == NULL:
        return -1
    zero = pagecore_page_hash(page_of_zeros)
    free(page_of_zeros)
    for block in range((size + BLOCK_PAGES - 1) // BLOCK_PAGES):
        sum = 0
        end = min((block + 1) * BLOCK_PAGES, size)
        for page in range(block * BLOCK_PAGES, end):
            if content.c_test(page):
                sum += pagecore_placed_hash(memory + page * PAGE, page)
            if zeros.c_test(page) and pagecore_page_hash(memory + page * PAGE) != zero:
                wrong.c_set(page)
        if sum != sums[block]:
            for page in range(block * BLOCK_PAGES, end):
                if content.c_test(page):
                    wrong.c_set(page)
    return 0


def compare_placed(memory, Bitmap content not None, Bitmap zeros not None, sums):
    """compare_placed(memory, content, zeros, sums)
    --

    Hold what a :class:`PlacementAudit` recorded against the frozen source.

    Parameters
    ----------
    memory : buffer
        All of the source's memory; its guest has stood still since the switch.
    content, zeros : Bitmap
        Pages that were placed with content, and as zeros. What the guest held free at the switch may have been filled with
        zeros that the source does not have: such pages have no place in `zeros`.
    sums : array_like of uint64
        `PlacementAudit.sums`.

    Returns
    -------
    Bitmap
        Pages that were placed as something else. Content is judged by 64 pages: if one differs, all that were placed
        in its block count.

    Raises
    ------
    ValueError
        If the sizes differ.

    Notes
    -----
    Releases the GIL.
    Thread-safe with everything but writers of the memory.
    Needs no kernel interface.
    """
    cdef Pinned image = Pinned(memory, False, PAGE)
    # A copy: nobody else changes it between the check and the use.
    cdef Pinned given = Pinned(numpy.array(sums, dtype=numpy.uint64), False, sizeof(uint64_t))
    cdef Bitmap wrong = Bitmap(content.size)
    cdef size_t blocks = (content.size + BLOCK_PAGES - 1) // BLOCK_PAGES
    cdef int failed
    if zeros.size != content.size or <size_t>image.view.len != content.size * PAGE:
        raise ValueError(f"{image.view.len} bytes, content of {content.size} and zeros of {zeros.size} pages do not fit")
    if given.array.shape != (blocks,):
        raise ValueError(f"sums of shape {given.array.shape}, need ({blocks},)")
    with nogil:
        failed = _compare(<const uint8_t *>image.view.buf, content.size, content, zeros,
                          <const uint64_t *>given.numbers(), wrong)
    if failed:
        raise MemoryError()
    return wrong
