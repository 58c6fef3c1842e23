/* The bitmap headers against plain bit loops, on every path that this processor has, and under threads.
 *
 *   bitmap_selftest [seed]                every operation, every path
 *   bitmap_selftest stress [seed] [millions]   threads: no bit is lost or hidden, every count is exact
 *
 * Built by test_bitmap_headers.py for the host, with ThreadSanitizer, for AArch64 and against musl. Exits with 0, or says
 * what is wrong.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_map.h"

static uint64_t state = 20261;

static uint64_t draw(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static uint64_t below(uint64_t bound)
{
    return bound ? draw(&state) % bound : 0;
}

#define CHECK(condition, ...)                                      \
    do {                                                           \
        if (!(condition)) {                                        \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__);                                   \
            printf(" (cpu %u)\n", pagecore_cpu);                   \
            exit(1);                                               \
        }                                                          \
    } while (0)

/* A map between two guards that nothing may touch. `shift` words off a cache line; `kind`: 0 bare, 1 count, 2 summary. */
struct subject {
    struct pagecore_map map;
    uint64_t *memory;
    size_t shift;
};

static const uint64_t GUARD = UINT64_C(0x5ca1ab1e0ddba11);

static struct subject make(size_t size, size_t shift, int kind)
{
    struct subject subject = {.shift = shift};
    const size_t n = pagecore_word_count(size);
    subject.memory = aligned_alloc(64, ((n + shift + 2) * 8 + 127) & ~(size_t)63);
    for (size_t i = 0; i < n + shift + 2; ++i)
        subject.memory[i] = GUARD;
    subject.map.words = subject.memory + shift + 1;
    if (!shift) /* aligned: the guard stands behind alone */
        subject.map.words = subject.memory;
    subject.map.size = size;
    memset(subject.map.words, 0, n * 8);
    if (kind) {
        subject.map.keeper = calloc(1, sizeof *subject.map.keeper);
        if (kind == 2)
            subject.map.keeper->summary = calloc(pagecore_summary_words(size), 8);
    }
    return subject;
}

static void check_map(struct subject *subject, const char *what)
{
    const struct pagecore_map map = subject->map;
    const size_t n = pagecore_word_count(map.size);
    CHECK(map.words[n] == GUARD, "%s wrote past %zu pages", what, map.size);
    CHECK(!subject->shift || subject->memory[subject->shift] == GUARD, "%s wrote before the words", what);
    CHECK(!pagecore_tail(map.words, map.size), "%s set tail bits of %zu pages", what, map.size);
    size_t count = 0;
    for (size_t i = 0; i < n; ++i)
        count += pagecore_popcount(map.words[i]);
    CHECK(pagecore_map_count(map) == count, "%s: count of %zu pages", what, map.size);
    CHECK(pagecore_map_count(map) == count, "%s: kept count of %zu pages", what, map.size);
    if (map.keeper && map.keeper->summary)
        for (size_t i = 0; i < n; ++i)
            CHECK(!map.words[i] || map.keeper->summary[i >> 9] >> (i >> 3 & 63) & 1, "%s hides word %zu of %zu", what,
                  i, n);
}

static void drop(struct subject *subject)
{
    if (subject->map.keeper)
        free(subject->map.keeper->summary);
    free(subject->map.keeper);
    free(subject->memory);
}

/* Densities: nothing, one page in 10,000, in 100, half, all, and runs. */
enum {
    EMPTY,
    SPARSE,
    MEDIUM,
    HALF,
    FULL,
    CLUSTERED,
    DENSITIES
};

static void fill(struct pagecore_map map, int density)
{
    for (size_t i = 0; i < map.size; ++i) {
        int set = 0;
        switch (density) {
        case SPARSE: set = below(10000) == 0; break;
        case MEDIUM: set = below(100) == 0; break;
        case HALF: set = below(2) == 0; break;
        case FULL: set = 1; break;
        case CLUSTERED: set = (i / 700) % 5 == 0; break;
        }
        if (set)
            map.words[i >> 6] |= UINT64_C(1) << (i & 63);
    }
    pagecore_note_set(map.keeper, 0, map.size);
}

static int bit(const uint64_t *words, size_t i)
{
    return words[i >> 6] >> (i & 63) & 1;
}

static uint64_t *snapshot(struct pagecore_map map)
{
    const size_t bytes = pagecore_word_count(map.size) * 8;
    uint64_t *copy = malloc(bytes + 8);
    memcpy(copy, map.words, bytes);
    return copy;
}

