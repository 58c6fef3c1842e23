/* A map: words, and what is kept beside them where they are ours. The operations that use a summary, or keep the
 * count; the loops themselves are those of _bitscan.h.
 */
#ifndef PAGECORE_MAP_H
#define PAGECORE_MAP_H

#include "_keeper.h"

struct pagecore_map {
    uint64_t *words;
    size_t size;
    struct pagecore_keeper *keeper; /* NULL: the words are others' too */
};

/* ---- looking ---- */

/* The first set page of [first, end) that lies in a marked line, or end. */
static inline size_t pagecore_find_marked(struct pagecore_map map, const uint64_t *summary, size_t first, size_t end)
{
    const size_t lines = ((end - 1) >> PAGECORE_LINE_SHIFT) + 1;
    const size_t begin = first;
    for (size_t line = first >> PAGECORE_LINE_SHIFT, was = line; line < lines; was = line) {
        uint64_t marks = pagecore_load_acquire(&summary[line >> 6]) >> (line & 63);
        if (!marks) {
            const size_t next = pagecore_find_set(summary, (line | 63) + 1 < lines ? (line | 63) + 1 : lines, lines);
            line = next;
            continue;
        }
        line += (size_t)__builtin_ctzll(marks);
        if (line >= lines)
            break;
        const size_t from = line << PAGECORE_LINE_SHIFT > first ? line << PAGECORE_LINE_SHIFT : first;
        const size_t stop = (line + 1) << PAGECORE_LINE_SHIFT < end ? (line + 1) << PAGECORE_LINE_SHIFT : end;
        const size_t found = pagecore_find_set(map.words, from, stop);
        if (found < stop)
            return found;
        ++line;
        /* A whole summary word of marks that led to nothing: later calls are spared them. */
        if (!(line & 63) && begin <= (line - 64) << PAGECORE_LINE_SHIFT && line - 64 <= was)
            pagecore_clean(map.keeper, map.words, pagecore_word_count(map.size), (line >> 6) - 1);
    }
    return end;
}

static inline size_t pagecore_map_find_set(struct pagecore_map map, size_t first, size_t end)
{
    uint64_t generation = 0;
    const uint64_t *summary = first < end ? pagecore_begin_reading(map.keeper, &generation) : NULL;
    if (summary) {
        const size_t found = pagecore_find_marked(map, summary, first, end);
        if (pagecore_end_reading(map.keeper, summary, generation))
            return found;
    }
    return pagecore_find_set(map.words, first, end);
}

/* Both list; where a cleaner was at work meanwhile the list is made again from all words. */
static inline size_t pagecore_map_indices(struct pagecore_map map, size_t start, int64_t *indices, size_t capacity,
                                          size_t *next)
{
    uint64_t generation = 0;
    const uint64_t *summary = pagecore_begin_reading(map.keeper, &generation);
    const size_t listed = PAGECORE_BEST(list_indices)(map.words, summary, start, map.size, indices, capacity, next);
    if (pagecore_end_reading(map.keeper, summary, generation))
        return listed;
    return PAGECORE_BEST(list_indices)(map.words, NULL, start, map.size, indices, capacity, next);
}

static inline size_t pagecore_map_runs(struct pagecore_map map, size_t start, int64_t *pairs, size_t capacity,
                                       size_t *next)
{
    uint64_t generation = 0;
    const uint64_t *summary = pagecore_begin_reading(map.keeper, &generation);
    const size_t listed = PAGECORE_BEST(list_runs)(map.words, summary, start, map.size, pairs, capacity, next);
    if (pagecore_end_reading(map.keeper, summary, generation))
        return listed;
    return PAGECORE_BEST(list_runs)(map.words, NULL, start, map.size, pairs, capacity, next);
}

static inline size_t pagecore_map_count_runs(struct pagecore_map map, size_t start)
{
    uint64_t generation = 0;
    const uint64_t *summary = pagecore_begin_reading(map.keeper, &generation);
    const size_t count = PAGECORE_BEST(count_runs)(map.words, summary, start, map.size);
    if (pagecore_end_reading(map.keeper, summary, generation))
        return count;
    return PAGECORE_BEST(count_runs)(map.words, NULL, start, map.size);
}

/* The set pages in marked units, or everywhere. */
static inline size_t pagecore_count_marked(struct pagecore_map map, const uint64_t *summary)
{
    const size_t unit = (size_t)PAGECORE_UNIT * PAGECORE_WORD_BITS;
    size_t count = 0, first = 0;
    if (!summary)
        return pagecore_count(map.words, 0, map.size);
    while (first < map.size) {
        /* As many units as are marked side by side. */
        size_t end = first;
        while (end < map.size && pagecore_load_acquire(&summary[end / unit]))
            end = end + unit < map.size ? end + unit : map.size;
        if (first < end)
            count += pagecore_count(map.words, first, end);
        first = end < map.size ? end + unit : end;
    }
    return count;
}

