/* What a bitmap of our own keeps beside its words: the count, and a summary with one bit for each line of 512 bits.
 *
 * THE SUMMARY marks every line that holds a set bit; it may mark lines that hold none. It hides no set bit:
 *
 *   writer    sets the bit by a locked operation; [fence]; loads the summary; marks the line if it is not marked.
 *             A batch does both in one memory transaction, where there are any: then nobody sees one without the other
 *             Who finds the bit set already marks all the same: its first writer may not have come to that
 *   cleaner   one at a time: makes the generation odd; exchanges a summary word with 0; [fence]; loads the lines it
 *             marked; takes their bits, or marks them again; makes the generation even
 *   reader    loads the generation; acts on marked lines alone; loads the generation again. Where it was odd or is
 *             another one, what was not marked may hold bits all the same, and it looks at all words instead
 *
 * Between writer and cleaner that is store buffering: each stores, then loads what the other stored. With a full
 * fence in between at both, one of them sees the other: the cleaner finds the bit, or the writer finds the line not
 * marked. A locked operation is that fence on x86; elsewhere (AArch64, where an acquire-release exchange may pass a
 * later load) pagecore_fence_after_rmw is one. Between cleaner and reader the generation is a sequence lock: a
 * reader that loaded (acquire) a summary word that the cleaner emptied (release) finds the generation odd or changed
 * afterwards. So a bit whose set has returned is found by every scan that begins later, whatever cleaners do
 * meanwhile. spec/summary.pml is a model of it.
 *
 * THE COUNT is `base + kept`. A call that changes many bits knows exactly how many, because each read-modify-write
 * says which bits were its own, and adds that once, at its end. Single bits are not counted: their writers set
 * `stale`, a store once and a load from then on. Where it is stale, count() counts, and keeps the result if no call
 * that counts ran meanwhile and no single bit came: the same order of store and load as above, between a writer's
 * bit and `stale`.
 */
#ifndef PAGECORE_KEEPER_H
#define PAGECORE_KEEPER_H

#include "_bitscan.h"

enum {
    PAGECORE_LINE_SHIFT = 9,
    PAGECORE_LINE_WORDS = 8
};

struct pagecore_keeper {
    uint64_t *summary;   /* NULL: none */
    uint64_t generation; /* odd while a cleaner is at work */
    uint64_t stale;
    uint64_t base;
    uint64_t kept;     /* the sum of what counted calls changed */
    uint64_t calls;    /* counted calls: under way in the low 16 bits, finished above */
    uint64_t counting; /* one counter at a time publishes `base` */
};

static inline size_t pagecore_summary_words(size_t size)
{
    return pagecore_word_count(pagecore_word_count(size) / PAGECORE_LINE_WORDS + 1);
}

/* ---- writers ---- */

static inline void pagecore_make_stale(struct pagecore_keeper *keeper)
{
    pagecore_fence_after_rmw();
    if (!pagecore_load_relaxed(&keeper->stale))
        pagecore_store_release(&keeper->stale, 1);
}

static inline void pagecore_mark(struct pagecore_keeper *keeper, size_t first, size_t end)
{
    if (keeper && keeper->summary && first < end)
        pagecore_mark_lines(keeper->summary, first, end);
}

/* After a single bit was set, or some of one word. */
static inline void pagecore_note_page(struct pagecore_keeper *keeper, size_t page)
{
    if (!keeper)
        return;
    pagecore_make_stale(keeper); /* and its fence stands before the mark, too */
    if (keeper->summary)
        pagecore_mark_line_of(keeper->summary, page);
}

/* After a few bits were set. */
static inline void pagecore_note_set(struct pagecore_keeper *keeper, size_t first, size_t end)
{
    if (keeper) {
        pagecore_make_stale(keeper);
        pagecore_mark(keeper, first, end);
    }
}

static inline void pagecore_note_cleared(struct pagecore_keeper *keeper)
{
    if (keeper)
        pagecore_make_stale(keeper);
}

/* Around a call that counts what it changes. */
static inline void pagecore_begin_call(struct pagecore_keeper *keeper)
{
    if (keeper)
        (void)pagecore_fetch_add(&keeper->calls, 1);
}

static inline void pagecore_end_call(struct pagecore_keeper *keeper, size_t more, size_t fewer)
{
    if (!keeper)
        return;
    if (more != fewer)
        (void)pagecore_fetch_add(&keeper->kept, (uint64_t)more - (uint64_t)fewer);
    (void)pagecore_fetch_add(&keeper->calls, (UINT64_C(1) << 16) - 1);
}

/* ---- readers of the summary ---- */

/* The summary, if it may be trusted from here to pagecore_end_reading; else NULL. */
static inline const uint64_t *pagecore_begin_reading(const struct pagecore_keeper *keeper, uint64_t *generation)
{
    if (!keeper || !keeper->summary)
        return NULL;
    *generation = pagecore_load_acquire(&keeper->generation);
    return *generation & 1 ? NULL : keeper->summary;
}

/* Whether what was read holds. True where there was no summary. */
static inline int pagecore_end_reading(const struct pagecore_keeper *keeper, const uint64_t *summary,
                                       uint64_t generation)
{
    pagecore_fence_acquire();
    return !summary || pagecore_load_relaxed(&keeper->generation) == generation;
}

/* ---- the cleaner ---- */

static inline int pagecore_begin_cleaning(struct pagecore_keeper *keeper)
{
    if (!keeper || !keeper->summary)
        return 0;
    uint64_t generation = pagecore_load_relaxed(&keeper->generation);
    return !(generation & 1) && pagecore_compare_exchange(&keeper->generation, &generation, generation + 1);
}

static inline void pagecore_end_cleaning(struct pagecore_keeper *keeper)
{
    (void)pagecore_fetch_add(&keeper->generation, 1);
}

/* The marks of one summary word, which are gone; the lines are the caller's to look at afterwards. */
static inline uint64_t pagecore_take_marks(struct pagecore_keeper *keeper, size_t i)
{
    if (!pagecore_load_relaxed(&keeper->summary[i]))
        return 0;
    const uint64_t marks = pagecore_exchange(&keeper->summary[i], 0);
    pagecore_fence_after_rmw();
    return marks;
}

/* One summary word whose lines were found empty: take back the marks of those that still are. */
static inline void pagecore_clean(struct pagecore_keeper *keeper, const uint64_t *words, size_t nwords, size_t i)
{
    if (!pagecore_begin_cleaning(keeper))
        return;
    uint64_t again = 0;
    for (uint64_t marks = pagecore_take_marks(keeper, i); marks; marks &= marks - 1) {
        const size_t first = i * PAGECORE_UNIT + (size_t)__builtin_ctzll(marks) * PAGECORE_LINE_WORDS;
        for (size_t w = first; w < first + PAGECORE_LINE_WORDS && w < nwords; ++w)
            if (pagecore_load_relaxed(&words[w]))
                again |= marks & -marks;
    }
    if (again)
        pagecore_or(&keeper->summary[i], again);
    pagecore_end_cleaning(keeper);
}

#endif
