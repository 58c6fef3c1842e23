/* The only file that spells atomics. Words are plain uint64_t in our own or in shared memory.
 *
 * Order table. "Pairs with" names the access on the other side; each call site says which pair it is.
 *
 *   function                     order      why it is enough
 *   pagecore_load_relaxed        relaxed    a snapshot: counts, scans, the look before a read-modify-write
 *   pagecore_load_acquire        acquire    "is it received?": pairs with the release that follows the placement,
 *                                           so that whoever sees the bit sees the page
 *   pagecore_store_release       release    publishes what was written before it (an index, a flag)
 *   pagecore_or, pagecore_and    acq_rel    no result: one locked instruction. A writer marks a page AFTER it wrote
 *                                           it; the release makes the write visible to whoever drains the bit
 *   pagecore_fetch_or/_and       acq_rel    the old word decides who won a bit (claims, hints)
 *   pagecore_exchange            acq_rel    drains a word; the acquire orders the page read after the drain
 *   pagecore_fence               seq_cst    store, then load, of two different words (none of the above orders that)
 *
 * All read-modify-writes of one word are totally ordered: a bit set after a drain is found by the next drain.
 */
#ifndef PAGECORE_ATOMIC_H
#define PAGECORE_ATOMIC_H

#include <stdint.h>

static inline uint64_t pagecore_load_relaxed(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline uint64_t pagecore_load_acquire(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void pagecore_store_relaxed(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline void pagecore_store_release(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline void pagecore_or(uint64_t *word, uint64_t mask)
{
    (void)__atomic_fetch_or(word, mask, __ATOMIC_ACQ_REL);
}

static inline void pagecore_and(uint64_t *word, uint64_t mask)
{
    (void)__atomic_fetch_and(word, mask, __ATOMIC_ACQ_REL);
}

static inline uint64_t pagecore_fetch_or(uint64_t *word, uint64_t mask)
{
    return __atomic_fetch_or(word, mask, __ATOMIC_ACQ_REL);
}

static inline uint64_t pagecore_fetch_and(uint64_t *word, uint64_t mask)
{
    return __atomic_fetch_and(word, mask, __ATOMIC_ACQ_REL);
}

static inline uint64_t pagecore_fetch_add(uint64_t *word, uint64_t value)
{
    return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}

static inline uint64_t pagecore_exchange(uint64_t *word, uint64_t value)
{
    return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}

static inline int pagecore_compare_exchange(uint64_t *word, uint64_t *expected, uint64_t value)
{
    return __atomic_compare_exchange_n(word, expected, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static inline void pagecore_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* One visible bit and only its old value wanted: gcc makes one `lock bts`/`lock btr` of it. */
static inline int pagecore_test_and_set_bit(uint64_t *words, uint64_t bit)
{
    const uint64_t mask = UINT64_C(1) << (bit & 63);
    return (__atomic_fetch_or(&words[bit >> 6], mask, __ATOMIC_ACQ_REL) & mask) != 0;
}

static inline int pagecore_test_and_clear_bit(uint64_t *words, uint64_t bit)
{
    const uint64_t mask = UINT64_C(1) << (bit & 63);
    return (__atomic_fetch_and(&words[bit >> 6], ~mask, __ATOMIC_ACQ_REL) & mask) != 0;
}

static inline int pagecore_test_bit(const uint64_t *words, uint64_t bit)
{
    return (int)(pagecore_load_acquire(&words[bit >> 6]) >> (bit & 63)) & 1;
}

#endif