static inline size_t pagecore_map_count(struct pagecore_map map)
{
    struct pagecore_keeper *keeper = map.keeper;
    uint64_t generation = 0;
    if (!keeper)
        return pagecore_count(map.words, 0, map.size);
    if (!pagecore_load_acquire(&keeper->stale))
        return (size_t)(pagecore_load_relaxed(&keeper->base) + pagecore_load_acquire(&keeper->kept));
    const int publish = !pagecore_exchange(&keeper->counting, 1);
    const uint64_t calls = pagecore_load_acquire(&keeper->calls), kept = pagecore_load_acquire(&keeper->kept);
    if (publish)
        (void)pagecore_exchange(&keeper->stale, 0);
    pagecore_fence_after_rmw();
    const uint64_t *summary = pagecore_begin_reading(keeper, &generation);
    size_t count = pagecore_count_marked(map, summary);
    if (!pagecore_end_reading(keeper, summary, generation))
        count = pagecore_count(map.words, 0, map.size);
    if (publish) {
        /* Another single bit leaves `stale` set, whenever it comes. A counted call may have been counted in part. */
        const int quiet = !(calls & 0xffff) && pagecore_load_acquire(&keeper->calls) == calls;
        if (quiet)
            pagecore_store_release(&keeper->base, (uint64_t)count - kept);
        else
            pagecore_store_release(&keeper->stale, 1);
        pagecore_store_release(&keeper->counting, 0);
    }
    return count;
}

/* ---- changing ---- */

enum {
    PAGECORE_FEW = 512
}; /* pages of a range for which the count is not kept up: less than counting it costs */

static inline size_t pagecore_map_set_range(struct pagecore_map map, size_t first, size_t end)
{
    const int few = end - first <= PAGECORE_FEW;
    if (first == end)
        return 0;
    if (!few)
        pagecore_begin_call(map.keeper);
    const size_t changed = pagecore_set_range(map.words, first, end);
    if (few) {
        pagecore_note_set(map.keeper, first, end);
    } else {
        pagecore_mark(map.keeper, first, end);
        pagecore_end_call(map.keeper, changed, 0);
    }
    return changed;
}

/* Unit by unit where there is a summary: what is not marked is not looked at, and what was cleared loses its
 * marks. */
static inline size_t pagecore_clear_marked(struct pagecore_map map, size_t first, size_t end)
{
    const size_t unit = (size_t)PAGECORE_UNIT * PAGECORE_WORD_BITS;
    uint64_t generation = 0;
    size_t cleared = 0;
    const uint64_t *summary = end - first >= unit ? pagecore_begin_reading(map.keeper, &generation) : NULL;
    if (!summary)
        return pagecore_clear_range(map.words, first, end);
    for (size_t at = first, stop; at < end; at = stop) {
        stop = (at / unit + 1) * unit < end ? (at / unit + 1) * unit : end;
        if (pagecore_load_acquire(&summary[at / unit]))
            cleared += pagecore_clear_range(map.words, at, stop);
    }
    if (!pagecore_end_reading(map.keeper, summary, generation))
        cleared += pagecore_clear_range(map.words, first, end);
    for (size_t i = (first + unit - 1) / unit; i < end / unit || (end == map.size && i * unit < end); ++i)
        if (pagecore_load_relaxed(&summary[i]))
            pagecore_clean(map.keeper, map.words, pagecore_word_count(map.size), i);
    return cleared;
}

static inline size_t pagecore_map_clear_range(struct pagecore_map map, size_t first, size_t end)
{
    if (end - first <= PAGECORE_FEW) {
        const size_t changed = pagecore_clear_range(map.words, first, end);
        pagecore_note_cleared(map.keeper);
        return changed;
    }
    pagecore_begin_call(map.keeper);
    const size_t changed = pagecore_clear_marked(map, first, end);
    pagecore_end_call(map.keeper, 0, changed);
    return changed;
}

static inline size_t pagecore_map_apply_runs(struct pagecore_map map, const int64_t *pairs, size_t n, int set,
                                             size_t *done)
{
    uint64_t generation = 0;
    const uint64_t *trusted = set ? NULL : pagecore_begin_reading(map.keeper, &generation);
    uint64_t *summary = !map.keeper || (!set && !trusted) ? NULL : map.keeper->summary;
    pagecore_begin_call(map.keeper);
    size_t changed = PAGECORE_BEST(apply_runs)(map.words, summary, pairs, n, map.size, set, done);
    if (!pagecore_end_reading(map.keeper, trusted, generation))
        changed += PAGECORE_BEST(apply_runs)(map.words, NULL, pairs, *done, map.size, set, done);
    pagecore_end_call(map.keeper, set ? changed : 0, set ? 0 : changed);
    return changed;
}