static void drains(size_t size, size_t shift, int from_kind, int to_kind, int density, int to_density, int mode)
{
    struct subject from = make(size, shift, from_kind), to = make(size, shift, to_kind);
    fill(from.map, density);
    fill(to.map, to_density);
    uint64_t *source = snapshot(from.map), *dest = snapshot(to.map);
    size_t newly = 0;
    const size_t n = pagecore_word_count(size);
    for (size_t i = 0; i < n; ++i)
        newly += pagecore_popcount(source[i] & ~dest[i]);
    CHECK(pagecore_map_drain(from.map, to.map, mode == 2, mode >= 1) == newly, "drain %d of %zu pages", mode, size);
    for (size_t i = 0; i < n; ++i)
        CHECK(!from.map.words[i] && to.map.words[i] == (source[i] | dest[i]), "drain %d, word %zu of %zu", mode, i,
              n);
    check_map(&from, "drain");
    check_map(&to, "drain");
    CHECK(pagecore_map_drain(from.map, to.map, mode == 2, mode >= 1) == 0, "a second drain");
    if (size) {
        const size_t page = below(size);
        pagecore_or(&from.map.words[page >> 6], UINT64_C(1) << (page & 63));
        pagecore_note_set(from.map.keeper, page, page + 1);
        CHECK(pagecore_map_find_set(from.map, 0, size) == page, "page %zu is hidden after a drain", page);
    }
    free(source);
    free(dest);
    drop(&from);
    drop(&to);
}

static void merges(size_t size, size_t shift, int kind, int density)
{
    struct subject from = make(size, shift, kind), to = make(size, shift, kind), out = make(size, shift, 0);
    fill(from.map, density);
    fill(to.map, MEDIUM);
    uint64_t *dest = snapshot(to.map);
    size_t newly = 0, changed[4] = {0};
    const size_t n = pagecore_word_count(size);
    for (int how = 0; how < 4; ++how) {
        pagecore_combine(to.map.words, from.map.words, out.map.words, size, how);
        for (size_t i = 0; i < n; ++i) {
            const uint64_t result = pagecore_combined_plain(dest[i], from.map.words[i], how);
            CHECK(out.map.words[i] == result, "operation %d, word %zu of %zu", how, i, n);
            changed[how] += pagecore_popcount(result ^ dest[i]);
        }
        memcpy(out.map.words, dest, n * 8);
        CHECK(pagecore_combine(out.map.words, from.map.words, out.map.words, size, how) == changed[how],
              "in place %d", how);
        check_map(&out, "combine");
    }
    for (size_t i = 0; i < n; ++i)
        newly += pagecore_popcount(from.map.words[i] & ~dest[i]);
    CHECK(pagecore_map_merge(from.map, to.map) == newly, "merge of %zu pages", size);
    for (size_t i = 0; i < n; ++i)
        CHECK(to.map.words[i] == (dest[i] | from.map.words[i]), "merge, word %zu of %zu", i, n);
    check_map(&to, "merge");
    free(dest);
    drop(&from);
    drop(&to);
    drop(&out);
}

