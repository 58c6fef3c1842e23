/* The loops of hints and takes, as a template: _hints.h includes this file for each path of the processor (see
 * _bitloops.h). No include guard. */

#define PAGECORE_INLINE static inline __attribute__((always_inline))

/* See pagecore_check_hints. */
static inline size_t PAGECORE_(check_hints)(const int64_t *runs, size_t n, size_t npages, size_t *clipped)
{
    size_t i = 0;
    *clipped = 0;
    while (i < n) {
        enum { STRETCH = 64 };
        const size_t end = n - i < STRETCH ? n : i + STRETCH;
#if PAGECORE_VECTORS
        /* Most stretches are within the region: a sign bit that stays clear in all of their numbers. */
        if (end == i + STRETCH) {
            const __m256i size = _mm256_set1_epi64x((int64_t)npages);
            __m256i bad = _mm256_setzero_si256();
            for (size_t k = i; k < end; k += 4) {
                const __m256i low = _mm256_loadu_si256((const __m256i *)(runs + 2 * k));
                const __m256i high = _mm256_loadu_si256((const __m256i *)(runs + 2 * k + 4));
                const __m256i first = _mm256_unpacklo_epi64(low, high), count = _mm256_unpackhi_epi64(low, high);
                const __m256i left = _mm256_sub_epi64(size, first);
                bad = _mm256_or_si256(_mm256_or_si256(bad, first), _mm256_or_si256(count, left));
                bad = _mm256_or_si256(bad, _mm256_sub_epi64(left, count));
            }
            if (!_mm256_movemask_pd(_mm256_castsi256_pd(bad))) {
                i = end;
                continue;
            }
        }
#endif
        for (; i < end; i++) {
            const int64_t first = pagecore_once(&runs[2 * i]), count = pagecore_once(&runs[2 * i + 1]);
            if (pagecore_run_fits(first, count, npages))
                continue;
            if (count <= 0 || first >= (int64_t)npages || (first < 0 && (uint64_t)count <= 0 - (uint64_t)first))
                return i;
            ++*clipped;
        }
    }
    return n;
}

/* Look at one word, and keep what is owed of it for hint_apply. Without a branch: which words have something cannot be
 * foreseen. */
PAGECORE_INLINE void PAGECORE_(hint_add)(const uint64_t *dirty, size_t w, uint64_t mask, pagecore_hint_batch *batch)
{
    const uint64_t owed = pagecore_load_relaxed(&dirty[w]) & mask;
    batch->at[batch->filled] = w;
    batch->owed[batch->filled] = owed;
    batch->filled += owed != 0;
}

#if PAGECORE_VECTORS
/* A few words of a batch as if nobody else were there; 0 where that failed, and nothing is done. */
PAGECORE_INLINE int PAGECORE_(hint_few)(uint64_t *dirty, uint64_t *hinted, const uint64_t *at, const uint64_t *owed,
                                        pagecore_change *change)
{
    size_t taken = 0, again = 0;
    if (!pagecore_begin_transaction())
        return 0;
#pragma GCC unroll 8
    for (size_t i = 0; i < PAGECORE_HINT_GROUP; i++) {
        const uint64_t there = pagecore_load_relaxed(&dirty[at[i]]), before = pagecore_load_relaxed(&hinted[at[i]]);
        const uint64_t bits = there & owed[i];
        pagecore_store_relaxed(&hinted[at[i]], before | bits);
        pagecore_store_relaxed(&dirty[at[i]], there ^ bits);
        taken += pagecore_popcount(bits);
        again += pagecore_popcount(bits & before);
    }
    pagecore_end_transaction();
    change->dirty -= (int64_t)taken;
    change->hinted += (int64_t)(taken - again);
    return 1;
}

