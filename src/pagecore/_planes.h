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
 *
 * Every loop says how many bits it changed, so that whoever called it can keep the counts with one addition a call.
 */
#ifndef PAGECORE_PLANES_H
#define PAGECORE_PLANES_H

#include "_atomic.h"
#include "_hints.h"

/* ---- the sync ---- */

/* A log in smaller pages than the region's, 2^shift to a page: a page with one of them written is dirty (S10).
 * Private words on both sides; `fine` is left. */
static inline void pagecore_fold(const uint64_t *fine, size_t nfine, uint64_t *pages, unsigned shift)
{
    for (size_t w = 0; w < pagecore_word_count(nfine); w++) {
        if (fine[w] == 0)
            continue;
        if (shift >= 6) {
            const size_t page = (w << 6) >> shift;
            pages[page >> 6] |= UINT64_C(1) << (page & 63);
            continue;
        }
        for (uint64_t left = fine[w]; left; left &= left - 1) {
            const size_t page = ((w << 6) + (size_t)__builtin_ctzll(left)) >> shift;
            pages[page >> 6] |= UINT64_C(1) << (page & 63);
        }
    }
}

/* S2, the last step of a sync: set dirty, then clear hinted, then count. Empties the private words as it goes.
 * The fetch_or pairs with the taker's compare-exchange: a taker that finds the bit reads the page after the log was
 * re-armed. The store to hinted cannot pass it (acquire), so the page never reads as sent in between.
 * The words of a block are counted together: a count of many words is many times faster than many counts. */
static inline pagecore_change pagecore_publish(uint64_t *fetched, uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    enum { BLOCK = 64 };
    pagecore_change change = {0, 0};
    const size_t nwords = pagecore_word_count(npages);
    for (size_t block = 0; block < nwords; block += BLOCK) {
        const size_t end = nwords - block < BLOCK ? nwords : block + BLOCK;
        uint64_t any = 0, unhinted = 0;
        for (size_t w = block; w < end; w++)
            any |= fetched[w];
        if (any == 0)
            continue;
        for (size_t w = block; w < end; w++) {
            const uint64_t bits = fetched[w];
            if (bits == 0)
                continue;
            const uint64_t before = pagecore_fetch_or(&dirty[w], bits);
            const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
            if (hints & bits) {
                pagecore_store_relaxed(&hinted[w], hints & ~bits);
                unhinted += pagecore_popcount(hints & bits);
            }
            fetched[w] = bits & ~before;
        }
        change.hinted -= (int64_t)unhinted;
        change.dirty += (int64_t)pagecore_count(&fetched[block], 0, (end - block) * PAGECORE_WORD_BITS);
        memset(&fetched[block], 0, (end - block) * sizeof *fetched);
    }
    return change;
}

/* ---- senders ---- */

/* Fetch and clear runs of [start, end): at most `max_pages` pages and `capacity` pairs; *next is the first page that was
 * not looked at, *taken how many pages were taken. What is cleared is exactly what is listed, whoever else sets or
 * takes. acq_rel: pairs with the release of the writer that set the bits; the caller reads the pages afterwards (S1).
 * A word that the limits hold for whatever is in it goes in one step; the general way is for the last words. */
