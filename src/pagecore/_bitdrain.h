/* Drains, as a template (see _bitloops.h): fetch and clear here, OR in there, count what is new there.
 *
 * `owned` says that nobody else changes those words during the call: they are loaded and stored, not exchanged. A
 * locked instruction costs 3 to 5 ns whatever it does, so these loops are as fast as they have few of them: none for
 * a word that is zero, and one for two words where most are not.
 */

#define PAGECORE_INLINE static inline __attribute__((always_inline))

PAGECORE_INLINE uint64_t PAGECORE_(take)(uint64_t *word, int owned)
{
    if (!owned)
        return pagecore_exchange(word, 0);
    const uint64_t bits = pagecore_load_relaxed(word);
    pagecore_store_relaxed(word, 0);
    return bits;
}

/* Returns the bits that were not there. */
PAGECORE_INLINE uint64_t PAGECORE_(put)(uint64_t *word, uint64_t bits, int owned)
{
    if (!owned)
        return bits & ~pagecore_fetch_or(word, bits);
    const uint64_t before = pagecore_load_relaxed(word);
    pagecore_store_relaxed(word, before | bits);
    return bits & ~before;
}

/* The listed words; the destination's lines are asked for before their turn comes. */
PAGECORE_INLINE size_t PAGECORE_(drain_listed)(uint64_t *from, uint64_t *to, const uint16_t *list, size_t n,
                                               int from_owned, int to_owned)
{
    size_t newly = 0;
    for (size_t k = 0; k < n; ++k) {
        __builtin_prefetch(&to[list[k + PAGECORE_AHEAD]], 1);
        const size_t i = list[k];
        newly += pagecore_popcount(PAGECORE_(put)(&to[i], PAGECORE_(take)(&from[i], from_owned), to_owned));
    }
    return newly;
}

#if PAGECORE_VECTORS
/* Up to PAGECORE_GROUP pairs of words: exchanged first, into registers, and put afterwards. A locked instruction
 * waits until all stores before it have landed, so a store between two of them costs as much as another lock.
 * Returns sums of bytes. */
PAGECORE_INLINE __m128i PAGECORE_(drain_group)(uint64_t *from, uint64_t *to, const uint16_t *at, unsigned n,
                                               int to_owned)
{
    const __m128i zero = _mm_setzero_si128();
    __m128i bits[PAGECORE_GROUP], newly = zero;
#pragma GCC unroll 8
    for (unsigned j = 0; j < n; ++j) {
        uint64_t pair[2];
        pagecore_exchange_pair(&from[at[j]], pair);
        bits[j] = _mm_set_epi64x((int64_t)pair[1], (int64_t)pair[0]);
    }
#pragma GCC unroll 8
    for (unsigned j = 0; j < n; ++j) {
        uint64_t *dest = &to[at[j]];
        __m128i before;
        if (to_owned) {
            before = _mm_loadu_si128((const __m128i *)dest);
            _mm_storeu_si128((__m128i *)dest, _mm_or_si128(before, bits[j]));
        } else {
            uint64_t seen[2];
            const uint64_t pair[2] = {(uint64_t)_mm_extract_epi64(bits[j], 0),
                                      (uint64_t)_mm_extract_epi64(bits[j], 1)};
            pagecore_or_pair(dest, pair, seen);
            before = _mm_set_epi64x((int64_t)seen[1], (int64_t)seen[0]);
        }
        newly = _mm_add_epi8(newly, PAGECORE_(sum_bits_of_pair)(_mm_andnot_si128(before, bits[j])));
    }
    return _mm_sad_epu8(newly, zero);
}

PAGECORE_INLINE size_t PAGECORE_(total_of_pair)(__m128i sums)
{
    return (size_t)(_mm_extract_epi64(sums, 0) + _mm_extract_epi64(sums, 1));
}

/* Few zeros: all of them, and no list. */
PAGECORE_INLINE size_t PAGECORE_(drain_dense)(uint64_t *from, uint64_t *to, size_t n, int to_owned)
{
    static const uint16_t at[] = {0, 2, 4, 6, 8, 10, 12, 14};
    __m128i newly = _mm_setzero_si128();
    for (size_t i = 0; i < n; i += 2 * PAGECORE_GROUP) {
        for (unsigned j = 0; j < 2 * PAGECORE_GROUP; j += 8) {
            __builtin_prefetch(&from[i + 64 + j], 1);
            __builtin_prefetch(&to[i + 64 + j], 1);
        }
        newly = _mm_add_epi64(newly, PAGECORE_(drain_group)(from + i, to + i, at, PAGECORE_GROUP, to_owned));
    }
    return PAGECORE_(total_of_pair)(newly);
}

