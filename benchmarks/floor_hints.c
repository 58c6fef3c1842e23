/* The floor rows of bench_hints.py: what plain C needs for the same work on the same two planes.
 *
 * Nothing here is atomic but the source of the sync, in which vCPUs set bits. `qemu_hint` does what QEMU's hint path
 * does for each run (take a mutex, look at the chunks whose log would have to be re-armed, count, clear), extended to
 * the second plane, in passes of its own as there. Written from what such loops must do; no code is taken from another
 * project.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define CHUNK_SHIFT 18

static uint64_t mask_of(size_t bit, size_t end, size_t *length)
{
    const size_t in_word = bit & 63;
    *length = end - bit < 64 - in_word ? end - bit : 64 - in_word;
    return (~UINT64_C(0) >> (64 - *length)) << in_word;
}

size_t floor_hint(uint64_t *dirty, uint64_t *hinted, const int64_t *pairs, size_t n)
{
    size_t taken = 0;
    for (size_t i = 0; i < n; ++i) {
        const size_t end = (size_t)(pairs[2 * i] + pairs[2 * i + 1]);
        size_t length;
        for (size_t bit = (size_t)pairs[2 * i]; bit < end; bit += length) {
            const uint64_t owed = dirty[bit >> 6] & mask_of(bit, end, &length);
            hinted[bit >> 6] |= owed;
            dirty[bit >> 6] &= ~owed;
            taken += (size_t)__builtin_popcountll(owed);
        }
    }
    return taken;
}

size_t qemu_hint(uint64_t *dirty, uint64_t *hinted, uint64_t *chunks, const int64_t *pairs, size_t n)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    size_t taken = 0;
    for (size_t i = 0; i < n; ++i) {
        const size_t first = (size_t)pairs[2 * i], end = first + (size_t)pairs[2 * i + 1];
        size_t length;
        pthread_mutex_lock(&mutex);
        for (size_t chunk = first >> CHUNK_SHIFT; chunk <= (end - 1) >> CHUNK_SHIFT; ++chunk)
            chunks[chunk >> 6] &= ~(UINT64_C(1) << (chunk & 63));
        for (size_t bit = first; bit < end; bit += length)
            taken += (size_t)__builtin_popcountll(dirty[bit >> 6] & mask_of(bit, end, &length));
        for (size_t bit = first; bit < end; bit += length)
            hinted[bit >> 6] |= dirty[bit >> 6] & mask_of(bit, end, &length);
        for (size_t bit = first; bit < end; bit += length)
            dirty[bit >> 6] &= ~mask_of(bit, end, &length);
        pthread_mutex_unlock(&mutex);
    }
    return taken;
}

size_t floor_sync(uint64_t *log, uint64_t *dirty, uint64_t *hinted, size_t nwords)
{
    size_t newly = 0;
    for (size_t i = 0; i < nwords; ++i) {
        if (!__atomic_load_n(&log[i], __ATOMIC_RELAXED))
            continue;
        const uint64_t bits = __atomic_exchange_n(&log[i], 0, __ATOMIC_SEQ_CST);
        newly += (size_t)__builtin_popcountll(bits & ~dirty[i]);
        dirty[i] |= bits;
        hinted[i] &= ~bits;
    }
    return newly;
}
