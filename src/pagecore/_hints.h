/* Hints over the source's planes (design rule S3): checked, clipped, and applied; _planes.h says who may write what.
 *
 * The holder of the tracker's lock hints, beside senders that take pages and put them back without it. So `dirty` is
 * changed by what nothing can come between:
 *   a memory transaction over some runs, where the processor has them: both planes at once, in plain loads and stores
 *   a batch of words: turn `hinted` on, then fetch-and-clear `dirty`, then undo
 */
#ifndef PAGECORE_HINTS_H
#define PAGECORE_HINTS_H

#include "_bitscan.h"

/* A count of its own for each plane that a loop changes; signed, to be added. */
typedef struct {
    int64_t dirty;
    int64_t hinted;
} pagecore_change;

/* The pages of a hint that lie in the region, in whole placing units, rounded inward: [*low, *high). */
static inline void pagecore_clip_hint(int64_t first, int64_t count, size_t npages, size_t unit, size_t *low,
                                      size_t *high)
{
    const uint64_t past = (uint64_t)first + (uint64_t)count;    /* right where it is positive: first may be negative */
    const int nothing = count <= 0 || (first < 0 && (uint64_t)count <= 0 - (uint64_t)first);
    size_t from = first < 0 ? 0 : (size_t)first;
    if (from > npages)
        from = npages;
    /* A unit is a power of two. */
    *low = (from + unit - 1) & ~(unit - 1);
    *high = (nothing ? 0 : past < npages ? (size_t)past : npages) & ~(unit - 1);
}

/* Where a list of hints was left: the run, and the page in it. */
typedef struct {
    size_t run;
    size_t page;
} pagecore_hint_place;

enum {
    PAGECORE_HINT_BATCH = 256,              /* words after which a batch is applied */
    PAGECORE_HINT_PART = 64,                /* words of a run that are looked at together */
    PAGECORE_HINT_STRETCH = 16,             /* short runs that are looked at together */
    PAGECORE_HINT_ROOM = PAGECORE_HINT_BATCH + PAGECORE_HINT_PART + 2,  /* what comes before it is applied */
    PAGECORE_HINT_GROUP = 32,               /* words of a batch that are changed in one transaction */
    PAGECORE_HINT_SPANS = 16,               /* middles of long runs that are changed in one transaction */
    PAGECORE_HINT_AHEAD = 16,               /* runs between asking for a line and looking at it */
    PAGECORE_HINT_LARGE = 1 << 23,          /* pages from which on a plane does not stay in the cache: 1 MiB */
    PAGECORE_TAKE_WORDS = 128               /* words that are taken in one transaction */
};

/* Words in which something is owed, and what; and whole words in the middle of long runs. */
typedef struct {
    size_t filled, spans, span_words;
    size_t span_at[PAGECORE_HINT_SPANS], span_length[PAGECORE_HINT_SPANS];
    uint64_t at[PAGECORE_HINT_ROOM];
    uint64_t owed[PAGECORE_HINT_ROOM];
    uint64_t before[PAGECORE_HINT_ROOM];
    pagecore_change change;
} pagecore_hint_batch;

/* S3 for words [from, to) of a batch: turn hinted on, then fetch-and-clear dirty, then undo where a sender was faster:
 * only bits that were turned on here and whose dirty came back 0. All of one step go before all of the next: a locked
 * operation waits for the stores before it, and so it waits once. A word may be in the batch twice: `before` of the
 * second entry has what the first turned on, so the first alone may undo that. */
static inline void pagecore_hint_apply(uint64_t *dirty, uint64_t *hinted, pagecore_hint_batch *batch, size_t from,
                                       size_t to)
{
    int64_t again = 0;
    for (size_t i = from; i < to; i++) {
        uint64_t *plane = &hinted[batch->at[i]];
        batch->before[i] = pagecore_load_relaxed(plane);
        pagecore_store_relaxed(plane, batch->before[i] | batch->owed[i]);
    }
    for (size_t i = from; i < to; i++) {
        const uint64_t owed = batch->owed[i], before = batch->before[i];
        const uint64_t fetched = pagecore_fetch_and(&dirty[batch->at[i]], ~owed) & owed;
        batch->owed[i] = fetched;
        if ((owed & ~before) != (fetched & ~before)) {
            uint64_t *plane = &hinted[batch->at[i]];
            pagecore_store_relaxed(plane, pagecore_load_relaxed(plane) & ~(owed & ~before & ~fetched));
        }
        if (fetched & before)
            again += pagecore_popcount(fetched & before);
    }
    /* The counts of many words together are many times faster than many counts. */
    const int64_t taken = (int64_t)pagecore_count(batch->owed + from, 0, (to - from) * PAGECORE_WORD_BITS);
    batch->change.dirty -= taken;
    batch->change.hinted += taken - again;
}

/* Every loop exists for each path of the processor, as those of _bitscan.h do. */
#define PAGECORE_(name) pagecore_##name##_plain
#define PAGECORE_VECTORS 0
#include "_planeloops.h"
#undef PAGECORE_
#undef PAGECORE_VECTORS

#if PAGECORE_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#define PAGECORE_(name) pagecore_##name##_avx2
#define PAGECORE_VECTORS 1
#include "_planeloops.h"
#undef PAGECORE_
#undef PAGECORE_VECTORS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* The first hint that is wrong (a negative count, or nothing of it in the region), or n; *clipped is how many overlap
 * an end of the region. */
static inline size_t pagecore_check_hints(const int64_t *runs, size_t n, size_t npages, size_t *clipped)
{
    return PAGECORE_BEST(check_hints)(runs, n, npages, clipped);
}

/* Process hints from *place on, until the list ends or about `budget` words were looked at. The runs were checked
 * before the GIL was released, but the array is the caller's and another thread may write to it: each is checked again
 * as it is read, and clipped. */
static inline pagecore_change pagecore_hint_runs(uint64_t *dirty, uint64_t *hinted, size_t npages, size_t unit,
                                                 const int64_t *runs, size_t n, pagecore_hint_place *place,
                                                 size_t budget)
{
    return PAGECORE_BEST(hint_runs)(dirty, hinted, npages, unit, runs, n, place, budget);
}

#endif
