/* Word loops over the source's planes: dirty, hinted, and the side plane of mark (design section 3).
 *
 * Who may write what:
 *   dirty    anyone, by read-modify-write: takers clear, writers of put_back set, and the holder of the tracker's
 *            lock does both
 *   hinted   the holder of the tracker's lock alone. Takers never touch it: a taker that cleared it could be put
 *            back between the two steps of a hint, and the page would end as neither dirty nor hinted, unsent.
 *            With one writer at a time a relaxed store is enough; the read-modify-write of `dirty` beside it is
 *            acq_rel and keeps the two in order
 *   side     anyone sets; the holder of the lock drains
 */
#ifndef PAGECORE_PLANES_H
#define PAGECORE_PLANES_H

#include <stddef.h>
#include <stdint.h>

#include "_atomic.h"

/* Bits [low, high) of a word; 0 <= low < high <= 64. */
static inline uint64_t pagecore_span(unsigned low, unsigned high)
{
    return (UINT64_MAX << low) & (UINT64_MAX >> (64 - high));
}

/* The part of word w that lies in pages [first, end), where the two overlap. */
static inline uint64_t pagecore_word_mask(size_t w, uint64_t first, uint64_t end)
{
    const uint64_t base = (uint64_t)w << 6;
    return pagecore_span(first > base ? (unsigned)(first - base) : 0,
                         end < base + 64 ? (unsigned)(end - base) : 64);
}

/* Runs were checked before the GIL was released, but the array is the caller's and another thread may write to it:
 * a run that no longer fits is skipped, never followed out of the planes. */
static inline int pagecore_run_fits(int64_t first, int64_t count, uint64_t npages)
{
    return first >= 0 && count > 0 && (uint64_t)first < npages && (uint64_t)count <= npages - (uint64_t)first;
}

/* The index of the first run that is not inside [0, npages), or n. A run of no pages is inside. */
static inline size_t pagecore_check_runs(const int64_t *runs, size_t n, uint64_t npages)
{
    for (size_t i = 0; i < n; i++) {
        const int64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (first < 0 || count < 0 || (uint64_t)first > npages || (uint64_t)count > npages - (uint64_t)first)
            return i;
    }
    return n;
}

static inline size_t pagecore_popcount(uint64_t word)
{
    return (size_t)__builtin_popcountll(word);
}

/* Exchange the non-zero words of `source` with zero and OR them into private words; returns how many bits are new
 * there. The look before the exchange keeps an idle log from being written (a word set after the look is found by
 * the next drain). acq_rel exchange: pairs with the release of the writer that set the bit after its write. */
static inline size_t pagecore_drain_private(uint64_t *source, uint64_t *destination, size_t nwords)
{
    size_t newly = 0;
    for (size_t w = 0; w < nwords; w++) {
        if (pagecore_load_relaxed(&source[w]) == 0)
            continue;
        const uint64_t bits = pagecore_exchange(&source[w], 0);
        newly += pagecore_popcount(bits & ~destination[w]);
        destination[w] |= bits;
    }
    return newly;
}

/* Set a run. acq_rel: the release makes the write that the caller reports visible to whoever drains the bit. */
static inline void pagecore_set_run(uint64_t *words, uint64_t first, uint64_t count)
{
    const uint64_t end = first + count;
    for (size_t w = first >> 6; w < (end + 63) >> 6; w++)
        pagecore_or(&words[w], pagecore_word_mask(w, first, end));
}

static inline void pagecore_set_runs(uint64_t *words, uint64_t npages, const int64_t *runs, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const int64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (pagecore_run_fits(first, count, npages))
            pagecore_set_run(words, (uint64_t)first, (uint64_t)count);
    }
}

/* S2, the last step of a sync: set dirty, then clear hinted, then count. Empties the private words as it goes.
 * The fetch_or pairs with the taker's compare-exchange: a taker that finds the bit reads the page after the log was
 * re-armed. The store to hinted cannot pass it (acquire), so the page never reads as sent in between. */
static inline size_t pagecore_publish(uint64_t *fetched, uint64_t *dirty, uint64_t *hinted, size_t nwords)
{
    size_t newly = 0;
    for (size_t w = 0; w < nwords; w++) {
        const uint64_t bits = fetched[w];
        if (bits == 0)
            continue;
        const uint64_t before = pagecore_fetch_or(&dirty[w], bits);
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]);
        if (free_pages & bits)
            pagecore_store_relaxed(&hinted[w], free_pages & ~bits);
        newly += pagecore_popcount(bits & ~before);
        fetched[w] = 0;
    }
    return newly;
}

/* S3 for one word: turn hinted on, then fetch-and-clear dirty, then undo where a sender was faster: only bits that
 * were turned on here and whose dirty came back 0. Pages that are hinted and not dirty need nothing. Returns the
 * pages taken off the debt. */