/* The listed pairs, each of them once: a bit that was moved and set again is counted by the next call. */
PAGECORE_INLINE size_t PAGECORE_(drain_pairs)(uint64_t *from, uint64_t *to, const uint16_t *list, size_t n,
                                              int to_owned)
{
    __m128i newly = _mm_setzero_si128();
    size_t k = 0;
    for (; k + PAGECORE_GROUP <= n; k += PAGECORE_GROUP) {
        for (unsigned j = 0; j < PAGECORE_GROUP; ++j) {
            __builtin_prefetch(&from[list[k + PAGECORE_AHEAD + j]], 1);
            __builtin_prefetch(&to[list[k + PAGECORE_AHEAD + j]], 1);
        }
        newly = _mm_add_epi64(newly, PAGECORE_(drain_group)(from, to, list + k, PAGECORE_GROUP, to_owned));
    }
    for (; k < n; ++k)
        newly = _mm_add_epi64(newly, PAGECORE_(drain_group)(from, to, list + k, 1, to_owned));
    return PAGECORE_(total_of_pair)(newly);
}

/* One line of eight words that nobody else has; nothing to do where it is zero. */
PAGECORE_INLINE __m256i PAGECORE_(drain_line)(uint64_t *from, uint64_t *to, __m256i sum)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i *source = (__m256i *)from, *dest = (__m256i *)to;
    const __m256i low = _mm256_loadu_si256(source), high = _mm256_loadu_si256(source + 1);
    const __m256i any = _mm256_or_si256(low, high);
    if (_mm256_testz_si256(any, any))
        return sum;
    const __m256i low_there = _mm256_loadu_si256(dest), high_there = _mm256_loadu_si256(dest + 1);
    _mm256_storeu_si256(source, zero);
    _mm256_storeu_si256(source + 1, zero);
    _mm256_storeu_si256(dest, _mm256_or_si256(low_there, low));
    _mm256_storeu_si256(dest + 1, _mm256_or_si256(high_there, high));
    const __m256i bytes = _mm256_add_epi8(PAGECORE_(sum_bits)(_mm256_andnot_si256(low_there, low)),
                                          PAGECORE_(sum_bits)(_mm256_andnot_si256(high_there, high)));
    return _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
}

/* Nobody else is there: four streams, no locks. */
static inline size_t PAGECORE_(drain_owned_block)(uint64_t *from, uint64_t *to)
{
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < PAGECORE_CHUNK; i += 8)
        for (size_t at = i; at < PAGECORE_BLOCK; at += PAGECORE_CHUNK)
            sum = PAGECORE_(drain_line)(from + at, to + at, sum);
    return PAGECORE_(total)(sum);
}

/* As if nobody else were there: a memory transaction of sixteen lines costs as much as four locked instructions.
 * Where one fails (another thread wrote to a line, a page is not mapped yet, an interrupt came), that piece is
 * exchanged. */
static inline size_t PAGECORE_(drain_in_transactions)(uint64_t *from, uint64_t *to, size_t n, int to_owned)
{
    size_t newly = 0;
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += PAGECORE_TRANSACTION) {
        for (size_t j = 0; j < PAGECORE_TRANSACTION; j += 8) {
            __builtin_prefetch(&from[i + PAGECORE_TRANSACTION + j], 1);
            __builtin_prefetch(&to[i + PAGECORE_TRANSACTION + j], 1);
        }
        if (pagecore_begin_transaction()) {
            for (size_t j = i; j < i + PAGECORE_TRANSACTION; j += 8)
                sum = PAGECORE_(drain_line)(from + j, to + j, sum);
            pagecore_end_transaction();
        } else {
            newly += PAGECORE_(drain_dense)(from + i, to + i, PAGECORE_TRANSACTION, to_owned);
        }
    }
    return newly + PAGECORE_(total)(sum);
}