static void lists(size_t size, size_t shift, int kind, int density)
{
    struct subject subject = make(size, shift, kind);
    const struct pagecore_map map = subject.map;
    fill(map, density);
    const size_t start = below(size + 1), stop = start + below(size - start + 1);
    int64_t *expected = malloc((size + 2) * 2 * sizeof *expected), *found = malloc((size + 80) * 2 * sizeof *found);
    size_t indices = 0, runs = 0, next, first_set = size, first_clear = stop, in_range = 0;
    for (size_t i = start; i < size; ++i)
        if (bit(map.words, i))
            expected[indices++] = (int64_t)i;
    first_set = indices ? (size_t)expected[0] : size;
    for (size_t i = stop; i-- > start;) {
        first_clear = bit(map.words, i) ? first_clear : i;
        in_range += (size_t)bit(map.words, i);
    }
    CHECK(pagecore_map_find_set(map, start, size) == first_set, "find_set(%zu) of %zu", start, size);
    CHECK(pagecore_find_clear(map.words, start, stop) == first_clear, "find_clear(%zu) of %zu", start, size);
    CHECK(pagecore_count(map.words, start, stop) == in_range, "count [%zu, %zu) of %zu", start, stop, size);
    for (size_t capacity = indices;; capacity /= 2) {
        const size_t listed = pagecore_map_indices(map, start, found, capacity, &next);
        CHECK(listed == capacity, "%zu indices of %zu from %zu: %zu", capacity, indices, start, listed);
        CHECK(!memcmp(found, expected, listed * sizeof *found), "indices from %zu", start);
        CHECK(next == (listed < indices ? (size_t)expected[listed] : size), "indices from %zu go on at %zu", start,
              next);
        if (!capacity)
            break;
    }
    for (size_t i = start; i < size; ++i)
        if (bit(map.words, i)) {
            if (runs && expected[2 * runs - 2] + expected[2 * runs - 1] == (int64_t)i) {
                ++expected[2 * runs - 1];
            } else {
                expected[2 * runs] = (int64_t)i;
                expected[2 * runs++ + 1] = 1;
            }
        }
    CHECK(pagecore_map_count_runs(map, start) == runs, "runs from %zu", start);
    for (size_t capacity = runs + 1;; capacity /= 2) {
        const size_t listed = pagecore_map_runs(map, start, found, capacity, &next),
                     want = capacity < runs ? capacity : runs;
        CHECK(listed == want, "%zu runs of %zu: %zu", capacity, runs, listed);
        CHECK(!memcmp(found, expected, 2 * listed * sizeof *found), "runs from %zu", start);
        if (!capacity)
            break;
    }
    /* Take them in pieces. */
    uint64_t *before = snapshot(map);
    size_t at = start, taken = 0;
    while (at < size) {
        const size_t from = at,
                     listed = pagecore_map_take_runs(map, from, size, 1 + below(300), found, 1 + below(9), &at);
        for (size_t k = 0; k < listed; ++k)
            for (int64_t i = found[2 * k]; i < found[2 * k] + found[2 * k + 1]; ++i, ++taken)
                CHECK(bit(before, (size_t)i) && !bit(map.words, (size_t)i), "page %lld was taken", (long long)i);
    }
    CHECK(taken == indices, "%zu of %zu taken", taken, indices);
    check_map(&subject, "take");
    free(before);
    free(expected);
    free(found);
    drop(&subject);
}

static void batches(size_t size, size_t shift, int kind, int density)
{
    enum {
        N = 700
    };
    static int64_t pairs[N][2], pages[N];
    struct subject subject = make(size, shift, kind);
    const struct pagecore_map map = subject.map;
    fill(map, density);
    uint64_t *model = snapshot(map);
    for (int set = 0; set < 2; ++set) {
        size_t changed = 0, done;
        for (size_t k = 0; k < N; ++k) {
            pairs[k][0] = (int64_t)below(size + 1);
            pairs[k][1] = (int64_t)below((k % 10 ? 200 : 70000) + 1);
            if ((size_t)(pairs[k][0] + pairs[k][1]) > size)
                pairs[k][1] = (int64_t)size - pairs[k][0];
            for (int64_t i = pairs[k][0]; i < pairs[k][0] + pairs[k][1]; ++i)
                if (bit(model, (size_t)i) != set) {
                    model[i >> 6] ^= UINT64_C(1) << (i & 63);
                    ++changed;
                }
        }
        CHECK(pagecore_map_apply_runs(map, pairs[0], N, set, &done) == changed && done == N, "%d runs of %zu", set,
              size);
        CHECK(!memcmp(map.words, model, pagecore_word_count(size) * 8), "%d runs of %zu", set, size);
        check_map(&subject, "runs");
        if (!size)
            continue;
        changed = 0;
        for (size_t k = 0; k < N; ++k) {
            pages[k] = (int64_t)below(size);
            if (bit(model, (size_t)pages[k]) == set) {
                model[pages[k] >> 6] ^= UINT64_C(1) << (pages[k] & 63);
                ++changed;
            }
        }
        CHECK(pagecore_map_apply_indices(map, pages, N, !set, &done) == changed && done == N, "%d pages of %zu", set,
              size);
        CHECK(!memcmp(map.words, model, pagecore_word_count(size) * 8), "%d pages of %zu", set, size);
        check_map(&subject, "pages");
        CHECK(pagecore_check_indices(pages, N, size) == N, "all pages are inside");
        const size_t bad = below(N);
        const int64_t was = pages[bad];
        pages[bad] = below(2) ? (int64_t)size : -1 - (int64_t)below(5);
        CHECK(pagecore_check_indices(pages, N, size) == bad, "page %zu is outside", bad);
        pages[bad] = was;
    }
    const size_t first = below(size + 1), end = first + below(size - first + 1);
    size_t in_range = pagecore_count_plain(map.words, first, end);
    CHECK(pagecore_map_set_range(map, first, end) == end - first - in_range, "set [%zu, %zu)", first, end);
    check_map(&subject, "set_range");
    CHECK(pagecore_map_clear_range(map, first, end) == end - first, "clear [%zu, %zu)", first, end);
    CHECK(pagecore_count_plain(map.words, first, end) == 0, "clear [%zu, %zu)", first, end);
    check_map(&subject, "clear_range");
    pagecore_map_clear_range(map, 0, size);
    CHECK(pagecore_map_find_set(map, 0, size) == size, "cleared");
    check_map(&subject, "clear");
    free(model);
    drop(&subject);
}

