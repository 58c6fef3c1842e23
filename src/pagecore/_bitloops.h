/* Loops that only look, as a template: _bitscan.h includes this file once for each kind of processor, with
 * PAGECORE_(name) naming the copy and PAGECORE_VECTORS saying whether it may use AVX2. No include guard, for that
 * reason.
 *
 * The loads are relaxed: a snapshot, word by word. A vector load of aligned words is one relaxed load a word on
 * every processor that has AVX2.
 *
 * What makes these loops fast is that they do not branch on the words. Where about half of them are zero, `if
 * (word)` costs a mispredicted branch for every second one, which is more than the memory costs; so a loop first
 * makes a list of the words that are not zero, appending without a branch, and then walks the list.
 */

#define PAGECORE_INLINE static inline __attribute__((always_inline))

/* ---- lists of words ---- */

/* The positions of the words that are not zero among `n`, at most PAGECORE_CHUNK; `list` has room for 8 more. */
static inline size_t PAGECORE_(list_words)(const uint64_t *words, size_t n, uint16_t *list)
{
    size_t listed = 0, i = 0;
#if PAGECORE_VECTORS
    for (; i + 8 <= n; i += 8) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)(words + i));
        const __m256i high = _mm256_loadu_si256((const __m256i *)(words + i + 4));
        listed += PAGECORE_(append)(list + listed, i, low, high, 0);
    }
#endif
    for (; i < n; ++i) {
        list[listed] = (uint16_t)i;
        listed += pagecore_load_relaxed(&words[i]) != 0;
    }
    return listed;
}

/* The edges of runs: a bit differs from the one below it. Each word is loaded once, so that edges come in pairs
 * whoever changes the words meanwhile. `*carry` is the top bit of the word before. */
static inline size_t PAGECORE_(list_edges)(const uint64_t *words, size_t n, uint64_t *carry, uint64_t *edges,
                                           uint16_t *list)
{
    size_t listed = 0, i = 0;
    uint64_t below = *carry;
#if PAGECORE_VECTORS
    __m256i before = _mm256_set1_epi64x((int64_t)(below << 63));
    for (; i + 8 <= n; i += 8) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)(words + i));
        const __m256i high = _mm256_loadu_si256((const __m256i *)(words + i + 4));
        const __m256i low_edges = PAGECORE_(edges_of)(low, before), high_edges = PAGECORE_(edges_of)(high, low);
        const __m256i any = _mm256_or_si256(low_edges, high_edges);
        before = high;
        if (_mm256_testz_si256(any, any)) /* inside a run or a gap */
            continue;
        _mm256_storeu_si256((__m256i *)(edges + i), low_edges);
        _mm256_storeu_si256((__m256i *)(edges + i + 4), high_edges);
        listed += PAGECORE_(append)(list + listed, i, low_edges, high_edges, 0);
    }
    if (i)
        below = (uint64_t)_mm256_extract_epi64(before, 3) >> 63;
#endif
    for (; i < n; ++i) {
        const uint64_t word = pagecore_load_relaxed(&words[i]);
        edges[i] = word ^ (word << 1 | below);
        below = word >> 63;
        list[listed] = (uint16_t)i;
        listed += edges[i] != 0;
    }
    *carry = below;
    return listed;
}

/* The numbers of the set bits, from `base`; returns how many, and may write PAGECORE_SLACK entries whatever that is.
 * Most words that are not zero hold at most `most` bits: those are written without asking how many. */
PAGECORE_INLINE size_t PAGECORE_(decode)(uint64_t word, int64_t base, int64_t *numbers, unsigned most)
{
    const unsigned count = pagecore_popcount(word);
    unsigned at = 0;
#if PAGECORE_VECTORS
    if (count > 12) {
        for (unsigned byte = 0; byte < 8; ++byte, word >>= 8) {
            const uint8_t *bits = pagecore_positions[word & 255];
            const __m256i first = _mm256_set1_epi64x(base + 8 * byte);
            const __m256i low = _mm256_cvtepu8_epi64(_mm_loadu_si32(bits));
            const __m256i high = _mm256_cvtepu8_epi64(_mm_loadu_si32(bits + 4));
            _mm256_storeu_si256((__m256i *)(numbers + at), _mm256_add_epi64(low, first));
            _mm256_storeu_si256((__m256i *)(numbers + at + 4), _mm256_add_epi64(high, first));
            at += pagecore_popcount(word & 255);
        }
        return count;
    }
#endif
    for (; at < most; ++at, word &= word - 1)
        numbers[at] = base + PAGECORE_(first_bit)(word);
    for (; at < count; ++at, word &= word - 1)
        numbers[at] = base + PAGECORE_(first_bit)(word);
    return count;
}

/* `decode` of at most `room` numbers; returns how many there were to write. */
PAGECORE_INLINE size_t PAGECORE_(decode_some)(uint64_t word, int64_t base, int64_t *numbers, size_t room,
                                              unsigned most)
{
    int64_t all[PAGECORE_SLACK];
    if (room >= PAGECORE_SLACK)
        return PAGECORE_(decode)(word, base, numbers, most);
    const size_t count = PAGECORE_(decode)(word, base, all, most);
    memcpy(numbers, all, (count < room ? count : room) * sizeof *all);
    return count;
}