/* How many of 64 words, from eight lines of the block, are not zero. The next block's are asked for. */
static inline size_t PAGECORE_(sample)(const uint64_t *words)
{
    size_t found = 0;
    for (size_t line = 0; line < 8; ++line) {
        const uint64_t *at = words + line * (PAGECORE_BLOCK / 8);
        __builtin_prefetch(at + PAGECORE_BLOCK);
        for (size_t i = 0; i < 8; ++i)
            found += pagecore_load_relaxed(&at[i]) != 0;
    }
    return found;
}
#endif

/* A list of pairs, or of words; the lines of the destination are marked in its summary, if it has one. */
PAGECORE_INLINE size_t PAGECORE_(drain_list)(uint64_t *from, uint64_t *to, uint64_t *summary, size_t at,
                                             uint16_t *list, size_t n, int pairs, int from_owned, int to_owned)
{
    size_t newly;
    memset(list + n, 0, 2 * PAGECORE_AHEAD * sizeof *list);
#if PAGECORE_VECTORS
    if (pairs)
        newly = PAGECORE_(drain_pairs)(from + at, to + at, list, n, to_owned);
    else
#endif
        newly = PAGECORE_(drain_listed)(from + at, to + at, list, n, from_owned, to_owned);
    (void)pairs;
    if (summary) {
        pagecore_fence_after_rmw();
        for (size_t k = 0; k < n; ++k)
            pagecore_mark_line_of(summary, (at + list[k]) * PAGECORE_WORD_BITS);
    }
    return newly;
}

PAGECORE_INLINE int PAGECORE_(in_pairs)(const uint64_t *from, const uint64_t *to, int from_owned)
{
    return PAGECORE_VECTORS && !from_owned && (pagecore_cpu & PAGECORE_CX16) &&
           !(((uintptr_t)from | (uintptr_t)to) & 15);
}

/* `n` words, at most PAGECORE_BLOCK. `summary` is that of these words of `to`, or NULL. */
PAGECORE_INLINE size_t PAGECORE_(drain_block_how)(uint64_t *from, uint64_t *to, uint64_t *summary, size_t n,
                                                  int from_owned, int to_owned)
{
    uint16_t lists[4][PAGECORE_CHUNK + 2 * PAGECORE_AHEAD];
    size_t newly = 0;
#if PAGECORE_VECTORS
    if (n == PAGECORE_BLOCK) {
        const int pairs = PAGECORE_(in_pairs)(from, to, from_owned);
        const size_t found = pairs ? PAGECORE_(sample)(from) : 0;
        const int in_transactions = found > 8 && pagecore_cpu & PAGECORE_RTM;
        if ((from_owned && to_owned) || in_transactions || found >= 52) {
            newly = from_owned && to_owned ? PAGECORE_(drain_owned_block)(from, to)
                    : in_transactions      ? PAGECORE_(drain_in_transactions)(from, to, n, to_owned)
                                           : PAGECORE_(drain_dense)(from, to, n, to_owned);
            /* Nothing new in a shared map: a writer that has set the bits may not have marked them yet. */
            if (summary && (newly || !to_owned))
                pagecore_mark_lines(summary, 0, n * PAGECORE_WORD_BITS);
            return newly;
        }
        size_t listed[4] = {0};
        for (size_t i = 0; i < PAGECORE_CHUNK; i += 8)
            for (size_t s = 0; s < 4; ++s) {
                const __m256i *at = (const __m256i *)(from + s * PAGECORE_CHUNK + i);
                const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
                listed[s] += PAGECORE_(append)(lists[s] + listed[s], i, low, high, pairs);
            }
        for (size_t s = 0; s < 4; ++s)
            for (size_t k = 0; k < PAGECORE_AHEAD && k < listed[s]; ++k)
                __builtin_prefetch(to + s * PAGECORE_CHUNK + lists[s][k], 1);
        for (size_t s = 0; s < 4; ++s)
            newly += PAGECORE_(drain_list)(from, to, summary, s * PAGECORE_CHUNK, lists[s], listed[s], pairs,
                                           from_owned, to_owned);
        return newly;
    }
#endif
    for (size_t chunk = 0; chunk < n; chunk += PAGECORE_CHUNK) {
        const size_t length = n - chunk < PAGECORE_CHUNK ? n - chunk : PAGECORE_CHUNK;
        const size_t listed = PAGECORE_(list_words)(from + chunk, length, lists[0]);
        newly += PAGECORE_(drain_list)(from, to, summary, chunk, lists[0], listed, 0, from_owned, to_owned);
    }
    return newly;
}