static inline uint64_t pagecore_hint_word(uint64_t *dirty, uint64_t *hinted, uint64_t mask)
{
    const uint64_t owed = pagecore_load_relaxed(dirty) & mask;
    if (owed == 0)
        return 0;
    const uint64_t before = pagecore_load_relaxed(hinted);
    pagecore_store_relaxed(hinted, before | owed);
    const uint64_t fetched = pagecore_fetch_and(dirty, ~owed) & owed;
    const uint64_t undo = owed & ~before & ~fetched;
    if (undo)
        pagecore_store_relaxed(hinted, (before | owed) & ~undo);
    return fetched;
}

static inline size_t pagecore_hint_runs(uint64_t *dirty, uint64_t *hinted, uint64_t npages, const int64_t *runs,
                                        size_t n)
{
    size_t taken = 0;
    for (size_t i = 0; i < n; i++) {
        const int64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (!pagecore_run_fits(first, count, npages))
            continue;
        const uint64_t end = (uint64_t)first + (uint64_t)count;
        for (size_t w = (uint64_t)first >> 6; w < (end + 63) >> 6; w++)
            taken += pagecore_popcount(
                pagecore_hint_word(&dirty[w], &hinted[w], pagecore_word_mask(w, (uint64_t)first, end)));
    }
    return taken;
}

typedef struct {
    int64_t *runs;          /* (first, count) pairs */
    size_t n, max_runs;
    uint64_t pages_left;
    int full;               /* a limit was met: no more words need a look */
} pagecore_taker;

/* Append the runs of `word` as far as the limits allow; returns the bits appended. */
static inline uint64_t pagecore_take_word(pagecore_taker *taker, size_t w, uint64_t word)
{
    uint64_t taken = 0;
    while (word) {
        const unsigned low = (unsigned)__builtin_ctzll(word);
        const uint64_t above = ~(word >> low);
        unsigned length = above ? (unsigned)__builtin_ctzll(above) : 64;
        const int64_t first = (int64_t)(((uint64_t)w << 6) + low);
        int64_t *last = taker->n ? &taker->runs[2 * (taker->n - 1)] : NULL;
        const int extends = last && last[0] + last[1] == first;
        if (taker->pages_left == 0 || (!extends && taker->n == taker->max_runs)) {
            taker->full = 1;
            break;
        }
        if (length > taker->pages_left)
            length = (unsigned)taker->pages_left;
        if (extends) {
            last[1] += length;
        } else {
            taker->runs[2 * taker->n] = first;
            taker->runs[2 * taker->n + 1] = length;
            taker->n++;
        }
        taker->pages_left -= length;
        const uint64_t bits = pagecore_span(low, low + length);
        taken |= bits;
        word &= ~bits;
    }
    return taken;
}

/* S1: clear dirty, then the caller reads. Exactly the pages handed out are cleared: the runs are planned from a look
 * at the word and the compare-exchange takes them or, if anyone touched the word meanwhile, the plan is dropped and
 * made again. acq_rel: the caller's reads of the pages come after the clear, so a write that they miss is logged. */
static inline void pagecore_take_span(uint64_t *dirty, uint64_t first, uint64_t end, pagecore_taker *taker)
{
    for (size_t w = first >> 6; w < (end + 63) >> 6 && !taker->full; w++) {
        uint64_t seen = pagecore_load_relaxed(&dirty[w]);
        if (seen == 0) {
            taker->full = taker->n == taker->max_runs;
            continue;
        }
        const uint64_t mask = pagecore_word_mask(w, first, end);
        const pagecore_taker before = *taker;
        const int64_t last_count = before.n ? before.runs[2 * before.n - 1] : 0;
        while (seen & mask) {
            const uint64_t taken = pagecore_take_word(taker, w, seen & mask);
            if (taken == 0 || pagecore_compare_exchange(&dirty[w], &seen, seen & ~taken))
                break;
            *taker = before;
            if (before.n)
                taker->runs[2 * before.n - 1] = last_count;
        }
        taker->full |= taker->pages_left == 0;
    }
}

/* Take from the cursor to the end and from the start to the cursor; returns the number of runs and moves the cursor
 * behind the last one. Two takers may start at the same cursor: they share the words out between them. */
static inline size_t pagecore_take(uint64_t *dirty, uint64_t npages, uint64_t *cursor, int64_t *runs,
                                   size_t max_runs, uint64_t max_pages)
{
    pagecore_taker taker = {runs, 0, max_runs, max_pages, 0};
    uint64_t start = pagecore_load_relaxed(cursor);
    if (start >= npages)
        start = 0;
    if (max_pages == 0 || max_runs == 0)
        return 0;
    if (start < npages)
        pagecore_take_span(dirty, start, npages, &taker);
    if (start > 0 && !taker.full)
        pagecore_take_span(dirty, 0, start, &taker);
    if (taker.n)
        pagecore_store_relaxed(cursor, (uint64_t)(runs[2 * taker.n - 2] + runs[2 * taker.n - 1]));
    return taker.n;
}

