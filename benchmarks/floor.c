/* The floor rows of bench_bitmap.py: what plain C needs for the same work, in the way QEMU does it.
 *
 * Built by conftest.py on its own, with -O2 and the POPCNT instruction, and called through ctypes (which releases the
 * GIL, as pagecore does). Written from what such loops must do; no code is taken from another project.
 */
#include <stddef.h>
#include <stdint.h>

/* How many bits are set: one POPCNT a word. */
size_t floor_count(const uint64_t *words, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; ++i)
        count += (size_t)__builtin_popcountll(words[i]);
    return count;
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

/* Set an array of pages, checked and counted, but not atomic. */
size_t floor_set_indices(uint64_t *words, size_t size, const int64_t *indices, size_t n)
{
    size_t newly = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint64_t bit = (uint64_t)indices[i];
        if (bit >= size)
            return newly;
        const uint64_t mask = UINT64_C(1) << (bit & 63);
        newly += !(words[bit >> 6] & mask);
        words[bit >> 6] |= mask;
    }
    return newly;
}
