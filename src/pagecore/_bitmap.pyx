"""Bitmap: one bit for each page, changed atomically a word at a time by any number of threads and processes."""

from operator import index as as_index

import numpy as np

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t

cdef extern from "Python.h":
    # With NULL for the error, a number that is too large is clipped: it then fails the range check like any other.
    Py_ssize_t PyNumber_AsSsize_t(object number, void *error) except? -1

cdef extern from "_atomic.h" nogil:
    void pagecore_or(uint64_t *word, uint64_t mask)
    void pagecore_and(uint64_t *word, uint64_t mask)
    bint pagecore_test_bit(const uint64_t *words, uint64_t bit)
    bint pagecore_test_and_set_bit(uint64_t *words, uint64_t bit)
    bint pagecore_test_and_clear_bit(uint64_t *words, uint64_t bit)

cdef extern from "_bitscan.h" nogil:
    size_t pagecore_word_count(size_t bits)
    uint64_t pagecore_tail(const uint64_t *words, size_t end)
    size_t pagecore_count(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_count_runs(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_find_set(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_find_clear(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_find_last(const uint64_t *words, size_t end)
    size_t pagecore_find_clear_area(const uint64_t *words, size_t first, size_t end, size_t length, size_t align)
    bint pagecore_test_range(const uint64_t *words, size_t first, size_t end)
    bint pagecore_equal(const uint64_t *a, const uint64_t *b, size_t end)
    bint pagecore_intersects(const uint64_t *a, const uint64_t *b, size_t end)
    size_t pagecore_next_run(const uint64_t *words, size_t start, size_t end, size_t *first)
    size_t pagecore_list_runs(const uint64_t *words, size_t start, size_t end, int64_t *pairs, size_t capacity,
                              size_t *next)
    size_t pagecore_list_indices(const uint64_t *words, size_t start, size_t end, int64_t *indices, size_t capacity,
                                 size_t *next)
    uint64_t pagecore_set_bits(uint64_t *word, uint64_t mask)
    uint64_t pagecore_clear_bits(uint64_t *word, uint64_t mask)
    size_t pagecore_set_range(uint64_t *words, size_t first, size_t end)
    size_t pagecore_clear_range(uint64_t *words, size_t first, size_t end)
    size_t pagecore_take_runs(uint64_t *words, size_t start, size_t end, size_t max_pages, int64_t *pairs,
                              size_t capacity, size_t *next)
    size_t pagecore_drain(uint64_t *source, uint64_t *dest, size_t end)
    size_t pagecore_merge(const uint64_t *source, uint64_t *dest, size_t end)
    size_t pagecore_intersect(uint64_t *words, const uint64_t *other, size_t end)
    size_t pagecore_subtract(uint64_t *words, const uint64_t *other, size_t end)
    void pagecore_flip(uint64_t *words, const uint64_t *other, size_t end)
    size_t pagecore_copy_range(const uint64_t *source, size_t at, uint64_t *dest, size_t first, size_t count)
    size_t pagecore_check_runs(const int64_t *pairs, size_t n, size_t end)
    size_t pagecore_check_indices(const int64_t *indices, size_t n, size_t end)
    size_t pagecore_apply_runs(uint64_t *words, const int64_t *pairs, size_t n, size_t end, bint set, size_t *done)
    size_t pagecore_apply_indices(uint64_t *words, const int64_t *indices, size_t n, size_t end, bint set,
                                  size_t *done)
    void pagecore_test_indices(const uint64_t *words, const int64_t *indices, size_t n, size_t end,
                               uint8_t *answers, size_t *done)
    void pagecore_copy(const uint64_t *source, uint64_t *dest, size_t end, uint64_t flip)
    void pagecore_to_bytes(const uint64_t *words, size_t end, unsigned char *data)
    void pagecore_from_bytes(const unsigned char *data, uint64_t *words, size_t end)

cdef size_t CACHE_LINE = 64
cdef Py_ssize_t WORD_BYTES = sizeof(uint64_t)
cdef char *WORD_FORMAT = b"Q"
cdef size_t NO_LIMIT = <size_t>-1
# Arrays of runs that are not counted beforehand begin with so many pairs, and grow to this many.
cdef size_t FIRST_CHUNK = 512
cdef size_t LAST_CHUNK = 1 << 20


@cython.final
cdef class _Pinned:
    """An exporter's buffer, held until this object goes: the memory stays where it is on every path."""

    cdef Py_buffer view
    cdef size_t used            # pairs that take_runs has put here

    def __cinit__(self, buffer, bint writable):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef int64_t *pairs(self) noexcept nogil:
        return <int64_t *>self.view.buf


@cython.final
@cython.no_gc_clear             # a cycle through the exporter must not unpin memory that another object still uses
cdef class Bitmap:
    """Bitmap(npages)\n--\n
    One bit for each page of a region, all clear at first.

    Parameters
    ----------
    npages : int
        Number of pages; 0 is legal.

    Attributes
    ----------
    size : int
        Number of pages, also ``len(bitmap)``; it never changes.

    Raises
    ------
    ValueError
        `npages` is negative.
    MemoryError
        There is no memory for the words.

    Notes
    -----
    ``bitmap[page]``, ``bitmap[page] = flag`` and ``page in bitmap`` are single bits; there are no negative indices
    and no slices. A page or a run outside raises IndexError with the number and the bound, and changes nothing.
    The words are exported read-only through the buffer protocol: ``np.frombuffer(bitmap, np.uint64)``.

    - Every method that loops releases the GIL; single bits and the attributes do not.
    - Every method may run in any number of threads and processes at once, and needs no lock: each word changes
      atomically, so no set bit is lost and each change is counted by exactly one caller. What looks at many words
      (`count`, `runs`, ``==``) is no snapshot of one instant: bits that change meanwhile may be seen or not.
    - No kernel interface is used: any kernel.
    """

    def __cinit__(self, npages):
        cdef _Pinned memory
        cdef Py_ssize_t size
        if type(npages) is tuple:       # from_buffer: (size, pinned memory), both checked
            size, memory = npages
            self._owner = memory
            self.c_words = <uint64_t *>memory.view.buf
        else:
            size = count_of(npages, "size")
            # One word more than needed: there is an address to export at size 0, and room to align to a cache line.
            self._allocation = PyMem_RawCalloc(1, pagecore_word_count(size) * sizeof(uint64_t) + CACHE_LINE)
            if self._allocation is NULL:
                raise MemoryError(f"no memory for a bitmap of {npages} pages")
            self.c_words = <uint64_t *>(
                (<uintptr_t>self._allocation + CACHE_LINE - 1) & ~<uintptr_t>(CACHE_LINE - 1)
            )
        self.size = size
        self.c_nwords = pagecore_word_count(size)
        self._shape = self.c_nwords

    def __dealloc__(self):
        PyMem_RawFree(self._allocation)

    @classmethod
    def from_buffer(cls, buffer, npages):
        """A bitmap over memory that others see too, zero-copy: mmap, shared memory, memfd.

        Parameters
        ----------
        buffer : object
            A writable, contiguous buffer that begins at a multiple of 8 bytes and holds at least ``(npages + 63) // 64``
            native 64-bit words, least significant bit first. It stays exported (an mmap cannot be closed) for as long
            as the bitmap or a view of it lives.
        npages : int
            Number of pages.

        Returns
        -------
        Bitmap
            Its bits are what the memory holds.

        Raises
        ------
        ValueError
            The buffer is too short or not aligned, or bits past `npages` are set in its last word: that memory belongs
            to something else, and clearing it could harm that. What another process writes there later is never
            reported and never changed, except by a drain, which clears the whole word.
        BufferError
            The buffer is read-only or not contiguous.
        """
        cdef Py_ssize_t size = count_of(npages, "size")
        cdef _Pinned memory = _Pinned(buffer, True)
        cdef size_t needed = pagecore_word_count(size) * sizeof(uint64_t)
        cdef uint64_t tail
        if <size_t>memory.view.len < needed:
            raise ValueError(f"a bitmap of {size} pages needs {needed} bytes, the buffer has {memory.view.len}")
        if needed and <uintptr_t>memory.view.buf % sizeof(uint64_t):
            raise ValueError(f"the buffer begins at {<uintptr_t>memory.view.buf:#x}, not at a multiple of 8 bytes")
        tail = pagecore_tail(<uint64_t *>memory.view.buf, size)
        if tail:
            raise ValueError(tail_message(size, tail))
        return cls((size, memory))

    @classmethod
    def from_bytes(cls, data, npages):
        """A new bitmap from what `to_bytes` made.

        Parameters
        ----------
        data : bytes-like
            Exactly ``(npages + 63) // 64`` little-endian 64-bit words.
        npages : int
            Number of pages.

        Returns
        -------
        Bitmap

        Raises
        ------
        ValueError
            The length is another one, or bits past `npages` are set in the last word (W3: they are zero on the link,
            so these bytes are damaged or of another size).
        """
        cdef Bitmap bitmap = cls(npages)
        cdef _Pinned memory = _Pinned(data, False)
        cdef uint64_t tail
        if <size_t>memory.view.len != bitmap.c_nwords * sizeof(uint64_t):
            raise ValueError(
                f"a bitmap of {bitmap.size} pages is {bitmap.c_nwords * sizeof(uint64_t)} bytes, not {memory.view.len}"
            )
        with nogil:
            pagecore_from_bytes(<const unsigned char *>memory.view.buf, bitmap.c_words, bitmap.size)
        # Looked at after the copy: another thread may write to `data`.
        tail = pagecore_tail(bitmap.c_words, bitmap.size)
        if tail:
            raise ValueError(tail_message(bitmap.size, tail))
        return bitmap

    def to_bytes(self):
        """The words as little-endian bytes, ``8 * ((size + 63) // 64)`` of them, bits past the size zero (W3)."""
        cdef bytes data = PyBytes_FromStringAndSize(NULL, self.c_nwords * WORD_BYTES)
        cdef unsigned char *start = <unsigned char *>PyBytes_AS_STRING(data)
        with nogil:
            pagecore_to_bytes(self.c_words, self.size, start)
        return data

    # ---- single bits

    def __len__(self):
        return self.size

    def __getitem__(self, page):
        return self.c_test(self._page(page))

    def __setitem__(self, page, flag):
        cdef Py_ssize_t number = self._page(page)
        if flag:
            self.c_set(number)
        else:
            self.c_clear(number)

    def __contains__(self, page):
        return self.c_test(self._page(page))

    def __iter__(self):
        raise TypeError("a Bitmap is not iterated bit by bit: use iter_runs(), runs() or indices()")

    def test(self, page):
        """Is the bit set? acquire: whoever sees it set sees what was written before it was set."""
        return self.c_test(self._page(page))

    def set(self, page):
        """Set the bit of one page."""
        self.c_set(self._page(page))

    def clear(self, page):
        """Clear the bit of one page."""
        self.c_clear(self._page(page))

    def test_and_set(self, page):
        """Set the bit and say whether it was set before: of several callers exactly one gets False."""
        return self.c_test_and_set(self._page(page))

    def test_and_clear(self, page):
        """Clear the bit and say whether it was set before: of several callers exactly one gets True."""
        return self.c_test_and_clear(self._page(page))

    # ---- ranges, runs and index arrays

    def set_range(self, first, count):
        """Set `count` bits from page `first`; returns how many were clear before."""
        cdef size_t start, length, changed
        self._span(first, count, &start, &length)
        with nogil:
            changed = self.c_set_range(start, length)
        return changed

    def clear_range(self, first, count):
        """Clear `count` bits from page `first`; returns how many were set before."""
        cdef size_t start, length, changed
        self._span(first, count, &start, &length)
        with nogil:
            changed = self.c_clear_range(start, length)
        return changed

    def test_range(self, first, count):
        """Are all `count` bits from page `first` set? True for none."""
        cdef size_t start, length
        cdef bint answer
        self._span(first, count, &start, &length)
        with nogil:
            answer = self.c_test_range(start, length)
        return answer

    def set_runs(self, runs):
        """Set every page of some runs.

        Parameters
        ----------
        runs : array of int, shape (n, 2)
            (first page, page count) each; they may overlap. All are checked before the first bit changes.

        Returns
        -------
        int
            How many bits were clear before; a page that stands in two runs counts once.

        Raises
        ------
        IndexError
            A run does not lie in [0, size).
        ValueError
            The shape is another one.
        """
        return self._apply_runs(runs, True)

    def clear_runs(self, runs):
        """Clear every page of some runs; as `set_runs`, returns how many bits were set before."""
        return self._apply_runs(runs, False)

    def set_indices(self, pages):
        """Set the bits of an array of page numbers.

        Parameters
        ----------
        pages : array of int, shape (n,)
            In any order, repeated or not. All are checked before the first bit changes.

        Returns
        -------
        int
            How many bits were clear before; a page that stands there twice counts once.

        Raises
        ------
        IndexError
            A page does not lie in [0, size).
        ValueError
            The shape is another one.
        """
        return self._apply_indices(pages, True)

    def clear_indices(self, pages):
        """Clear the bits of an array of page numbers; as `set_indices`, returns how many bits were set before."""
        return self._apply_indices(pages, False)

    def test_indices(self, pages):
        """The bits of an array of page numbers, as a bool array of the same shape (n,)."""
        cdef _Pinned memory = self._checked_indices(pages)
        cdef size_t n = <size_t>memory.view.len // sizeof(int64_t)
        cdef size_t done = 0
        answers = np.empty(n, dtype=np.bool_)
        cdef _Pinned output = _Pinned(answers, True)
        with nogil:
            pagecore_test_indices(
                self.c_words, memory.pairs(), n, self.size, <uint8_t *>output.view.buf, &done
            )
        check_done(done, n)
        return answers

    def fill(self):
        """Set every bit."""
        with nogil:
            self.c_set_range(0, self.size)

    def reset(self):
        """Clear every bit."""
        with nogil:
            self.c_clear_range(0, self.size)

    # ---- counting and finding

    def count(self):
        """How many bits are set."""
        cdef size_t result
        with nogil:
            result = self.c_count()
        return result

    def count_range(self, first, count):
        """How many of `count` bits from page `first` are set."""
        cdef size_t start, length, result
        self._span(first, count, &start, &length)
        with nogil:
            result = self.c_count_range(start, length)
        return result

    def any(self):
        """Is a bit set? False at size 0."""
        cdef size_t found
        with nogil:
            found = self.c_find_set(0)
        return found != self.size

    def all(self):
        """Is every bit set? True at size 0."""
        cdef size_t found
        with nogil:
            found = self.c_find_clear(0)
        return found == self.size

    def find_set(self, start=0):
        """The first set page at or after `start` (which may be the size), or None."""
        cdef size_t begin = self._start(start)
        cdef size_t found
        with nogil:
            found = self.c_find_set(begin)
        return found if found != self.size else None

    def find_clear(self, start=0):
        """The first clear page at or after `start` (which may be the size), or None."""
        cdef size_t begin = self._start(start)
        cdef size_t found
        with nogil:
            found = self.c_find_clear(begin)
        return found if found != self.size else None

    def find_last(self):
        """The last set page, or None."""
        cdef size_t found
        with nogil:
            found = self.c_find_last()
        return found if found != self.size else None

    def find_clear_area(self, count, start=0, align=1):
        """The first page at or after `start`, a multiple of `align`, from which `count` bits are clear, or None."""
        cdef size_t length = count_of(count, "count", 1)
        cdef size_t multiple = count_of(align, "align", 1)
        cdef size_t begin = self._start(start)
        cdef size_t found
        with nogil:
            found = pagecore_find_clear_area(self.c_words, begin, self.size, length, multiple)
        return found if found != self.size else None

    def runs(self):
        """The runs of set pages in rising order, as an int64 array of shape (n, 2): first page, page count."""
        return self._list(True)

    def indices(self):
        """The set pages in rising order, as an int64 array of shape (n,)."""
        return self._list(False)

    def iter_runs(self):
        """Iterate over the runs of set pages as tuples (first page, page count), a few hundred fetched at a time."""
        cdef size_t start = 0
        cdef size_t listed
        cdef _Pinned memory
        while start < self.size:
            chunk = np.empty((FIRST_CHUNK, 2), dtype=np.int64)
            memory = _Pinned(chunk, True)
            with nogil:
                listed = self.c_runs(start, memory.pairs(), FIRST_CHUNK, &start)
            for first, count in chunk[:listed].tolist():
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
            (first page, page count) in rising order. Of several threads that take, each page goes to one; a page set
            during the call is either returned or still set.

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
        cdef size_t chunk = FIRST_CHUNK
        cdef size_t capacity, listed, i
        cdef _Pinned memory
        cdef list arrays = []
        cdef list pinned = []
        try:
            while start < self.size and pages and runs:
                capacity = min(chunk, pages, runs)
                array = np.empty((capacity, 2), dtype=np.int64)
                memory = _Pinned(array, True)
                pinned.append(memory)
                with nogil:
                    listed = self.c_take_runs(start, self.size, pages, memory.pairs(), capacity, &start)
                    memory.used = listed
                    for i in range(listed):
                        pages -= <size_t>memory.pairs()[2 * i + 1]
                    runs -= listed
                arrays.append(array[:listed])
                chunk = min(4 * chunk, LAST_CHUNK)
            return joined(arrays, True)
        except BaseException:
            for memory in pinned:
                self.c_set_runs(memory.pairs(), memory.used)
            raise

    # ---- two bitmaps

    def copy(self):
        """A new bitmap of its own memory with the same bits."""
        cdef Bitmap fresh = Bitmap(self.size)
        with nogil:
            self.c_copy_into(fresh)
        return fresh

    def resized(self, npages):
        """A copy with `npages` pages: pages past it are dropped, new ones are clear."""
        cdef Bitmap fresh = Bitmap(npages)
        cdef size_t common = min(self.size, fresh.size)
        with nogil:
            pagecore_copy(self.c_words, fresh.c_words, common, 0)
        return fresh

    def copy_range(self, Bitmap source not None, source_first, first, count):
        """Copy `count` bits of `source` from its page `source_first` onto this bitmap's pages from `first`.

        Returns how many bits changed. Bits outside the range are not touched; the two ranges may overlap.
        """
        cdef size_t at, length, start, changed
        source._span(source_first, count, &at, &length)
        self._span(first, count, &start, &length)
        # Through a copy where both may be the same memory: shifted words would be read after they were written.
        if source is self or source._owner is not None or self._owner is not None:
            source = source.copy()
        with nogil:
            changed = pagecore_copy_range(source.c_words, at, self.c_words, start, length)
        return changed

    def drain_into(self, Bitmap dest not None):
        """Move all bits into `dest`: fetch and clear each word here, then OR it in there.

        Parameters
        ----------
        dest : Bitmap
            Another bitmap of the same size.

        Returns
        -------
        int
            How many bits of `dest` were newly set. A bit set here during the call is either moved or still set.

        Raises
        ------
        ValueError
            The sizes differ, or `dest` is this bitmap.
        """
        cdef size_t newly
        self._same_size(dest)
        if dest is self:
            raise ValueError("a bitmap cannot be drained into itself")
        with nogil:
            newly = self.c_drain_into(dest)
        return newly

    def merge(self, Bitmap other not None):
        """Set here what is set in `other`; returns how many bits were newly set."""
        cdef size_t newly
        self._same_size(other)
        with nogil:
            newly = self.c_merge(other)
        return newly

    def andnot(self, Bitmap other not None):
        """Clear here what is set in `other`, in place; returns how many bits were cleared."""
        cdef size_t cleared
        self._same_size(other)
        with nogil:
            cleared = self.c_subtract(other)
        return cleared

    def intersects(self, Bitmap other not None):
        """Is a page set in both?"""
        cdef bint answer
        self._same_size(other)
        with nogil:
            answer = pagecore_intersects(self.c_words, other.c_words, self.size)
        return answer

    def __ior__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        self.merge(other)
        return self

    def __iand__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        self._same_size(<Bitmap>other)
        with nogil:
            self.c_intersect(<Bitmap>other)
        return self

    def __ixor__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        self._same_size(<Bitmap>other)
        with nogil:
            pagecore_flip(self.c_words, (<Bitmap>other).c_words, self.size)
        return self

    def __or__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.copy().__ior__(other)

    def __and__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.copy().__iand__(other)

    def __xor__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.copy().__ixor__(other)

    def __invert__(self):
        cdef Bitmap fresh = Bitmap(self.size)
        with nogil:
            pagecore_copy(self.c_words, fresh.c_words, self.size, <uint64_t>-1)
        return fresh

    def __eq__(self, other):
        cdef bint answer
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self.size != (<Bitmap>other).size:
            return False
        with nogil:
            answer = pagecore_equal(self.c_words, (<Bitmap>other).c_words, self.size)
        return answer

    __hash__ = None

    def __repr__(self):
        return f"<pagecore.Bitmap size={self.size} count={self.count()}>"

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a bitmap exports its words read-only: change them through its methods")
        view.buf = self.c_words
        view.obj = self         # keeps the memory for as long as the view lives
        view.len = self._shape * WORD_BYTES
        view.readonly = 1
        view.itemsize = WORD_BYTES
        view.format = WORD_FORMAT if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = &self._shape if flags & PyBUF_ND else NULL
        view.strides = &WORD_BYTES if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL

    # ---- checks and conversions behind the methods

    cdef Py_ssize_t _page(self, object page) except -1:
        cdef Py_ssize_t number = PyNumber_AsSsize_t(page, NULL)
        if number < 0 or <size_t>number >= self.size:
            raise IndexError(f"page {page} is outside [0, {self.size})")
        return number

    cdef Py_ssize_t _start(self, object start) except -1:
        cdef Py_ssize_t number = PyNumber_AsSsize_t(start, NULL)
        if number < 0 or <size_t>number > self.size:
            raise IndexError(f"page {start} is outside [0, {self.size}]")
        return number

    cdef int _span(self, object first, object count, size_t *start, size_t *length) except -1:
        cdef Py_ssize_t low = PyNumber_AsSsize_t(first, NULL)
        cdef Py_ssize_t pages = count_of(count, "count")
        if low < 0 or <size_t>low > self.size or <size_t>pages > self.size - <size_t>low:
            raise IndexError(run_message(as_index(first), as_index(count), self.size))
        start[0] = low
        length[0] = pages
        return 0

    cdef int _same_size(self, Bitmap other) except -1:
        if other.size != self.size:
            raise ValueError(f"the bitmaps differ in size: {self.size} and {other.size} pages")
        return 0

    cdef object _apply_runs(self, object runs, bint set):
        array = int64_array(runs, 2, "runs", self.size)
        cdef _Pinned memory = _Pinned(array, False)
        cdef size_t n = <size_t>memory.view.len // (2 * sizeof(int64_t))
        cdef size_t bad, changed
        cdef size_t done = 0
        with nogil:
            bad = pagecore_check_runs(memory.pairs(), n, self.size)
        if bad < n:
            first, count = array[bad].tolist()
            if count < 0:
                raise ValueError(f"count {count} of run {bad} is negative")
            raise IndexError(run_message(first, count, self.size))
        with nogil:
            changed = pagecore_apply_runs(self.c_words, memory.pairs(), n, self.size, set, &done)
        check_done(done, n)
        return changed

    cdef object _checked_indices(self, object pages):
        array = int64_array(pages, 1, "pages", self.size)
        cdef _Pinned memory = _Pinned(array, False)
        cdef size_t n = <size_t>memory.view.len // sizeof(int64_t)
        cdef size_t bad
        with nogil:
            bad = pagecore_check_indices(memory.pairs(), n, self.size)
        if bad < n:
            raise IndexError(f"page {array[bad]} is outside [0, {self.size})")
        return memory

    cdef object _apply_indices(self, object pages, bint set):
        cdef _Pinned memory = self._checked_indices(pages)
        cdef size_t n = <size_t>memory.view.len // sizeof(int64_t)
        cdef size_t changed
        cdef size_t done = 0
        with nogil:
            changed = pagecore_apply_indices(self.c_words, memory.pairs(), n, self.size, set, &done)
        check_done(done, n)
        return changed

    cdef object _list(self, bint as_runs):
        # Count, then list. Where other threads set more meanwhile, the rest is counted and listed in turn.
        cdef size_t start = 0
        cdef size_t capacity, listed
        cdef _Pinned memory
        cdef list arrays = []
        while start < self.size:
            with nogil:
                if as_runs:
                    capacity = pagecore_count_runs(self.c_words, start, self.size)
                else:
                    capacity = pagecore_count(self.c_words, start, self.size)
            if capacity == 0:
                break
            array = np.empty((capacity, 2)[:2 if as_runs else 1], dtype=np.int64)
            memory = _Pinned(array, True)
            with nogil:
                if as_runs:
                    listed = self.c_runs(start, memory.pairs(), capacity, &start)
                else:
                    listed = self.c_indices(start, memory.pairs(), capacity, &start)
            arrays.append(array[:listed])
        return joined(arrays, as_runs)

    # ---- the C face: trusts its arguments

    cdef bint c_test(self, size_t page) noexcept nogil:
        return pagecore_test_bit(self.c_words, page)

    cdef void c_set(self, size_t page) noexcept nogil:
        pagecore_or(&self.c_words[page >> 6], <uint64_t>1 << (page & 63))

    cdef void c_clear(self, size_t page) noexcept nogil:
        pagecore_and(&self.c_words[page >> 6], ~(<uint64_t>1 << (page & 63)))

    cdef bint c_test_and_set(self, size_t page) noexcept nogil:
        return pagecore_test_and_set_bit(self.c_words, page)

    cdef bint c_test_and_clear(self, size_t page) noexcept nogil:
        return pagecore_test_and_clear_bit(self.c_words, page)

    cdef size_t c_set_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_set_range(self.c_words, first, first + count)

    cdef size_t c_clear_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_clear_range(self.c_words, first, first + count)

    cdef size_t c_count(self) noexcept nogil:
        return pagecore_count(self.c_words, 0, self.size)

    cdef size_t c_count_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_count(self.c_words, first, first + count)

    cdef size_t c_find_set(self, size_t start) noexcept nogil:
        return pagecore_find_set(self.c_words, start, self.size)

    cdef size_t c_find_clear(self, size_t start) noexcept nogil:
        return pagecore_find_clear(self.c_words, start, self.size)

    cdef size_t c_drain_into(self, Bitmap dest) noexcept nogil:
        return pagecore_drain(self.c_words, dest.c_words, self.size)

    cdef size_t c_merge(self, Bitmap other) noexcept nogil:
        return pagecore_merge(other.c_words, self.c_words, self.size)

    cdef bint c_test_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_test_range(self.c_words, first, first + count)

    cdef size_t c_find_last(self) noexcept nogil:
        return pagecore_find_last(self.c_words, self.size)

    cdef uint64_t c_set_word(self, size_t index, uint64_t mask) noexcept nogil:
        return pagecore_set_bits(&self.c_words[index], mask)

    cdef uint64_t c_clear_word(self, size_t index, uint64_t mask) noexcept nogil:
        return pagecore_clear_bits(&self.c_words[index], mask)

    cdef size_t c_next_run(self, size_t start, size_t stop, size_t *first) noexcept nogil:
        return pagecore_next_run(self.c_words, start, stop, first)

    cdef size_t c_runs(self, size_t start, int64_t *pairs, size_t capacity, size_t *next) noexcept nogil:
        return pagecore_list_runs(self.c_words, start, self.size, pairs, capacity, next)

    cdef size_t c_indices(self, size_t start, int64_t *indices, size_t capacity, size_t *next) noexcept nogil:
        return pagecore_list_indices(self.c_words, start, self.size, indices, capacity, next)

    cdef size_t c_take_runs(self, size_t start, size_t stop, size_t max_pages, int64_t *pairs, size_t capacity,
                            size_t *next) noexcept nogil:
        return pagecore_take_runs(self.c_words, start, stop, max_pages, pairs, capacity, next)

    cdef size_t c_set_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return pagecore_apply_runs(self.c_words, pairs, n, self.size, True, &done)

    cdef size_t c_clear_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return pagecore_apply_runs(self.c_words, pairs, n, self.size, False, &done)

    cdef size_t c_intersect(self, Bitmap other) noexcept nogil:
        return pagecore_intersect(self.c_words, other.c_words, self.size)

    cdef size_t c_subtract(self, Bitmap other) noexcept nogil:
        return pagecore_subtract(self.c_words, other.c_words, self.size)

    cdef void c_copy_into(self, Bitmap fresh) noexcept nogil:
        pagecore_copy(self.c_words, fresh.c_words, self.size, 0)


cdef Py_ssize_t count_of(object number, str name, Py_ssize_t least=0) except -1:
    cdef Py_ssize_t value = PyNumber_AsSsize_t(number, NULL)
    if value < least:
        raise ValueError(f"{name} {number} is negative" if value < 0 else f"{name} {number} is less than {least}")
    return value


cdef str run_message(first, count, size):
    return f"pages [{first}, {first + count}) are outside [0, {size})"


cdef str tail_message(size_t size, uint64_t tail):
    return f"bits past page {size} are set in the last word: {tail:#018x}"


cdef int check_done(size_t done, size_t n) except -1:
    if done < n:
        raise RuntimeError(f"another thread changed the array during the call: entries 0 to {done} of {n} were used")
    return 0


cdef object int64_array(object values, int ndim, str name, size_t size):
    """`values` as a contiguous int64 array of shape (n,) or (n, 2); numbers that int64 cannot hold are outside."""
    array = np.asarray(values)
    if array.size == 0:         # np.asarray([]) is float64
        return np.empty((0, 2)[:ndim], dtype=np.int64)
    if array.ndim != ndim or (ndim == 2 and array.shape[1] != 2):
        raise ValueError(f"{name} must have the shape {'(n, 2)' if ndim == 2 else '(n,)'}, not {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise IndexError(f"page {array.max()} is outside [0, {size})")
    return np.ascontiguousarray(array, dtype=np.int64)


cdef object joined(list arrays, bint as_runs):
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty((0, 2)[:2 if as_runs else 1], dtype=np.int64)