/* Some whole lines: in a transaction, or their words by a list. */
PAGECORE_INLINE size_t PAGECORE_(drain_few_lines)(uint64_t *from, uint64_t *to, const uint16_t *lines, size_t n,
                                                  int pairs, int from_owned, int to_owned)
{
    uint16_t list[8 * PAGECORE_FEW_LINES + 2 * PAGECORE_AHEAD];
    size_t listed = 0;
#if PAGECORE_VECTORS
    __m256i sum = _mm256_setzero_si256();
    if ((from_owned && to_owned) || (pagecore_cpu & PAGECORE_RTM && pagecore_begin_transaction())) {
        for (size_t k = 0; k < n; ++k)
            sum = PAGECORE_(drain_line)(from + lines[k], to + lines[k], sum);
        if (!(from_owned && to_owned))
            pagecore_end_transaction();
        return PAGECORE_(total)(sum);
    }
    for (size_t k = 0; k < n; ++k) {
        const __m256i *at = (const __m256i *)(from + lines[k]);
        const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
        listed += PAGECORE_(append)(list + listed, lines[k], low, high, pairs);
    }
#else
    for (size_t k = 0; k < n; ++k)
        for (size_t i = lines[k]; i < lines[k] + 8u; ++i) {
            list[listed] = (uint16_t)i;
            listed += pagecore_load_relaxed(&from[i]) != 0;
        }
#endif
    return PAGECORE_(drain_list)(from, to, NULL, 0, list, listed, pairs, from_owned, to_owned);
}

/* The marked lines of a block of `n` words; there are at most PAGECORE_CHUNK / 8 of them. The marks go over to
 * `to`. */
PAGECORE_INLINE size_t PAGECORE_(drain_marked_how)(uint64_t *from, uint64_t *to, uint64_t *summary,
                                                   const uint64_t *marks, size_t n, int from_owned, int to_owned)
{
    uint16_t lines[PAGECORE_CHUNK / 8];
    size_t nlines = 0, newly = 0;
    const int pairs = PAGECORE_(in_pairs)(from, to, from_owned);
    for (size_t i = 0; i < PAGECORE_BLOCK / PAGECORE_UNIT; ++i)
        for (uint64_t left = marks[i]; left; left &= left - 1) {
            const size_t at = i * PAGECORE_UNIT + (size_t)__builtin_ctzll(left) * 8;
            __builtin_prefetch(&from[at], 1);
            __builtin_prefetch(&to[at], 1);
            if (at + 8 <= n)
                lines[nlines++] = (uint16_t)at;
            else /* the last line, of fewer words */
                for (size_t w = at; w < n; ++w)
                    newly +=
                        pagecore_popcount(PAGECORE_(put)(&to[w], PAGECORE_(take)(&from[w], from_owned), to_owned));
        }
    for (size_t k = 0; k < nlines; k += PAGECORE_FEW_LINES) {
        const size_t few = nlines - k < PAGECORE_FEW_LINES ? nlines - k : PAGECORE_FEW_LINES;
        newly += PAGECORE_(drain_few_lines)(from, to, lines + k, few, pairs, from_owned, to_owned);
    }
    pagecore_fence_after_rmw();
    for (size_t i = 0; summary && i < PAGECORE_BLOCK / PAGECORE_UNIT; ++i)
        if (marks[i] && marks[i] & ~pagecore_load_relaxed(&summary[i]))
            pagecore_or(&summary[i], marks[i]);
    return newly;
}

/* With constants for what is owned, so that each of the three is compiled on its own. */
static inline size_t PAGECORE_(drain_block)(uint64_t *from, uint64_t *to, uint64_t *summary, const uint64_t *marks,
                                            size_t n, int from_owned, int to_owned)
{
#define PAGECORE_DRAIN(from_is, to_is)                                                      \
    return marks ? PAGECORE_(drain_marked_how)(from, to, summary, marks, n, from_is, to_is) \
                 : PAGECORE_(drain_block_how)(from, to, summary, n, from_is, to_is)
    if (from_owned && to_owned)
        PAGECORE_DRAIN(1, 1);
    if (to_owned)
        PAGECORE_DRAIN(0, 1);
    PAGECORE_DRAIN(0, 0);
#undef PAGECORE_DRAIN
}

#undef PAGECORE_INLINE
