"""Give back the memory of many pages at once."""

import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t

from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport Pinned

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    const int MADV_DONTNEED

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "_kernel_abi.h" nogil:
    const long SYS_pidfd_open
    const long SYS_process_madvise

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int close(int descriptor)
    int getpid()

cdef enum:
    VECTORS = 1024              # the kernel's bound


cdef int _discard(iovec *vectors, size_t n, int process) noexcept nogil:
    """Discard the ranges; 0, or the errno of the one that could not be."""
    cdef size_t at = 0
    cdef long done
    while at < n:
        # One call for many: the processor's translations are thrown away once, and not for every range.
        done = syscall(SYS_process_madvise, process, vectors + at, n - at, MADV_DONTNEED, 0) if process >= 0 else -1
        if done <= 0:
            # Before Linux 6.13 it takes no such advice. Alone, whatever is wrong with a range gets its name.
            process = -1
            if madvise(vectors[at].iov_base, vectors[at].iov_len, MADV_DONTNEED) != 0:
                return errno
            at += 1
            continue
        while at < n and done >= <long>vectors[at].iov_len:
            done -= <long>vectors[at].iov_len
            at += 1
        if done:
            vectors[at].iov_base = <uint8_t *>vectors[at].iov_base + done
            vectors[at].iov_len -= <size_t>done
    return 0


cdef int _discard_all(uint8_t *memory, Bitmap pages, size_t page_size, int process) noexcept nogil:
    cdef int64_t runs[2 * VECTORS]
    cdef iovec vectors[VECTORS]
    cdef size_t start = 0, n, index
    cdef int error
    while start < pages.size:
        n = pages.c_runs(start, runs, VECTORS, &start)
        for index in range(n):
            vectors[index].iov_base = memory + <size_t>runs[2 * index] * page_size
            vectors[index].iov_len = <size_t>runs[2 * index + 1] * page_size
        error = _discard(vectors, n, process)
        if error:
            return error
    return 0


def discard_pages(memory, Bitmap pages not None, size_t page_size=4096):
    """discard_pages(memory, pages, page_size=4096)
    --

    Give back the memory of a set of pages: they are missing then, and private anonymous ones read as zeros (MADV_DONTNEED).

    Parameters
    ----------
    memory : buffer
        Writable, mapped, and aligned to the system's pages; as many pages as the bitmap has.
    pages : Bitmap
    page_size : int
        Bytes.

    Raises
    ------
    ValueError
        The memory is not as large as the bitmap says.
    OSError
        The kernel refused; pages before that one are gone.

    Notes
    -----
    Releases the GIL.
    Thread-safe with everything; not atomic, and the kernel tells a userfaultfd that asked for such events.
    Since Linux 6.13 scattered pages cost a sixth of what one call each does.
    """
    cdef Pinned image = Pinned(memory, True, page_size)
    cdef int process, error
    if <size_t>image.view.len != pages.size * page_size:
        raise ValueError(f"{image.view.len} bytes are not {pages.size} pages of {page_size}")
    with nogil:
        process = <int>syscall(SYS_pidfd_open, getpid(), 0)
        error = _discard_all(<uint8_t *>image.view.buf, pages, page_size, process)
        if process >= 0:
            close(process)
    if error:
        raise OSError(error, f"discarding {pages.count()} pages: {os.strerror(error)}")
