/* Word loops over page bitmaps: plain uint64_t words, least significant bit first, in our own or in shared
 * memory.
 *
 * Every function takes bits [first, end) and masks the words at both ends, so that bits past the size are
 * neither reported nor changed, even where another process writes rubbish there. Arguments are trusted:
 * first <= end <= size.
 *
 * Loops load words relaxed and look before they lock: a zero word costs a load, not an exchange. A look
 * may only spare a CLEAR. A set is always a locked operation, also of a bit that is set already: a writer
 * that skipped it could be overtaken by a drain whose reader then misses the write (the drain's read-
 * modify-write must meet the writer's).
 */
#ifndef PAGECORE_BITSCAN_H
#define PAGECORE_BITSCAN_H

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
#define PAGECORE_EACH_WORD(index, mask, first, end)                                                        \
    for (uint64_t index = (first) >> 6, mask;                                                              \
         index < pagecore_word_count(end) && ((mask = pagecore_mask(index, (first), (end))), 1); ++index)

/* ---- looking ---- */

/* relaxed: a snapshot, word by word; bits that change during the call may be counted or not. */
static inline size_t pagecore_count(const uint64_t *words, size_t first, size_t end)
{
    size_t count = 0;
    PAGECORE_EACH_WORD(i, mask, first, end)
        count += pagecore_popcount(pagecore_load_relaxed(&words[i]) & mask);
    return count;
}

/* The first set bit, or end. relaxed: a hint where to look; who acts on the bit takes it by a read-modify-
 * write. */
static inline size_t pagecore_find_set(const uint64_t *words, size_t first, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, first, end) {
        const uint64_t word = pagecore_load_relaxed(&words[i]) & mask;
        if (word)
            return i * PAGECORE_WORD_BITS + (size_t)__builtin_ctzll(word);
    }
    return end;
}

/* The first clear bit, or end. */
static inline size_t pagecore_find_clear(const uint64_t *words, size_t first, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, first, end) {
        const uint64_t word = ~pagecore_load_relaxed(&words[i]) & mask;
        if (word)
            return i * PAGECORE_WORD_BITS + (size_t)__builtin_ctzll(word);
    }
    return end;
}

/* The last set bit of [0, end), or end. */
static inline size_t pagecore_find_last(const uint64_t *words, size_t end)
{
    for (size_t i = pagecore_word_count(end); i-- > 0;) {
        const uint64_t word = pagecore_load_relaxed(&words[i]) & pagecore_mask(i, 0, end);
        if (word)
            return i * PAGECORE_WORD_BITS + 63 - (size_t)__builtin_clzll(word);
    }
    return end;
}

/* The first multiple of `align` where `length` bits (at least 1) are clear, or end. */
static inline size_t pagecore_find_clear_area(const uint64_t *words, size_t first, size_t end, size_t length,
                                              size_t align)
{
    for (;;) {
        const size_t clear = pagecore_find_clear(words, first, end);
        const size_t gap = clear % align ? align - clear % align : 0;
        if (gap > end - clear || length > end - clear - gap)
            return end;
        const size_t set = pagecore_find_set(words, clear + gap, clear + gap + length);
        if (set == clear + gap + length)
            return clear + gap;
        first = set + 1;
    }
}

/* Are all of them set? acquire: pairs with the release that set them, so that whoever sees the bits sees
 * the pages. */
static inline int pagecore_test_range(const uint64_t *words, size_t first, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, first, end)
        if (mask & ~pagecore_load_acquire(&words[i]))
            return 0;
    return 1;
}

static inline int pagecore_equal(const uint64_t *a, const uint64_t *b, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, 0, end)
        if ((pagecore_load_relaxed(&a[i]) ^ pagecore_load_relaxed(&b[i])) & mask)
            return 0;
    return 1;
}

static inline int pagecore_intersects(const uint64_t *a, const uint64_t *b, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, 0, end)
        if (pagecore_load_relaxed(&a[i]) & pagecore_load_relaxed(&b[i]) & mask)
            return 1;
    return 0;
}

/* The next run at or after `start`: its length (0: there is none) and *first. The word in which it begins
 * is loaded once, so a run that another thread is clearing is still at least one bit long. */
