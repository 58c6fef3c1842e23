/* Loops that change bitmaps, as a template (see _bitloops.h).
 *
 * `owned` says that nobody else changes those words during the call: they are loaded and stored, not exchanged. A locked
 * instruction costs 3 to 5 ns whatever it does, so these loops are as fast as they have few of them: none for a word that
 * is zero, and one for two words where most are not.
 */

#define PAGECORE_INLINE static inline __attribute__((always_inline))

/* ---- drain ---- */

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
/* Up to PAGECORE_GROUP pairs of words: exchanged first, into registers, and put afterwards. A locked instruction waits until all
 * stores before it have landed, so a store between two of them costs as much as another lock. Returns sums of bytes. */
PAGECORE_INLINE __m128i PAGECORE_(drain_group)(uint64_t *from, uint64_t *to, const uint16_t *at, unsigned n, int to_owned)
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
            const uint64_t pair[2] = {(uint64_t)_mm_extract_epi64(bits[j], 0), (uint64_t)_mm_extract_epi64(bits[j], 1)};
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
PAGECORE_INLINE size_t PAGECORE_(drain_pairs)(uint64_t *from, uint64_t *to, const uint16_t *list, size_t n, int to_owned)
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

/* As if nobody else were there: a memory transaction of sixteen lines costs as much as four locked instructions. Where one
 * fails (another thread wrote to a line, a page is not mapped yet, an interrupt came), that piece is exchanged. */
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
PAGECORE_INLINE size_t PAGECORE_(drain_list)(uint64_t *from, uint64_t *to, uint64_t *summary, size_t at, uint16_t *list,
                                             size_t n, int pairs, int from_owned, int to_owned)
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
    return PAGECORE_VECTORS && !from_owned && (pagecore_cpu & PAGECORE_CX16) && !(((uintptr_t)from | (uintptr_t)to) & 15);
}

/* `n` words, at most PAGECORE_BLOCK. `summary` is that of these words of `to`, or NULL. */
PAGECORE_INLINE size_t PAGECORE_(drain_block_how)(uint64_t *from, uint64_t *to, uint64_t *summary, size_t n, int from_owned,
                                                  int to_owned)
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
            if (summary && newly)
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
            newly += PAGECORE_(drain_list)(from, to, summary, s * PAGECORE_CHUNK, lists[s], listed[s], pairs, from_owned,
                                           to_owned);
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
PAGECORE_INLINE size_t PAGECORE_(drain_few_lines)(uint64_t *from, uint64_t *to, const uint16_t *lines, size_t n, int pairs,
                                                  int from_owned, int to_owned)
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

/* The marked lines of a block of `n` words; there are at most PAGECORE_CHUNK / 8 of them. The marks go over to `to`. */
PAGECORE_INLINE size_t PAGECORE_(drain_marked_how)(uint64_t *from, uint64_t *to, uint64_t *summary, const uint64_t *marks,
                                                   size_t n, int from_owned, int to_owned)
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
            else    /* the last line, of fewer words */
                for (size_t w = at; w < n; ++w)
                    newly += pagecore_popcount(
                        PAGECORE_(put)(&to[w], PAGECORE_(take)(&from[w], from_owned), to_owned));
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
static inline size_t PAGECORE_(drain_block)(uint64_t *from, uint64_t *to, uint64_t *summary, const uint64_t *marks, size_t n,
                                            int from_owned, int to_owned)
{
#define PAGECORE_DRAIN(from_is, to_is)                                                                                  \
    return marks ? PAGECORE_(drain_marked_how)(from, to, summary, marks, n, from_is, to_is)                             \
                 : PAGECORE_(drain_block_how)(from, to, summary, n, from_is, to_is)
    if (from_owned && to_owned)
        PAGECORE_DRAIN(1, 1);
    if (to_owned)
        PAGECORE_DRAIN(0, 1);
    PAGECORE_DRAIN(0, 0);
#undef PAGECORE_DRAIN
}

/* ---- algebra ---- */

/* The word that an operation makes of two. */
PAGECORE_INLINE uint64_t PAGECORE_(combined)(uint64_t a, uint64_t b, int how)
{
    return how == PAGECORE_OR ? a | b : how == PAGECORE_AND ? a & b : how == PAGECORE_XOR ? a ^ b : a & ~b;
}

#if PAGECORE_VECTORS
PAGECORE_INLINE __m256i PAGECORE_(combined_vectors)(__m256i a, __m256i b, int how)
{
    return how == PAGECORE_OR    ? _mm256_or_si256(a, b)
           : how == PAGECORE_AND ? _mm256_and_si256(a, b)
           : how == PAGECORE_XOR ? _mm256_xor_si256(a, b)
                                 : _mm256_andnot_si256(b, a);
}
#endif

