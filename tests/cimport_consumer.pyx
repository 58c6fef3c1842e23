# cython: language_level=3, freethreading_compatible=True
"""A consumer of the C face, as another project would write it: compiled and run by test_cimport.py."""

from libc.stdint cimport int64_t, uint64_t

from pagecore cimport Bitmap
from pagecore.dirty_log cimport KvmDirtyRing


def bits(Bitmap bitmap, size_t page):
    cdef bint before, won, lost, seen, cleared
    with nogil:
        before = bitmap.c_test(page)
        won = not bitmap.c_test_and_set(page)
        lost = bitmap.c_test_and_set(page)
        bitmap.c_clear(page)
        bitmap.c_set(page)
        seen = bitmap.c_test(page)
        cleared = bitmap.c_test_and_clear(page)
    return before, won, lost, seen, cleared


def ranges(Bitmap bitmap):
    """Set pages 10 to 199, clear 60 to 129; count, and find the edges."""
    cdef size_t newly, cleared, found_set, found_clear, last
    cdef bint covered
    with nogil:
        newly = bitmap.c_set_range(10, 190)
        cleared = bitmap.c_clear_range(60, 70)
        found_set = bitmap.c_find_set(60)
        found_clear = bitmap.c_find_clear(10)
        last = bitmap.c_find_last()
        covered = bitmap.c_test_range(10, 50)
    return newly, cleared, found_set, found_clear, last, covered, bitmap.c_count(), bitmap.c_count_range(0, 20)


def drain(Bitmap log, Bitmap dirty):
    cdef size_t newly, merged
    with nogil:
        newly = log.c_drain_into(dirty)
        merged = log.c_merge(dirty)
    return newly, merged


def algebra(Bitmap a, Bitmap b):
    cdef Bitmap copy = Bitmap(a.size)
    cdef size_t kept, removed
    with nogil:
        a.c_copy_into(copy)
        kept = copy.c_intersect(b)
        removed = copy.c_subtract(a)
    return kept, removed, copy


def take(Bitmap bitmap, size_t max_pages):
    """All runs, at most `max_pages` pages and four runs a call."""
    cdef int64_t pairs[8]
    cdef size_t n, i, start = 0
    taken = []
    while start < bitmap.size:
        with nogil:
            n = bitmap.c_take_runs(start, bitmap.size, max_pages, pairs, 4, &start)
        taken.append([(pairs[2 * i], pairs[2 * i + 1]) for i in range(n)])
    return taken


def lists(Bitmap bitmap):
    cdef int64_t pairs[20]
    cdef int64_t pages[5]
    cdef size_t runs, indices, after_runs, after_indices, first, length
    cdef size_t i
    with nogil:
        runs = bitmap.c_runs(0, pairs, 10, &after_runs)
        indices = bitmap.c_indices(0, pages, 5, &after_indices)
        length = bitmap.c_next_run(1, bitmap.size, &first)
    return (
        [(pairs[2 * i], pairs[2 * i + 1]) for i in range(runs)],
        after_runs,
        [pages[i] for i in range(indices)],
        after_indices,
        (first, length),
    )


def put(Bitmap bitmap, runs):
    cdef int64_t pairs[8]
    cdef size_t i, n = len(runs)
    for i in range(n):
        pairs[2 * i], pairs[2 * i + 1] = runs[i]
    cdef size_t newly, cleared
    with nogil:
        newly = bitmap.c_set_runs(pairs, n)
        cleared = bitmap.c_clear_runs(pairs, 1)
    return newly, cleared


def claim(Bitmap bitmap):
    """Claim every page a word at a time, as a placer does (D1), without the GIL; returns how many were won."""
    cdef size_t i, won = 0
    cdef uint64_t mask, got
    with nogil:
        for i in range(bitmap.c_nwords):
            mask = <uint64_t>-1
            if i == bitmap.c_nwords - 1 and bitmap.size % 64:
                mask >>= 64 - bitmap.size % 64
            got = bitmap.c_set_word(i, mask)
            while got:
                got &= got - 1
                won += 1
    return won


def release(Bitmap bitmap, size_t index, uint64_t mask):
    return bitmap.c_clear_word(index, mask)


# The storms stay out of Python altogether, so that the windows of a race meet as often as they can.

def storm_set(Bitmap bitmap, size_t n, uint64_t seed):
    """Set `n` random pages, one at a time; returns how many were clear."""
    cdef size_t won = 0
    cdef size_t size = bitmap.size
    with nogil:
        for _ in range(n):
            seed ^= seed << 13
            seed ^= seed >> 7
            seed ^= seed << 17
            won += not bitmap.c_test_and_set(seed % size)
    return won


def storm_drain(Bitmap log, Bitmap dirty, Bitmap stop):
    """Drain `log` into `dirty`, which nobody else has, until page 0 of `stop` is set; returns how many bits came."""
    cdef size_t fetched = 0
    with nogil:
        while not stop.c_test(0):
            fetched += log.c_drain_into(dirty)
            dirty.c_clear_range(0, dirty.size)
    return fetched


def storm_take(Bitmap bitmap, size_t max_pages, Bitmap stop):
    """Take pages until page 0 of `stop` is set; returns how many came."""
    cdef int64_t pairs[16]
    cdef size_t i, n, start = 0, taken = 0
    with nogil:
        while not stop.c_test(0):
            n = bitmap.c_take_runs(start, bitmap.size, max_pages, pairs, 8, &start)
            for i in range(n):
                taken += <size_t>pairs[2 * i + 1]
            if start == bitmap.size:
                start = 0
    return taken


def storm_ranges(Bitmap bitmap, size_t n, Bitmap stop):
    """Set and clear unaligned ranges, `n` times; returns (bits set, bits cleared), then stops the others."""
    cdef size_t i, newly = 0, cleared = 0
    cdef size_t size = bitmap.size
    with nogil:
        for i in range(n):
            newly += bitmap.c_set_range(i % (size // 2), size // 3)
            cleared += bitmap.c_clear_range((i * 7) % (size // 2), size // 2)
        stop.c_set(0)
    return newly, cleared


def reap(KvmDirtyRing ring):
    """What the thread of a vCPU does that left because its dirty ring is full."""
    cdef int64_t taken
    with nogil:
        taken = ring.c_reap()
    return taken
