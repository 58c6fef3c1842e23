/* The only file that spells atomics. Words are plain uint64_t in our own or in shared memory.
 *
 * Order table. "Pairs with" names the access on the other side; each call site says which pair it is.
 *
 *   function                     order      why it is enough
 *   pagecore_load_relaxed        relaxed    a snapshot: counts, scans, the look before a read-modify-write
 *   pagecore_load_acquire        acquire    "is it received?": pairs with the release that follows the placement,
 *                                           so that whoever sees the bit sees the page
 *   pagecore_store_release       release    publishes what was written before it (an index, a flag)
 *   pagecore_load_acquire_32,    acquire    the same for words of 32 bits that the kernel shares with us: the flags of
 *   pagecore_store_release_32    release    a dirty ring's entry, which hand its other fields over and back
 *   pagecore_or, pagecore_and    acq_rel    no result: one locked instruction. A writer marks a page AFTER it wrote
 *                                           it; the release makes the write visible to whoever drains the bit
 *   pagecore_fetch_or/_and       acq_rel    the old word decides who won a bit (claims, hints)
 *   pagecore_exchange            acq_rel    drains a word; the acquire orders the page read after the drain
 *   pagecore_fence               seq_cst    store, then load, of two different words (none of the above orders that)
 *   pagecore_fence_after_rmw     seq_cst    the same after a read-modify-write, which on x86 is such a fence already
 *   pagecore_exchange_pair       acq_rel    two neighbours of one 16-byte unit in one locked instruction
 *   pagecore_or_pair             acq_rel    as pagecore_fetch_or, for two neighbours
 *   pagecore_begin_transaction   seq_cst    until pagecore_end_transaction: plain loads and stores, all or nothing
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

static inline uint32_t pagecore_load_acquire_32(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void pagecore_store_release_32(uint32_t *word, uint32_t value)
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

static inline void pagecore_fence_after_rmw(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* The loads before it come before the loads after it. */
static inline void pagecore_fence_acquire(void)
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
}

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
/* `lock cmpxchg16b`, which wants 16-byte alignment and a processor that has it (_cpu.h). On failure seen[] holds
 * what is there now. gcc would call libatomic for the builtin, and libatomic would ask the processor each time. */
static inline int pagecore_compare_exchange_pair(uint64_t *pair, uint64_t seen[2], uint64_t low, uint64_t high)
{
    char same;
    __asm__ __volatile__("lock cmpxchg16b %1"
                         : "=@ccz"(same), "+m"(*(unsigned __int128 *)pair), "+a"(seen[0]), "+d"(seen[1])
                         : "b"(low), "c"(high)
                         : "memory");
    return same;
}

static inline void pagecore_exchange_pair(uint64_t *pair, uint64_t seen[2])
{
    seen[0] = __atomic_load_n(&pair[0], __ATOMIC_RELAXED);
    seen[1] = __atomic_load_n(&pair[1], __ATOMIC_RELAXED);
    while (!pagecore_compare_exchange_pair(pair, seen, 0, 0))
        ;
}

static inline void pagecore_or_pair(uint64_t *pair, const uint64_t bits[2], uint64_t seen[2])
{
    seen[0] = __atomic_load_n(&pair[0], __ATOMIC_RELAXED);
    seen[1] = __atomic_load_n(&pair[1], __ATOMIC_RELAXED);
    while (!pagecore_compare_exchange_pair(pair, seen, seen[0] | bits[0], seen[1] | bits[1]))
        ;
}

/* A memory transaction (TSX): what stands between begin and end happens at once, with the order of a locked
 * instruction, or not at all, and then begin returns 0 a second time. Only where _cpu.h found that transactions
 * succeed. */
static inline __attribute__((always_inline)) int pagecore_begin_transaction(void)
{
    unsigned status = ~0u;
    __asm__ __volatile__(".byte 0xc7, 0xf8; .long 0" : "+a"(status) : : "memory");
    return status == ~0u;
}

static inline __attribute__((always_inline)) void pagecore_end_transaction(void)
{
    __asm__ __volatile__(".byte 0x0f, 0x01, 0xd5" : : : "memory");
}
#endif

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
