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
from pagecore._runs cimport Pinned, count_of

cdef size_t CACHE_LINE = 64
cdef Py_ssize_t WORD_BYTES = sizeof(uint64_t)
cdef char *WORD_FORMAT = b"Q"


@cython.no_gc_clear     # clearing a cycle must not unpin memory that another object still uses
cdef class Words:
    """Base of Bitmap, which alone is public. Words and size are written once, here: nothing needs a lock."""

    def __cinit__(self, npages):
        cdef Pinned memory
        cdef Py_ssize_t size
        if type(npages) is tuple:       # from_buffer: (size, pinned memory), both checked
            size, memory = npages
            self._owner = memory
            self.c_words = <uint64_t *>memory.view.buf
        else:
            size = count_of(npages, "size")
            # A cache line more: room to begin at one, and an address to export at size 0.
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

    cdef size_t c_drain_into(self, Words dest) noexcept nogil:
        return pagecore_drain(self.c_words, dest.c_words, self.size)

    cdef size_t c_merge(self, Words other) noexcept nogil:
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

    cdef size_t c_take_runs(self, size_t start, size_t stop, size_t max_pages, int64_t *pairs,
                            size_t capacity, size_t *next) noexcept nogil:
        return pagecore_take_runs(self.c_words, start, stop, max_pages, pairs, capacity, next)

    cdef size_t c_set_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return pagecore_apply_runs(self.c_words, pairs, n, self.size, True, &done)

    cdef size_t c_clear_runs(self, const int64_t *pairs, size_t n) noexcept nogil:
        cdef size_t done
        return pagecore_apply_runs(self.c_words, pairs, n, self.size, False, &done)

    cdef size_t c_intersect(self, Words other) noexcept nogil:
        return pagecore_intersect(self.c_words, other.c_words, self.size)

    cdef size_t c_subtract(self, Words other) noexcept nogil:
        return pagecore_subtract(self.c_words, other.c_words, self.size)

    cdef void c_copy_into(self, Words fresh) noexcept nogil:
        pagecore_copy(self.c_words, fresh.c_words, self.size, 0)