static inline size_t pagecore_next_run(const uint64_t *words, size_t start, size_t end, size_t *first)
{
    PAGECORE_EACH_WORD(i, mask, start, end) {
        const uint64_t word = pagecore_load_relaxed(&words[i]) & mask;
        if (!word)
            continue;
        const unsigned bit = (unsigned)__builtin_ctzll(word);
        const unsigned length = pagecore_ones_at_start(word >> bit);
        const size_t stop = i * PAGECORE_WORD_BITS + bit + length;
        *first = i * PAGECORE_WORD_BITS + bit;
        /* A run that ends inside its word is whole; one that fills it may go on in the next. */
        const int whole = bit + length < PAGECORE_WORD_BITS || stop >= end;
        return (whole ? stop : pagecore_find_clear(words, stop, end)) - *first;
    }
    *first = end;
    return 0;
}

/* How many runs begin in [first, end). */
static inline size_t pagecore_count_runs(const uint64_t *words, size_t first, size_t end)
{
    size_t count = 0;
    uint64_t carry = 0;
    PAGECORE_EACH_WORD(i, mask, first, end) {
        const uint64_t word = pagecore_load_relaxed(&words[i]) & mask;
        count += pagecore_popcount(word & ~(word << 1 | carry));
        carry = word >> 63;
    }
    return count;
}

/* Runs as (first, count) pairs, at most `capacity`; *next is where to go on, end when all were listed. */
static inline size_t pagecore_list_runs(const uint64_t *words, size_t start, size_t end, int64_t *pairs,
                                        size_t capacity, size_t *next)
{
    size_t listed = 0;
    while (listed < capacity) {
        size_t first;
        const size_t count = pagecore_next_run(words, start, end, &first);
        if (!count) {
            *next = end;
            return listed;
        }
        pairs[2 * listed] = (int64_t)first;
        pairs[2 * listed + 1] = (int64_t)count;
        start = first + count;
        ++listed;
    }
    *next = start;
    return listed;
}

/* Set bits as numbers, at most `capacity`; *next is where to go on, end when all were listed. */
static inline size_t pagecore_list_indices(const uint64_t *words, size_t start, size_t end, int64_t *indices,
                                           size_t capacity, size_t *next)
{
    size_t listed = 0;
    PAGECORE_EACH_WORD(i, mask, start, end) {
        for (uint64_t word = pagecore_load_relaxed(&words[i]) & mask; word; word &= word - 1) {
            const size_t bit = i * PAGECORE_WORD_BITS + (size_t)__builtin_ctzll(word);
            if (listed == capacity) {
                *next = bit;
                return listed;
            }
            indices[listed++] = (int64_t)bit;
        }
    }
    *next = end;
    return listed;
}

/* ---- changing ---- */

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

static inline size_t pagecore_set_range(uint64_t *words, size_t first, size_t end)
{
    size_t changed = 0;
    PAGECORE_EACH_WORD(i, mask, first, end)
        if (mask)
            changed += pagecore_popcount(pagecore_set_bits(&words[i], mask));
    return changed;
}

static inline size_t pagecore_clear_range(uint64_t *words, size_t first, size_t end)
{
    size_t changed = 0;
    PAGECORE_EACH_WORD(i, mask, first, end)
        changed += pagecore_popcount(pagecore_clear_bits(&words[i], mask));
    return changed;
}

/* From the lowest bit of `word`: what `pages` bits and `runs` new runs can pay for. Bit 0 needs no new run
 * if it joins the run that ended at the word before. */
static inline uint64_t pagecore_affordable(uint64_t word, size_t pages, size_t runs, int joins)
{
    uint64_t take = 0;
    while (word && pages) {
        const unsigned bit = (unsigned)__builtin_ctzll(word);
        if (bit || !joins) {
            if (!runs)
                break;
            --runs;
        }
        size_t length = pagecore_ones_at_start(word >> bit);
        if (length > pages)
            length = pages;
        pages -= length;
        take |= pagecore_ones(length) << bit;
        word &= ~take;
    }
    return take;
}

/* Fetch and clear runs, at most `max_pages` bits and `capacity` pairs; *next is the first bit not looked
 * at. A word is taken by compare-exchange, so what is cleared is exactly what is listed, whoever else sets
 * or takes. acq_rel: pairs with the release of the writer that set the bits; the caller reads the pages
 * afterwards (S1). */
