/* Loops over the words of page bitmaps, in our own or in shared memory.
 *
 * Every function takes bits [first, end) and masks the words at both ends, so that bits past the size are neither
 * reported nor changed, even where another process writes rubbish there. Arguments are trusted: first <= end <=
 * size.
 *
 * Loops load words relaxed and look before they lock: a zero word costs a load, not an exchange.
 *
 *   _bitword.h     one word
 *   _cpu.h         which path this processor takes
 *   _bitloops.h    what looks: a template, included here for each path
 *   _bitdrain.h    drains: a template, included here for each path
 *   _bitmove.h     algebra, ranges and batches: a template, too
 */
#ifndef PAGECORE_BITSCAN_H
#define PAGECORE_BITSCAN_H

#include "_bitword.h"
#include "_cpu.h"

enum {
    PAGECORE_CHUNK = 2048,         /* words that one list covers: 16 KiB, half of a small first-level cache */
    PAGECORE_BLOCK = 8192,         /* words whose mode is chosen together: four streams of a chunk each */
    PAGECORE_UNIT = 512,           /* words that one summary word stands for: 64 cache lines */
    PAGECORE_AHEAD = 16,           /* list entries or runs between a prefetch and its use */
    PAGECORE_FEW_PAGES = 16,       /* pages of a batch that are changed together */
    PAGECORE_GROUP = 8,            /* pairs that are exchanged before the first of them is put */
    PAGECORE_TRANSACTION = 128,    /* words drained in one memory transaction */
    PAGECORE_FEW_LINES = 16,       /* marked lines that are drained together */
    PAGECORE_SLACK = 72,           /* entries that decode may write past its answer */
    PAGECORE_PAST_CACHE = 1 << 18, /* words from which results are stored past the cache: 2 MiB */
};

enum {
    PAGECORE_OR,
    PAGECORE_AND,
    PAGECORE_XOR,
    PAGECORE_ANDNOT
};

#define PAGECORE_(name) pagecore_##name##_plain
#define PAGECORE_VECTORS 0
#include "_bitvector.h"
#include "_bitloops.h"
#include "_bitdrain.h"
#include "_bitmove.h"
#undef PAGECORE_
#undef PAGECORE_VECTORS

#if PAGECORE_X86
#include <immintrin.h>

/* The positions of the set bits of each byte. */
static uint8_t pagecore_positions[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void pagecore_list_positions(void)
{
    for (unsigned byte = 0; byte < 256; ++byte)
        for (unsigned bit = 0, n = 0; bit < 8; ++bit)
            if (byte >> bit & 1)
                pagecore_positions[byte][n++] = (uint8_t)bit;
}

/* The set bits of a block, in four streams (see count_block). */
__attribute__((target("avx512f,avx512vpopcntdq"))) static inline size_t
pagecore_count_block_avx512(const uint64_t *words)
{
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < PAGECORE_CHUNK; i += 8)
        for (size_t at = i; at < PAGECORE_BLOCK; at += PAGECORE_CHUNK)
            sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_loadu_si512(words + at)));
    return (size_t)_mm512_reduce_add_epi64(sum);
}

/* a |= b for `n` words, a multiple of 8, of a map that nobody else uses; returns the newly set bits. */
__attribute__((target("avx512f,avx512vpopcntdq"))) static inline size_t
pagecore_or_avx512(uint64_t *a, const uint64_t *b, size_t n)
{
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 8) {
        __builtin_prefetch(a + i + 512, 1); /* the processor's own prefetchers stop at the end of a page */
        __builtin_prefetch(b + i + 512, 0);
        const __m512i left = _mm512_loadu_si512(a + i), right = _mm512_loadu_si512(b + i);
        _mm512_storeu_si512(a + i, _mm512_or_si512(left, right));
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_andnot_si512(left, right)));
    }
    return (size_t)_mm512_reduce_add_epi64(sum);
}

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#define PAGECORE_(name) pagecore_##name##_avx2
#define PAGECORE_VECTORS 1
#include "_bitvector.h"
#include "_bitloops.h"
#include "_bitdrain.h"
#include "_bitmove.h"
#undef PAGECORE_
#undef PAGECORE_VECTORS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define PAGECORE_BEST(name) (pagecore_cpu & PAGECORE_AVX2 ? pagecore_##name##_avx2 : pagecore_##name##_plain)
#else
#define PAGECORE_BEST(name) pagecore_##name##_plain
#endif

/* ---- looking ---- */

static inline size_t pagecore_count(const uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(count)(words, first, end);
}

static inline size_t pagecore_count_runs(const uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(count_runs)(words, NULL, first, end);
}

