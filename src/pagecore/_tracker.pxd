from libc.stdint cimport uint64_t

from pagecore._tracker_sends cimport TrackerSends


cdef class PageTracker(TrackerSends):
    """See the stub for the Python face, and SourcePlanes for the native one."""

    cdef uint64_t _generation           # W6: of the connection that reports of settled pages come on
    cdef bint _reloaded                 # one has come on it
