# _bitscan.h. Not for consumers: they have no include path to the headers.
from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from "_bitscan.h" nogil:
    int PAGECORE_OR
    int PAGECORE_AND
    int PAGECORE_XOR
    size_t pagecore_combine(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t end, int how)
    size_t pagecore_word_count(size_t bits)
    uint64_t pagecore_tail(const uint64_t *words, size_t end)
    size_t pagecore_count(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_find_clear(const uint64_t *words, size_t first, size_t end)
    size_t pagecore_find_last(const uint64_t *words, size_t end)
    size_t pagecore_find_clear_area(const uint64_t *words, size_t first, size_t end, size_t length,
                                    size_t align)
    bint pagecore_test_range(const uint64_t *words, size_t first, size_t end)
    bint pagecore_equal(const uint64_t *a, const uint64_t *b, size_t end)
    bint pagecore_intersects(const uint64_t *a, const uint64_t *b, size_t end)
    size_t pagecore_next_run(const uint64_t *words, size_t start, size_t end, size_t *first)
    uint64_t pagecore_set_bits(uint64_t *word, uint64_t mask)
    uint64_t pagecore_clear_bits(uint64_t *word, uint64_t mask)
    size_t pagecore_intersect(uint64_t *words, const uint64_t *other, size_t end)
    size_t pagecore_subtract(uint64_t *words, const uint64_t *other, size_t end)
    void pagecore_flip(uint64_t *words, const uint64_t *other, size_t end)
    size_t pagecore_copy_range(const uint64_t *source, size_t at, uint64_t *dest, size_t first, size_t count)
    size_t pagecore_check_runs(const int64_t *pairs, size_t n, size_t end)
    size_t pagecore_check_indices(const int64_t *indices, size_t n, size_t end)
    void pagecore_test_indices(const uint64_t *words, const int64_t *indices, size_t n, size_t end,
                               uint8_t *answers, size_t *done)
    void pagecore_copy(const uint64_t *source, uint64_t *dest, size_t end, uint64_t flip)
    void pagecore_to_bytes(const uint64_t *words, size_t end, unsigned char *data)
    void pagecore_from_bytes(const unsigned char *data, uint64_t *words, size_t end)
