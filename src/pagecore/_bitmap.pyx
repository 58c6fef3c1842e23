"""Bitmap: one bit for each page, changed atomically by any number of threads and processes."""

import numpy as np

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from pagecore._atomic cimport pagecore_or, pagecore_test_bit
from pagecore._bitscan cimport *
from pagecore._listing cimport Listing
from pagecore._map cimport pagecore_keeper, pagecore_note_page
from pagecore._runs cimport Pinned, check_done, count_of, pinned_pages, pinned_runs, run_of

cdef extern from "_small_int.h":
    Py_ssize_t pagecore_small_int(object number) noexcept

cdef Py_ssize_t WORD_BYTES = sizeof(uint64_t)


@cython.final
@cython.no_gc_clear     # clearing a cycle must not unpin memory that another object still uses
cdef class Bitmap(Listing):
    """Bitmap(npages, *, summary=None)\n--\n
    One bit for each page of a region, all clear at first.

    Parameters
    ----------
    npages : int
        Number of pages; 0 is legal.
    summary : bool or None
        Keep one bit for each 512 pages that says whether to look there, so that sparse and clustered bitmaps are scanned
        in time that is proportional to what is set. It costs a setter one more load. None: from 65,536 pages on.

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
    ``bitmap[page]``, ``bitmap[page] = flag`` and ``page in bitmap`` are single bits; there are no negative
    indices and no slices. A page or a run outside raises IndexError with the number and bound, and changes
    nothing. The buffer protocol exports the words read-only: ``np.frombuffer(bitmap, np.uint64)``.

    - Every method that loops releases the GIL; single bits and the attributes do not.
    - Every method may run in any number of threads and processes at once, and needs no lock: each word
      changes atomically, so no set bit is lost and each change is counted by exactly one caller. What looks
      at many words (`count`, `runs`, ``==``) is no snapshot of one instant: bits that change meanwhile may be
      seen or not.
    - No kernel interface is used: any kernel.
    """

    @classmethod
    def from_buffer(cls, buffer, npages):
        """A bitmap over memory that others see too, zero-copy: mmap, shared memory, memfd.

        Parameters
        ----------
        buffer : object
            A writable, contiguous buffer that begins at a multiple of 8 bytes and holds at least ``(npages +
            63) // 64`` native 64-bit words, least significant bit first. It stays exported (an mmap cannot be
            closed) for as long as the bitmap or a view of it lives.
        npages : int
            Number of pages.

        Returns
        -------
        Bitmap
            Its bits are what the memory holds.

        Raises
        ------
        ValueError
            The buffer is too short or not aligned, or bits past `npages` are set in its last word: that
            memory belongs to something else, and clearing it could harm that. What another process writes
            there later is never reported and never changed, except by a drain, which clears the whole word.
        BufferError
            The buffer is read-only or not contiguous.
        """
        cdef Py_ssize_t size = count_of(npages, "size")
        cdef Pinned memory = Pinned(buffer, True)
        cdef size_t needed = pagecore_word_count(size) * sizeof(uint64_t)
        cdef uint64_t tail
        if <size_t>memory.view.len < needed:
            raise ValueError(f"a bitmap of {size} pages needs {needed} bytes, not {memory.view.len}")
        if needed and <uintptr_t>memory.view.buf % sizeof(uint64_t):
            raise ValueError(f"the buffer begins at {<uintptr_t>memory.view.buf:#x}, not a multiple of 8")
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
            The length is another one, or bits past `npages` are set in the last word (W3: zero on the link,
            so these bytes are damaged or of another size).
        """
        cdef Bitmap bitmap = cls(npages)
        cdef Pinned memory = Pinned(data, False)
        cdef uint64_t tail
        if <size_t>memory.view.len != bitmap.c_nwords * sizeof(uint64_t):
            size = bitmap.c_nwords * sizeof(uint64_t)
            raise ValueError(f"a bitmap of {bitmap.size} pages is {size} bytes, not {memory.view.len}")
        with nogil:
            pagecore_from_bytes(<const unsigned char *>memory.view.buf, bitmap.c_words, bitmap.size)
            bitmap.c_words_changed(0, bitmap.size)
        # Looked at after the copy: another thread may write to `data`.
        tail = pagecore_tail(bitmap.c_words, bitmap.size)
        if tail:
            raise ValueError(tail_message(bitmap.size, tail))
        return bitmap

    def to_bytes(self):
        """The words as little-endian bytes, ``8 * ((size + 63) // 64)`` of them, bits past the size zero
        (W3)."""
        cdef bytes data = PyBytes_FromStringAndSize(NULL, self.c_nwords * WORD_BYTES)
        cdef unsigned char *start = <unsigned char *>PyBytes_AS_STRING(data)
        with nogil:
            pagecore_to_bytes(self.c_words, self.size, start)
        return data

    # ---- single bits

    def __len__(self):
        return self.size

    def __getitem__(self, page):
        return <bint>pagecore_test_bit(self.c_words, self._page(page))

    def __setitem__(self, page, flag):
        cdef Py_ssize_t number = self._page(page)
        if flag:
            set_bit(self, number)
        else:
            self.c_clear(number)

    def __contains__(self, page):
        return <bint>pagecore_test_bit(self.c_words, self._page(page))

    def __iter__(self):
        raise TypeError("a Bitmap is not iterated bit by bit: use iter_runs(), runs() or indices()")

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def test(self, page):
        """test($self, page, /)\n--\n
        Is the bit set? acquire: whoever sees it set sees what was written before it was set."""
        return <bint>pagecore_test_bit(self.c_words, self._page(page))

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def set(self, page):
        """set($self, page, /)\n--\n
        Set the bit of one page."""
        set_bit(self, self._page(page))

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def clear(self, page):
        """clear($self, page, /)\n--\n
        Clear the bit of one page."""
        self.c_clear(self._page(page))

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def test_and_set(self, page):
        """test_and_set($self, page, /)\n--\n
        Set the bit and say whether it was set before: of several callers exactly one gets False."""
        return self.c_test_and_set(self._page(page))

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def test_and_clear(self, page):
        """test_and_clear($self, page, /)\n--\n
        Clear the bit and say whether it was set before: of several callers exactly one gets True."""
        return self.c_test_and_clear(self._page(page))

    # ---- ranges, runs and index arrays

    def set_range(self, first, count):
        """Set `count` bits from page `first`; returns how many were clear before."""
        cdef size_t start, length, changed
        run_of(first, count, self.size, &start, &length)
        with nogil:
            changed = self.c_set_range(start, length)
        return changed

    def clear_range(self, first, count):
        """Clear `count` bits from page `first`; returns how many were set before."""
        cdef size_t start, length, changed
        run_of(first, count, self.size, &start, &length)
        with nogil:
            changed = self.c_clear_range(start, length)
        return changed

    def test_range(self, first, count):
        """Are all `count` bits from page `first` set? True for none."""
        cdef size_t start, length
        cdef bint answer
        run_of(first, count, self.size, &start, &length)
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
        cdef Pinned pinned = pinned_runs(runs, self.size)
        cdef size_t changed, done
        with nogil:
            changed = self.c_apply_runs(pinned.numbers(), pinned.n, True, &done)
        check_done(done, pinned.n)
        return changed

    def clear_runs(self, runs):
        """Clear every page of some runs; as `set_runs`, returns how many bits were set before."""
        cdef Pinned pinned = pinned_runs(runs, self.size)
        cdef size_t changed, done
        with nogil:
            changed = self.c_apply_runs(pinned.numbers(), pinned.n, False, &done)
        check_done(done, pinned.n)
        return changed

    def set_indices(self, pages):
        """Set the bits of an array of page numbers, shape (n,), in any order, repeated or not.

        Returns how many bits were clear before, and raises, as `set_runs`.
        """
        cdef Pinned pinned = pinned_pages(pages, self.size)
        cdef size_t changed, done
        with nogil:
            changed = self.c_apply_indices(pinned.numbers(), pinned.n, True, &done)
        check_done(done, pinned.n)
        return changed

    def clear_indices(self, pages):
        """Clear the bits of an array of page numbers; as `set_indices`, returns how many bits were set
        before."""
        cdef Pinned pinned = pinned_pages(pages, self.size)
        cdef size_t changed, done
        with nogil:
            changed = self.c_apply_indices(pinned.numbers(), pinned.n, False, &done)
        check_done(done, pinned.n)
        return changed

    def test_indices(self, pages):
        """The bits of an array of page numbers, as a bool array of the same shape (n,)."""
        cdef Pinned pinned = pinned_pages(pages, self.size)
        cdef Pinned answers = Pinned(np.empty(pinned.n, dtype=np.bool_), True)
        cdef uint8_t *flags = <uint8_t *>answers.view.buf
        cdef size_t done
        with nogil:
            pagecore_test_indices(self.c_words, pinned.numbers(), pinned.n, self.size, flags, &done)
        check_done(done, pinned.n)
        return answers.array

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
        run_of(first, count, self.size, &start, &length)
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
        cdef size_t found, begin = self._start(start)
        with nogil:
            found = self.c_find_set(begin)
        return found if found != self.size else None

    def find_clear(self, start=0):
        """The first clear page at or after `start`, or None."""
        cdef size_t found, begin = self._start(start)
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
        """The first page at or after `start`, a multiple of `align`, from which `count` bits are clear, or
        None."""
        cdef size_t length = count_of(count, "count", 1)
        cdef size_t multiple = count_of(align, "align", 1)
        cdef size_t found, begin = self._start(start)
        with nogil:
            found = pagecore_find_clear_area(self.c_words, begin, self.size, length, multiple)
        return found if found != self.size else None

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
            fresh.c_words_changed(0, common)
        return fresh

    def copy_range(self, Bitmap source not None, source_first, first, count):
        """Copy `count` bits of `source` from its page `source_first` onto this bitmap's pages from `first`.

        Returns how many bits changed. Bits outside the range are not touched; the two ranges may overlap.
        """
        cdef size_t at, length, start, changed
        run_of(source_first, count, source.size, &at, &length)
        run_of(first, count, self.size, &start, &length)
        # Through a copy where both may be the same memory: shifted words would be read after they were
        # written.
        if source is self or source._owner is not None or self._owner is not None:
            source = source.copy()
        with nogil:
            changed = pagecore_copy_range(source.c_words, at, self.c_words, start, length)
            self.c_words_changed(start, length)
        return changed

    def drain_into(self, Bitmap dest not None):
        """Move all bits into `dest`, while any threads and processes use both: fetch and clear words here, then OR
        them in there.

        Parameters
        ----------
        dest : Bitmap
            Another bitmap of the same size.

        Returns
        -------
        int
            How many bits of `dest` were newly set. A bit set here during the call is either moved or still
            set.

        Raises
        ------
        ValueError
            The sizes differ, or `dest` is this bitmap.
        """
        cdef size_t newly
        self._other(dest)
        with nogil:
            newly = self.c_drain_into(dest)
        return newly

    def drain_into_owned(self, Bitmap dest not None):
        """As `drain_into`, where nobody else uses `dest` during the call: a bit set there meanwhile may be lost."""
        cdef size_t newly
        self._other(dest)
        with nogil:
            newly = self.c_drain_into_owned(dest)
        return newly

    def drain_owned_into_owned(self, Bitmap dest not None):
        """As `drain_into`, where nobody else uses either bitmap during the call; a bit set meanwhile may be lost."""
        cdef size_t newly
        self._other(dest)
        with nogil:
            newly = self.c_drain_owned_into_owned(dest)
        return newly

    def merge(self, Bitmap other not None):
        """Set here what is set in `other`; returns how many bits were newly set."""
        cdef size_t newly
        self._same_size(other)
        with nogil:
            newly = self.c_merge(other)
        return newly

    def merge_owned(self, Bitmap other not None):
        """As `merge`, where nobody else uses this bitmap during the call: a bit set here meanwhile may be lost."""
        cdef size_t newly
        self._same_size(other)
        with nogil:
            newly = self.c_merge_owned(other)
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

    def __ior__(self, Bitmap other not None):
        self.merge(other)
        return self

    def __iand__(self, Bitmap other not None):
        self._same_size(other)
        with nogil:
            self.c_intersect(other)
        return self

    def __ixor__(self, Bitmap other not None):
        self._same_size(other)
        with nogil:
            pagecore_flip(self.c_words, (<Bitmap>other).c_words, self.size)
            self.c_words_changed(0, self.size)
        return self

    def __or__(self, Bitmap other not None):
        return self._combined(other, PAGECORE_OR)

    def __and__(self, Bitmap other not None):
        return self._combined(other, PAGECORE_AND)

    def __xor__(self, Bitmap other not None):
        return self._combined(other, PAGECORE_XOR)

    cdef Bitmap _combined(self, Bitmap other, int how):
        cdef Bitmap fresh
        self._same_size(other)
        fresh = Bitmap(self.size)
        with nogil:
            pagecore_combine(self.c_words, other.c_words, fresh.c_words, self.size, how)
            fresh.c_words_changed(0, self.size)
        return fresh

    def __invert__(self):
        cdef Bitmap fresh = Bitmap(self.size)
        with nogil:
            pagecore_copy(self.c_words, fresh.c_words, self.size, <uint64_t>-1)
            fresh.c_words_changed(0, self.size)
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

    # ---- checks and conversions behind the methods

    cdef Py_ssize_t _page(self, object page) except -1:
        cdef Py_ssize_t number = pagecore_small_int(page)
        if <size_t>number < self.size:
            return number
        return self._other_page(page)


cdef str tail_message(size_t size, uint64_t tail):
    return f"bits past page {size} are set in the last word: {tail:#018x}"


# As c_set, in line: a call through the table of methods costs as much as what it does.
cdef inline void set_bit(Bitmap bitmap, size_t page) noexcept:
    pagecore_or(&bitmap.c_words[page >> 6], <uint64_t>1 << (page & 63))
    pagecore_note_page(<pagecore_keeper *>bitmap._keeper, page)