/* The spans of a batch as if nobody else were there; 0 where that failed, and nothing is done. */
PAGECORE_INLINE int PAGECORE_(hint_spans)(uint64_t *dirty, uint64_t *hinted, pagecore_hint_batch *batch)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i taken = zero, again = zero;
    if (!pagecore_begin_transaction())
        return 0;
    for (size_t k = 0; k < batch->spans; k++) {
        uint64_t *const there = dirty + batch->span_at[k], *const free_pages = hinted + batch->span_at[k];
        __m256i some = zero, more = zero; /* no byte of them overflows: a span is short */
        for (size_t i = 0; i < batch->span_length[k]; i += 4) {
            const __m256i owed = _mm256_loadu_si256((__m256i *)(there + i));
            const __m256i before = _mm256_loadu_si256((__m256i *)(free_pages + i));
            _mm256_storeu_si256((__m256i *)(free_pages + i), _mm256_or_si256(before, owed));
            _mm256_storeu_si256((__m256i *)(there + i), zero);
            some = _mm256_add_epi8(some, PAGECORE_(sum_bits)(owed));
            more = _mm256_add_epi8(more, PAGECORE_(sum_bits)(_mm256_and_si256(owed, before)));
        }
        taken = _mm256_add_epi64(taken, _mm256_sad_epu8(some, zero));
        again = _mm256_add_epi64(again, _mm256_sad_epu8(more, zero));
    }
    pagecore_end_transaction();
    const size_t all = PAGECORE_(total)(taken);
    batch->change.dirty -= (int64_t)all;
    batch->change.hinted += (int64_t)(all - PAGECORE_(total)(again));
    return 1;
}

/* The spans in a transaction, or word by word: behind what the batch holds there is room for one of them. (Pairs of
 * words, by 16-byte exchanges, were tried: as slow in dense planes, and slower in sparse ones.) */
static inline void PAGECORE_(hint_flush_spans)(uint64_t *dirty, uint64_t *hinted, pagecore_hint_batch *batch)
{
    if (!PAGECORE_(hint_spans)(dirty, hinted, batch))
        for (size_t k = 0; k < batch->spans; k++) {
            const size_t filled = batch->filled;
            for (size_t i = 0; i < batch->span_length[k]; i++)
                PAGECORE_(hint_add)(dirty, batch->span_at[k] + i, PAGECORE_ALL_ONES, batch);
            pagecore_hint_apply(dirty, hinted, batch, filled, batch->filled);
            batch->filled = filled;
        }
    batch->spans = batch->span_words = 0;
}
#endif

/* Apply what the batch holds: in transactions, or with locked operations. */
static inline void PAGECORE_(hint_flush)(uint64_t *dirty, uint64_t *hinted, pagecore_hint_batch *batch)
{
    size_t i = 0;
#if PAGECORE_VECTORS
    if (pagecore_cpu & PAGECORE_RTM) {
        if (batch->spans)
            PAGECORE_(hint_flush_spans)(dirty, hinted, batch);
        for (size_t k = 0; k < batch->filled; k++)
            __builtin_prefetch(&hinted[batch->at[k]], 1);
        /* Words with nothing owed fill up the last group, unless it is too small to pay off. */
        if (batch->filled % PAGECORE_HINT_GROUP >= PAGECORE_HINT_GROUP / 4)
            while (batch->filled % PAGECORE_HINT_GROUP) {
                batch->at[batch->filled] = batch->at[0];
                batch->owed[batch->filled++] = 0;
            }
        for (; i + PAGECORE_HINT_GROUP <= batch->filled; i += PAGECORE_HINT_GROUP)
            if (!PAGECORE_(hint_few)(dirty, hinted, batch->at + i, batch->owed + i, &batch->change))
                pagecore_hint_apply(dirty, hinted, batch, i, i + PAGECORE_HINT_GROUP);
    }
#endif
    pagecore_hint_apply(dirty, hinted, batch, i, batch->filled);
    batch->filled = 0;
}

