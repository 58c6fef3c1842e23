"""What single pages of another process hold, as checksums, read without asking the process and without changing it."""

import numpy as np

from libc.errno cimport EFAULT, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pagecore._runs cimport Pinned

from pagecore.errors import raise_for_errno


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long locals, const iovec *remote,
                             unsigned long remotes, unsigned long flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, int64_t offset)

cdef extern from "_page_hash.h" nogil:
    uint64_t pagecore_page_hash(const uint8_t *page)


cdef enum:
    PAGE = 4096
    BATCH = 256

# Bits of an entry of /proc/PID/pagemap.
cdef uint64_t PRESENT = <uint64_t>1 << 63
cdef uint64_t SWAPPED = <uint64_t>1 << 62

UNKNOWN = 0


cdef inline uint64_t _checksum(const uint8_t *page) noexcept nogil:
    # 0 is UNKNOWN.
    cdef uint64_t checksum = pagecore_page_hash(page)
    return checksum if checksum else 1


cdef int _read_batch(int pid, const iovec *remote, const size_t *places, size_t count, uint8_t *buffer,
                     uint64_t *sums) noexcept nogil:
    """The checksums of present pages; those that went away meanwhile stay as they are. 0 or -errno."""
    cdef iovec local
    cdef size_t at = 0, page, whole
    cdef ssize_t got
    while at < count:
        local.iov_base = buffer
        local.iov_len = (count - at) * PAGE
        got = process_vm_readv(pid, &local, 1, remote + at, count - at, 0)
        if got < 0 and errno != EFAULT:
            return -errno
        # It stops before the first page that it cannot read, and says EFAULT only where that is the first of all.
        whole = <size_t>got // PAGE if got > 0 else 0
        for page in range(whole):
            sums[places[at + page]] = _checksum(buffer + page * PAGE)
        at += whole + (1 if whole < count - at else 0)
    return 0


cdef int _read_all(int pid, int pagemap, const int64_t *addresses, const uint8_t *anonymous, size_t count,
                   uint8_t *buffer, uint64_t zero, uint64_t *sums) noexcept nogil:
    """0; -errno; 1 if the pagemap is empty, which is what an ended process leaves."""
    cdef iovec remote[BATCH]
    cdef size_t places[BATCH]
    cdef size_t at, batch = 0
    cdef uint64_t entry
    cdef ssize_t got
    cdef int error
    for at in range(count):
        got = pread(pagemap, &entry, sizeof(entry), addresses[at] // PAGE * <int64_t>sizeof(entry))
        if got != sizeof(entry):
            return -errno if got < 0 else 1
        if entry & PRESENT:
            remote[batch].iov_base = <void *>addresses[at]
            remote[batch].iov_len = PAGE
            places[batch] = at
            batch += 1
        elif anonymous[at] and not entry & SWAPPED:
            sums[at] = zero
        if batch == BATCH or (batch and at == count - 1):
            error = _read_batch(pid, remote, places, batch, buffer, sums)
            if error:
                return error
            batch = 0
    return 0


def page_checksums_of(int pid, int pagemap, addresses, anonymous):
    """page_checksums_of(pid, pagemap, addresses, anonymous)
    --

    Checksums of single pages of another process.

    Only what its page tables hold is read. Reading a page that was never populated would populate it, with the zero page
    or, in shared memory, with a new one; where a userfaultfd watches for missing pages it would wait for whoever serves
    them. Such a page of private anonymous memory holds zeros, and that is its checksum; of any other that is not in the
    page tables (shared memory, a file, swapped out, marked by userfaultfd) nothing is known.

    Parameters
    ----------
    pid : int
        The process.
    pagemap : int
        A descriptor of ``/proc/PID/pagemap``: it finds out if that process has ended and the number is another's.
    addresses : numpy.ndarray
        int64, shape (n,): multiples of 4096.
    anonymous : numpy.ndarray
        uint8, shape (n,): not 0 where the mapping is private anonymous memory.

    Returns
    -------
    numpy.ndarray
        uint64, shape (n,); ``UNKNOWN`` (0) where the content is not known, or could not be read.

    Raises
    ------
    PeerGoneError
        The process has ended.
    UffdError
        The kernel refused: EPERM without the right to trace the process.

    Notes
    -----
    Releases the GIL.
    Thread-safe with everything. A page that is written meanwhile gets the checksum of neither content.
    Linux 3.2 (process_vm_readv) and 4.2 (pagemap for unprivileged users). A page that the process shares with a forked
    child is copied by the kernel when it is read: it costs the process a page.
    """
    cdef Pinned where = Pinned(addresses, False, sizeof(int64_t))
    cdef Pinned kinds = Pinned(anonymous, False, sizeof(uint8_t))
    cdef Pinned sums
    cdef uint64_t zero
    cdef uint8_t *buffer
    cdef int error
    if kinds.n != where.n:
        raise ValueError(f"{where.n} addresses and {kinds.n} kinds")
    sums = Pinned(np.zeros(where.n, dtype=np.uint64), True, sizeof(uint64_t))
    buffer = <uint8_t *>malloc(BATCH * PAGE)
    if buffer == NULL:
        raise MemoryError()
    with nogil:
        memset(buffer, 0, PAGE)
        zero = _checksum(buffer)
        error = _read_all(pid, pagemap, where.numbers(), <const uint8_t *>kinds.view.buf, where.n, buffer, zero,
                          <uint64_t *>sums.numbers())
        free(buffer)
    if error:
        raise_for_errno(-error if error < 0 else ESRCH, f"reading pages of process {pid}")
    return sums.array


def zero_checksum():
    """The checksum of a page of zeros."""
    cdef uint8_t page[PAGE]
    memset(page, 0, PAGE)
    return _checksum(page)
