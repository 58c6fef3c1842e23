/* PAGEMAP_SCAN into a bitmap, and what it does not tell: which memory is no longer there, or no longer registered.
 * The facts behind it stand at the head of _pagemap.pyx.
 */
#ifndef PAGECORE_PAGEMAP_SCAN_H
#define PAGECORE_PAGEMAP_SCAN_H

#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "_bitscan.h"
#include "_kernel_abi.h"

/* Page regions of one scan: 48 KiB, which stay in the cache. */
#define PAGECORE_REGIONS 2048

/* The range that is scanned, and what it is scanned with. */
struct pagecore_scan {
    int pagemap;    /* /proc/PID/pagemap */
    int maps;       /* /proc/PID/maps */
    int shift;      /* of a page's size */
    uint64_t start; /* page 0 */
    uint64_t end;
    struct pagecore_page_region *regions;
};

/* ORs a run into the words, which are the caller's alone. The runs of a scan ascend, so what falls into one word is
 * gathered in `bits` and written once. */
struct pagecore_gather {
    uint64_t *words;
    uint64_t at;
    uint64_t bits;
    uint64_t newly;
};

static inline void pagecore_gather_flush(struct pagecore_gather *gather)
{
    gather->newly += pagecore_popcount(gather->bits & ~gather->words[gather->at]);
    gather->words[gather->at] |= gather->bits;
    gather->bits = 0;
}

static inline void pagecore_gather_run(struct pagecore_gather *gather, uint64_t first, uint64_t past)
{
    if (first >> 6 != gather->at) {
        pagecore_gather_flush(gather);
        gather->at = first >> 6;
    }
    if ((past - 1) >> 6 == gather->at)
        gather->bits |= pagecore_ones(past - first) << (first & 63);
    else
        gather->newly += pagecore_set_range(gather->words, first, past);
}

/* Reports what was written in [start, end) and re-arms it; 0 or -errno. With `arming` it arms everything and reports
 * what holds something. `words` NULL: nothing is reported. */
static inline int pagecore_scan_into(const struct pagecore_scan *scan, uint64_t start, uint64_t end, int arming,
                                     uint64_t *words, uint64_t *newly)
{
    const uint64_t base = scan->start;
    const int shift = scan->shift;
    struct pagecore_gather gather = {words, 0, 0, 0};
    struct pagecore_pm_scan_arg request = {
        .size = sizeof request,
        .flags = PAGECORE_PM_SCAN_WP_MATCHING | PAGECORE_PM_SCAN_CHECK_WPASYNC, /* fact 3 */
        .end = end,
        .vec = words ? (uintptr_t)scan->regions : 0,
        .vec_len = words ? PAGECORE_REGIONS : 0,
        .category_mask = arming ? 0 : PAGECORE_PAGE_IS_WRITTEN,
        .return_mask = arming ? PAGECORE_PAGE_IS_PRESENT | PAGECORE_PAGE_IS_SWAPPED | PAGECORE_PAGE_IS_PFNZERO
                              : PAGECORE_PAGE_IS_WRITTEN,
    };
    int result = 0;

    while (start < end) {
        request.start = start;
        const int found = ioctl(scan->pagemap, PAGECORE_PAGEMAP_SCAN, &request);
        if (found < 0) {
            result = -errno;
            if (words) /* fact 4 */
                gather.newly += pagecore_set_range(words, (start - base) >> shift, (end - base) >> shift);
            if (result != -EINTR)
                break;
            result = 0;
            continue;
        }
        for (int i = 0; words && i < found; ++i) {
            const struct pagecore_page_region *region = &scan->regions[i];
            if (arming && (!(region->categories & (PAGECORE_PAGE_IS_PRESENT | PAGECORE_PAGE_IS_SWAPPED)) ||
                           region->categories & PAGECORE_PAGE_IS_PFNZERO))
                continue;
            pagecore_gather_run(&gather, (region->start - base) >> shift, (region->end - base) >> shift);
        }
        if (gather.bits)
            pagecore_gather_flush(&gather);
        if (request.walk_end <= start)
            return -EIO;          /* no kernel does that, and it would go on for ever */
        start = request.walk_end; /* fact 5 */
    }
    if (newly)
        *newly += gather.newly;
    return result;
}

/* 1 and the first piece that is not mapped, 0 where there is none or the kernel cannot tell, or -errno. */
static inline int pagecore_find_hole(const struct pagecore_scan *scan, uint64_t *first, uint64_t *past)
{
    for (uint64_t at = scan->start; at < scan->end;) {
        struct pagecore_procmap_query query = {
            .size = sizeof query,
            .query_flags = PAGECORE_PROCMAP_QUERY_COVERING_OR_NEXT,
            .query_addr = at,
        };
        if (ioctl(scan->maps, PAGECORE_PROCMAP_QUERY, &query)) {
            if (errno == EINTR)
                continue;
            return errno == ENOTTY ? 0 : -errno; /* before Linux 6.11 */
        }
        if (query.vma_start > at) {
            *first = at;
            *past = query.vma_start < scan->end ? query.vma_start : scan->end;
            return 1;
        }
        at = query.vma_end;
    }
    return 0;
}

/* 1 and the first memory that is mapped but not registered for asynchronous write-protection, or 0. */
static inline int pagecore_find_stranger(const struct pagecore_scan *scan, uint64_t *first, uint64_t *past)
{
    struct pagecore_page_region region;
    struct pagecore_pm_scan_arg request = {
        .size = sizeof request,
        .start = scan->start,
        .end = scan->end,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PAGECORE_PAGE_IS_WPALLOWED,
        .category_inverted = PAGECORE_PAGE_IS_WPALLOWED,
    };
    if (ioctl(scan->pagemap, PAGECORE_PAGEMAP_SCAN, &request) <= 0)
        return 0;
    *first = region.start;
    *past = region.end;
    return 1;
}

#endif