/* Whole words [w, end) in the middle of a run. */
PAGECORE_INLINE void PAGECORE_(hint_middle)(uint64_t *dirty, uint64_t *hinted, size_t w, size_t end,
                                            pagecore_hint_batch *batch)
{
#if PAGECORE_VECTORS
    const size_t n = (end - w) & ~(size_t)3;
    if (n) {
        __m256i any = _mm256_setzero_si256();
        for (size_t i = w; i < w + n; i += 4)
            any = _mm256_or_si256(any, _mm256_loadu_si256((const __m256i *)(dirty + i)));
        if (_mm256_testz_si256(any, any)) {
            w += n;
        } else if (pagecore_cpu & PAGECORE_RTM) {
            for (size_t i = w; i < w + n + 7; i += 8)
                __builtin_prefetch(&hinted[i], 1);
            batch->span_at[batch->spans] = w;
            batch->span_length[batch->spans++] = n;
            batch->span_words += n;
            if (batch->spans == PAGECORE_HINT_SPANS || batch->span_words >= 4 * PAGECORE_HINT_PART)
                PAGECORE_(hint_flush_spans)(dirty, hinted, batch);
            w += n;
        }
    }
#endif
    (void)hinted;
    for (; w < end; w++)
        PAGECORE_(hint_add)(dirty, w, PAGECORE_ALL_ONES, batch);
}

#if PAGECORE_VECTORS
/* The words and masks of some runs. */
typedef struct {
    uint64_t word[PAGECORE_HINT_STRETCH], mask[PAGECORE_HINT_STRETCH];
    uint64_t next_word[PAGECORE_HINT_STRETCH], next_mask[PAGECORE_HINT_STRETCH];
} PAGECORE_(hint_stretch);

/* A stretch of runs of 1 to 64 pages, all inside the region, lies in a word each or in two; 0 where it is not such a
 * stretch. *crossing says whether some need the second word, which else is the first one with an empty mask. Each
 * number is read once. */
PAGECORE_INLINE int PAGECORE_(hint_masks)(const int64_t *runs, size_t npages, PAGECORE_(hint_stretch) *stretch,
                                          int *crossing)
{
    const __m256i zero = _mm256_setzero_si256(), size = _mm256_set1_epi64x((int64_t)npages);
    const __m256i one = _mm256_set1_epi64x(1), bits = _mm256_set1_epi64x(64), ones = _mm256_set1_epi64x(-1);
    __m256i bad = zero, cross = zero;
    for (size_t k = 0; k < PAGECORE_HINT_STRETCH; k += 4) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(runs + 2 * k));
        __m256i high = _mm256_loadu_si256((const __m256i *)(runs + 2 * k + 4));
        __asm__("" : "+x"(low), "+x"(high)); /* what is checked is what is used: never loaded again */
        const __m256i first = _mm256_unpacklo_epi64(low, high), count = _mm256_unpackhi_epi64(low, high);
        const __m256i left = _mm256_sub_epi64(size, first), room = _mm256_sub_epi64(bits, count);
        bad = _mm256_or_si256(_mm256_or_si256(bad, first), _mm256_or_si256(_mm256_sub_epi64(count, one), left));
        bad = _mm256_or_si256(bad, _mm256_or_si256(_mm256_sub_epi64(left, count), room));
        const __m256i shift = _mm256_and_si256(first, _mm256_set1_epi64x(63)), run = _mm256_srlv_epi64(ones, room);
        const __m256i word = _mm256_srli_epi64(first, 6);
        const __m256i past = _mm256_srlv_epi64(run, _mm256_sub_epi64(bits, shift));
        const __m256i next = _mm256_add_epi64(word, _mm256_add_epi64(one, _mm256_cmpeq_epi64(past, zero)));
        cross = _mm256_or_si256(cross, past);
        _mm256_storeu_si256((__m256i *)(stretch->word + k), word);
        _mm256_storeu_si256((__m256i *)(stretch->mask + k), _mm256_sllv_epi64(run, shift));
        _mm256_storeu_si256((__m256i *)(stretch->next_word + k), next);
        _mm256_storeu_si256((__m256i *)(stretch->next_mask + k), past);
    }
    *crossing = !_mm256_testz_si256(cross, cross);
    return !_mm256_movemask_pd(_mm256_castsi256_pd(bad));
}

