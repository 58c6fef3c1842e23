from libc.stdint cimport uint64_t

from pagecore._source_planes cimport SourcePlanes
from pagecore._tracker_core cimport TrackerCore


cdef struct Limits:
    uint64_t pages      # left, like the two others
    uint64_t runs
    uint64_t nbytes
    bint began          # something was taken: the first page goes out however large it is


cdef class TrackerSends(TrackerCore):
    """What senders call: take, put_back, resolve."""

    # Takes what the limits leave of [start, stop) and appends it; where it ended is the region's cursor. Returns
    # whether it came to the end.
    cdef bint _take_segment(self, SourcePlanes planes, size_t start, size_t stop, Limits *left, list parts) except -1
    cdef int _take_some(self, SourcePlanes planes, size_t start, size_t stop, uint64_t max_pages, object part,
                        size_t *next, size_t *taken) except -1
    cdef int _put_back_parts(self, SourcePlanes planes, list parts) except -1
