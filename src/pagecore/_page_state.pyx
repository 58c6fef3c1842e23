"""The destination planes of one region: who may place a page, and what is settled."""

import numpy as np

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from pagecore._bitmap cimport Bitmap
from pagecore._sync cimport (
    pagecore_lock_exclusive,
    pagecore_lock_shared,
    pagecore_place_lock,
    pagecore_place_lock_destroy,
    pagecore_place_lock_init,
    pagecore_unlock,
)


cdef Bitmap _pages(given, size_t size):
    if isinstance(given, Bitmap):
        return given
    pages = Bitmap(size)
    pages.set_runs(given)
    return pages


cdef class PageState:
    """PageState(npages)
    --

    The planes of one region at the destination, shared by all that place pages into it.

    Parameters
    ----------
    npages : int
        Pages of the region; 0 is legal.

    Attributes
    ----------
    claimed : Bitmap
        A placement of this page is under way or has succeeded (D1).
    received : Bitmap
        The kernel has accepted the page (D8).
    released : Bitmap
        The guest discarded the page after the switch: whenever it is missing it reads as zeros (D3). Never cleared.
    hinted : Bitmap
        The source owes nothing for the page: it is filled here (D11).
    requested : Bitmap
        The source was asked for the page; cleared when the page is settled or gone (D9).
    excluded : Bitmap
        Poison and guard pages, never placed (D12).
    zero : Bitmap
        During precopy: the page is zeros and nothing was ever stored for it (D0).

    Notes
    -----
    The bitmaps are live. Reading them is safe at any time; after a placement loop has started, only the loop changes them.
    """

    def __cinit__(self, size_t npages):
        self._lock = malloc(sizeof(pagecore_place_lock))
        if self._lock == NULL:
            raise MemoryError()
        if pagecore_place_lock_init(<pagecore_place_lock *>self._lock) != 0:
            free(self._lock)
            self._lock = NULL
            raise MemoryError("no memory for the placement lock")
        self.size = npages
        self.claimed = Bitmap(npages)
        self.received = Bitmap(npages)
        self.released = Bitmap(npages)
        self.hinted = Bitmap(npages)
        self.requested = Bitmap(npages)
        self.excluded = Bitmap(npages)
        self.zero = Bitmap(npages)

    def __dealloc__(self):
        if self._lock != NULL:
            pagecore_place_lock_destroy(<pagecore_place_lock *>self._lock)
            free(self._lock)

    def __repr__(self):
        return (f"PageState({self.size}, received={self.received.count()}, released={self.released.count()}, "
                f"hinted={self.hinted.count()})")

    cdef void c_lock_shared(self) noexcept nogil:
        pagecore_lock_shared(<pagecore_place_lock *>self._lock)

    cdef void c_lock_exclusive(self) noexcept nogil:
        pagecore_lock_exclusive(<pagecore_place_lock *>self._lock)

    cdef void c_unlock(self) noexcept nogil:
        pagecore_unlock(<pagecore_place_lock *>self._lock)

    cdef uint64_t c_claim(self, size_t first, size_t count, uint64_t *dropped, uint64_t *lost) noexcept nogil:
        cdef uint64_t won = 0
        cdef uint64_t bit = 1
        cdef size_t page
        dropped[0] = 0
        lost[0] = 0
        for page in range(first, first + count):
            if self.released.c_test(page) or self.excluded.c_test(page):
                dropped[0] |= bit
            elif self.claimed.c_test_and_set(page):
                lost[0] |= bit
            else:
                won |= bit
            bit <<= 1
        return won

    cdef void c_release(self, size_t first, size_t count) noexcept nogil:
        # Under the exclusive side. A discard of an excluded page makes it released (D12).
        self.released.c_set_range(first, count)
        self.excluded.c_clear_range(first, count)
        self.requested.c_clear_range(first, count)

    cdef void c_exclude(self, size_t first, size_t count) noexcept nogil:
        # Under the exclusive side: `excluded` and `claimed` first, because a late COPY would undo a poison marker (D12).
        self.excluded.c_set_range(first, count)
        self.claimed.c_set_range(first, count)
        self.requested.c_clear_range(first, count)

    cdef bint c_settled(self, size_t page) noexcept nogil:
        return self.received.c_test(page) or self.released.c_test(page)

    def settled(self):
        """Return the pages for which nothing is owed: received or released.

        Returns
        -------
        Bitmap
            A new bitmap; exact when nothing is under way (D8).
        """
        settled = self.received.copy()
        settled.merge(self.released)
        return settled

    def unsettled(self, *, fill_is_zero=True):
        """Return the runs that must not be left to an unregister (D16).

        Parameters
        ----------
        fill_is_zero : bool
            Hinted pages may stay missing where their fill is what an unregistered page reads as.

        Returns
        -------
        numpy.ndarray
            int64, shape (n, 2): pages that are neither received, released nor excluded (nor hinted).
        """
        fine = self.settled()
        fine.merge(self.excluded)
        if fill_is_zero:
            fine.merge(self.hinted)
        missing = Bitmap(self.size)
        missing.fill()
        missing.andnot(fine)
        return missing.runs()

    def store(self, size_t first_page, size_t count):
        """Precopy: content was stored for these pages (D0); it ends their `zero` mark.

        Parameters
        ----------
        first_page, count : int
            The run, in pages.
        """
        self.received.set_range(first_page, count)
        self.zero.clear_range(first_page, count)

    def store_zeros(self, size_t first_page, size_t count):
        """Precopy: the source says that these pages are zeros (D0).

        Parameters
        ----------
        first_page, count : int
            The run, in pages.

        Returns
        -------
        numpy.ndarray
            int64, shape (n, 2): the runs that hold older content. The caller writes zeros there; the other pages are only
            marked, since memory that nothing was stored to reads as zeros.
        """
        cdef size_t page = first_page, end, start
        cdef list stored = []
        self.zero.set_range(first_page, count)      # says so where the run is outside
        end = first_page + count
        while page < end:
            start = page
            while page < end and self.received.c_test(page):
                page += 1
            if page > start:
                self.zero.c_clear_range(start, page - start)
                stored.append((start, page - start))
            while page < end and not self.received.c_test(page):
                page += 1
        return np.array(stored, np.int64).reshape(-1, 2)

    def switch(self, discarded, hinted):
        """Turn precopy planes into those of postcopy, once the listed pages were discarded (D0).

        Parameters
        ----------
        discarded : Bitmap or array_like
            The pages whose memory was discarded; or their runs, int64, shape (n, 2).
        hinted : Bitmap or array_like
            The hinted pages, all of them discarded.

        Raises
        ------
        ValueError
            A hinted page was not discarded, or a page that stays was never received: the list is wrong, and guessing would
            be a page of zeros in the guest. Nothing is changed.
        """
        gone = _pages(discarded, self.size)
        free_pages = _pages(hinted, self.size)
        stray = free_pages.copy()
        stray.andnot(gone)
        if stray.any():
            raise ValueError(f"page {stray.find_set()} is hinted but not discarded")
        missing = Bitmap(self.size)
        missing.fill()
        for known in (gone, self.received, self.zero):
            missing.andnot(known)
        if missing.any():
            raise ValueError(f"page {missing.find_set()} is not discarded but was never received")
        for plane in (self.claimed, self.received, self.zero, self.requested):
            plane.andnot(gone)
        self.claimed.merge(self.received)
        self.released.merge(self.zero)
        self.hinted.merge(free_pages)
