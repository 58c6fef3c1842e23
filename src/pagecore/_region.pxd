cimport cython
from libc.stdint cimport uint8_t

from pagecore._bitmap cimport Bitmap
from pagecore._place_result cimport PlaceResult
from pagecore._span cimport Span


@cython.final
cdef class Region(Span):
    cdef int _check_live(self) except -1
    cdef int _check_ioctl(self, int bit, str name, str remedy) except -1
    cdef int _check_protectable(self) except -1
    cdef int _check_run(self, object first_page, object page_count, size_t *first, size_t *count) except -1
    cdef int _check_plane(self, Bitmap plane) except -1
    cdef int _flags(self, bint wake, object protect) except -1
    cdef PlaceResult _place(self, int operation, object first_page, object page_count, const uint8_t *data, int flags,
                            Bitmap claimed, Bitmap received, Bitmap excluded)