/* out = a (how) b for `n` words; nobody else has `out`, which may be `a`. Returns the bits by which out differs from a.
 * Results that are larger than a cache are stored past it: they would push out what is worth keeping. */
PAGECORE_INLINE size_t PAGECORE_(combine_how)(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t n, int how)
{
    size_t changed = 0, i = 0;
#if PAGECORE_VECTORS
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum = zero;
    if (how == PAGECORE_OR && out == a && pagecore_cpu & PAGECORE_AVX512) {
        i = n & ~(size_t)7;
        changed = pagecore_or_avx512(out, b, i);
    }
    const int past = out != a && n >= PAGECORE_PAST_CACHE && !((uintptr_t)out & 31);
    for (; i + 8 <= n; i += 8) {
        __m256i bytes = zero;
        for (size_t j = i; j < i + 8; j += 4) {
            const __m256i left = _mm256_loadu_si256((const __m256i *)(a + j));
            const __m256i right = _mm256_loadu_si256((const __m256i *)(b + j));
            const __m256i result = PAGECORE_(combined_vectors)(left, right, how);
            if (past)
                _mm256_stream_si256((__m256i *)(out + j), result);
            else
                _mm256_storeu_si256((__m256i *)(out + j), result);
            if (out == a)
                bytes = _mm256_add_epi8(bytes, PAGECORE_(sum_bits)(_mm256_xor_si256(left, result)));
        }
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
    }
    if (past)
        _mm_sfence();
    changed += PAGECORE_(total)(sum);
#endif
    for (; i < n; ++i) {
        const uint64_t left = pagecore_load_relaxed(&a[i]);
        const uint64_t result = PAGECORE_(combined)(left, pagecore_load_relaxed(&b[i]), how);
        pagecore_store_relaxed(&out[i], result);
        changed += pagecore_popcount(left ^ result);
    }
    return changed;
}

static inline size_t PAGECORE_(combine)(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t n, int how)
{
    switch (how) {
    case PAGECORE_OR:
        return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_OR);
    case PAGECORE_AND:
        return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_AND);
    case PAGECORE_XOR:
        return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_XOR);
    default:
        return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_ANDNOT);
    }
}

/* ---- ranges and batches ---- */

PAGECORE_INLINE size_t PAGECORE_(clear_words)(uint64_t *words, size_t n)
{
    size_t cleared = 0, i = 0;
#if PAGECORE_VECTORS
    if ((pagecore_cpu & PAGECORE_CX16) && n >= 4) {
        if ((uintptr_t)words & 15) {
            cleared += pagecore_popcount(pagecore_clear_bits(words, PAGECORE_ALL_ONES));
            ++i;
        }
        for (; i + 2 <= n; i += 2) {
            uint64_t seen[2] = {pagecore_load_relaxed(&words[i]), pagecore_load_relaxed(&words[i + 1])};
            if (!(seen[0] | seen[1]))
                continue;
            while (!pagecore_compare_exchange_pair(&words[i], seen, 0, 0))
                ;
            cleared += pagecore_popcount(seen[0]) + pagecore_popcount(seen[1]);
        }
    }
#endif
    for (; i < n; ++i)
        cleared += pagecore_popcount(pagecore_clear_bits(&words[i], PAGECORE_ALL_ONES));
    return cleared;
}

static inline size_t PAGECORE_(clear_range)(uint64_t *words, size_t first, size_t end)
{
    size_t cleared = 0, i = first >> 6;
    if (first == end)
        return 0;
    if (i == end >> 6)
        return pagecore_popcount(pagecore_clear_bits(&words[i], pagecore_mask(i, first, end)));
    if (first & 63)
        cleared += pagecore_popcount(pagecore_clear_bits(&words[i], pagecore_mask(i, first, end))), ++i;
    cleared += PAGECORE_(clear_words)(words + i, (end >> 6) - i);
    if (end & 63)
        cleared += pagecore_popcount(pagecore_clear_bits(&words[end >> 6], pagecore_ones(end & 63)));
    return cleared;
}

static inline size_t PAGECORE_(set_range)(uint64_t *words, size_t first, size_t end)
{
    size_t changed = 0;
    PAGECORE_EACH_WORD(i, mask, first, end)
        if (mask)
            changed += pagecore_popcount(pagecore_set_bits(&words[i], mask));
    return changed;
}