/* How many words the chunk has that begins at `chunk`. With a summary, chunks end where its words do, and *skip says
 * that the summary word, and so all of them, is zero. */
PAGECORE_INLINE size_t PAGECORE_(chunk_at)(size_t chunk, size_t nwords, const uint64_t *summary, int *skip)
{
    size_t n = PAGECORE_CHUNK - chunk % PAGECORE_CHUNK;
    *skip = 0;
    if (summary) {
        *skip = !pagecore_load_acquire(&summary[chunk / PAGECORE_UNIT]);
        for (size_t unit = PAGECORE_UNIT - chunk % PAGECORE_UNIT; unit < n; unit += PAGECORE_UNIT)
            if (chunk + unit >= nwords || *skip || !pagecore_load_acquire(&summary[(chunk + unit) / PAGECORE_UNIT]))
                n = unit;
    }
    return n < nwords - chunk ? n : nwords - chunk;
}

/* Set bits as numbers, at most `capacity`; *next is where to go on, end when all were listed. `summary` may be
 * NULL. */
static inline size_t PAGECORE_(list_indices)(const uint64_t *words, const uint64_t *summary, size_t start, size_t end,
                                             int64_t *indices, size_t capacity, size_t *next)
{
    uint16_t list[PAGECORE_CHUNK + 8];
    size_t listed = 0;
    const size_t nwords = pagecore_word_count(end);
    int skip;
    for (size_t chunk = start >> 6, n; chunk < nwords; chunk += n) {
        n = PAGECORE_(chunk_at)(chunk, nwords, summary, &skip);
        const size_t found = skip ? 0 : PAGECORE_(list_words)(words + chunk, n, list);
        for (size_t k = 0; k < found; ++k) {
            const size_t i = chunk + list[k];
            uint64_t word = pagecore_load_relaxed(&words[i]);
            if (i == start >> 6 || i == end >> 6)
                word &= pagecore_mask(i, start, end);
            const size_t room = capacity - listed;
            __builtin_prefetch(indices + listed + 256, 1);
            const size_t count =
                PAGECORE_(decode_some)(word, (int64_t)(i * PAGECORE_WORD_BITS), indices + listed, room, 3);
            if (count > room) {
                for (size_t dropped = room; dropped; --dropped)
                    word &= word - 1;
                *next = i * PAGECORE_WORD_BITS + (size_t)__builtin_ctzll(word);
                return capacity;
            }
            listed += count;
        }
    }
    *next = end;
    return listed;
}

/* Runs as (first, count) pairs, at most `capacity`; *next is where to go on, end when all were listed. The edges are
 * listed as if they were set bits, and each pair of them is a run. */
static inline size_t PAGECORE_(list_runs)(const uint64_t *words, const uint64_t *summary, size_t start, size_t end,
                                          int64_t *pairs, size_t capacity, size_t *next)
{
    uint16_t list[PAGECORE_CHUNK + 8];
    uint64_t edges[PAGECORE_CHUNK];
    size_t listed = 0, whole = 0;
    uint64_t carry = 0;
    const size_t nwords = pagecore_word_count(end);
    int skip;
    for (size_t chunk = start >> 6, n; chunk < nwords; chunk += n) {
        n = PAGECORE_(chunk_at)(chunk, nwords, summary, &skip);
        size_t found = 0;
        if (skip && !carry)
            continue;
        if (chunk == start >> 6 || chunk + n == nwords) {
            /* The first word and the last hold bits that are not asked for. */
            uint64_t copy[PAGECORE_CHUNK];
            for (size_t i = 0; i < n; ++i)
                copy[i] = pagecore_load_relaxed(&words[chunk + i]) & pagecore_mask(chunk + i, start, end);
            found = PAGECORE_(list_edges)(copy, n, &carry, edges, list);
        } else {
            found = PAGECORE_(list_edges)(words + chunk, n, &carry, edges, list);
        }
        for (size_t k = 0; k < found; ++k) {
            const size_t room = 2 * capacity - listed;
            const int64_t base = (int64_t)((chunk + list[k]) * PAGECORE_WORD_BITS);
            const size_t count = PAGECORE_(decode_some)(edges[list[k]], base, pairs + listed, room, 4);
            listed += count < room ? count : room;
            if (count > room)
                break;
        }
        for (; whole + 1 < listed; whole += 2)
            pairs[whole + 1] -= pairs[whole];
        if (listed == 2 * capacity) {
            *next = capacity ? (size_t)(pairs[listed - 2] + pairs[listed - 1]) : start;
            return capacity;
        }
    }
    if (listed & 1) {
        pairs[listed] = (int64_t)end - pairs[listed - 1];
        ++listed;
    }
    *next = end;
    return listed / 2;
}

/* ---- counting and finding ---- */

#if PAGECORE_VECTORS
/* Sums of the bits of `n` words, a multiple of 4, in four lanes. */
PAGECORE_INLINE __m256i PAGECORE_(sum_bits)(__m256i words)
{
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1,
                                            2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(counts, _mm256_and_si256(words, nibble));
    const __m256i high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble));
    return _mm256_add_epi8(low, high);
}

