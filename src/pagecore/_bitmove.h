/* Algebra, ranges and batches, as a template (see _bitloops.h). */

#define PAGECORE_INLINE static inline __attribute__((always_inline))

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

/* out = a (how) b for `n` words; nobody else has `out`, which may be `a`. Returns the bits by which out differs from
 * a. Results that are larger than a cache are stored past it: they would push out what is worth keeping. */
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
    case PAGECORE_OR: return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_OR);
    case PAGECORE_AND: return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_AND);
    case PAGECORE_XOR: return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_XOR);
    default: return PAGECORE_(combine_how)(a, b, out, n, PAGECORE_ANDNOT);
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
PAGECORE_INLINE size_t PAGECORE_(apply_group)(uint64_t *words, uint64_t *summary, uint64_t (*runs)[2], size_t n,
                                              int set)
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

/* Set or clear; stops at an entry that does not fit, and *done says how many were done; returns how many bits
 * changed. Each run is read once, asked for, and changed a few runs later. `summary` (or NULL) spares a clear the
 * lines that are zero, and is marked by a set. */
PAGECORE_INLINE size_t PAGECORE_(apply_runs_how)(uint64_t *words, uint64_t *summary, const int64_t *pairs, size_t n,
                                                 size_t end, int set, size_t *done)
{
    enum {
        RING = 2 * PAGECORE_AHEAD
    }; /* a multiple of the group: no group wraps */
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
            if (i % 256 == 255 && spared < i / 4) /* most lines are marked: looking there costs more than it spares */
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
PAGECORE_INLINE size_t PAGECORE_(apply_few)(uint64_t *words, uint64_t *summary, const uint64_t *pages, size_t n,
                                            int set)
{
    size_t changed = 0;
#if PAGECORE_VECTORS
    if (pagecore_cpu & PAGECORE_RTM && n == PAGECORE_FEW_PAGES && pagecore_begin_transaction()) {
        for (size_t i = 0; i < PAGECORE_FEW_PAGES; ++i)
            changed += PAGECORE_(change_word)(&words[pages[i] >> 6], UINT64_C(1) << (pages[i] & 63), set);
        pagecore_end_transaction();
        for (size_t i = 0; set && summary && i < PAGECORE_FEW_PAGES; ++i)
            pagecore_mark_line_of(summary, pages[i]);
        return changed;
    }
#endif
    for (size_t i = 0; i < n; ++i)
        changed += (size_t)(set ? !pagecore_test_and_set_bit(words, pages[i])
                                : pagecore_test_and_clear_bit(words, pages[i]));
    if (set && summary) {
        pagecore_fence_after_rmw();
        for (size_t i = 0; i < n; ++i)
            pagecore_mark_line_of(summary, pages[i]);
    }
    return changed;
}

/* Set or clear, as above: a few pages at a time, each read once. The lines of later ones are asked for by numbers that
 * were not checked, which is harmless: a prefetch does not fault. */
PAGECORE_INLINE size_t PAGECORE_(apply_indices_how)(uint64_t *words, uint64_t *summary, const int64_t *indices, size_t n,
                                                    size_t end, int set, size_t *done)
{
    enum { AHEAD = 48 };
    size_t changed = 0, few = PAGECORE_FEW_PAGES;
    for (*done = 0; *done < n && few == PAGECORE_FEW_PAGES; *done += few) {
        uint64_t pages[PAGECORE_FEW_PAGES];
        const size_t i = *done, left = n - i;
        if (left > AHEAD + PAGECORE_FEW_PAGES)
            for (size_t k = i + AHEAD; k < i + AHEAD + PAGECORE_FEW_PAGES; ++k) {
                const uint64_t page = (uint64_t)pagecore_once(&indices[k]);
                __builtin_prefetch((const char *)words + (page >> 6) * sizeof *words, 1);
                if (set && summary)
                    __builtin_prefetch((const char *)summary + (page >> 15) * sizeof *summary, 1);
            }
        for (few = 0; few < PAGECORE_FEW_PAGES && few < left; ++few) {
            pages[few] = (uint64_t)pagecore_once(&indices[i + few]);
            if (pages[few] >= end)
                break;
        }
        changed += PAGECORE_(apply_few)(words, summary, pages, few, set);
    }
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
    enum {
        STRETCH = 512
    };
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