static inline size_t pagecore_take_runs(uint64_t *words, size_t start, size_t end, size_t max_pages,
                                        int64_t *pairs, size_t capacity, size_t *next)
{
    size_t listed = 0;
    PAGECORE_EACH_WORD(i, mask, start, end) {
        const size_t base = i * PAGECORE_WORD_BITS;
        const int joins = listed && (size_t)(pairs[2 * listed - 2] + pairs[2 * listed - 1]) == base;
        uint64_t seen = pagecore_load_relaxed(&words[i]);
        uint64_t take;
        do {
            take = pagecore_affordable(seen & mask, max_pages, capacity - listed, joins);
        } while (take && !pagecore_compare_exchange(&words[i], &seen, seen & ~take));
        const uint64_t left = seen & mask & ~take;
        max_pages -= pagecore_popcount(take);
        while (take) {
            const unsigned bit = (unsigned)__builtin_ctzll(take);
            const unsigned length = pagecore_ones_at_start(take >> bit);
            if (bit == 0 && joins) {
                pairs[2 * listed - 1] += length;
            } else {
                pairs[2 * listed] = (int64_t)(base + bit);
                pairs[2 * listed + 1] = length;
                ++listed;
            }
            take &= ~(pagecore_ones(length) << bit);
        }
        if (left) {
            *next = base + (size_t)__builtin_ctzll(left);
            return listed;
        }
    }
    *next = end;
    return listed;
}

/* Exchange the words of `from` with zero and OR them into `to`; returns the newly set bits of `to`.
 * acq_rel at both: what was written before a bit of `from` was set is visible to whoever takes the bit
 * from `to`. */
static inline size_t pagecore_drain(uint64_t *from, uint64_t *to, size_t end)
{
    size_t newly = 0;
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        if (!pagecore_load_relaxed(&from[i]))
            continue;
        const uint64_t bits = pagecore_exchange(&from[i], 0) & mask;
        if (bits)
            newly += pagecore_popcount(pagecore_set_bits(&to[i], bits));
    }
    return newly;
}

/* OR `from` into `to`, leaving `from`; returns the newly set bits. acquire: hands on what a bit of `from`
 * published. */
static inline size_t pagecore_merge(const uint64_t *from, uint64_t *to, size_t end)
{
    size_t newly = 0;
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        const uint64_t bits = pagecore_load_acquire(&from[i]) & mask;
        if (bits)
            newly += pagecore_popcount(pagecore_set_bits(&to[i], bits));
    }
    return newly;
}

/* words &= other; returns how many bits it cleared. */
static inline size_t pagecore_intersect(uint64_t *words, const uint64_t *other, size_t end)
{
    size_t cleared = 0;
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        const uint64_t bits = ~pagecore_load_acquire(&other[i]) & mask;
        cleared += pagecore_popcount(pagecore_clear_bits(&words[i], bits));
    }
    return cleared;
}

/* words &= ~other; returns how many bits it cleared. */
static inline size_t pagecore_subtract(uint64_t *words, const uint64_t *other, size_t end)
{
    size_t cleared = 0;
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        const uint64_t bits = pagecore_load_acquire(&other[i]) & mask;
        cleared += pagecore_popcount(pagecore_clear_bits(&words[i], bits));
    }
    return cleared;
}

/* Replace the bits of `mask` by those of `bits`; returns the bits that changed. */
static inline uint64_t pagecore_replace_bits(uint64_t *word, uint64_t mask, uint64_t bits)
{
    uint64_t seen = pagecore_load_relaxed(word);
    while (!pagecore_compare_exchange(word, &seen, (seen & ~mask) | (bits & mask)))
        ;
    return (seen ^ bits) & mask;
}

/* words ^= other. */
static inline void pagecore_flip(uint64_t *words, const uint64_t *other, size_t end)
{
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        const uint64_t bits = pagecore_load_acquire(&other[i]) & mask;
        uint64_t seen = pagecore_load_relaxed(&words[i]);
        while (bits && !pagecore_compare_exchange(&words[i], &seen, seen ^ bits))
            ;
    }
}

/* Copy bits [source, source + count) of `from` onto [first, first + count) of `to`, bits outside
 * untouched; returns how many bits changed. The two may share memory only where source == first. */
static inline size_t pagecore_copy_range(const uint64_t *from, size_t source, uint64_t *to, size_t first,
                                         size_t count)
{
    size_t changed = 0;
    const size_t end = first + count;
    PAGECORE_EACH_WORD(i, mask, first, end) {
        if (!mask)
            continue;
        /* The 64 source bits that fall on this word, fetched from the one or two words that hold wanted
         * ones. */
        const size_t low = i * PAGECORE_WORD_BITS > first ? i * PAGECORE_WORD_BITS : first;
        const size_t high = (i + 1) * PAGECORE_WORD_BITS < end ? (i + 1) * PAGECORE_WORD_BITS : end;
        const size_t at = source + (low - first);
        const size_t last = source + (high - first) - 1;
        uint64_t bits = pagecore_load_acquire(&from[at >> 6]) >> (at & 63);
        if (at >> 6 != last >> 6)
            bits |= pagecore_load_acquire(&from[last >> 6]) << (PAGECORE_WORD_BITS - (at & 63));
        changed += pagecore_popcount(pagecore_replace_bits(&to[i], mask, bits << (low & 63)));
    }
    return changed;
}

