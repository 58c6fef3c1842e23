"""Listing: what is set in a bitmap, as arrays of runs and of page numbers."""

cimport cython

from pagecore._runs cimport Pinned, count_of, joined, new_pages, new_runs
from pagecore._words cimport Words

cdef size_t NO_LIMIT = <size_t>-1
# Arrays of runs that are not counted beforehand begin with so many pairs, and grow to this many.
cdef size_t FIRST_CHUNK = 512
cdef size_t LAST_CHUNK = 1 << 20


@cython.no_gc_clear     # as Words
cdef class Listing(Words):
    """Between Words and Bitmap, which alone is public."""

    def runs(self):
        """The runs of set pages in rising order, as an int64 array of shape (n, 2): first page, page
        count."""
        # Count, then list. Where other threads set more meanwhile, the rest is counted and listed in turn.
        cdef size_t capacity, start = 0
        cdef Pinned part
        cdef list parts = []
        while True:
            with nogil:
                capacity = self.c_count_runs(start)
            part = new_runs(capacity)
            parts.append(part)
            with nogil:
                part.used = self.c_runs(start, part.numbers(), capacity, &start)
            if capacity == 0 or start == self.size:
                return joined(parts)

    def indices(self):
        """The set pages in rising order, as an int64 array of shape (n,)."""
        cdef size_t capacity, start = 0
        cdef Pinned part
        cdef list parts = []
        while True:
            with nogil:
                capacity = self.c_count_range(start, self.size - start) if start else self.c_count()
            part = new_pages(capacity)
            parts.append(part)
            with nogil:
                part.used = self.c_indices(start, part.numbers(), capacity, &start)
            if capacity == 0 or start == self.size:
                return joined(parts)

    def iter_runs(self):
        """Iterate over the runs of set pages as tuples (first page, page count), a few hundred fetched at a
        time."""
        cdef size_t start = 0
        cdef Pinned part
        while start < self.size:
            part = new_runs(FIRST_CHUNK)
            with nogil:
                part.used = self.c_runs(start, part.numbers(), part.n, &start)
            for first, count in part.filled().tolist():
                yield first, count

    def take_runs(self, first=0, max_pages=None, max_runs=None):
        """Fetch and clear runs of set pages, atomically: what is cleared is exactly what is returned.

        Parameters
        ----------
        first : int
            Where to begin; there is no wrap past the end.
        max_pages, max_runs : int or None
            Bounds on what is taken; None is no bound. The last run is cut to fit `max_pages`.

        Returns
        -------
        ndarray of int64, shape (n, 2)
            (first page, page count) in rising order. Of several threads that take, each page goes to one; a
            page set during the call is either returned or still set.

        Raises
        ------
        IndexError
            `first` is outside [0, size].
        ValueError
            A bound is negative.
        MemoryError
            There is no memory for the result; every page taken so far is set again.
        """
        cdef size_t start = self._start(first)
        cdef size_t pages = NO_LIMIT if max_pages is None else count_of(max_pages, "max_pages")
        cdef size_t runs = NO_LIMIT if max_runs is None else count_of(max_runs, "max_runs")
        cdef size_t i, chunk = FIRST_CHUNK
        cdef Pinned part
        cdef list parts = []
        try:
            while True:
                part = new_runs(min(chunk, pages, runs))
                parts.append(part)
                with nogil:
                    part.used = self.c_take_runs(start, self.size, pages, part.numbers(), part.n, &start)
                    for i in range(part.used):
                        pages -= <size_t>part.numbers()[2 * i + 1]
                runs -= part.used
                if start == self.size or pages == 0 or runs == 0:
                    return joined(parts)
                chunk = min(4 * chunk, LAST_CHUNK)
        except BaseException:
            for part in parts:
                self.c_set_runs(part.numbers(), part.used)
            raise