static inline size_t pagecore_take_pages(uint64_t *words, size_t start, size_t end, size_t max_pages, int64_t *pairs,
                                         size_t capacity, size_t *next, size_t *taken)
{
    size_t listed = 0, left_pages = max_pages;
    size_t open = SIZE_MAX;     /* where the run before this word ends; nothing joins it at first */
    size_t by_word = 0;         /* the first word that may be taken together with others */
    PAGECORE_EACH_WORD(w, mask, start, end) {
        uint64_t bits = pagecore_load_relaxed(&words[w]) & mask;
        if (bits == 0)
            continue;
        const size_t whole = ((end >> 6) - w) & ~(size_t)3;
        if (whole && w >= by_word && mask == PAGECORE_ALL_ONES) {
            size_t pages, n = whole < PAGECORE_TAKE_WORDS ? whole : PAGECORE_TAKE_WORDS;
            const size_t more = PAGECORE_BEST(take_block)(words, w, n, left_pages, pairs + 2 * listed,
                                                          capacity - listed, &pages);
            if (more != SIZE_MAX) {
                int64_t *const first = pairs + 2 * listed;
                left_pages -= pages;
                listed += more;
                if (more && (size_t)first[0] == open) {
                    first[-1] += first[1];
                    memmove(first, first + 2, (more - 1) * 2 * sizeof *pairs);
                    listed--;
                }
                if (listed)
                    open = (size_t)(pairs[2 * listed - 2] + pairs[2 * listed - 1]);
                w += n - 1;
                continue;
            }
            by_word = w + n;
        }
        if (left_pages < PAGECORE_WORD_BITS || capacity - listed < PAGECORE_WORD_BITS / 2 + 1) {
            /* The run before is seen by the general way through the array alone: hand it that one. */
            const size_t shared = listed ? 1 : 0;
            const size_t first = w == start >> 6 ? start : w << 6;
            int64_t *tail = pairs + 2 * (listed - shared);
            const int64_t first_of_last = shared ? tail[0] : 0, length_of_last = shared ? tail[1] : 0;
            size_t more = pagecore_take_runs(words, first, end, left_pages, pairs + 2 * listed, capacity - listed, next);
            for (size_t i = 0; i < more; i++)
                left_pages -= (size_t)pairs[2 * (listed + i) + 1];
            if (shared && more && first_of_last + length_of_last == pairs[2 * listed]) {
                tail[1] += pairs[2 * listed + 1];
                memmove(pairs + 2 * listed, pairs + 2 * listed + 2, (more - 1) * 2 * sizeof *pairs);
                more--;
            }
            *taken = max_pages - left_pages;
            return listed + more;
        }
        bits &= bits == PAGECORE_ALL_ONES ? pagecore_exchange(&words[w], 0) : pagecore_fetch_and(&words[w], ~bits);
        size_t base = w << 6;
        while (bits) {
            const unsigned bit = (unsigned)__builtin_ctzll(bits);
            const unsigned length = pagecore_ones_at_start(bits >> bit);
            base = (w << 6) + bit;
            if (base == open) {
                pairs[2 * listed - 1] += length;
            } else {
                pairs[2 * listed] = (int64_t)base;
                pairs[2 * listed + 1] = length;
                listed++;
            }
            open = base + length;
            left_pages -= length;
            bits &= ~(pagecore_ones(length) << bit);
        }
    }
    *next = end;
    *taken = max_pages - left_pages;
    return listed;
}

/* The same in whole placing units (S10), of which each has all pages dirty or none: under the lock. At least one unit
 * goes out if there is one, however small the limit. */
static inline size_t pagecore_take_units(uint64_t *words, size_t start, size_t end, size_t unit, size_t max_pages,
                                         int64_t *pairs, size_t capacity, size_t *next, size_t *taken)
{
    size_t listed = 0;
    *taken = 0;
    *next = end;
    while (start < end) {
        const size_t first = pagecore_find_set(words, start, end) / unit * unit;
        if (first + unit > end)
            break;
        const int joins = listed && (size_t)(pairs[2 * listed - 2] + pairs[2 * listed - 1]) == first;
        if ((*taken && *taken + unit > max_pages) || (listed == capacity && !joins)) {
            *next = first;
            break;
        }
        *taken += pagecore_clear_range(words, first, first + unit);
        if (joins) {
            pairs[2 * listed - 1] += (int64_t)unit;
        } else {
            pairs[2 * listed] = (int64_t)first;
            pairs[2 * listed + 1] = (int64_t)unit;
            listed++;
        }
        start = first + unit;
    }
    return listed;
}

/* S1: pages that were not sent are owed again. Widened to whole units of `unit` pages. Returns the newly owed, stops
 * at a run that does not fit (*done), and says in *mixed whether one of the pages is hinted: then its count as a free
 * page is wrong until the planes are settled. The look comes after the read-modify-write, which is in one order with
 * that of a hint: a hint that this page does not lose to has set `hinted` before. */
static inline size_t pagecore_put_back(uint64_t *dirty, const uint64_t *hinted, size_t npages, size_t unit,
                                       const int64_t *runs, size_t n, size_t *done, uint64_t *mixed)
{
    size_t newly = 0;
    *mixed = 0;
    for (*done = 0; *done < n; ++*done) {
        const int64_t first = pagecore_once(&runs[2 * *done]), count = pagecore_once(&runs[2 * *done + 1]);
        if (!pagecore_run_fits(first, count, npages))
            break;
        if (count == 0)
            continue;
        const size_t low = (size_t)first / unit * unit;
        const size_t high = ((size_t)(first + count) + unit - 1) / unit * unit;
        PAGECORE_EACH_WORD(w, mask, low, high) {
            if (mask == 0)
                continue;
            newly += pagecore_popcount(pagecore_set_bits(&dirty[w], mask));
            *mixed |= pagecore_load_relaxed(&hinted[w]) & mask;
        }
    }
    return newly;
}

/* ---- requests ---- */

enum { PAGECORE_OWED = 0, PAGECORE_FREE = 1, PAGECORE_SENT = 2 };

/* S7 for pages [first, end): what each one was, as runs of (kind, first, count); afterwards all of them are sent.
 * Under the tracker's lock: beside a hint, a page that a sender has just taken could read as free.
 * `runs` holds a triple for each page. */
