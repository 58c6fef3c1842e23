"""The plain C that bitmaps are measured against, called as cheaply as a Bitmap's own methods: addresses in, no checks."""

cimport cython
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memset

from pagecore._bitmap cimport Bitmap

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>
    size_t floor_count(const uint64_t *, size_t);
    size_t floor_drain(uint64_t *, uint64_t *, size_t);
    size_t floor_clear_runs(uint64_t *, const int64_t *, size_t);
    size_t floor_runs(const uint64_t *, size_t, int64_t *);
    size_t floor_indices(const uint64_t *, size_t, int64_t *);
    size_t floor_set_indices(uint64_t *, size_t, const int64_t *, size_t);
    size_t floor_find_many(const uint64_t *, size_t, const int64_t *, size_t);
    size_t floor_or_in_place(uint64_t *, const uint64_t *, size_t);
    size_t floor_or(const uint64_t *, const uint64_t *, uint64_t *, size_t);
    size_t floor_read(const uint64_t *, size_t);
    size_t floor_read_four(const uint64_t *, size_t);
    size_t floor_hint(uint64_t *, uint64_t *, const int64_t *, size_t);
    size_t qemu_hint(uint64_t *, uint64_t *, uint64_t *, const int64_t *, size_t);
    """
    size_t floor_count(const uint64_t *words, size_t n)
    size_t floor_drain(uint64_t *source, uint64_t *dest, size_t n)
    size_t floor_clear_runs(uint64_t *words, const int64_t *pairs, size_t n)
    size_t floor_runs(const uint64_t *words, size_t size, int64_t *pairs)
    size_t floor_indices(const uint64_t *words, size_t n, int64_t *indices)
    size_t floor_set_indices(uint64_t *words, size_t size, const int64_t *indices, size_t n)
    size_t floor_find_many(const uint64_t *words, size_t size, const int64_t *starts, size_t n)
    size_t floor_or_in_place(uint64_t *a, const uint64_t *b, size_t n)
    size_t floor_or(const uint64_t *a, const uint64_t *b, uint64_t *out, size_t n)
    size_t floor_read(const uint64_t *words, size_t n)
    size_t floor_read_four(const uint64_t *words, size_t n)
    size_t floor_hint(uint64_t *dirty, uint64_t *hinted, const int64_t *pairs, size_t n)
    size_t c_qemu_hint "qemu_hint"(uint64_t *dirty, uint64_t *hinted, uint64_t *chunks, const int64_t *pairs, size_t n)


def count(uintptr_t words, size_t n):
    cdef size_t result
    with nogil:
        result = floor_count(<const uint64_t *>words, n)
    return result


def drain(uintptr_t source, uintptr_t dest, size_t n):
    cdef size_t result
    with nogil:
        result = floor_drain(<uint64_t *>source, <uint64_t *>dest, n)
    return result


def clear_runs(uintptr_t words, uintptr_t pairs, size_t n):
    cdef size_t result
    with nogil:
        result = floor_clear_runs(<uint64_t *>words, <const int64_t *>pairs, n)
    return result


def runs(uintptr_t words, size_t size, uintptr_t pairs):
    cdef size_t result
    with nogil:
        result = floor_runs(<const uint64_t *>words, size, <int64_t *>pairs)
    return result


def indices(uintptr_t words, size_t n, uintptr_t numbers):
    cdef size_t result
    with nogil:
        result = floor_indices(<const uint64_t *>words, n, <int64_t *>numbers)
    return result


def set_indices(uintptr_t words, size_t size, uintptr_t numbers, size_t n):
    cdef size_t result
    with nogil:
        result = floor_set_indices(<uint64_t *>words, size, <const int64_t *>numbers, n)
    return result


def find_many(uintptr_t words, size_t size, uintptr_t starts, size_t n):
    cdef size_t result
    with nogil:
        result = floor_find_many(<const uint64_t *>words, size, <const int64_t *>starts, n)
    return result


def or_in_place(uintptr_t a, uintptr_t b, size_t n):
    with nogil:
        floor_or_in_place(<uint64_t *>a, <const uint64_t *>b, n)


def or_three(uintptr_t a, uintptr_t b, uintptr_t out, size_t n):
    with nogil:
        floor_or(<const uint64_t *>a, <const uint64_t *>b, <uint64_t *>out, n)


def read(uintptr_t words, size_t n):
    cdef size_t result
    with nogil:
        result = floor_read(<const uint64_t *>words, n)
    return result


def read_four(uintptr_t words, size_t n):
    cdef size_t result
    with nogil:
        result = floor_read_four(<const uint64_t *>words, n)
    return result


def hint(uintptr_t dirty, uintptr_t hinted, uintptr_t pairs, size_t n):
    cdef size_t result
    with nogil:
        result = floor_hint(<uint64_t *>dirty, <uint64_t *>hinted, <const int64_t *>pairs, n)
    return result


def qemu_hint(uintptr_t dirty, uintptr_t hinted, uintptr_t pairs, size_t n):
    # A bit for each chunk whose log would have to be re-armed: 2^32 pages of 2^18 each.
    cdef uint64_t[256] chunks
    cdef size_t result
    with nogil:
        memset(chunks, 0, sizeof(chunks))
        result = c_qemu_hint(<uint64_t *>dirty, <uint64_t *>hinted, chunks, <const int64_t *>pairs, n)
    return result


# ---- the same of a Bitmap, where one call of Python would hide what is measured

def bitmap_find_many(Bitmap bitmap, uintptr_t starts, size_t n):
    cdef size_t i, total = 0
    cdef const int64_t *start = <const int64_t *>starts
    with nogil:
        for i in range(n):
            total += bitmap.c_find_set(<size_t>start[i])
    return total


def bitmap_indices(Bitmap bitmap, uintptr_t numbers, size_t capacity):
    cdef size_t listed, after
    with nogil:
        listed = bitmap.c_indices(0, <int64_t *>numbers, capacity, &after)
    return listed


def bitmap_runs(Bitmap bitmap, uintptr_t pairs, size_t capacity):
    cdef size_t listed, after
    with nogil:
        listed = bitmap.c_runs(0, <int64_t *>pairs, capacity, &after)
    return listed


def bitmap_or_three(Bitmap a, Bitmap b, Bitmap out):
    with nogil:
        a.c_or_into(b, out)


@cython.final
cdef class Empty:
    """What a call of a method that takes one argument costs when it does nothing."""

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    def nothing(self, page):
        return None
