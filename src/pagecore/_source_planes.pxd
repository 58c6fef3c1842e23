from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t, uint64_t

from pagecore._bitmap cimport Bitmap


cdef class SourcePlanes:
    """What a PageTracker is to native code. The c_ methods are nogil and trust their arguments.

    Lock-free: take, put_back and mark. All else acquires the lock by itself, except where it says "under the lock".
    """

    cdef readonly size_t size               # pages
    cdef Bitmap _dirty
    cdef Bitmap _hinted                     # written under the lock alone; see _planes.h
    cdef Bitmap _side                       # S12: what mark() reported since the last sync
    cdef Bitmap _fetched                    # what a sync has collected and not published yet; under the lock
    cdef PyThread_type_lock _lock
    cdef uint64_t _cursor                   # where the next take starts
    cdef uint64_t _epoch                    # the open hint epoch, 0 for none; written under the lock
    cdef uint64_t _last_epoch
    cdef bint _armed                        # the dirty log reports every write from now on; under the lock

    # Wait for it without the GIL: a dirty log in Python runs under it.
    cdef void c_acquire(self) noexcept nogil
    cdef void c_release(self) noexcept nogil

    # Runs are (first, count) pairs. Returns how many were written; each page of them is the caller's to send.
    cdef size_t c_take(self, int64_t *runs, size_t max_runs, uint64_t max_pages) noexcept nogil
    cdef void c_put_back(self, size_t first, size_t count) noexcept nogil
    cdef void c_mark(self, size_t first, size_t count) noexcept nogil

    # Pages taken off the debt, or -1 where the epoch is not the open one. Waits for a sync.
    cdef int64_t c_hint_runs(self, const int64_t *runs, size_t n, uint64_t epoch) noexcept nogil
    # (AnswerKind, first, count) triples, at most `count` of them; returns how many. Waits for a sync or a hint.
    cdef size_t c_resolve(self, size_t first, size_t count, bint again, int64_t *answers) noexcept nogil
    # The id of the new epoch, or 0 where the log is not armed.
    cdef uint64_t c_open_epoch(self) noexcept nogil
    cdef bint c_close_epoch(self, uint64_t epoch) noexcept nogil

    # A sync, under the lock: begin, fetch into _fetched, mask, re-arm; that done, drain the side and publish.
    cdef void c_begin_sync(self) noexcept nogil
    cdef void c_mask_fetched(self) noexcept nogil
    cdef void c_drain_side(self) noexcept nogil     # the log is armed
    cdef size_t c_publish(self) noexcept nogil
    cdef void c_owe_all(self) noexcept nogil

    # The switch and recovery. The copies are new bitmaps that nobody else uses yet.
    cdef size_t c_copy_unsent(self, Bitmap copy) noexcept nogil     # returns the pages marked since the last sync
    cdef void c_copy_free(self, Bitmap copy) noexcept nogil
    cdef size_t c_owe_hinted(self) noexcept nogil
    cdef size_t c_reload(self, Bitmap settled) noexcept nogil
