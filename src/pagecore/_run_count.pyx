"""run_count: how many runs a bitmap has, as far as that matters."""

from libc.stdint cimport uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport count_of


cdef extern from "_bitscan.h" nogil:
    size_t pagecore_count_runs(const uint64_t *words, size_t first, size_t end)

cdef enum:
    # Pages of 4 KiB of bitmap: enough that the loop costs nothing, little to count in vain.
    PIECE = 1 << 15


def run_count(Bitmap bitmap not None, limit):
    """Count the runs of set pages, giving up once they are more than a limit.

    Parameters
    ----------
    bitmap : Bitmap
    limit : int
        At least 0.

    Returns
    -------
    int
        The number of runs, or some number above `limit`.

    Notes
    -----
    Releases the GIL. Thread-safe; a snapshot. Needs no kernel interface.
    """
    cdef size_t bound = count_of(limit, "limit"), first = 0, end, count = 0
    with nogil:
        while first < bitmap.size and count <= bound:
            end = min(bitmap.size, first + PIECE)
            count += pagecore_count_runs(bitmap.c_words, first, end)
            # A run over the border was counted on both sides of it.
            if first and bitmap.c_test(first - 1) and bitmap.c_test(first):
                count -= 1
            first = end
    return count
