"""Words: the memory of a bitmap, with the nogil face that other native code drives."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree
from libc.stdint cimport int64_t, uint64_t, uintptr_t

from pagecore._atomic cimport (
    pagecore_and,
    pagecore_or,
    pagecore_test_and_clear_bit,
    pagecore_test_and_set_bit,
    pagecore_test_bit,
)
from pagecore._bitscan cimport *
from pagecore._map cimport *
from pagecore._runs cimport Pinned, PyNumber_AsSsize_t, count_of

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int descriptor, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_HUGEPAGE
    void *MAP_FAILED

cdef size_t CACHE_LINE = 64
# From here on words are mapped on their own, at a multiple of it, and ask for huge pages: a scan is stopped by the end of
# every small one.
cdef size_t HUGE_PAGE = 2 << 20
# Bitmaps with fewer pages are scanned in less time than a summary needs to pay off.
cdef size_t LEAST_SUMMARY = 1 << 16
cdef Py_ssize_t WORD_BYTES = sizeof(uint64_t)
cdef char *WORD_FORMAT = b"Q"


@cython.no_gc_clear     # clearing a cycle must not unpin memory that another object still uses
cdef class Words:
    """Base of Bitmap, which alone is public. Words and size are written once, here: nothing needs a lock."""

    def __cinit__(self, npages, *, summary=None):
        cdef Pinned memory
        cdef Py_ssize_t size
        if type(npages) is tuple:       # from_buffer: (size, pinned memory), both checked
            size, memory = npages
            self._owner = memory
            self.c_words = <uint64_t *>memory.view.buf
        else:
            size = count_of(npages, "size")
            self._allocate(size, npages)
            self._keep(size, npages, summary if summary is not None else <size_t>size >= LEAST_SUMMARY)
        self.size = size
        self.c_nwords = pagecore_word_count(size)
        self._shape = self.c_nwords

    cdef int _allocate(self, size_t size, object npages) except -1:
        cdef size_t length = pagecore_word_count(size) * sizeof(uint64_t)
        cdef size_t unit = CACHE_LINE
        if length >= HUGE_PAGE:
            unit = HUGE_PAGE
            self._mapped = length + HUGE_PAGE
            self._allocation = mmap(
                NULL, self._mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
            )
            if self._allocation is MAP_FAILED:
                self._allocation = NULL
        else:
            # A cache line more: room to begin at one, and an address to export at size 0.
            self._allocation = PyMem_RawCalloc(1, length + CACHE_LINE)
        if self._allocation is NULL:
            raise MemoryError(f"no memory for a bitmap of {npages} pages")
        self.c_words = <uint64_t *>((<uintptr_t>self._allocation + unit - 1) & ~<uintptr_t>(unit - 1))
        if self._mapped:
            madvise(self.c_words, length, MADV_HUGEPAGE)     # an advice: without it the words are only slower
        return 0

    cdef int _keep(self, size_t size, object npages, bint summary) except -1:
        cdef size_t words = pagecore_summary_words(size) if summary else 0
        # The keeper begins at a cache line of its own: single bits load from it what only whole calls write.
        self._kept = PyMem_RawCalloc(1, sizeof(pagecore_keeper) + 2 * CACHE_LINE + words * sizeof(uint64_t))
        if self._kept is NULL:
            raise MemoryError(f"no memory for a bitmap of {npages} pages")
        cdef uintptr_t start = (<uintptr_t>self._kept + CACHE_LINE - 1) & ~<uintptr_t>(CACHE_LINE - 1)
        self._keeper = <void *>start
        if summary:
            (<pagecore_keeper *>start).summary = <uint64_t *>(start + CACHE_LINE)
        return 0

    def __dealloc__(self):
        if self._mapped and self._allocation is not NULL:
            munmap(self._allocation, self._mapped)
        else:
            PyMem_RawFree(self._allocation)
        PyMem_RawFree(self._kept)

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

    # ---- checks behind the methods of Bitmap

    cdef Py_ssize_t _other_page(self, object page) except -1:
        cdef Py_ssize_t number = PyNumber_AsSsize_t(page, NULL)
        if number < 0 or <size_t>number >= self.size:
            raise IndexError(f"page {page} is outside [0, {self.size})")
        return number

    cdef Py_ssize_t _start(self, object start) except -1:
        cdef Py_ssize_t number = PyNumber_AsSsize_t(start, NULL)
        if number < 0 or <size_t>number > self.size:
            raise IndexError(f"page {start} is outside [0, {self.size}]")
        return number

    cdef int _other(self, Words dest) except -1:
        self._same_size(dest)
        if dest is self:
            raise ValueError("a bitmap cannot be drained into itself")
        return 0

    cdef int _same_size(self, Words other) except -1:
        if other.size != self.size:
            raise ValueError(f"the bitmaps differ in size: {self.size} and {other.size} pages")
        return 0

    # ---- the C face: trusts its arguments

    cdef bint c_test(self, size_t page) noexcept nogil:
        return pagecore_test_bit(self.c_words, page)

    cdef void c_set(self, size_t page) noexcept nogil:
        pagecore_or(&self.c_words[page >> 6], <uint64_t>1 << (page & 63))
        note_set(self, page)

    cdef void c_clear(self, size_t page) noexcept nogil:
        pagecore_and(&self.c_words[page >> 6], ~(<uint64_t>1 << (page & 63)))
        pagecore_note_cleared(<pagecore_keeper *>self._keeper)

    cdef bint c_test_and_set(self, size_t page) noexcept nogil:
        cdef bint before = pagecore_test_and_set_bit(self.c_words, page)
        note_set(self, page)
        return before

    cdef bint c_test_and_clear(self, size_t page) noexcept nogil:
        cdef bint before = pagecore_test_and_clear_bit(self.c_words, page)
        pagecore_note_cleared(<pagecore_keeper *>self._keeper)
        return before

    cdef size_t c_set_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_map_set_range(map_of(self), first, first + count)

    cdef size_t c_clear_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_map_clear_range(map_of(self), first, first + count)

    cdef size_t c_count(self) noexcept nogil:
        return pagecore_map_count(map_of(self))

    cdef size_t c_count_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_count(self.c_words, first, first + count)

    cdef size_t c_find_set(self, size_t start) noexcept nogil:
        return pagecore_map_find_set(map_of(self), start, self.size)

    cdef size_t c_find_clear(self, size_t start) noexcept nogil:
        return pagecore_find_clear(self.c_words, start, self.size)

    cdef size_t c_drain_into(self, Words dest) noexcept nogil:
        return pagecore_map_drain(map_of(self), map_of(dest), False, False)

    cdef size_t c_drain_into_owned(self, Words dest) noexcept nogil:
        return pagecore_map_drain(map_of(self), map_of(dest), False, True)

    cdef size_t c_drain_owned_into_owned(self, Words dest) noexcept nogil:
        return pagecore_map_drain(map_of(self), map_of(dest), True, True)

    cdef size_t c_merge(self, Words other) noexcept nogil:
        return pagecore_map_merge(map_of(other), map_of(self))

    cdef bint c_test_range(self, size_t first, size_t count) noexcept nogil:
        return pagecore_test_range(self.c_words, first, first + count)

    cdef size_t c_find_last(self) noexcept nogil:
        return pagecore_find_last(self.c_words, self.size)

    cdef uint64_t c_set_word(self, size_t index, uint64_t mask) noexcept nogil:
        cdef uint64_t won = pagecore_set_bits(&self.c_words[index], mask)
        note_set(self, 64 * index)
        return won

    cdef uint64_t c_clear_word(self, size_t index, uint64_t mask) noexcept nogil:
        cdef uint64_t won = pagecore_clear_bits(&self.c_words[index], mask)
        pagecore_note_cleared(<pagecore_keeper *>self._keeper)
        return won

    cdef size_t c_next_run(self, size_t start, size_t stop, size_t *first) noexcept nogil:
        return pagecore_next_run(self.c_words, pagecore_map_find_set(map_of(self), start, stop), stop, first)

    cdef size_t c_runs(self, size_t start, int64_t *pairs, size_t capacity, size_t *next) noexcept nogil:
        return pagecore_map_runs(map_of(self), start, pairs, capacity, next)

    cdef size_t c_indices(self, size_t start, int64_t *indices, size_t capacity, size_t *next) noexcept nogil:
        return pagecore_map_indices(map_of(self), start, indices, capacity, next)

    cdef size_t c_take_runs(self, size_t start, size_t stop, size_t max_pages, int64_t *pairs,
                            size_t capacity, size_t *next) noexcept nogil:
        return pagecore_map_take_runs(map_of(self), start, stop, max_pages, pairs, capacity, next)

    cdef size_t c_set_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return self.c_apply_runs(pairs, n, True, &done)

    cdef size_t c_clear_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return self.c_apply_runs(pairs, n, False, &done)

    cdef size_t c_apply_runs(self, const int64_t *pairs, size_t n, bint set, size_t *done) noexcept nogil:
        return pagecore_map_apply_runs(map_of(self), pairs, n, set, done)

    cdef size_t c_apply_indices(self, const int64_t *pages, size_t n, bint set, size_t *done) noexcept nogil:
        return pagecore_map_apply_indices(map_of(self), pages, n, set, done)

    cdef size_t c_intersect(self, Words other) noexcept nogil:
        cdef size_t cleared
        pagecore_begin_call(<pagecore_keeper *>self._keeper)
        cleared = pagecore_intersect(self.c_words, other.c_words, self.size)
        pagecore_end_call(<pagecore_keeper *>self._keeper, 0, cleared)
        return cleared

    cdef size_t c_subtract(self, Words other) noexcept nogil:
        cdef size_t cleared
        pagecore_begin_call(<pagecore_keeper *>self._keeper)
        cleared = pagecore_subtract(self.c_words, other.c_words, self.size)
        pagecore_end_call(<pagecore_keeper *>self._keeper, 0, cleared)
        return cleared

    cdef void c_copy_into(self, Words fresh) noexcept nogil:
        pagecore_copy(self.c_words, fresh.c_words, self.size, 0)
        fresh.c_words_changed(0, fresh.size)

    cdef size_t c_merge_owned(self, Words other) noexcept nogil:
        cdef size_t newly
        pagecore_begin_call(<pagecore_keeper *>self._keeper)
        newly = pagecore_combine(self.c_words, other.c_words, self.c_words, self.size, PAGECORE_OR)
        if newly and self._keeper is not NULL:
            pagecore_mark(<pagecore_keeper *>self._keeper, 0, self.size)
        pagecore_end_call(<pagecore_keeper *>self._keeper, newly, 0)
        return newly

    cdef void c_or_into(self, Words other, Words out) noexcept nogil:
        pagecore_combine(self.c_words, other.c_words, out.c_words, self.size, PAGECORE_OR)
        out.c_words_changed(0, self.size)

    cdef size_t c_count_runs(self, size_t start) noexcept nogil:
        return pagecore_map_count_runs(map_of(self), start)

    cdef void c_words_changed(self, size_t first, size_t count) noexcept nogil:
        pagecore_note_set(<pagecore_keeper *>self._keeper, first, first + count)

    cdef uint64_t *c_share_words(self) noexcept nogil:
        self._keeper = NULL
        return self.c_words


cdef inline pagecore_map map_of(Words words) noexcept nogil:
    cdef pagecore_map map
    map.words = words.c_words
    map.size = words.size
    map.keeper = <pagecore_keeper *>words._keeper
    return map


cdef inline void note_set(Words words, size_t page) noexcept nogil:
    pagecore_note_set(<pagecore_keeper *>words._keeper, page, page + 1)
