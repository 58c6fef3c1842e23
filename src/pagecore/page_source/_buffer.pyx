"""BufferSource: pages that lie in memory already."""

from pagecore._mappings import backing_of
from pagecore._uffd_types import MemoryKind

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EFAULT, EINVAL, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport getpid

from pagecore.page_source._protocol cimport ANSWER_FAILED, ANSWER_PAGES, PageAnswer, PageSource

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long locals, const iovec *remote,
                             unsigned long remotes, unsigned long flags)

cdef extern from "page_source/_staging.h" nogil:
    uint8_t *pagecore_staging_get(size_t size)

cdef enum:
    STAGING_BYTES = 1 << 21


cdef class BufferSource(PageSource):
    """BufferSource(buffer, page_size=4096, *, region_id=0)
    --

    A pull source: page n of one region is the n-th page of a buffer.

    Parameters
    ----------
    buffer : bytes-like
        The content, in whole pages. It is pinned for the life of the source, and must never be the memory that is being
        served. A mapping of a file is read through a buffer of its own; `FileSource` is faster and knows holes.
    page_size : int
        Bytes.
    region_id : int
        The region that the buffer belongs to.

    Attributes
    ----------
    size : int
        Pages.
    staged : bool
        The buffer is no plain memory (a mapped file, shared memory) and is copied before it is placed.

    Raises
    ------
    ValueError
        The length is not a multiple of the page size.

    Notes
    -----
    ``c_fetch`` does not take the GIL, and any number of threads may call it: the buffer is only read. A staged one needs
    Linux 3.2 (process_vm_readv), and is an error where the file was cut meanwhile, not a SIGBUS.
    """

    cdef Py_buffer _view
    cdef bint _pinned
    cdef uint32_t _region
    cdef readonly size_t size       # pages
    cdef readonly bint staged

    def __cinit__(self, buffer, size_t page_size=4096, *, uint32_t region_id=0):
        PyObject_GetBuffer(buffer, &self._view, PyBUF_SIMPLE)
        self._pinned = True
        if page_size == 0 or self._view.len % page_size:
            raise ValueError(f"length {self._view.len} is not a multiple of page size {page_size}")
        self._region = region_id
        self.page_size = page_size
        self.size = self._view.len // page_size
        # D5: an ioctl that reads a mapping of a file would serve that mapping's faults while a lock is held, and fail
        # midway where the file is shorter by now.
        kind = MemoryKind.ANONYMOUS
        if self._view.len:
            kind = backing_of(<uintptr_t>self._view.buf, self._view.len).kind
        self.staged = self.slow = kind not in (MemoryKind.ANONYMOUS, MemoryKind.HUGE)

    def __dealloc__(self):
        if self._pinned:
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
            A region has pages of another size, or is the buffer itself.
        """
        cdef uintptr_t first = <uintptr_t>self._view.buf
        regions = tuple(regions)
        PageSource.accept(self, regions)
        for region in regions:
            # D5: a placement that reads what is being served would wait for itself.
            if (not region.uffd.remote and first < region.address + region.nbytes
                    and region.address < first + self._view.len):
                raise ValueError(f"the buffer overlaps region {region.id}, which it is to fill")

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        cdef int error = 0
        answer.region = region
        answer.first = first
        answer.count = count
        answer.kind = ANSWER_PAGES
        answer.field = NULL
        if region != self._region or count > self.size or first > self.size - count:
            error = EINVAL
        elif self.staged:
            answer.count = min(count, <uint64_t>max(<size_t>1, STAGING_BYTES // self.page_size))
            error = self._stage(first, answer)
        else:
            answer.data = <const uint8_t *>self._view.buf + first * self.page_size
        if error:
            answer.kind = ANSWER_FAILED
            answer.error = error
            if error != EINVAL:
                answer.field = b"the mapped file"
        return answer.kind

    cdef int _stage(self, uint64_t first, PageAnswer *answer) noexcept nogil:
        """Copy by the kernel: what memcpy would die of (a file that was cut) is EFAULT here."""
        cdef iovec local, remote
        cdef size_t done = 0
        cdef ssize_t got
        cdef size_t length = answer.count * self.page_size
        cdef uint8_t *staging = pagecore_staging_get(length)
        if staging == NULL:
            return ENOMEM
        while done < length:
            local.iov_base = staging + done
            remote.iov_base = <uint8_t *>self._view.buf + first * self.page_size + done
            local.iov_len = remote.iov_len = length - done
            got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0)
            if got <= 0:
                return errno if got < 0 else EFAULT
            done += got
        answer.data = staging
        return 0
