from pagecore._words cimport Words


cdef class Listing(Words):
    """The methods of Bitmap that list what is set; the c_ methods, nogil, are those of Words."""