enum { PAGECORE_OWED = 0, PAGECORE_FREE = 1, PAGECORE_SENT = 2 };

/* S7 for pages [first, first + count): what each one was, as runs of (kind, first, count); afterwards all of them
 * are sent. Under the tracker's lock: beside a hint, a page that a sender has just taken could read as free.
 * `runs` holds `count` triples. */
static inline size_t pagecore_resolve(uint64_t *dirty, uint64_t *hinted, uint64_t first, uint64_t count,
                                      int64_t *runs)
{
    const uint64_t end = first + count;
    size_t n = 0;
    for (size_t w = first >> 6; w < (end + 63) >> 6; w++) {
        uint64_t mask = pagecore_word_mask(w, first, end);
        uint64_t kinds[3];
        kinds[PAGECORE_OWED] = 0;
        /* fetch_and: decides against takers who sends the page. */
        if (pagecore_load_relaxed(&dirty[w]) & mask)
            kinds[PAGECORE_OWED] = pagecore_fetch_and(&dirty[w], ~mask) & mask;
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]);
        if (free_pages & mask)
            pagecore_store_relaxed(&hinted[w], free_pages & ~mask);
        kinds[PAGECORE_FREE] = free_pages & mask & ~kinds[PAGECORE_OWED];
        kinds[PAGECORE_SENT] = mask & ~kinds[PAGECORE_OWED] & ~kinds[PAGECORE_FREE];
        while (mask) {
            const unsigned low = (unsigned)__builtin_ctzll(mask);
            int kind = PAGECORE_OWED;
            while (!(kinds[kind] >> low & 1))
                kind++;
            const uint64_t above = ~(kinds[kind] >> low);
            const unsigned length = above ? (unsigned)__builtin_ctzll(above) : 64;
            const int64_t page = (int64_t)(((uint64_t)w << 6) + low);
            int64_t *last = n ? &runs[3 * (n - 1)] : NULL;
            if (last && last[0] == kind && last[1] + last[2] == page) {
                last[2] += length;
            } else {
                runs[3 * n] = kind;
                runs[3 * n + 1] = page;
                runs[3 * n + 2] = length;
                n++;
            }
            mask &= ~pagecore_span(low, low + length);
        }
    }
    return n;
}

/* S9: what the destination reports as settled is the truth. dirty = not settled and not hinted, hinted keeps what is
 * not settled; a page with both bits was dirty. Returns the pages owed. */
static inline size_t pagecore_reload(uint64_t *dirty, uint64_t *hinted, const uint64_t *settled, uint64_t npages)
{
    size_t owed = 0;
    for (size_t w = 0; w < (npages + 63) >> 6; w++) {
        const uint64_t mask = pagecore_word_mask(w, 0, npages);
        const uint64_t missing = mask & ~pagecore_load_relaxed(&settled[w]);
        const uint64_t free_pages =
            pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]) & missing;
        pagecore_store_relaxed(&hinted[w], free_pages);
        (void)pagecore_exchange(&dirty[w], missing & ~free_pages);
        owed += pagecore_popcount(missing & ~free_pages);
    }
    return owed;
}

/* Hinted pages become owed: dirty first, so that none reads as sent in between. Returns how many were free. */
static inline size_t pagecore_owe_hinted(uint64_t *dirty, uint64_t *hinted, size_t nwords)
{
    size_t owed = 0;
    for (size_t w = 0; w < nwords; w++) {
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]);
        if (free_pages == 0)
            continue;
        owed += pagecore_popcount(free_pages & ~pagecore_fetch_or(&dirty[w], free_pages));
        pagecore_store_relaxed(&hinted[w], 0);
    }
    return owed;
}

/* Copies of a state (both bits set reads as dirty) into private words; relaxed snapshots. */
static inline void pagecore_copy_plane(const uint64_t *words, uint64_t *copy, size_t nwords)
{
    for (size_t w = 0; w < nwords; w++)
        copy[w] = pagecore_load_relaxed(&words[w]);
}

static inline void pagecore_copy_free(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy, size_t nwords)
{
    for (size_t w = 0; w < nwords; w++)
        copy[w] = pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]);
}

static inline void pagecore_copy_unsent(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy, size_t nwords)
{
    for (size_t w = 0; w < nwords; w++)
        copy[w] = pagecore_load_relaxed(&hinted[w]) | pagecore_load_relaxed(&dirty[w]);
}

static inline size_t pagecore_count_plane(const uint64_t *words, size_t nwords)
{
    size_t count = 0;
    for (size_t w = 0; w < nwords; w++)
        count += pagecore_popcount(pagecore_load_relaxed(&words[w]));
    return count;
}

static inline size_t pagecore_count_free(const uint64_t *dirty, const uint64_t *hinted, size_t nwords)
{
    size_t count = 0;
    for (size_t w = 0; w < nwords; w++)
        count += pagecore_popcount(pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]));
    return count;
}

#endif
