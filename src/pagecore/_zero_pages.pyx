"""Which pages are all zero, found at memory speed."""

import numpy as np

from libc.stdint cimport int64_t, uint64_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc

from pagecore._runs cimport Pinned, new_runs, pinned_runs


cdef extern from "_zero_pages.h" nogil:
    bint pagecore_is_zero(const uint64_t *words, size_t count)
    void __builtin_prefetch(const void *address)

# Pages whose first line is asked for ahead: of those that hold data nothing else is read, so that memory's latency counts.
cdef int64_t AHEAD = 8


cdef size_t _split(const uint8_t *memory, const int64_t *runs, size_t n, size_t page_size, uint8_t *flags,
                   size_t *zero_runs) noexcept nogil:
    """Mark the zero pages, run after run; returns the number of runs of data and stores that of zeros."""
    cdef size_t found[2]
    cdef size_t at = 0
    cdef size_t run
    cdef int64_t page
    found[0] = 0
    found[1] = 0
    for run in range(n):
        for page in range(runs[2 * run], runs[2 * run] + runs[2 * run + 1]):
            __builtin_prefetch(memory + <size_t>(page + AHEAD) * page_size)
            flags[at] = pagecore_is_zero(<const uint64_t *>(memory + <size_t>page * page_size), page_size // 8)
            if page == runs[2 * run] or flags[at] != flags[at - 1]:
                found[flags[at]] += 1
            at += 1
    zero_runs[0] = found[1]
    return found[0]


cdef void _collect(const int64_t *runs, size_t n, const uint8_t *flags, int64_t *data, int64_t *zeros) noexcept nogil:
    """Turn the marks into runs, in the order of the runs that were given."""
    cdef size_t at = 0
    cdef size_t run
    cdef int64_t page, start, end
    cdef int64_t *out
    for run in range(n):
        page = runs[2 * run]
        end = page + runs[2 * run + 1]
        while page < end:
            start = page
            while page < end and flags[at + <size_t>(page - start)] == flags[at]:
                page += 1
            out = zeros if flags[at] else data
            out[0] = start
            out[1] = page - start
            if flags[at]:
                zeros += 2
            else:
                data += 2
            at += <size_t>(page - start)


def split_zero(memory, runs, size_t page_size=4096):
    """split_zero(memory, runs, page_size=4096)
    --

    Tell the pages that are all zero from the others.

    Parameters
    ----------
    memory : buffer
        Whole pages, 8-byte aligned. Nothing keeps others from writing to it meanwhile: a page is judged by what is read.
    runs : array_like
        int64, shape (n, 2): first page and page count.
    page_size : int
        Bytes; a multiple of 512.

    Returns
    -------
    data, zeros : numpy.ndarray
        int64, shape (n, 2): the same pages in the same order, apart.

    Raises
    ------
    IndexError
        A run is outside the memory.
    ValueError
        The memory is not 8-byte aligned, the page size is no multiple of 512, `runs` has another shape, or a count is
        negative.
    TypeError
        `runs` holds no integers.

    Notes
    -----
    Releases the GIL while it reads memory; memory registered with userfaultfd is nevertheless the wrong argument, since
    reading a page that is missing waits for whoever serves it.
    Thread-safe with everything.
    Needs no kernel interface.
    """
    cdef Pinned pages, given, data, zeros
    cdef size_t index
    cdef size_t total = 0
    cdef size_t data_runs = 0
    cdef size_t zero_runs = 0
    cdef uint8_t *flags
    if page_size == 0 or page_size % 512:
        raise ValueError(f"page size {page_size} is not a multiple of 512")
    pages = Pinned(memory, False, page_size)
    if <uintptr_t>pages.view.buf % sizeof(uint64_t):
        raise ValueError(f"the memory begins at {<uintptr_t>pages.view.buf:#x}, not a multiple of 8")
    # A copy: what another thread writes into the caller's array after the check must not count.
    given = pinned_runs(np.array(runs), pages.n)
    for index in range(given.n):
        total += <size_t>given.numbers()[2 * index + 1]
    flags = <uint8_t *>malloc(total + 1)
    if flags == NULL:
        raise MemoryError()
    try:
        with nogil:
            data_runs = _split(<const uint8_t *>pages.view.buf, given.numbers(), given.n, page_size, flags, &zero_runs)
        data, zeros = new_runs(data_runs), new_runs(zero_runs)
        with nogil:
            _collect(given.numbers(), given.n, flags, data.numbers(), zeros.numbers())
    finally:
        free(flags)
    return data.array, zeros.array