#if PAGECORE_VECTORS
/* As if nobody else were there. */
PAGECORE_INLINE size_t PAGECORE_(change_word)(uint64_t *word, uint64_t mask, int set)
{
    const uint64_t before = pagecore_load_relaxed(word);
    pagecore_store_relaxed(word, set ? before | mask : before & ~mask);
    return pagecore_popcount((set ? ~before : before) & mask);
}

PAGECORE_INLINE size_t PAGECORE_(change_range)(uint64_t *words, size_t first, size_t end, int set)
{
    size_t i = first >> 6;
    const size_t last = end >> 6;
    const uint64_t low = PAGECORE_ALL_ONES << (first & 63), high = pagecore_ones(end & 63);
    if (i == last)
        return first == end ? 0 : PAGECORE_(change_word)(&words[i], low & high, set);
    size_t changed = PAGECORE_(change_word)(&words[i], low, set);
    while (++i < last)
        changed += PAGECORE_(change_word)(&words[i], PAGECORE_ALL_ONES, set);
    return high ? changed + PAGECORE_(change_word)(&words[last], high, set) : changed;
}

/* Some short runs in one transaction. Returns the bits changed, or ALL_ONES where it failed and nothing is done. */
PAGECORE_INLINE size_t PAGECORE_(change_runs)(uint64_t *words, uint64_t (*runs)[2], size_t n, int set)
{
    size_t changed = 0;
    if (!pagecore_begin_transaction())
        return (size_t)-1;
    for (size_t k = 0; k < n; ++k)
        changed += PAGECORE_(change_range)(words, runs[k][0], runs[k][1], set);
    pagecore_end_transaction();
    return changed;
}
#endif

/* Runs that wait for their lines. */
PAGECORE_INLINE size_t PAGECORE_(apply_group)(uint64_t *words, uint64_t *summary, uint64_t (*runs)[2], size_t n, int set)
{
    size_t changed;
#if PAGECORE_VECTORS
    size_t pages = 0;
    for (size_t k = 0; k < n; ++k)
        pages += runs[k][1] - runs[k][0];
    if (pagecore_cpu & PAGECORE_RTM && pages < PAGECORE_CHUNK * 8) {
        changed = PAGECORE_(change_runs)(words, runs, n, set);
    } else
#endif
        changed = (size_t)-1;
    if (changed == (size_t)-1) {
        changed = 0;
        for (size_t k = 0; k < n; ++k)
            changed += set ? PAGECORE_(set_range)(words, runs[k][0], runs[k][1])
                           : PAGECORE_(clear_range)(words, runs[k][0], runs[k][1]);
    }
    for (size_t k = 0; set && summary && k < n; ++k)
        if (runs[k][0] < runs[k][1])
            pagecore_mark_lines(summary, runs[k][0], runs[k][1]);
    return changed;
}

/* Set or clear; stops at an entry that does not fit, and *done says how many were done; returns how many bits changed. Each
 * run is read once, asked for, and changed a few runs later. `summary` (or NULL) spares a clear the lines that are zero, and is
 * marked by a set. */
PAGECORE_INLINE size_t PAGECORE_(apply_runs_how)(uint64_t *words, uint64_t *summary, const int64_t *pairs, size_t n,
                                                 size_t end, int set, size_t *done)
{
    enum { RING = 2 * PAGECORE_AHEAD };     /* a multiple of the group: no group wraps */
    uint64_t queue[RING][2];
    size_t changed = 0, asked = 0, applied = 0, spared = 0, i;
    for (i = 0; i < n; ++i) {
        const int64_t first = pagecore_once(&pairs[2 * i]), count = pagecore_once(&pairs[2 * i + 1]);
        if (!pagecore_run_fits(first, count, end))
            break;
        if (summary && !set) {
            if (!pagecore_any_line(summary, (size_t)first, (size_t)(first + count))) {
                ++spared;
                continue;
            }
            if (i % 256 == 255 && spared < i / 4)   /* most lines are marked: looking there costs more than it spares */
                summary = NULL;
        }
        queue[asked % RING][0] = (uint64_t)first;
        queue[asked % RING][1] = (uint64_t)(first + count);
        __builtin_prefetch(&words[first >> 6], 1);
        __builtin_prefetch(&words[(first + count) >> 6], 1);
        if (++asked - applied == PAGECORE_AHEAD + PAGECORE_GROUP) {
            changed += PAGECORE_(apply_group)(words, summary, queue + applied % RING, PAGECORE_GROUP, set);
            applied += PAGECORE_GROUP;
        }
    }
    while (applied < asked) {
        const size_t group = asked - applied < PAGECORE_GROUP ? asked - applied : PAGECORE_GROUP;
        changed += PAGECORE_(apply_group)(words, summary, queue + applied % RING, group, set);
        applied += group;
    }
    *done = i;
    return changed;
}