/* Such a stretch, if there is one at `runs`. */
PAGECORE_INLINE int PAGECORE_(hint_short)(const uint64_t *dirty, size_t npages, const int64_t *runs,
                                          pagecore_hint_batch *batch)
{
    PAGECORE_(hint_stretch) stretch;
    int crossing;
    if (!PAGECORE_(hint_masks)(runs, npages, &stretch, &crossing))
        return 0;
    for (size_t k = 0; k < PAGECORE_HINT_STRETCH; k++)
        PAGECORE_(hint_add)(dirty, stretch.word[k], stretch.mask[k], batch);
    if (crossing)
        for (size_t k = 0; k < PAGECORE_HINT_STRETCH; k++)
            PAGECORE_(hint_add)(dirty, stretch.next_word[k], stretch.next_mask[k], batch);
    return 1;
}
#endif

/* Ask for the first lines of a run that comes soon; it is not checked yet. */
PAGECORE_INLINE void PAGECORE_(hint_ask)(const uint64_t *dirty, size_t npages, const int64_t *run)
{
    const uint64_t first = (uint64_t)pagecore_once(run), count = (uint64_t)pagecore_once(run + 1);
    if (first >= npages)
        return;
    __builtin_prefetch(&dirty[first >> 6], 1);
    /* A prefetch does not fault, wherever it is. */
    for (uint64_t page = 512; page < count && page <= 1024; page += 512)
        __builtin_prefetch((const char *)dirty + ((first + page) >> 6) * sizeof *dirty, 1);
}

/* See pagecore_hint_runs. */
static inline pagecore_change PAGECORE_(hint_runs)(uint64_t *dirty, uint64_t *hinted, size_t npages, size_t unit,
                                                   const int64_t *runs, size_t n, pagecore_hint_place *place,
                                                   size_t budget)
{
    size_t run = place->run, page = place->page;
#if PAGECORE_VECTORS
    size_t next_try = 0; /* the list may have short runs again from here on */
#endif
    /* Where a plane is larger than a cache, a random run waits for its line. */
    const size_t ahead = npages >= PAGECORE_HINT_LARGE ? PAGECORE_HINT_AHEAD : n;
    pagecore_hint_batch batch;
    batch.filled = batch.spans = batch.span_words = 0;
    batch.change.dirty = batch.change.hinted = 0;
    while (run < n && budget) {
#if PAGECORE_VECTORS
        if (run >= next_try && n - run >= PAGECORE_HINT_STRETCH && budget >= PAGECORE_HINT_STRETCH && unit == 1 &&
            !page) {
            if (ahead < n && n - run >= 2 * PAGECORE_HINT_STRETCH)
                for (size_t k = run + PAGECORE_HINT_STRETCH; k < run + 2 * PAGECORE_HINT_STRETCH; k++)
                    PAGECORE_(hint_ask)(dirty, npages, runs + 2 * k);
            if (PAGECORE_(hint_short)(dirty, npages, runs + 2 * run, &batch)) {
                run += PAGECORE_HINT_STRETCH;
                budget -= PAGECORE_HINT_STRETCH;
                if (batch.filled >= PAGECORE_HINT_BATCH)
                    PAGECORE_(hint_flush)(dirty, hinted, &batch);
                continue;
            }
            next_try = run + 4 * PAGECORE_HINT_STRETCH;
        }
#endif
        const int64_t first = pagecore_once(&runs[2 * run]), count = pagecore_once(&runs[2 * run + 1]);
        size_t low = (size_t)first, high = (size_t)first + (size_t)count;
        if (run + ahead < n)
            PAGECORE_(hint_ask)(dirty, npages, runs + 2 * (run + ahead));
        budget--;
        if (unit > 1 || !pagecore_run_fits(first, count, npages))
            pagecore_clip_hint(first, count, npages, unit, &low, &high);
        if (low < page)
            low = page;
        page = 0;
        run++;
        if (low >= high)
            continue;
        size_t w = low >> 6, last = (high - 1) >> 6;
        uint64_t mask = PAGECORE_ALL_ONES << (low & 63);
        const uint64_t end = PAGECORE_ALL_ONES >> (63 - ((high - 1) & 63));
        if (last - w <= 1) {
            /* Two words, without a branch: the mask of one of them may be empty. */
            const uint64_t two = w - last;
            PAGECORE_(hint_add)(dirty, w, mask & (end | two), &batch);
            PAGECORE_(hint_add)(dirty, last, end & two, &batch);
        } else {
            if (last - w >= PAGECORE_HINT_PART) {
                /* The rest of the run is for the next turn. */
                last = w + PAGECORE_HINT_PART;
                page = last << 6;
                run--;
            }
            budget -= last - w < budget ? last - w : budget;
            PAGECORE_(hint_add)(dirty, w, mask, &batch);
            PAGECORE_(hint_middle)(dirty, hinted, w + 1, last, &batch);
            if (!page)
                PAGECORE_(hint_add)(dirty, last, end, &batch);
        }
        if (batch.filled >= PAGECORE_HINT_BATCH)
            PAGECORE_(hint_flush)(dirty, hinted, &batch);
    }
    PAGECORE_(hint_flush)(dirty, hinted, &batch);
    place->run = run;
    place->page = page;
    return batch.change;
}

