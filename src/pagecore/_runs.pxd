from libc.stdint cimport int64_t

cdef extern from "Python.h":
    # With NULL for the error a number that is too large is clipped: it then fails the range check like any
    # other.
    Py_ssize_t PyNumber_AsSsize_t(object number, void *error) except? -1


cdef class Pinned:
    """An exporter's buffer, held until this object goes: the memory stays where it is on every path."""

    cdef Py_buffer view
    cdef object array           # the exporter
    cdef size_t n               # pairs or numbers in it
    cdef size_t used            # how many of them a filler has written

    # The numbers; of runs, two for each.
    cdef int64_t *numbers(self) noexcept nogil
    # The part of the array that was written.
    cdef object filled(self)


# A number that the caller gave as a size, a count or a bound: ValueError below `least`.
cdef Py_ssize_t count_of(object number, str name, Py_ssize_t least=*) except -1
# A run, IndexError where it does not lie in [0, size).
cdef int run_of(object first, object count, size_t size, size_t *start, size_t *length) except -1
# Arrays that the caller gave, as int64, every entry inside [0, size).
cdef Pinned pinned_runs(object runs, size_t size)
# The same in an array of our own, for whoever uses its entries without checking them again: another thread may write to
# the caller's.
cdef Pinned copied_runs(object runs, size_t size)
# The same of any numbers that int64 holds: whoever asked checks them.
cdef Pinned pinned_pairs(object runs, size_t size)
cdef Pinned pinned_pages(object pages, size_t size)
# RuntimeError where a loop stopped early because another thread changed the array after it was checked.
cdef int check_done(size_t done, size_t n) except -1
# New arrays to be filled and returned.
cdef Pinned new_runs(size_t capacity)
cdef Pinned new_pages(size_t capacity)
# The filled parts of at least one of them, as one array.
cdef object joined(list parts)