static inline size_t PAGECORE_(apply_runs)(uint64_t *words, uint64_t *summary, const int64_t *pairs, size_t n,
                                           size_t end, int set, size_t *done)
{
    return set ? PAGECORE_(apply_runs_how)(words, summary, pairs, n, end, 1, done)
               : PAGECORE_(apply_runs_how)(words, summary, pairs, n, end, 0, done);
}

/* Some pages whose lines were asked for, changed and then marked. */
PAGECORE_INLINE size_t PAGECORE_(apply_few)(uint64_t *words, uint64_t *summary, const uint64_t *pages, size_t n, int set)
{
    size_t changed = 0;
#if PAGECORE_VECTORS
    if (pagecore_cpu & PAGECORE_RTM && n == PAGECORE_FEW_PAGES && pagecore_begin_transaction()) {
        for (size_t i = 0; i < PAGECORE_FEW_PAGES; ++i)
            changed += PAGECORE_(change_word)(&words[pages[i] >> 6], UINT64_C(1) << (pages[i] & 63), set);
        for (size_t i = 0; set && summary && i < PAGECORE_FEW_PAGES; ++i)
            (void)PAGECORE_(change_word)(&summary[pages[i] >> 15], UINT64_C(1) << (pages[i] >> 9 & 63), 1);
        pagecore_end_transaction();
        return changed;
    }
#endif
    for (size_t i = 0; i < n; ++i)
        changed += (size_t)(set ? !pagecore_test_and_set_bit(words, pages[i]) : pagecore_test_and_clear_bit(words, pages[i]));
    if (set && summary) {
        pagecore_fence_after_rmw();
        for (size_t i = 0; i < n; ++i)
            pagecore_mark_line_of(summary, pages[i]);
    }
    return changed;
}

/* Set or clear, as above: each page is read once, asked for, and changed some pages later. */
PAGECORE_INLINE size_t PAGECORE_(apply_indices_how)(uint64_t *words, uint64_t *summary, const int64_t *indices, size_t n,
                                                    size_t end, int set, size_t *done)
{
    enum { RING = 4 * PAGECORE_FEW_PAGES };
    uint64_t queue[RING];
    size_t changed = 0, applied = 0, i;
    for (i = 0; i < n; ++i) {
        const uint64_t page = (uint64_t)pagecore_once(&indices[i]);
        if (page >= end)
            break;
        queue[i % RING] = page;
        __builtin_prefetch(&words[page >> 6], 1);
        if (i + 1 - applied == RING) {
            changed += PAGECORE_(apply_few)(words, summary, queue + applied % RING, PAGECORE_FEW_PAGES, set);
            applied += PAGECORE_FEW_PAGES;
        }
    }
    for (size_t few; applied < i; applied += few) {
        few = i - applied < PAGECORE_FEW_PAGES ? i - applied : PAGECORE_FEW_PAGES;
        changed += PAGECORE_(apply_few)(words, summary, queue + applied % RING, few, set);
    }
    *done = i;
    return changed;
}

static inline size_t PAGECORE_(apply_indices)(uint64_t *words, uint64_t *summary, const int64_t *indices, size_t n,
                                              size_t end, int set, size_t *done)
{
    return set ? PAGECORE_(apply_indices_how)(words, summary, indices, n, end, 1, done)
               : PAGECORE_(apply_indices_how)(words, summary, indices, n, end, 0, done);
}

/* The position of the first index that does not fit, or n. Whole stretches at first: a sign bit that stays clear. */
static inline size_t PAGECORE_(check_indices)(const int64_t *indices, size_t n, size_t end)
{
    enum { STRETCH = 512 };
    size_t i = 0;
#if PAGECORE_VECTORS
    for (; i + STRETCH <= n; i += STRETCH) {
        __m256i bad = _mm256_setzero_si256();
        const __m256i last = _mm256_set1_epi64x((int64_t)end - 1);
        for (size_t j = i; j < i + STRETCH; j += 4) {
            const __m256i number = _mm256_loadu_si256((const __m256i *)(indices + j));
            bad = _mm256_or_si256(bad, _mm256_or_si256(number, _mm256_sub_epi64(last, number)));
        }
        if (_mm256_movemask_pd(_mm256_castsi256_pd(bad)))
            break;
    }
#endif
    for (; i < n; ++i)
        if ((uint64_t)pagecore_once(&indices[i]) >= end)
            return i;
    return n;
}

#undef PAGECORE_INLINE
