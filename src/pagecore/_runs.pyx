"""Runs and page numbers: checked where callers hand them in, int64 arrays where they get them back."""

from operator import index as as_index

import numpy as np

cimport cython
from cpython.buffer cimport (
    PyBUF_RECORDS_RO,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_IsContiguous,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uintptr_t

from pagecore._bitscan cimport pagecore_check_indices, pagecore_check_runs


cdef object LATER = object()        # int64_view pins


@cython.final
@cython.freelist(8)
cdef class Pinned:
    def __cinit__(self, exporter=LATER, bint writable=False, size_t entry_size=1):
        if exporter is LATER:
            return
        PyObject_GetBuffer(exporter, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.array = exporter
        self.n = <size_t>self.view.len // entry_size

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef int64_t *numbers(self) noexcept nogil:
        return <int64_t *>self.view.buf

    cdef object filled(self):
        return self.array if self.used == self.n else self.array[:self.used]


cdef Py_ssize_t count_of(object number, str name, Py_ssize_t least=0) except -1:
    cdef Py_ssize_t value = PyNumber_AsSsize_t(number, NULL)
    if value < least:
        problem = "negative" if value < 0 else f"less than {least}"
        raise ValueError(f"{name} {number} is {problem}")
    return value


cdef int run_of(object first, object count, size_t size, size_t *start, size_t *length) except -1:
    cdef Py_ssize_t low = PyNumber_AsSsize_t(first, NULL)
    cdef Py_ssize_t pages = count_of(count, "count")
    if low < 0 or <size_t>low > size or <size_t>pages > size - <size_t>low:
        raise IndexError(outside(as_index(first), as_index(count), size))
    start[0] = low
    length[0] = pages
    return 0


cdef Pinned pinned_pairs(object runs, size_t size):
    return pinned_numbers(runs, 2, "runs", size)


cdef Pinned pinned_runs(object runs, size_t size):
    cdef Pinned pinned = pinned_pairs(runs, size)
    cdef size_t bad
    cdef int64_t first, count
    with nogil:
        bad = pagecore_check_runs(pinned.numbers(), pinned.n, size)
    if bad < pinned.n:
        first, count = pinned.numbers()[2 * bad], pinned.numbers()[2 * bad + 1]
        if count < 0:
            raise ValueError(f"count {count} of run {bad} is negative")
        raise IndexError(outside(first, count, size))
    return pinned


cdef Pinned copied_runs(object runs, size_t size):
    return pinned_runs(np.array(runs), size)


cdef Pinned pinned_pages(object pages, size_t size):
    cdef Pinned pinned = pinned_numbers(pages, 1, "pages", size)
    cdef size_t bad
    with nogil:
        bad = pagecore_check_indices(pinned.numbers(), pinned.n, size)
    if bad < pinned.n:
        raise IndexError(f"page {pinned.numbers()[bad]} is outside [0, {size})")
    return pinned


cdef int check_done(size_t done, size_t n) except -1:
    if done < n:
        raise RuntimeError(f"another thread changed the array meanwhile: the first {done} of {n} were used")
    return 0


cdef Pinned new_runs(size_t capacity):
    return Pinned(np.empty((capacity, 2), dtype=np.int64), True, 2 * sizeof(int64_t))


cdef Pinned new_pages(size_t capacity):
    return Pinned(np.empty(capacity, dtype=np.int64), True, sizeof(int64_t))


cdef object joined(list parts):
    arrays = [(<Pinned>part).filled() for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


cdef str outside(object first, object count, size_t size):
    return f"pages [{first}, {first + count}) are outside [0, {size})"


cdef Pinned pinned_numbers(object values, int ndim, str name, size_t size):
    """What was given as it stands, or where it is anything but int64 in a row, as an array that is."""
    cdef Pinned pinned = Pinned.__new__(Pinned)
    if not PyObject_CheckBuffer(values) or not int64_view(pinned, values, ndim):
        return Pinned(int64_array(values, ndim, name, size), False, ndim * sizeof(int64_t))
    return pinned


cdef bint int64_view(Pinned pinned, object values, int ndim) except -1:
    """Pin the buffer of `values` if it is native int64, aligned, contiguous, of shape (n,) or (n, 2)."""
    cdef Py_buffer *view = &pinned.view
    try:
        PyObject_GetBuffer(values, view, PyBUF_RECORDS_RO)
    except Exception:           # datetime64 has none, for one: the conversion knows what to say
        return False
    if (
        view.ndim == ndim
        and view.itemsize == sizeof(int64_t)
        and view.format is not NULL
        and view.format[0] in (c'l', c'q')
        and view.format[1] == 0
        and (ndim == 1 or view.shape[1] == 2)
        and <uintptr_t>view.buf % sizeof(int64_t) == 0
        and PyBuffer_IsContiguous(view, c'C')
    ):
        pinned.array = values
        pinned.n = <size_t>view.shape[0]
        return True
    PyBuffer_Release(view)
    return False


cdef object int64_array(object values, int ndim, str name, size_t size):
    """`values` contiguous and int64, of shape (n,) or (n, 2). What int64 cannot hold is outside anyway."""
    array = np.asarray(values)
    if array.size == 0:         # np.asarray([]) is float64
        return np.empty((0, 2)[:ndim], dtype=np.int64)
    if array.ndim != ndim or (ndim == 2 and array.shape[1] != 2):
        raise ValueError(f"{name} must have the shape {'(n, 2)' if ndim == 2 else '(n,)'}, not {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise IndexError(f"page {array.max()} is outside [0, {size})")
    return np.ascontiguousarray(array, dtype=np.int64)
