/* Whether a page is all zeros, at the speed of memory: as plain C and for AVX2 (_cpu.h). */
#ifndef PAGECORE_ZERO_PAGES_H
#define PAGECORE_ZERO_PAGES_H

#include <stddef.h>
#include <stdint.h>

#include "_cpu.h"

enum {
    PAGECORE_ZERO_LINE = 8,   /* words of a cache line: most pages differ from zero in their first one */
    PAGECORE_ZERO_BLOCK = 64, /* words OR-ed before they are looked at */
    PAGECORE_ZERO_AHEAD = 512 /* words: the processor's own prefetchers stop at the end of a page of 4 KiB */
};

static inline __attribute__((always_inline)) int pagecore_zero_words(const uint64_t *words, size_t count)
{
    uint64_t line = 0;
    for (size_t at = 0; at < PAGECORE_ZERO_LINE; at++)
        line |= words[at];
    if (line)
        return 0;
    for (const uint64_t *end = words + count; words < end; words += PAGECORE_ZERO_BLOCK) {
        uint64_t bits = 0;
        for (size_t at = 0; at < PAGECORE_ZERO_BLOCK; at += 8)
            __builtin_prefetch(words + PAGECORE_ZERO_AHEAD + at);
        for (size_t at = 0; at < PAGECORE_ZERO_BLOCK; at++)
            bits |= words[at];
        if (bits)
            return 0;
    }
    return 1;
}

static int pagecore_is_zero_plain(const uint64_t *words, size_t count)
{
    return pagecore_zero_words(words, count);
}

#if PAGECORE_X86
__attribute__((target("avx2"))) static int pagecore_is_zero_avx2(const uint64_t *words, size_t count)
{
    return pagecore_zero_words(words, count);
}
#endif

/* `count`, a multiple of PAGECORE_ZERO_BLOCK, words from an address that is a multiple of 8. */
static inline int pagecore_is_zero(const uint64_t *words, size_t count)
{
#if PAGECORE_X86
    if (pagecore_cpu & PAGECORE_AVX2)
        return pagecore_is_zero_avx2(words, count);
#endif
    return pagecore_is_zero_plain(words, count);
}

#endif
