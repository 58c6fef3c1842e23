from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._protocol cimport DirtyLog


cdef class PageTracker:
    """See the stub for the Python face. The c_ methods are nogil and trust their arguments."""

    cdef readonly size_t size               # pages
    cdef readonly size_t page_size          # bytes
    cdef readonly DirtyLog dirty_log        # or None
    cdef Bitmap _dirty
    cdef Bitmap _hinted                     # written under _lock alone; see _planes.h
    cdef Bitmap _side                       # S12: what mark() reported since the last sync
    cdef Bitmap _fetched                    # what a sync has collected and not published yet; under _lock
    cdef PyThread_type_lock _lock
    cdef uint64_t _sync_thread              # who is inside a dirty log under _lock; 0 for nobody
    cdef uint64_t _cursor                   # where the next take starts
    cdef uint64_t _epoch                    # the open hint epoch, 0 for none; written under _lock
    cdef uint64_t _last_epoch
    cdef bint _armed                        # the last sync came to its end
    cdef object _session                    # weak reference to the session in charge, or None

    cdef void _acquire(self) noexcept nogil
    cdef void _release(self) noexcept nogil
    cdef int _check_not_in_log(self) except -1
    cdef int _collect(self) except -1

    # Runs are (first, count) pairs. Returns how many were written; each page of them is the caller's to send.
    cdef size_t c_take(self, int64_t *runs, size_t max_runs, uint64_t max_pages) noexcept nogil
    cdef void c_put_back(self, size_t first, size_t count) noexcept nogil
    cdef void c_mark(self, size_t first, size_t count) noexcept nogil
    # Pages taken off the debt, or -1 where the epoch is not the open one. Waits for a sync; never with the
    # GIL.
    cdef int64_t c_hint_runs(self, const int64_t *runs, size_t n, uint64_t epoch) noexcept nogil
    # (AnswerKind, first, count) triples, at most `count` of them; returns how many. Waits for a sync or a
    # hint.
    cdef size_t c_resolve(self, size_t first, size_t count, bint again, int64_t *answers) noexcept nogil