static inline size_t pagecore_map_apply_indices(struct pagecore_map map, const int64_t *indices, size_t n, int set,
                                                size_t *done)
{
    uint64_t *summary = map.keeper ? map.keeper->summary : NULL;
    pagecore_begin_call(map.keeper);
    const size_t changed = PAGECORE_BEST(apply_indices)(map.words, summary, indices, n, map.size, set, done);
    pagecore_end_call(map.keeper, set ? changed : 0, set ? 0 : changed);
    return changed;
}

static inline size_t pagecore_map_take_runs(struct pagecore_map map, size_t start, size_t stop, size_t max_pages,
                                            int64_t *pairs, size_t capacity, size_t *next)
{
    size_t taken = 0;
    pagecore_begin_call(map.keeper);
    const size_t from = pagecore_map_find_set(map, start, stop);
    const size_t listed = pagecore_take_runs(map.words, from, stop, max_pages, pairs, capacity, next);
    for (size_t i = 0; i < listed; ++i)
        taken += (size_t)pairs[2 * i + 1];
    pagecore_end_call(map.keeper, 0, taken);
    return listed;
}

/* The drains: `owned` says that nobody else uses that map during the call. Where the source has a summary, and no
 * other thread is draining it, what is not marked is not looked at. */
static inline size_t pagecore_map_drain(struct pagecore_map from, struct pagecore_map to, int from_owned,
                                        int to_owned)
{
    const size_t n = from.size >> 6, units = PAGECORE_BLOCK / PAGECORE_UNIT;
    const int cleaning = pagecore_begin_cleaning(from.keeper);
    uint64_t *summary = to.keeper ? to.keeper->summary : NULL;
    size_t newly = 0;
    pagecore_begin_call(to.keeper);
    for (size_t i = 0; i < pagecore_word_count(from.size); i += PAGECORE_BLOCK) {
        const size_t length = n - i < PAGECORE_BLOCK ? n - i : PAGECORE_BLOCK;
        uint64_t *here = summary ? summary + i / PAGECORE_UNIT : NULL;
        uint64_t marks[PAGECORE_BLOCK / PAGECORE_UNIT] = {0};
        size_t lines = 0;
        for (size_t j = 0; cleaning && j < units && i + j * PAGECORE_UNIT < pagecore_word_count(from.size); ++j) {
            marks[j] = pagecore_take_marks(from.keeper, i / PAGECORE_UNIT + j);
            lines += pagecore_popcount(marks[j]);
        }
        if (i >= n || (cleaning && !lines))
            continue;
        newly += PAGECORE_BEST(drain_block)(from.words + i, to.words + i, here,
                                            cleaning && lines <= PAGECORE_CHUNK / 8 ? marks : NULL, length,
                                            from_owned, to_owned);
    }
    const size_t tail = pagecore_drain_tail(from.words, to.words, from.size);
    if (summary && from.size & 63 && pagecore_load_relaxed(&to.words[n])) /* new or not, as in drain_block */
        pagecore_mark_lines(summary, from.size - 1, from.size);
    if (cleaning)
        pagecore_end_cleaning(from.keeper);
    pagecore_note_cleared(from.keeper);
    pagecore_end_call(to.keeper, newly + tail, 0);
    return newly + tail;
}

/* OR `from` into `to`, line by line. A line is marked even if nothing in it is new: the writer that set those bits may
 * not have marked them yet. */
static inline size_t pagecore_map_merge(struct pagecore_map from, struct pagecore_map to)
{
    size_t newly = 0;
    if (!to.keeper || !to.keeper->summary) {
        pagecore_begin_call(to.keeper);
        newly = pagecore_merge(from.words, to.words, to.size);
        pagecore_end_call(to.keeper, newly, 0);
        return newly;
    }
    pagecore_begin_call(to.keeper);
    for (size_t first = pagecore_map_find_set(from, 0, to.size); first < to.size;
         first = pagecore_map_find_set(from, first, to.size)) {
        const size_t begin = first & ~(size_t)511, end = begin + 512 < to.size ? begin + 512 : to.size;
        const size_t more = pagecore_merge(from.words + (begin >> 6), to.words + (begin >> 6), end - begin);
        pagecore_mark_lines(to.keeper->summary, begin, end);
        newly += more;
        first = end;
    }
    pagecore_end_call(to.keeper, newly, 0);
    return newly;
}

#endif
