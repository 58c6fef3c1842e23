/* The choice of the processor's path, made once when a module is loaded; here and in _bitscan.h alone.
 *
 * Every loop exists twice: as plain C, and compiled for AVX2 with the bit instructions of that generation. The plain
 * one runs on every other processor, under ThreadSanitizer (which wants to see each load), and where
 * PAGECORE_CPU=plain asks for it, so that the tests can; PAGECORE_CPU=avx2 has neither 16-byte exchanges nor memory
 * transactions, and PAGECORE_CPU=cx16 neither those nor AVX-512, whose POPCNT is all that is used of it.
 */
#ifndef PAGECORE_CPU_H
#define PAGECORE_CPU_H

#include <stdlib.h>
#include <string.h>

#include "_atomic.h"

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define PAGECORE_X86 1
#include <cpuid.h>
#else
#define PAGECORE_X86 0
#endif

enum {
    PAGECORE_AVX2 = 1,
    PAGECORE_CX16 = 2,
    PAGECORE_RTM = 4,
    PAGECORE_AVX512 = 8
};

static unsigned pagecore_cpu;

#if PAGECORE_X86
/* Transactions may be there and always fail (firmware that disables them), so a few are tried. */
static inline int pagecore_transactions_succeed(void)
{
    unsigned a, b, c, d;
    volatile unsigned done = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_RTM) || d & 1u << 11 /* RTM_ALWAYS_ABORT */)
        return 0;
    for (int i = 0; i < 16; ++i)
        if (pagecore_begin_transaction()) {
            done = done + 1;
            pagecore_end_transaction();
        }
    return done >= 8;
}
#endif

__attribute__((constructor)) static void pagecore_choose_cpu(void)
{
#if PAGECORE_X86
    const char *wanted = getenv("PAGECORE_CPU");
    unsigned a, b, c, d;
    if (!wanted)
        wanted = "";
    __builtin_cpu_init();
    if (!strcmp(wanted, "plain") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt"))
        return;
    pagecore_cpu = PAGECORE_AVX2;
    if (!strcmp(wanted, "avx2") || !__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_CMPXCHG16B))
        return;
    pagecore_cpu |= PAGECORE_CX16;
    if (strcmp(wanted, "cx16") != 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq"))
        pagecore_cpu |= PAGECORE_AVX512;
    if (strcmp(wanted, "cx16") != 0 && pagecore_transactions_succeed())
        pagecore_cpu |= PAGECORE_RTM;
#endif
}

#endif
