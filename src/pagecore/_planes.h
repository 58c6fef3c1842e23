/* Word loops over the source's planes: dirty, hinted, and the side plane of mark (design section 3).
 *
 * Who may write what:
 *   dirty    anyone, by read-modify-write: takers clear, put_back sets, and the holder of the tracker's lock does
 *            both
 *   hinted   the holder of the tracker's lock alone. Takers never touch it: had a taker cleared it, and were the
 *            page put back between the two steps of a hint, it would end as neither dirty nor hinted, unsent.
 *            With one writer at a time a relaxed store is enough; the read-modify-write of `dirty` beside it is
 *            acq_rel and keeps the two in order
 *   side     anyone sets; the holder of the lock drains
 */
#ifndef PAGECORE_PLANES_H
#define PAGECORE_PLANES_H

#include "_atomic.h"
#include "_bitscan.h"

/* Exchange the non-zero words of `from` with zero and OR them into words that nobody else uses; returns how many bits
 * are new there. Bits past the size stay out. The look spares an idle log the exchange; what is set after it is found
 * by the next drain. acq_rel exchange: pairs with the release of the writer that set the bit after its write. */
static inline size_t pagecore_drain_private(uint64_t *from, uint64_t *words, size_t npages)
{
    return pagecore_drain_to_owned(from, words, npages);
}

/* S2, the last step of a sync: set dirty, then clear hinted, then count. Empties the private words as it goes.
 * The fetch_or pairs with the taker's compare-exchange: a taker that finds the bit reads the page after the log was
 * re-armed. The store to hinted cannot pass it (acquire), so the page never reads as sent in between. */
static inline size_t pagecore_publish(uint64_t *fetched, uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    size_t newly = 0;
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
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

/* The runs were checked before the GIL was released, but the array is the caller's and another thread may write to
 * it: a run that no longer fits is skipped, never followed out of the planes. */
static inline size_t pagecore_hint_runs(uint64_t *dirty, uint64_t *hinted, size_t npages, const int64_t *runs,
                                        size_t n)
{
    size_t taken = 0;
    for (size_t i = 0; i < n; i++) {
        const int64_t first = pagecore_once(&runs[2 * i]), count = pagecore_once(&runs[2 * i + 1]);
        if (!pagecore_run_fits(first, count, npages))
            continue;
        PAGECORE_EACH_WORD(w, mask, (size_t)first, (size_t)(first + count))
            taken += pagecore_popcount(pagecore_hint_word(&dirty[w], &hinted[w], mask));
    }
    return taken;
}

enum { PAGECORE_OWED = 0, PAGECORE_FREE = 1, PAGECORE_SENT = 2 };

/* S7 for pages [first, end): what each one was, as runs of (kind, first, count); afterwards all of them are sent.
 * Under the tracker's lock: beside a hint, a page that a sender has just taken could read as free.
 * `runs` holds a triple for each page. */
static inline size_t pagecore_resolve(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end, int64_t *runs)
{
    size_t n = 0;
    PAGECORE_EACH_WORD(w, mask, first, end) {
        /* The read-modify-write decides against takers who sends the page. */
        const uint64_t owed = pagecore_clear_bits(&dirty[w], mask);
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        if (hints & mask)
            pagecore_store_relaxed(&hinted[w], hints & ~mask);
        const uint64_t free_pages = hints & mask & ~owed;
        const uint64_t kinds[3] = {owed, free_pages, mask & ~owed & ~free_pages};
        while (mask) {
            const unsigned low = (unsigned)__builtin_ctzll(mask);
            int kind = PAGECORE_OWED;
            while (!(kinds[kind] >> low & 1))
                kind++;
            const unsigned length = pagecore_ones_at_start(kinds[kind] >> low);
            const int64_t page = (int64_t)(w * PAGECORE_WORD_BITS + low);
            int64_t *last = n ? &runs[3 * (n - 1)] : NULL;
            if (last && last[0] == kind && last[1] + last[2] == page) {
                last[2] += length;
            } else {
                runs[3 * n] = kind;
                runs[3 * n + 1] = page;
                runs[3 * n + 2] = length;
                n++;
            }
            mask &= ~(pagecore_ones(length) << low);
        }
    }
    return n;
}

/* `again` (S7): the content goes out whatever the planes say, and is sent from here on. */
static inline void pagecore_resolve_again(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end)
{
    PAGECORE_EACH_WORD(w, mask, first, end) {
        pagecore_and(&dirty[w], ~mask);
        pagecore_store_relaxed(&hinted[w], pagecore_load_relaxed(&hinted[w]) & ~mask);
    }
}

/* S9, before a list was applied: every page is owed. */
static inline void pagecore_owe_all(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    PAGECORE_EACH_WORD(w, mask, 0, npages) {
        pagecore_or(&dirty[w], mask);
        pagecore_store_relaxed(&hinted[w], 0);
    }
}

/* S9, after it: what the destination reports as settled is the truth. dirty = not settled and not hinted, hinted
 * keeps what is not settled; a page with both bits was dirty. Returns the pages owed. */
static inline size_t pagecore_reload(uint64_t *dirty, uint64_t *hinted, const uint64_t *settled, size_t npages)
{
    size_t owed = 0;
    PAGECORE_EACH_WORD(w, mask, 0, npages) {
        const uint64_t missing = mask & ~pagecore_load_relaxed(&settled[w]);
        const uint64_t free_pages =
            pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]) & missing;
        pagecore_store_relaxed(&hinted[w], free_pages);
        (void)pagecore_exchange(&dirty[w], missing & ~free_pages);
        owed += pagecore_popcount(missing & ~free_pages);
    }
    return owed;
}

/* S8: hinted pages become owed; dirty first, so that none reads as sent in between. Returns the newly owed. */
static inline size_t pagecore_owe_hinted(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    size_t owed = 0;
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]);
        if (free_pages == 0)
            continue;
        owed += pagecore_popcount(free_pages & ~pagecore_fetch_or(&dirty[w], free_pages));
        pagecore_store_relaxed(&hinted[w], 0);
    }
    return owed;
}

/* S8: what is owed is not free any more. A page that was hinted after it was taken, and then put back, has both bits;
 * were it taken like that after the switch, a request for it would be answered with the fill while its content is on
 * the way. Right beside takers too: the page is then sent, or owed again by a put_back. */
static inline void pagecore_settle_owed(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        const uint64_t owed = hints ? hints & pagecore_load_relaxed(&dirty[w]) : 0;
        if (owed)
            pagecore_store_relaxed(&hinted[w], hints & ~owed);
    }
}

/* The free pages (both bits set reads as dirty) into private words; relaxed: a snapshot. Returns how many. */
static inline size_t pagecore_copy_free(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy,
                                        size_t npages)
{
    size_t count = 0;
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]);
        if (copy)
            copy[w] = free_pages;
        count += pagecore_popcount(free_pages);
    }
    return count;
}

#endif
