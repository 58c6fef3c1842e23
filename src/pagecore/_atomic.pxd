# _atomic.h. Not for consumers: they have no include path to the headers.
from libc.stdint cimport uint64_t

cdef extern from "_atomic.h" nogil:
    uint64_t pagecore_load_relaxed(const uint64_t *word)
    uint64_t pagecore_load_acquire(const uint64_t *word)
    void pagecore_store_relaxed(uint64_t *word, uint64_t value)
    void pagecore_store_release(uint64_t *word, uint64_t value)
    void pagecore_or(uint64_t *word, uint64_t mask)
    void pagecore_and(uint64_t *word, uint64_t mask)
    uint64_t pagecore_fetch_or(uint64_t *word, uint64_t mask)
    uint64_t pagecore_fetch_add(uint64_t *word, uint64_t value)
    uint64_t pagecore_exchange(uint64_t *word, uint64_t value)
    bint pagecore_compare_exchange(uint64_t *word, uint64_t *expected, uint64_t value)
    void pagecore_fence()
    void pagecore_fence_after_rmw()
    bint pagecore_test_bit(const uint64_t *words, uint64_t bit)
    bint pagecore_test_and_set_bit(uint64_t *words, uint64_t bit)
    bint pagecore_test_and_clear_bit(uint64_t *words, uint64_t bit)
