from pagecore._listing cimport Listing


cdef class Bitmap(Listing):
    """See the stub for the Python face; the c_ methods, nogil, are those of Words."""

    cdef Py_ssize_t _page(self, object page) except -1
    cdef Bitmap _combined(self, Bitmap other, int how)
