/* Single words of a bitmap: 64 bits, least significant first, in our own or in shared memory.
 *
 * A look may only spare a CLEAR. A set is always a locked operation, also of a bit that is set already: a writer
 * that skipped it could be overtaken by a drain whose reader then misses the write (the drain's read-modify-write
 * must meet the writer's).
 */
#ifndef PAGECORE_BITWORD_H
#define PAGECORE_BITWORD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_atomic.h"

#define PAGECORE_WORD_BITS 64
#define PAGECORE_ALL_ONES (~UINT64_C(0))

static inline size_t pagecore_word_count(size_t bits)
{
    return bits / PAGECORE_WORD_BITS + (bits % PAGECORE_WORD_BITS != 0);
}

static inline unsigned pagecore_popcount(uint64_t word)
{
    return (unsigned)__builtin_popcountll(word);
}

/* `length` ones from bit 0; length is 0 to 64. */
static inline uint64_t pagecore_ones(size_t length)
{
    return length ? PAGECORE_ALL_ONES >> (PAGECORE_WORD_BITS - length) : 0;
}

/* The length of the run of ones that begins at bit 0; 64 where all are ones. */
static inline unsigned pagecore_ones_at_start(uint64_t word)
{
    return ~word ? (unsigned)__builtin_ctzll(~word) : PAGECORE_WORD_BITS;
}

/* The bits of word `index` that lie in [first, end). */
static inline uint64_t pagecore_mask(size_t index, size_t first, size_t end)
{
    uint64_t mask = PAGECORE_ALL_ONES;
    if (index == first >> 6)
        mask <<= first & 63;
    if (index == end >> 6)
        mask &= pagecore_ones(end & 63);
    return mask;
}

/* Each word that holds bits of [first, end), with the mask of those bits. */
#define PAGECORE_EACH_WORD(index, mask, first, end) \
    for (uint64_t index = (first) >> 6, mask;       \
         index < pagecore_word_count(end) && ((mask = pagecore_mask(index, (first), (end))), 1); ++index)

/* Both give the bits of `mask` that this call changed. acq_rel: the old word decides who won each bit. */
static inline uint64_t pagecore_set_bits(uint64_t *word, uint64_t mask)
{
    const int whole = mask == PAGECORE_ALL_ONES;
    return mask & ~(whole ? pagecore_exchange(word, mask) : pagecore_fetch_or(word, mask));
}

static inline uint64_t pagecore_clear_bits(uint64_t *word, uint64_t mask)
{
    if (!(pagecore_load_relaxed(word) & mask))
        return 0;
    return mask & (mask == PAGECORE_ALL_ONES ? pagecore_exchange(word, 0) : pagecore_fetch_and(word, ~mask));
}

/* Replace the bits of `mask` by those of `bits`; returns the bits that changed. */
static inline uint64_t pagecore_replace_bits(uint64_t *word, uint64_t mask, uint64_t bits)
{
    uint64_t seen = pagecore_load_relaxed(word);
    while (!pagecore_compare_exchange(word, &seen, (seen & ~mask) | (bits & mask)))
        ;
    return (seen ^ bits) & mask;
}

/* Whether the summary, one bit for each line of 512 bits, marks a line that [first, end) touches. acquire: see
 * _keeper.h. */
static inline int pagecore_any_line(const uint64_t *summary, size_t first, size_t end)
{
    if (first == end)
        return 0;
    PAGECORE_EACH_WORD(i, mask, first >> 9, ((end - 1) >> 9) + 1)
        if (pagecore_load_acquire(&summary[i]) & mask)
            return 1;
    return 0;
}

/* Mark in the summary the lines of pages [first, end), at least one, after their bits were set. */
static inline void pagecore_mark_lines(uint64_t *summary, size_t first, size_t end)
{
    pagecore_fence_after_rmw();
    PAGECORE_EACH_WORD(i, mask, first >> 9, ((end - 1) >> 9) + 1)
        if (mask & ~pagecore_load_relaxed(&summary[i]))
            pagecore_or(&summary[i], mask);
}

/* The same for one page, without the fence. */
static inline void pagecore_mark_line_of(uint64_t *summary, size_t page)
{
    const uint64_t mask = UINT64_C(1) << (page >> 9 & 63);
    if (!(pagecore_load_relaxed(&summary[page >> 15]) & mask))
        pagecore_or(&summary[page >> 15], mask);
}

static inline int pagecore_run_fits(int64_t first, int64_t count, size_t end)
{
    return first >= 0 && count >= 0 && (uint64_t)first <= end && (uint64_t)count <= end - (uint64_t)first;
}

/* Read once, so that what was checked is what is used, even if another thread writes the array meanwhile. */
static inline int64_t pagecore_once(const int64_t *value)
{
    return (int64_t)pagecore_load_relaxed((const uint64_t *)value);
}

static inline uint64_t pagecore_little_endian(uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

/* The bits past the size in the last word. */
static inline uint64_t pagecore_tail(const uint64_t *words, size_t end)
{
    return end & 63 ? pagecore_load_relaxed(&words[end >> 6]) & ~pagecore_ones(end & 63) : 0;
}

#endif
