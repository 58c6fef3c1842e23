from pagecore._words cimport Words


cdef class Bitmap(Words):
    """See the stub for the Python face; the c_ methods, nogil, are those of Words."""

    cdef Py_ssize_t _page(self, object page) except -1
    cdef Bitmap _combined(self, Bitmap other, int how)
