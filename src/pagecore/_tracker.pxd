from libc.stdint cimport uint64_t

from pagecore._source_planes cimport SourcePlanes
from pagecore.dirty_log._protocol cimport DirtyLog


cdef class PageTracker(SourcePlanes):
    """See the stub for the Python face, and SourcePlanes for the native one."""

    cdef readonly size_t page_size          # bytes
    cdef readonly DirtyLog dirty_log        # or None
    cdef uint64_t _sync_thread              # who is inside a dirty log under the lock; 0 for nobody
    cdef object _session                    # weak reference to the session in charge, or None

    cdef int _check_not_in_log(self) except -1
    cdef int _enter_log(self) except -1
    cdef int _leave_log(self) except -1
    cdef int _collect(self) except -1
