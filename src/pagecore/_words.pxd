from libc.stdint cimport int64_t, uint64_t


cdef class Words:
    """What a Bitmap is to native code. The c_ methods are nogil, atomic per word, and trust their
    arguments."""

    # (size + 63) // 64 words, LSB first; bits past size are zero. Read them freely. Whoever writes them directly tells
    # c_words_changed afterwards, or calls c_share_words once before.
    cdef uint64_t *c_words
    cdef size_t c_nwords
    cdef readonly size_t size       # pages
    cdef object _owner              # keeps the memory of from_buffer alive; None where the words are ours
    cdef void *_allocation          # what to free, or to unmap; NULL where the words are not ours
    cdef size_t _mapped             # bytes to unmap; 0 where it is to be freed
    cdef Py_ssize_t _shape          # c_nwords, where exported views may point at it
    cdef void *_keeper              # count and summary (_keeper.h); NULL where others write the words
    cdef void *_kept                # the same, to be freed

    cdef Py_ssize_t _other_page(self, object page) except -1
    cdef Py_ssize_t _start(self, object start) except -1
    cdef int _other(self, Words dest) except -1
    cdef int _same_size(self, Words other) except -1
    cdef int _allocate(self, size_t size, object npages) except -1
    cdef int _keep(self, size_t size, object npages, bint summary) except -1
    cdef bint c_test(self, size_t page) noexcept nogil
    cdef void c_set(self, size_t page) noexcept nogil
    cdef void c_clear(self, size_t page) noexcept nogil
    cdef bint c_test_and_set(self, size_t page) noexcept nogil
    cdef bint c_test_and_clear(self, size_t page) noexcept nogil
    # Ranges return how many bits changed.
    cdef size_t c_set_range(self, size_t first, size_t count) noexcept nogil
    cdef size_t c_clear_range(self, size_t first, size_t count) noexcept nogil
    cdef size_t c_count(self) noexcept nogil
    cdef size_t c_count_range(self, size_t first, size_t count) noexcept nogil
    # The first set (clear) page at or after `start`, or `size` where there is none.
    cdef size_t c_find_set(self, size_t start) noexcept nogil
    cdef size_t c_find_clear(self, size_t start) noexcept nogil
    # Move all bits into dest, of the same size; return how many bits of dest were newly set. Any threads and processes may
    # use both meanwhile; ... this one, but dest is the caller's alone; both are the caller's alone.
    cdef size_t c_drain_into(self, Words dest) noexcept nogil
    cdef size_t c_drain_into_owned(self, Words dest) noexcept nogil
    cdef size_t c_drain_owned_into_owned(self, Words dest) noexcept nogil
    # ORs `other` into self and returns how many bits of self were newly set.
    cdef size_t c_merge(self, Words other) noexcept nogil

    cdef bint c_test_range(self, size_t first, size_t count) noexcept nogil
    cdef size_t c_find_last(self) noexcept nogil
    # The bits of `mask` in word `index` that this call set (cleared): it won these, whoever else tried.
    cdef uint64_t c_set_word(self, size_t index, uint64_t mask) noexcept nogil
    cdef uint64_t c_clear_word(self, size_t index, uint64_t mask) noexcept nogil
    # The run that begins in [start, stop), cut at stop: its length (0: there is none) and *first.
    cdef size_t c_next_run(self, size_t start, size_t stop, size_t *first) noexcept nogil
    # Up to `capacity` (first, count) pairs, or indices, from `start`; *next is where to go on, `size` at the
    # end.
    cdef size_t c_runs(self, size_t start, int64_t *pairs, size_t capacity, size_t *next) noexcept nogil
    cdef size_t c_indices(self, size_t start, int64_t *indices, size_t capacity, size_t *next) noexcept nogil
    # Fetches and clears runs in [start, stop), at most `max_pages` bits and `capacity` pairs; exactly what it
    # lists.
    cdef size_t c_take_runs(self, size_t start, size_t stop, size_t max_pages, int64_t *pairs,
                            size_t capacity, size_t *next) noexcept nogil
    # Return how many bits changed; every run must lie inside.
    cdef size_t c_set_runs(self, const int64_t *pairs, size_t n) noexcept nogil
    cdef size_t c_clear_runs(self, const int64_t *pairs, size_t n) noexcept nogil
    # The same for arrays that another thread may change meanwhile; *done says how many entries fitted.
    cdef size_t c_apply_runs(self, const int64_t *pairs, size_t n, bint set, size_t *done) noexcept nogil
    cdef size_t c_apply_indices(self, const int64_t *pages, size_t n, bint set, size_t *done) noexcept nogil
    # self &= other, self &= ~other: return how many bits were cleared.
    cdef size_t c_intersect(self, Words other) noexcept nogil
    cdef size_t c_subtract(self, Words other) noexcept nogil
    # A private copy of the words, as another Words of the same size that nobody else uses yet.
    cdef void c_copy_into(self, Words fresh) noexcept nogil
    # self |= other where self is the caller's alone during the call: no locks. Returns how many bits were newly set.
    cdef size_t c_merge_owned(self, Words other) noexcept nogil
    # out = self | other, of the same size; out is the caller's alone.
    cdef void c_or_into(self, Words other, Words out) noexcept nogil
    # How many runs begin at or after `start`.
    cdef size_t c_count_runs(self, size_t start) noexcept nogil
    # After something other than these methods changed the words of pages [first, first + count).
    cdef void c_words_changed(self, size_t first, size_t count) noexcept nogil
    # The words, for writers that will not tell: from here on neither a count nor a summary is kept. Before they are written.
    cdef uint64_t *c_share_words(self) noexcept nogil