/* A writer of `to` stands between its bits and their marks, which nobody sees. What is moved onto those bits is not new,
 * and must be found all the same as soon as the call returns. */
static void moves_onto_unmarked(size_t size, int merge, int dense)
{
    struct subject from = make(size, 0, 2), to = make(size, 0, 2);
    for (size_t page = dense ? 0 : size - 1; page < size; page += 3) {
        from.map.words[page >> 6] |= UINT64_C(1) << (page & 63);
        to.map.words[page >> 6] |= UINT64_C(1) << (page & 63);
    }
    pagecore_note_set(from.map.keeper, 0, size);
    const size_t first = pagecore_map_find_set(from.map, 0, size);
    CHECK(!(merge ? pagecore_map_merge(from.map, to.map) : pagecore_map_drain(from.map, to.map, 0, 0)), "nothing new");
    CHECK(pagecore_map_find_set(to.map, 0, size) == first, "moved onto an unmarked bit of %zu pages: hidden", size);
    drop(&from);
    drop(&to);
}

static int every_operation(void)
{
    static const size_t sizes[] = {0,   1,    63,    64,    65,     511,          512,
                                   513, 4097, 32768, 65599, 524288, 524289 + 700, (1 << 20) + 1};
    const unsigned best = pagecore_cpu;
    const unsigned paths[] = {0, PAGECORE_AVX2, PAGECORE_AVX2 | PAGECORE_CX16,
                              PAGECORE_AVX2 | PAGECORE_CX16 | PAGECORE_RTM, ~0u};
    int tried = 0;
    for (size_t p = 0; p < sizeof paths / sizeof *paths; ++p) {
        const unsigned path = paths[p] == ~0u ? best : paths[p];
        if (path & ~best)
            continue;
        pagecore_cpu = path;
        ++tried;
        for (size_t s = 1; s < sizeof sizes / sizeof *sizes; ++s)
            for (int how = 0; how < 4; ++how)
                moves_onto_unmarked(sizes[s], how & 1, how >> 1);
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s)
            for (int density = 0; density < DENSITIES; ++density)
                for (int kind = 0; kind < 3; ++kind) {
                    const size_t shift = below(3) ? 0 : 1 + below(3);
                    for (int mode = 0; mode < 3; ++mode)
                        drains(sizes[s], shift, kind, (int)below(3), density, (int)below(DENSITIES), mode);
                    merges(sizes[s], shift, kind, density);
                    lists(sizes[s], shift, kind, density);
                    if (kind != 1 || sizes[s] < 100000)
                        batches(sizes[s], shift, kind, density);
                }
    }
    printf("%d paths of %u agree with plain loops\n", tried, best);
    return 0;
}

/* ---- threads ---- */

static struct subject shared_map, dest_map;
static uint64_t running, sets_each, lost;

static void *set_pages(void *argument)
{
    uint64_t seed = (uint64_t)(uintptr_t)argument * 77777 + state, newly = 0;
    const struct pagecore_map map = shared_map.map;
    int64_t pages[1000];
    size_t done;
    for (uint64_t i = 0; i < sets_each; i += 1000) {
        if (i / 1000 % 4) {
            for (size_t k = 0; k < 1000; ++k)
                pages[k] = (int64_t)(draw(&seed) % map.size);
            newly += pagecore_map_apply_indices(map, pages, 1000, 1, &done);
        } else {
            for (size_t k = 0; k < 1000; ++k) {
                const uint64_t page = draw(&seed) % map.size;
                newly += !pagecore_test_and_set_bit(map.words, page);
                pagecore_note_set(map.keeper, page, page + 1);
            }
        }
    }
    pagecore_fetch_add(&running, ~UINT64_C(0));
    return (void *)(uintptr_t)newly;
}

