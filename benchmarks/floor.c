/* The floor of bench_bitmap.py and of `pagecore bench bitmap`: what plain C needs for the same work, in the way QEMU does it.
 *
 * Built on its own, with -O2 and the POPCNT instruction: by conftest.py, which calls it through ctypes, and by setup.py
 * into pagecore.bench._floor. Both release the GIL, as pagecore does. Written from what such loops must do; no code is taken from another project.
 */
#include <stddef.h>
#include <stdint.h>

/* How many bits are set: one POPCNT a word, four sums, so that no add waits for the one before. */
size_t floor_count(const uint64_t *words, size_t n)
{
    size_t count[4] = {0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        count[0] += (size_t)__builtin_popcountll(words[i]);
        count[1] += (size_t)__builtin_popcountll(words[i + 1]);
        count[2] += (size_t)__builtin_popcountll(words[i + 2]);
        count[3] += (size_t)__builtin_popcountll(words[i + 3]);
    }
    for (; i < n; ++i)
        count[0] += (size_t)__builtin_popcountll(words[i]);
    return count[0] + count[1] + count[2] + count[3];
}

/* QEMU's sync: the source is atomic, because vCPUs set bits in it; the destination is plain, under a mutex. */
size_t floor_drain(uint64_t *from, uint64_t *to, size_t n)
{
    size_t newly = 0;
    for (size_t i = 0; i < n; ++i) {
        if (!__atomic_load_n(&from[i], __ATOMIC_RELAXED))
            continue;
        const uint64_t bits = __atomic_exchange_n(&from[i], 0, __ATOMIC_SEQ_CST);
        newly += (size_t)__builtin_popcountll(bits & ~to[i]);
        to[i] |= bits;
    }
    return newly;
}

/* A free-page hint: count a range, then clear it, neither atomic. */
static size_t clear_range(uint64_t *words, size_t first, size_t count)
{
    size_t cleared = 0;
    const size_t end = first + count;
    for (size_t bit = first; bit < end;) {
        const size_t in_word = bit & 63;
        const size_t length = end - bit < 64 - in_word ? end - bit : 64 - in_word;
        const uint64_t mask = (~UINT64_C(0) >> (64 - length)) << in_word;
        cleared += (size_t)__builtin_popcountll(words[bit >> 6] & mask);
        words[bit >> 6] &= ~mask;
        bit += length;
    }
    return cleared;
}

size_t floor_clear_runs(uint64_t *words, const int64_t *pairs, size_t n)
{
    size_t cleared = 0;
    for (size_t i = 0; i < n; ++i)
        if (pairs[2 * i + 1])
            cleared += clear_range(words, (size_t)pairs[2 * i], (size_t)pairs[2 * i + 1]);
    return cleared;
}

/* The next bit that equals `set`, at or after `start`, or `size`. */
static size_t find_next(const uint64_t *words, size_t start, size_t size, int set)
{
    if (start >= size)
        return size;
    const uint64_t flip = set ? 0 : ~UINT64_C(0);
    size_t i = start >> 6;
    uint64_t word = (words[i] ^ flip) & (~UINT64_C(0) << (start & 63));
    while (!word) {
        if (++i * 64 >= size)
            return size;
        word = words[i] ^ flip;
    }
    const size_t bit = i * 64 + (size_t)__builtin_ctzll(word);
    return bit < size ? bit : size;
}

/* Runs by pairs of find-next calls, as QEMU and the kernel do it. */
size_t floor_runs(const uint64_t *words, size_t size, int64_t *pairs)
{
    size_t n = 0;
    for (size_t first = find_next(words, 0, size, 1); first < size; ++n) {
        const size_t end = find_next(words, first, size, 0);
        pairs[2 * n] = (int64_t)first;
        pairs[2 * n + 1] = (int64_t)(end - first);
        first = find_next(words, end, size, 1);
    }
    return n;
}

/* Set bits as numbers: count the trailing zeros, drop the lowest bit. */
size_t floor_indices(const uint64_t *words, size_t n, int64_t *indices)
{
    size_t listed = 0;
    for (size_t i = 0; i < n; ++i)
        for (uint64_t word = words[i]; word; word &= word - 1)
            indices[listed++] = (int64_t)(i * 64 + (size_t)__builtin_ctzll(word));
    return listed;
}

/* Set an array of pages, checked and counted, but not atomic; each line is asked for 32 pages ahead. */
size_t floor_set_indices(uint64_t *words, size_t size, const int64_t *indices, size_t n)
{
    size_t newly = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint64_t bit = (uint64_t)indices[i];
        if (bit >= size)
            return newly;
        const uint64_t mask = UINT64_C(1) << (bit & 63);
        if (i + 32 < n)
            __builtin_prefetch(&words[(uint64_t)indices[i + 32] >> 6], 1);
        newly += !(words[bit >> 6] & mask);
        words[bit >> 6] |= mask;
    }
    return newly;
}

/* The next set bit, as `for (bit = find_next(0); ...; bit = find_next(bit + 1))` asks for it. */
size_t floor_find_set(const uint64_t *words, size_t size, size_t start)
{
    return find_next(words, start, size, 1);
}

/* Boolean operations, in place and with three operands. */
size_t floor_or_in_place(uint64_t *a, const uint64_t *b, size_t n)
{
    for (size_t i = 0; i < n; ++i)
        a[i] |= b[i];
    return n;
}

size_t floor_or(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t n)
{
    for (size_t i = 0; i < n; ++i)
        out[i] = a[i] | b[i];
    return n;
}

/* ---- what the memory gives: vectors, which the compiler splits where the processor has none ---- */

typedef uint64_t vector __attribute__((vector_size(32), aligned(8), may_alias));

static inline uint64_t total(vector sum)
{
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

#ifdef __x86_64__
#define WIDE __attribute__((target("avx2")))
#else
#define WIDE
#endif

/* Read everything in one stream, and in four at a distance of 16 KiB. n is a multiple of 8192 words. */
WIDE size_t floor_read(const uint64_t *words, size_t n)
{
    vector sum[4] = {{0}};
    for (size_t i = 0; i < n; i += 16)
        for (int j = 0; j < 4; ++j)
            sum[j] ^= *(const vector *)(words + i + 4 * j);
    return total(sum[0] ^ sum[1] ^ sum[2] ^ sum[3]);
}

WIDE size_t floor_read_four(const uint64_t *words, size_t n)
{
    vector sum[4] = {{0}};
    for (size_t block = 0; block < n; block += 8192)
        for (size_t i = block; i < block + 2048; i += 8)
            for (int j = 0; j < 4; ++j)
                sum[j] ^= *(const vector *)(words + i + 2048 * j) ^ *(const vector *)(words + i + 2048 * j + 4);
    return total(sum[0] ^ sum[1] ^ sum[2] ^ sum[3]);
}

/* One find-next from each of some positions; the sum of the answers. */
size_t floor_find_many(const uint64_t *words, size_t size, const int64_t *starts, size_t n)
{
    size_t sum = 0;
    for (size_t i = 0; i < n; ++i)
        sum += find_next(words, (size_t)starts[i], size, 1);
    return sum;
}
