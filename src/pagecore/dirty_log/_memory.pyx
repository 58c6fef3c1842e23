"""MemoryDirtyLog: a dirty log whose writers set the bits themselves."""

from libc.limits cimport INT_MAX
from libc.stdint cimport uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._protocol cimport DirtyLog


cdef extern from "_bitscan.h" nogil:
    size_t pagecore_drain_to_owned(uint64_t *source, uint64_t *words, size_t end)


cdef class MemoryDirtyLog(DirtyLog):
    """MemoryDirtyLog(size, bitmap=None, *, misses=())\n--\n
    A dirty log in memory: whoever writes a page sets its bit in :attr:`bitmap` **after** the write.

    The order is the writers' part of the bargain. A bit set before the write could be collected, and the page
    sent, before the write lands; nothing would report it again. Collecting exchanges each word with zero, and
    that is the re-arm too: a bit set after the exchange is found by the next collect.

    Parameters
    ----------
    size : int
        Pages of the region.
    bitmap : Bitmap, optional
        The words that writers set, for instance ``Bitmap.from_buffer`` over memory shared with another
        process. A new one by default.
    misses : iterable of str
        Writers of the region that do not set bits here (rule S12).

    Raises
    ------
    ValueError
        If `size` is negative or not the size of `bitmap`.

    Notes
    -----
    Collecting releases the GIL.
    Writers may be any threads, and processes that share the words; two collects at once are not.
    Needs no kernel interface.
    """

    def __init__(self, size, Bitmap bitmap=None, *, misses=()):
        super().__init__(size, rearms_at_collect=True, misses=misses)
        if bitmap is None:
            bitmap = Bitmap(self.size)
        elif bitmap.size != self.size:
            raise ValueError(f"bitmap of {bitmap.size} pages does not fit a log of {self.size} pages")
        bitmap.c_share_words()      # native writers set its words, and collecting drains them
        self.bitmap = bitmap

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef size_t newly = pagecore_drain_to_owned(self.bitmap.c_words, words, self.bitmap.size)
        return <int>newly if newly < <size_t>INT_MAX else INT_MAX
