/* The two-plane loops of _planes.h with a second thread's step put exactly between two of their own.
 *
 * The atomics that change a word are replaced by ones that count, and run `between` before the one asked for. The
 * first scenario that fails is printed; 0 says that all held. One bit plays the page.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <sys/mman.h>

#include "_atomic.h"

static void (*between)(void);
static int countdown;       /* `between` runs before the atomic at which this comes to 0 */

static void run_between(void)
{
    if (between && --countdown == 0)
        between();
}

static uint64_t interleaved_fetch_and(uint64_t *word, uint64_t mask)
{
    run_between();
    return pagecore_fetch_and(word, mask);
}

static uint64_t interleaved_fetch_or(uint64_t *word, uint64_t mask)
{
    run_between();
    return pagecore_fetch_or(word, mask);
}

static void interleaved_store(uint64_t *word, uint64_t value)
{
    run_between();
    pagecore_store_relaxed(word, value);
}

#define pagecore_fetch_and interleaved_fetch_and
#define pagecore_fetch_or interleaved_fetch_or
#define pagecore_store_relaxed interleaved_store
#include "_planes.h"
#undef pagecore_fetch_and
#undef pagecore_fetch_or
#undef pagecore_store_relaxed

static uint64_t dirty, hinted, dirty_then, hinted_then;

static void look(void)
{
    dirty_then = dirty;
    hinted_then = hinted;
}

static void take(void)
{
    look();
    pagecore_fetch_and(&dirty, ~UINT64_C(1));
}

static void take_and_put_back(void)
{
    take();
    pagecore_or(&dirty, 1);
}

#define EXPECT(condition)                                                                                      \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            printf("line %d: %s (dirty %d, hinted %d)\n", __LINE__, #condition, (int)dirty, (int)hinted);      \
            return 1;                                                                                          \
        }                                                                                                      \
    } while (0)

static void set(uint64_t d, uint64_t h, int at, void (*step)(void))
{
    dirty = d;
    hinted = h;
    countdown = at;
    between = step;
}

/* A hint of page 0, as a list of one run. Returns the pages taken off the debt. */
static int64_t hint(void)
{
    const int64_t run[2] = {0, 1};
    pagecore_hint_place place = {0, 0};
    return -pagecore_hint_runs(&dirty, &hinted, 1, 1, run, 1, &place, 100).dirty;
}

/* Where `bytes` of memory end, with nothing behind them. */
static char *end_of_memory(size_t bytes)
{
    char *map = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return map == MAP_FAILED || mprotect(map + bytes, 4096, PROT_NONE) ? NULL : map + bytes;
}

/* Planes that end where the memory does: all hints in them, on this processor's path, touch nothing behind it. */
static int at_the_end(void)
{
    char *ends[2] = {end_of_memory(8192), end_of_memory(8192)};
    EXPECT(ends[0] && ends[1]);
    between = NULL;
    for (size_t words = 1; words <= 300; words++) {
        uint64_t *planes[2] = {(uint64_t *)ends[0] - words, (uint64_t *)ends[1] - words};
        const size_t npages = 64 * words;
        int64_t runs[33][2] = {{0, (int64_t)npages}};
        for (size_t i = 1; i < 33; i++) {
            /* Every other one over two words: then those of one word are near the end, too. */
            const int two = i & 1 && words > 1;
            runs[i][1] = two ? 16 : (int64_t)i;
            runs[i][0] = (int64_t)npages - (two ? 72 : runs[i][1]);
        }
        for (size_t way = 0; way < 4; way++) {
            const size_t first = way & 1, budget = way & 2 ? 7 : 4096;
            pagecore_hint_place place = {0, 0};
            int64_t taken = 0;
            memset(planes[0], 0xff, words * 8);
            memset(planes[1], 0, words * 8);
            while (place.run < 33 - first)
                taken -= pagecore_hint_runs(planes[0], planes[1], npages, 1, runs[first], 33 - first, &place, budget)
                             .dirty;
            EXPECT((size_t)taken == (!first ? npages : words > 1 ? 48 : 32));
        }
    }
    return 0;
}

int main(void)
{
    uint64_t fetched;

    if (at_the_end())
        return 1;

    /* Undisturbed: free, one page off the debt; and at no moment neither. */
    set(1, 0, 2, look);
    EXPECT(hint() == 1 && dirty == 0 && hinted == 1);
    EXPECT(dirty_then == 1 && hinted_then == 1);

    /* A sender was faster: the page is on its way, and sent it stays. */
    set(1, 0, 2, take);
    EXPECT(hint() == 0 && dirty == 0 && hinted == 0);

    /* It was hinted before this call: that is not this call's to undo. */
    set(1, 1, 2, take);
    EXPECT(hint() == 0 && dirty == 0 && hinted == 1);

    /* Put back after the hint found it taken: the undo leaves it owed. */
    set(1, 0, 2, take);
    EXPECT(hint() == 0);
    pagecore_or(&dirty, 1);
    EXPECT(dirty == 1 && hinted == 0);

    /* The send failed at once: nothing went out, and the hint stands. Never neither, unsent. */
    set(1, 0, 2, take_and_put_back);
    EXPECT(hint() == 1 && dirty == 0 && hinted == 1);
    set(1, 1, 2, take_and_put_back);
    EXPECT(hint() == 1 && dirty == 0 && hinted == 1);

    /* Sent and not hinted before: nothing to do, and nothing done. */
    set(0, 0, 1, NULL);
    EXPECT(hint() == 0 && dirty == 0 && hinted == 0);

    /* Publish: dirty first, then not hinted. In between it reads as dirty. */
    set(0, 1, 2, look);
    fetched = 1;
    EXPECT(pagecore_publish(&fetched, &dirty, &hinted, 1).dirty == 1 && dirty == 1 && hinted == 0 && fetched == 0);
    EXPECT(dirty_then == 1 && hinted_then == 1);

    /* A sender takes what is half published: sent, and no longer free. */
    set(0, 1, 2, take);
    fetched = 1;
    EXPECT(pagecore_publish(&fetched, &dirty, &hinted, 1).dirty == 1 && dirty == 0 && hinted == 0);

    /* Hinted pages become owed in the same order. */
    set(0, 1, 2, look);
    EXPECT(pagecore_owe_hinted(&dirty, &hinted, 1).dirty == 1 && dirty == 1 && hinted == 0);
    EXPECT(dirty_then == 1 && hinted_then == 1);
    return 0;
}