/* The first set bit, or end. */
static inline size_t pagecore_find_set(const uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(find)(words, first, end, 0);
}

/* The first clear bit, or end. */
static inline size_t pagecore_find_clear(const uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(find)(words, first, end, PAGECORE_ALL_ONES);
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

/* ---- changing ---- */

static inline size_t pagecore_set_range(uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(set_range)(words, first, end);
}

static inline size_t pagecore_clear_range(uint64_t *words, size_t first, size_t end)
{
    return PAGECORE_BEST(clear_range)(words, first, end);
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
static inline size_t pagecore_take_runs(uint64_t *words, size_t start, size_t end, size_t max_pages, int64_t *pairs,
                                        size_t capacity, size_t *next)
{
    size_t listed = 0;
    PAGECORE_EACH_WORD(i, mask, start, end) {
        const size_t base = i * PAGECORE_WORD_BITS;
        const int joins = listed && (size_t)(pairs[2 * listed - 2] + pairs[2 * listed - 1]) == base;
        uint64_t seen = pagecore_load_relaxed(&words[i]);
        uint64_t take;
        if (!seen) {
            /* On to the next word that holds something; what is set behind us meanwhile waits for the next call. */
            const size_t found = pagecore_find_set(words, base, end);
            if (found == end)
                break;
            i = found / PAGECORE_WORD_BITS - 1;
            continue;
        }
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

/* The word of a drain that holds the end: all of it is cleared, and what lies past the size goes nowhere. */
static inline size_t pagecore_drain_tail(uint64_t *from, uint64_t *to, size_t end)
{
    if (!(end & 63) || !pagecore_load_relaxed(&from[end >> 6]))
        return 0;
    const uint64_t bits = pagecore_exchange(&from[end >> 6], 0) & pagecore_ones(end & 63);
    return bits ? pagecore_popcount(pagecore_set_bits(&to[end >> 6], bits)) : 0;
}

/* Exchange the words of `from` with zero and OR them into `to`; returns the newly set bits of `to`. A shared map is
 * changed atomically; an owned one must be nobody else's during the call. acq_rel: what was written before a bit of
 * `from` was set is visible to whoever takes the bit from `to`. */
static inline size_t pagecore_drain_maps(uint64_t *from, uint64_t *to, size_t end, int from_owned, int to_owned)
{
    const size_t n = end >> 6;
    size_t newly = 0;
    for (size_t i = 0; i < n; i += PAGECORE_BLOCK)
        newly += PAGECORE_BEST(drain_block)(from + i, to + i, NULL, NULL,
                                            n - i < PAGECORE_BLOCK ? n - i : PAGECORE_BLOCK, from_owned, to_owned);
    return newly + pagecore_drain_tail(from, to, end);
}

/* `to` is the caller's alone: a log that others write into, collected into a private map. */
static inline size_t pagecore_drain_to_owned(uint64_t *from, uint64_t *to, size_t end)
{
    return pagecore_drain_maps(from, to, end, 0, 1);
}

/* Both are the caller's alone: the guest stands still, or `from` is a private copy. */
static inline size_t pagecore_drain_owned(uint64_t *from, uint64_t *to, size_t end)
{
    return pagecore_drain_maps(from, to, end, 1, 1);
}

/* out = a (how) b; `out` is the caller's alone and may be `a`. Returns the bits by which it differs from `a` where
 * it is `a`. The tail of `b` may be anything. */
static inline size_t pagecore_combine(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t end, int how)
{
    size_t changed = PAGECORE_BEST(combine)(a, b, out, end >> 6, how);
    if (end & 63) {
        const uint64_t left = pagecore_load_relaxed(&a[end >> 6]) & pagecore_ones(end & 63);
        const uint64_t result =
            pagecore_combined_plain(left, pagecore_load_relaxed(&b[end >> 6]), how) & pagecore_ones(end & 63);
        pagecore_store_relaxed(&out[end >> 6], result);
        changed += pagecore_popcount(left ^ result);
    }
    return changed;
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

/* The position of the first run that does not fit, or n. */
static inline size_t pagecore_check_runs(const int64_t *pairs, size_t n, size_t end)
{
    for (size_t i = 0; i < n; ++i)
        if (!pagecore_run_fits(pagecore_once(&pairs[2 * i]), pagecore_once(&pairs[2 * i + 1]), end))
            return i;
    return n;
}

static inline size_t pagecore_check_indices(const int64_t *indices, size_t n, size_t end)
{
    return PAGECORE_BEST(check_indices)(indices, n, end);
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

#endif