/* ---- batches: arrays that the caller owns and another thread might change under us ---- */

static inline int pagecore_run_fits(int64_t first, int64_t count, size_t end)
{
    return first >= 0 && count >= 0 && (uint64_t)first <= end && (uint64_t)count <= end - (uint64_t)first;
}

/* Read once, so that what was checked is what is used, even if another thread writes the array meanwhile. */
static inline int64_t pagecore_once(const int64_t *value)
{
    return (int64_t)pagecore_load_relaxed((const uint64_t *)value);
}

/* The position of the first run (index) that does not fit, or n. */
static inline size_t pagecore_check_runs(const int64_t *pairs, size_t n, size_t end)
{
    for (size_t i = 0; i < n; ++i)
        if (!pagecore_run_fits(pagecore_once(&pairs[2 * i]), pagecore_once(&pairs[2 * i + 1]), end))
            return i;
    return n;
}

static inline size_t pagecore_check_indices(const int64_t *indices, size_t n, size_t end)
{
    for (size_t i = 0; i < n; ++i)
        if ((uint64_t)pagecore_once(&indices[i]) >= end)
            return i;
    return n;
}

/* Each returns how many bits changed. They stop at an entry that does not fit, and *done says how many
 * were done. */
static inline size_t pagecore_apply_runs(uint64_t *words, const int64_t *pairs, size_t n, size_t end, int set,
                                         size_t *done)
{
    size_t changed = 0;
    for (*done = 0; *done < n; ++*done) {
        const int64_t first = pagecore_once(&pairs[2 * *done]);
        const int64_t count = pagecore_once(&pairs[2 * *done + 1]);
        if (!pagecore_run_fits(first, count, end))
            break;
        changed += set ? pagecore_set_range(words, (size_t)first, (size_t)(first + count))
                       : pagecore_clear_range(words, (size_t)first, (size_t)(first + count));
    }
    return changed;
}

static inline size_t pagecore_apply_indices(uint64_t *words, const int64_t *indices, size_t n, size_t end,
                                            int set, size_t *done)
{
    size_t changed = 0;
    for (*done = 0; *done < n; ++*done) {
        const uint64_t bit = (uint64_t)pagecore_once(&indices[*done]);
        if (bit >= end)
            break;
        changed += set ? !pagecore_test_and_set_bit(words, bit) : pagecore_test_and_clear_bit(words, bit);
    }
    return changed;
}

static inline void pagecore_test_indices(const uint64_t *words, const int64_t *indices, size_t n, size_t end,
                                         uint8_t *answers, size_t *done)
{
    for (*done = 0; *done < n; ++*done) {
        const uint64_t bit = (uint64_t)pagecore_once(&indices[*done]);
        if (bit >= end)
            break;
        answers[*done] = (uint8_t)pagecore_test_bit(words, bit);
    }
}

/* ---- whole copies and bytes ---- */

/* `to` is private: plain snapshot of the words, tail bits dropped. `flip` is 0, or all ones for the
 * complement. */
static inline void pagecore_copy(const uint64_t *from, uint64_t *to, size_t end, uint64_t flip)
{
    PAGECORE_EACH_WORD(i, mask, 0, end)
        pagecore_store_relaxed(&to[i], (pagecore_load_acquire(&from[i]) ^ flip) & mask);
}

static inline uint64_t pagecore_little_endian(uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

/* W3: little-endian 64-bit words, tail bits zero. */
static inline void pagecore_to_bytes(const uint64_t *words, size_t end, unsigned char *bytes)
{
    PAGECORE_EACH_WORD(i, mask, 0, end) {
        const uint64_t word = pagecore_little_endian(pagecore_load_acquire(&words[i]) & mask);
        memcpy(bytes + i * sizeof word, &word, sizeof word);
    }
}

/* `words` is private. The tail is not masked: the caller refuses a foreign one. */
static inline void pagecore_from_bytes(const unsigned char *bytes, uint64_t *words, size_t end)
{
    for (size_t i = 0; i < pagecore_word_count(end); ++i) {
        uint64_t word;
        memcpy(&word, bytes + i * sizeof word, sizeof word);
        words[i] = pagecore_little_endian(word);
    }
}

/* The bits past the size in the last word. */
static inline uint64_t pagecore_tail(const uint64_t *words, size_t end)
{
    return end & 63 ? pagecore_load_relaxed(&words[end >> 6]) & ~pagecore_ones(end & 63) : 0;
}

#endif