/* ---- takes ---- */

#if PAGECORE_VECTORS
/* Fetch and clear `n` whole words, a multiple of 4 and at most PAGECORE_TAKE_WORDS, as if nobody else were there, if
 * they hold at most `limit` pages; returns how many, or ALL_ONES where nothing was done. */
PAGECORE_INLINE size_t PAGECORE_(take_words)(uint64_t *words, size_t n, size_t limit, uint64_t *copy)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum = zero;
    if (!pagecore_begin_transaction())
        return SIZE_MAX;
    for (size_t i = 0; i < n; i += 4) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(words + i));
        _mm256_storeu_si256((__m256i *)(copy + i), bits);
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(PAGECORE_(sum_bits)(bits), zero));
    }
    const size_t found = PAGECORE_(total)(sum);
    if (found <= limit)
        for (size_t i = 0; i < n; i += 4) {
            _mm256_storeu_si256((__m256i *)(words + i), zero);
            __asm__ volatile("" : : : "memory"); /* no memset(): binding that name would end the transaction */
        }
    pagecore_end_transaction();
    return found <= limit ? found : SIZE_MAX;
}
#endif

/* Take words [w, w + n) and list their runs; *taken is the pages. Returns how many runs were written, or SIZE_MAX where
 * nothing was done: then it is done word by word. There is room for `room` runs. */
static inline size_t PAGECORE_(take_block)(uint64_t *words, size_t w, size_t n, size_t max_pages, int64_t *pairs,
                                           size_t room, size_t *taken)
{
#if PAGECORE_VECTORS
    uint64_t copy[PAGECORE_TAKE_WORDS], edges[PAGECORE_TAKE_WORDS], carry = 0;
    uint16_t list[PAGECORE_TAKE_WORDS + 8];
    if (!(pagecore_cpu & PAGECORE_RTM))
        return SIZE_MAX;
    /* A page of the stack that nobody touched yet would fail each transaction anew. */
    copy[0] = copy[PAGECORE_TAKE_WORDS - 1] = 0;
    __asm__ volatile("" : : "r"(copy) : "memory");
    /* There are no more runs than pages. */
    *taken = PAGECORE_(take_words)(words + w, n, max_pages < room ? max_pages : room, copy);
    if (*taken == SIZE_MAX)
        return SIZE_MAX;
    size_t listed = 0;
    const size_t found = PAGECORE_(list_edges)(copy, n, &carry, edges, list);
    for (size_t k = 0; k < found; k++)
        listed += PAGECORE_(decode_some)(edges[list[k]], (int64_t)((w + list[k]) * PAGECORE_WORD_BITS),
                                         pairs + listed, 2 * room - listed, 4);
    if (listed & 1)
        pairs[listed++] = (int64_t)((w + n) * PAGECORE_WORD_BITS);
    for (size_t i = 0; i < listed; i += 2)
        pairs[i + 1] -= pairs[i];
    return listed / 2;
#else
    (void)words, (void)w, (void)n, (void)max_pages, (void)pairs, (void)room, (void)taken;
    return SIZE_MAX;
#endif
}

#undef PAGECORE_INLINE