PAGECORE_INLINE __m128i PAGECORE_(sum_bits_of_pair)(__m128i words)
{
    const __m128i counts = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i low = _mm_shuffle_epi8(counts, _mm_and_si128(words, nibble));
    return _mm_add_epi8(low, _mm_shuffle_epi8(counts, _mm_and_si128(_mm_srli_epi16(words, 4), nibble)));
}

PAGECORE_INLINE size_t PAGECORE_(total)(__m256i lanes)
{
    const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return (size_t)(_mm_extract_epi64(pair, 0) + _mm_extract_epi64(pair, 1));
}

/* The set bits of a block. Four streams at once: one keeps too few cache lines under way, and the prefetchers stop
 * at the end of a page. */
static inline size_t PAGECORE_(count_block)(const uint64_t *words)
{
    if (pagecore_cpu & PAGECORE_AVX512)
        return pagecore_count_block_avx512(words);
    enum {
        STREAM = PAGECORE_BLOCK / 4,
        STEP = 8
    };
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum = zero;
    for (size_t i = 0; i < STREAM; i += STEP) {
        __m256i bytes = zero; /* at most 8 * 8 in each */
        for (size_t stream = 0; stream < 4; ++stream)
            for (size_t j = 0; j < STEP; j += 4)
                bytes = _mm256_add_epi8(bytes, PAGECORE_(sum_bits)(_mm256_loadu_si256(
                                                   (const __m256i *)(words + stream * STREAM + i + j))));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
    }
    return PAGECORE_(total)(sum);
}
#endif

/* Bits that change during the call may be counted or not. */
static inline size_t PAGECORE_(count)(const uint64_t *words, size_t first, size_t end)
{
    size_t count = 0, i = first >> 6;
    const size_t last = end >> 6;
    if (first < end && first & 63)
        count += pagecore_popcount(pagecore_load_relaxed(&words[i]) & pagecore_mask(i, first, end)), ++i;
#if PAGECORE_VECTORS
    for (; i + PAGECORE_BLOCK <= last; i += PAGECORE_BLOCK)
        count += PAGECORE_(count_block)(words + i);
#endif
    size_t counts[4] = {0};
    for (; i + 4 <= last; i += 4)
        for (unsigned j = 0; j < 4; ++j)
            counts[j] += pagecore_popcount(pagecore_load_relaxed(&words[i + j]));
    count += counts[0] + counts[1] + counts[2] + counts[3];
    for (; i < last; ++i)
        count += pagecore_popcount(pagecore_load_relaxed(&words[i]));
    if (i == last && end & 63)
        count += pagecore_popcount(pagecore_load_relaxed(&words[i]) & pagecore_mask(i, first, end));
    return count;
}

/* How many runs begin in [first, end). */
static inline size_t PAGECORE_(count_runs)(const uint64_t *words, const uint64_t *summary, size_t first, size_t end)
{
    size_t count = 0;
    uint64_t carry = 0;
    PAGECORE_EACH_WORD(i, mask, first, end) {
        if (summary && !carry && i % PAGECORE_UNIT == 0 && !pagecore_load_acquire(&summary[i / PAGECORE_UNIT])) {
            i += PAGECORE_UNIT - 1;
            continue;
        }
        const uint64_t word = pagecore_load_relaxed(&words[i]) & mask;
        count += pagecore_popcount(word & ~(word << 1 | carry));
        carry = word >> 63;
    }
    return count;
}

/* The first word of [i, n) that is not `flip` (0 or all ones), or n. */
static inline size_t PAGECORE_(find_word)(const uint64_t *words, size_t i, size_t n, uint64_t flip)
{
#if PAGECORE_VECTORS
    const __m256i flips = _mm256_set1_epi64x((int64_t)flip);
    for (; i + 16 <= n; i += 16) {
        __m256i any = _mm256_setzero_si256();
        for (unsigned j = 0; j < 16; j += 4)
            any = _mm256_or_si256(any, _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(words + i + j)), flips));
        if (!_mm256_testz_si256(any, any))
            break;
    }
#endif
    for (; i < n; ++i)
        if (pagecore_load_relaxed(&words[i]) != flip)
            break;
    return i;
}

/* The first bit that is set (flip: 0) or clear (all ones), or end. relaxed: a hint where to look; who acts on the bit
 * takes it by a read-modify-write. */
static inline size_t PAGECORE_(find)(const uint64_t *words, size_t first, size_t end, uint64_t flip)
{
    const size_t nwords = pagecore_word_count(end);
    for (size_t i = first >> 6; i < nwords; ++i) {
        const uint64_t word = (pagecore_load_relaxed(&words[i]) ^ flip) & pagecore_mask(i, first, end);
        if (word)
            return i * PAGECORE_WORD_BITS + (size_t)__builtin_ctzll(word);
        /* The words at both ends have masks, and are looked at here alone. */
        if (i + 1 < end >> 6)
            i = PAGECORE_(find_word)(words, i + 1, end >> 6, flip) - 1;
    }
    return end;
}

#undef PAGECORE_INLINE
