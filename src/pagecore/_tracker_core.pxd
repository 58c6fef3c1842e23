from libc.stdint cimport uint64_t

from pagecore._source_planes cimport SourcePlanes


cdef class TrackerCore:
    """The regions of a tracker under one lock, its hint epoch, and the sync."""

    cdef tuple _table                       # of SourcePlanes; replaced, never changed
    cdef void *_lock
    cdef uint64_t _epoch                    # the open hint epoch, 0 for none; written under the lock
    cdef uint64_t _last_epoch
    cdef bint _armed                        # the dirty logs report every write from now on; under the lock
    cdef uint64_t _log_thread               # who runs a dirty log under the lock; 0 for nobody
    cdef uint64_t _at                       # the place in the table of the region that the next take_batch starts in
    cdef readonly uint64_t newly_dirty_bytes
    cdef object _session                    # weak reference to the session in charge, or None

    # Wait for it without the GIL: a dirty log in Python runs under it.
    cdef void c_acquire(self) noexcept nogil
    cdef void c_release(self) noexcept nogil
    # The id of the new epoch, or 0 where a log is not armed.
    cdef uint64_t c_open_epoch(self) noexcept nogil
    cdef bint c_close_epoch(self, uint64_t epoch) noexcept nogil

    cdef tuple _regions(self)
    cdef SourcePlanes _planes_of(self, object region)
    cdef bint _in_log(self) noexcept
    cdef int _check_not_in_log(self) except -1
    cdef int _enter(self) except -1
    cdef int _leave(self) except -1
    cdef int _enter_log(self) except -1
    cdef int _leave_log(self) except -1
    cdef int _collect(self, tuple table, bint last) except -1
    cdef int _rearm_pages(self, SourcePlanes planes, size_t low, size_t high) except -1
    cdef int _settle(self, SourcePlanes planes) except -1