/* Sets a page that nobody else touches, and must find it at once, whatever cleaners do. */
static void *look(void *argument)
{
    (void)argument;
    const struct pagecore_map map = shared_map.map;
    uint64_t seed = state + 5;
    while (pagecore_load_acquire(&running)) {
        const size_t page = (draw(&seed) % (map.size / 1024)) * 1024 + 7, line = page & ~(size_t)511;
        pagecore_or(&map.words[page >> 6], UINT64_C(1) << (page & 63));
        pagecore_note_set(map.keeper, page, page + 1);
        if (pagecore_map_find_set(map, line, map.size) > page || pagecore_map_find_set(map, page, page + 1) != page)
            pagecore_fetch_add(&lost, 1);
        pagecore_and(&map.words[page >> 6], ~(UINT64_C(1) << (page & 63)));
        pagecore_note_cleared(map.keeper);
    }
    return NULL;
}

/* Sets and clears its own page in the same lines, and lets the cleaner take the marks back. */
static void *clean(void *argument)
{
    (void)argument;
    const struct pagecore_map map = shared_map.map;
    uint64_t seed = state + 9;
    for (uint64_t i = 0; i < sets_each; ++i) {
        const size_t page = (draw(&seed) % (map.size / 1024)) * 1024 + 300;
        pagecore_or(&map.words[page >> 6], UINT64_C(1) << (page & 63));
        pagecore_note_set(map.keeper, page, page + 1);
        pagecore_and(&map.words[page >> 6], ~(UINT64_C(1) << (page & 63)));
        pagecore_note_cleared(map.keeper);
        pagecore_clean(map.keeper, map.words, pagecore_word_count(map.size), page >> 15);
    }
    pagecore_fetch_add(&running, ~UINT64_C(0));
    return NULL;
}

static size_t drain_while_running(int to_owned)
{
    size_t moved = 0;
    while (pagecore_load_acquire(&running)) {
        moved += pagecore_map_drain(shared_map.map, dest_map.map, 0, to_owned);
        pagecore_map_clear_range(dest_map.map, 0, dest_map.map.size);
    }
    return moved;
}

static int stress(uint64_t millions)
{
    static const size_t sizes[] = {70, 5000, 66000, (1 << 20) + 77};
    pthread_t threads[3];
    for (int round = 0; round < 8; ++round) {
        void *newly[2];
        uint64_t total = 0;
        shared_map = make(sizes[round % 4], 0, round < 6 ? 2 : 0);
        dest_map = make(sizes[round % 4], 0, 2);
        running = 2;
        sets_each = millions * 1000000 / 16;
        for (uintptr_t t = 0; t < 2; ++t)
            pthread_create(&threads[t], NULL, set_pages, (void *)(t + 1));
        size_t moved = drain_while_running(round & 1);
        for (int t = 0; t < 2; ++t) {
            pthread_join(threads[t], &newly[t]);
            total += (uintptr_t)newly[t];
        }
        check_map(&shared_map, "stress");
        moved += pagecore_map_drain(shared_map.map, dest_map.map, 0, 0);
        CHECK(moved == total, "%llu pages were newly set, %zu drained", (unsigned long long)total, moved);
        check_map(&shared_map, "stress");
        check_map(&dest_map, "stress");
        drop(&shared_map);
        drop(&dest_map);
    }
    shared_map = make(40960, 0, 2);
    running = 1;
    sets_each = millions * 20000;
    pthread_create(&threads[0], NULL, look, NULL);
    clean(NULL);
    pthread_join(threads[0], NULL);
    CHECK(!lost, "%llu pages were hidden", (unsigned long long)lost);
    check_map(&shared_map, "cleaning");
    drop(&shared_map);
    printf("%llu M sets beside drains: none lost\n", (unsigned long long)millions);
    return 0;
}

int main(int argc, char **argv)
{
    const int threads = argc > 1 && !strcmp(argv[1], "stress");
    if (argc > 1 + threads)
        state = strtoull(argv[1 + threads], NULL, 0);
    return threads ? stress(argc > 3 ? strtoull(argv[3], NULL, 0) : 20) : every_operation();
}