static inline size_t pagecore_resolve(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end, int64_t *runs,
                                      pagecore_change *change)
{
    size_t n = 0;
    PAGECORE_EACH_WORD(w, mask, first, end) {
        /* The read-modify-write decides against takers who sends the page. */
        const uint64_t owed = pagecore_clear_bits(&dirty[w], mask);
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        if (hints & mask)
            pagecore_store_relaxed(&hinted[w], hints & ~mask);
        change->dirty -= pagecore_popcount(owed);
        change->hinted -= pagecore_popcount(hints & mask);
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
static inline void pagecore_resolve_again(uint64_t *dirty, uint64_t *hinted, size_t first, size_t end,
                                          pagecore_change *change)
{
    PAGECORE_EACH_WORD(w, mask, first, end) {
        change->dirty -= pagecore_popcount(pagecore_clear_bits(&dirty[w], mask));
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        pagecore_store_relaxed(&hinted[w], hints & ~mask);
        change->hinted -= pagecore_popcount(hints & mask);
    }
}

/* ---- the switch and recovery: under the lock, senders quiet ---- */

/* S9, before a list was applied: every page is owed. */
static inline pagecore_change pagecore_owe_all(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    pagecore_change change = {0, 0};
    PAGECORE_EACH_WORD(w, mask, 0, npages) {
        change.dirty += pagecore_popcount(pagecore_set_bits(&dirty[w], mask));
        change.hinted -= pagecore_popcount(pagecore_load_relaxed(&hinted[w]));
        pagecore_store_relaxed(&hinted[w], 0);
    }
    return change;
}

/* S9, after it: what the destination reports as settled is the truth. dirty = not settled and not hinted, hinted
 * keeps what is not settled; a page with both bits was dirty. */
static inline pagecore_change pagecore_reload(uint64_t *dirty, uint64_t *hinted, const uint64_t *settled,
                                              size_t npages)
{
    pagecore_change change = {0, 0};
    PAGECORE_EACH_WORD(w, mask, 0, npages) {
        const uint64_t missing = mask & ~pagecore_load_relaxed(&settled[w]);
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        const uint64_t free_pages = hints & ~pagecore_load_relaxed(&dirty[w]) & missing;
        pagecore_store_relaxed(&hinted[w], free_pages);
        change.hinted += (int64_t)pagecore_popcount(free_pages) - (int64_t)pagecore_popcount(hints);
        const uint64_t owed = missing & ~free_pages;
        change.dirty += (int64_t)pagecore_popcount(owed)
                        - (int64_t)pagecore_popcount(pagecore_exchange(&dirty[w], owed));
    }
    return change;
}

/* S8: hinted pages become owed; dirty first, so that none reads as sent in between. */
static inline pagecore_change pagecore_owe_hinted(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    pagecore_change change = {0, 0};
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
        const uint64_t free_pages = pagecore_load_relaxed(&hinted[w]);
        if (free_pages == 0)
            continue;
        change.dirty += pagecore_popcount(free_pages & ~pagecore_fetch_or(&dirty[w], free_pages));
        change.hinted -= pagecore_popcount(free_pages);
        pagecore_store_relaxed(&hinted[w], 0);
    }
    return change;
}

/* S8: what is owed is not free any more. A page that was hinted after it was taken, and then put back, has both bits;
 * were it taken like that after the switch, a request for it would be answered with the fill while its content is on
 * the way. Right beside takers too: the page is then sent, or owed again by a put_back. Returns the pages that are no
 * longer hinted. */
static inline size_t pagecore_settle_owed(uint64_t *dirty, uint64_t *hinted, size_t npages)
{
    size_t settled = 0;
    for (size_t w = 0; w < pagecore_word_count(npages); w++) {
        const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
        const uint64_t owed = hints ? hints & pagecore_load_relaxed(&dirty[w]) : 0;
        if (owed) {
            pagecore_store_relaxed(&hinted[w], hints & ~owed);
            settled += pagecore_popcount(owed);
        }
    }
    return settled;
}

/* S10: a placing unit is discarded as a whole, so it is sent, or free, only if all its pages are; else all are owed.
 * A unit in which some pages are free and others sent has to go out again, too: the sent ones may have been written
 * after the hint. */
static inline pagecore_change pagecore_whole_units(uint64_t *dirty, uint64_t *hinted, size_t npages, size_t unit)
{
    pagecore_change change = {0, 0};
    for (size_t first = 0; first < npages; first += unit) {
        uint64_t owed = 0, some = 0, sent = 0;
        PAGECORE_EACH_WORD(w, mask, first, first + unit) {
            const uint64_t hints = pagecore_load_relaxed(&hinted[w]) & mask;
            owed |= pagecore_load_relaxed(&dirty[w]) & mask;
            some |= hints;
            sent |= mask & ~hints;
        }
        if (!owed && !(some && sent))
            continue;
        PAGECORE_EACH_WORD(w, mask, first, first + unit) {
            change.dirty += pagecore_popcount(pagecore_set_bits(&dirty[w], mask));
            const uint64_t hints = pagecore_load_relaxed(&hinted[w]);
            change.hinted -= pagecore_popcount(hints & mask);
            pagecore_store_relaxed(&hinted[w], hints & ~mask);
        }
    }
    return change;
}

/* The free pages (both bits set reads as dirty) into private words; relaxed: a snapshot. */
static inline void pagecore_copy_free(const uint64_t *dirty, const uint64_t *hinted, uint64_t *copy, size_t npages)
{
    for (size_t w = 0; w < pagecore_word_count(npages); w++)
        copy[w] = pagecore_load_relaxed(&hinted[w]) & ~pagecore_load_relaxed(&dirty[w]);
}

/* ---- re-arming late, by chunks of 2^chunk_shift pages of the log; under the lock ---- */

/* What a sync has fetched was seen, and its chunks wait for their re-arm. Chunks of which nothing was seen do not. */
static inline void pagecore_see(const uint64_t *fetched, uint64_t *seen, uint64_t *pending, size_t nlog,
                                unsigned chunk_shift)
{
    for (size_t w = 0; w < pagecore_word_count(nlog); w++) {
        if (fetched[w] == 0)
            continue;
        const size_t chunk = (w << 6) >> chunk_shift;
        seen[w] |= fetched[w];
        pending[chunk >> 6] |= UINT64_C(1) << (chunk & 63);
    }
}

/* The bits of log word w whose pages are dirty. `shift`: 2^shift pages of the log are one page. */
static inline uint64_t pagecore_dirty_of_log_word(const uint64_t *dirty, size_t w, unsigned shift)
{
    if (shift == 0)
        return pagecore_load_relaxed(&dirty[w]);
    uint64_t bits = 0;
    const size_t step = shift >= 6 ? 64 : (size_t)1 << shift;
    for (size_t bit = 0; bit < 64; bit += step)
        if (pagecore_test_bit(dirty, ((w << 6) + bit) >> shift))
            bits |= pagecore_ones(step) << bit;
    return bits;
}

/* S11: what to re-arm of a chunk: bits that were seen, each sighting once, and only where the page is still dirty
 * here; a sighting of a page that is not is void. [*low, *high) are log pages, *low is a multiple of 64 and *high one
 * too or the end, as KVM_CLEAR_DIRTY_LOG has it; bits of other pages in there are 0. Returns how many bits are 1. */
static inline size_t pagecore_chunk_mask(const uint64_t *seen, const uint64_t *dirty, uint64_t *wanted, size_t nlog,
                                         unsigned shift, unsigned chunk_shift, size_t chunk, size_t *low, size_t *high)
{
    const size_t first = chunk << chunk_shift;
    const size_t last = nlog - first < (size_t)1 << chunk_shift ? nlog : first + ((size_t)1 << chunk_shift);
    size_t count = 0;
    *low = *high = first;
    for (size_t w = first >> 6; w < pagecore_word_count(last); w++) {
        wanted[w] = seen[w] ? seen[w] & pagecore_dirty_of_log_word(dirty, w, shift) : 0;
        if (wanted[w] == 0)
            continue;
        if (count == 0)
            *low = w << 6;
        *high = last - (w << 6) < 64 ? last : (w + 1) << 6;
        count += pagecore_popcount(wanted[w]);
    }
    return count;
}

/* The chunk is armed: its sightings are used up. */
static inline void pagecore_chunk_armed(uint64_t *seen, uint64_t *wanted, uint64_t *pending, size_t nlog,
                                        unsigned chunk_shift, size_t chunk)
{
    const size_t first = chunk << chunk_shift;
    const size_t last = nlog - first < (size_t)1 << chunk_shift ? nlog : first + ((size_t)1 << chunk_shift);
    for (size_t w = first >> 6; w < pagecore_word_count(last); w++)
        seen[w] = wanted[w] = 0;
    pending[chunk >> 6] &= ~(UINT64_C(1) << (chunk & 63));
}

/* The first chunk that waits for its re-arm and has log pages of page [low, high), or SIZE_MAX. */
static inline size_t pagecore_pending_chunk(const uint64_t *pending, size_t low, size_t high, unsigned shift,
                                            unsigned chunk_shift)
{
    if (low >= high)
        return SIZE_MAX;
    const size_t first = (low << shift) >> chunk_shift, end = (((high << shift) - 1) >> chunk_shift) + 1;
    const size_t chunk = pagecore_find_set(pending, first, end);
    return chunk < end ? chunk : SIZE_MAX;
}

#endif
