"""MemfdSource: pages that the shared memory which is served has already, and only have to be mapped."""

import mmap

from pagecore._uffd_types import MemoryKind, RegisterMode

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore.page_source._file cimport FileSource, fail
from pagecore.page_source._protocol cimport ANSWER_CONTINUE, ANSWER_ZEROS, PageAnswer, PageSource


cdef class MemfdSource(FileSource):
    """MemfdSource(memfd, extents=None, *, page_size=4096)
    --

    A pull source for shared memory registered for minor faults: its pages are in the page cache, and are mapped (CONTINUE).

    No page is copied, and guests that map one memfd share its pages. The content must be complete when it is served: a
    page that somebody is still writing would be seen half written.

    Parameters
    ----------
    memfd : int or object with fileno()
        The memory that the regions map. It is opened anew, so that the caller may close it.
    extents : iterable of (int, int, int), optional
        For each region its id, the offset of its first byte in the memfd and its length, in bytes. By default all of it is
        region 0.
    page_size : int
        Bytes. In a memfd of huge pages every page counts as content, since the kernel does not tell holes there.

    Raises
    ------
    ValueError, OSError
        As `FileSource`.

    Notes
    -----
    ``c_fetch`` does not take the GIL, does not sleep, and may be called by any number of threads. Holes are zero pages. A
    page that vanishes in between is an error and never zeros (D12). Since Linux 5.14; huge pages since 5.13.
    """

    cdef Py_buffer _view        # what an observer sees of a page; no ioctl reads it
    cdef bint _mapped

    def __cinit__(self, memfd, extents=None, *, page_size=4096):
        mapping = mmap.mmap(self._fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        PyObject_GetBuffer(mapping, &self._view, PyBUF_SIMPLE)
        self._mapped = True
        self.slow = False

    def __dealloc__(self):
        if self._mapped:
            PyBuffer_Release(&self._view)

    def accept(self, regions):
        """Check that this source can serve these regions; a placement loop does so before it starts.

        Parameters
        ----------
        regions : iterable of Region
            What is to be served.

        Raises
        ------
        ValueError
            A region has pages of another size, or more than the memfd, or reports no minor faults.
        """
        regions = tuple(regions)
        PageSource.accept(self, regions)
        for region in regions:
            # Of another process's memory the kind is known where its mappings may be read.
            if region.kind not in (MemoryKind.SHARED, MemoryKind.HUGE_SHARED, MemoryKind.UNKNOWN):
                raise ValueError(f"region {region.id} is not shared memory: it has no page cache to map pages from")
            if not region.modes & RegisterMode.MINOR:
                raise ValueError(f"region {region.id} reports no minor faults: register it with RegisterMode.MINOR")

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        cdef uint64_t position, holes, data
        cdef int error
        answer.region = region
        answer.first = first
        answer.count = count
        error = self._locate(region, first, count, &position)
        if error:
            return fail(answer, error, b"outside the memfd")
        error = self._split(position, count, &holes, &data)
        if error == 0:
            answer.count = holes if holes else data
            error = self._check_size(position + answer.count * self.page_size)
        if error:
            return fail(answer, error, b"the memfd is shorter than it was")
        if holes:
            answer.kind = ANSWER_ZEROS
        else:
            answer.kind = ANSWER_CONTINUE
            answer.data = <const uint8_t *>self._view.buf + position
        return answer.kind
