"""FileSource: pages of a file, read into memory when they are asked for."""

import errno as errno_names
import os
import stat

from libc.errno cimport EINTR, EINVAL, ENODATA, ENOMEM, ENXIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore.page_source._protocol cimport ANSWER_FAILED, ANSWER_PAGES, ANSWER_ZEROS, PageAnswer, PageSource

cdef extern from "unistd.h" nogil:
    ssize_t pread(int fd, void *buffer, size_t length, int64_t offset)
    int64_t lseek(int fd, int64_t offset, int whence)
    enum: SEEK_DATA
    enum: SEEK_HOLE

cdef extern from "sys/stat.h" nogil:
    struct file_status "stat":
        int64_t st_size
    int fstat(int fd, file_status *status)

cdef extern from "page_source/_staging.h" nogil:
    uint8_t *pagecore_staging_get(size_t size)

# The most that one fetch reads, unless a single page is larger: what a placement of 2 MiB wants at once.
cdef enum:
    STAGING_BYTES = 1 << 21
    UNIT = 4096


cdef class FileSource(PageSource):
    """FileSource(file, extents=None, *, page_size=4096)
    --

    A pull source: pages of a regular file or memfd, such as a snapshot, read with ``pread``.

    Holes of the file are zero runs; everything else is read into a buffer of the thread that asks, since a mapping of
    the file would be read under a lock, and be a SIGBUS where the file was cut (D5). A read that comes short is an error
    and never zeros: its pages stay missing (D12).

    Parameters
    ----------
    file : path, int, or object with fileno()
        Opened for reading; a descriptor is opened anew through ``/proc/self/fd``, so that its position is left alone and
        the caller may close it.
    extents : iterable of (int, int, int), optional
        For each region its id, the offset of its first byte in the file and its length, in bytes. By default the whole file
        is region 0.
    page_size : int
        Bytes.

    Raises
    ------
    ValueError
        No regular file; an extent that is negative, empty, no whole pages, beyond the end of the file, or given twice.
    OSError
        The file cannot be opened for reading.

    Notes
    -----
    ``c_fetch`` does not take the GIL, and any number of threads may call it. Since Linux 3.1 (SEEK_HOLE); a file system
    without it has no holes.
    """

    def __cinit__(self, file, extents=None, *, page_size=4096):
        cdef int index
        self._fd = -1
        if page_size <= 0 or page_size % 512:
            raise ValueError(f"page size {page_size} is not a positive multiple of 512")
        if isinstance(file, (str, bytes, os.PathLike)):
            path = file
        else:
            path = f"/proc/self/fd/{_descriptor_of(file)}"
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{os.fsdecode(path)} is no regular file")
        size = status.st_size
        if extents is None:
            if size == 0 or size % page_size:
                raise ValueError(f"the file has {size} bytes, no positive multiple of page size {page_size}")
            extents = [(0, 0, size)]
        extents = [(int(region), int(offset), int(length)) for region, offset, length in extents]
        if not extents:
            raise ValueError("no extents: the source would have no pages")
        regions = [region for region, _, _ in extents]
        for region, offset, length in extents:
            if not 0 <= region < 1 << 32:
                raise ValueError(f"region {region} is outside [0, {1 << 32})")
            if regions.count(region) > 1:
                raise ValueError(f"region {region} has two extents")
            if offset < 0:
                raise ValueError(f"offset {offset} of region {region} is negative")
            if length <= 0 or length % page_size:
                raise ValueError(f"length {length} of region {region} is not a positive multiple of page size {page_size}")
            if offset + length > size:
                raise ValueError(f"region {region} is [{offset}, {offset + length}) of a file of {size} bytes")
        self._extents = <Extent *>calloc(len(extents), sizeof(Extent))
        if self._extents == NULL:
            raise MemoryError()
        for index, (region, offset, length) in enumerate(extents):
            self._extents[index].region = region
            self._extents[index].offset = offset
            self._extents[index].pages = length // page_size
        self._count = len(extents)
        self.page_size = page_size
        self.slow = True
        self.sparse = _has_holes(self._fd, size)

    def __dealloc__(self):
        free(self._extents)
        if self._fd >= 0:
            os.close(self._fd)

    @property
    def extents(self):
        """tuple of (int, int, int): region id, offset and length in bytes of each extent."""
        return tuple([(self._extents[index].region, self._extents[index].offset,
                       self._extents[index].pages * self.page_size) for index in range(self._count)])

    cdef const Extent *_find(self, uint32_t region) noexcept nogil:
        cdef int index
        for index in range(self._count):
            if self._extents[index].region == region:
                return &self._extents[index]
        return NULL

    cdef uint64_t c_pages_of(self, uint32_t region) noexcept nogil:
        cdef const Extent *extent = self._find(region)
        return 0 if extent == NULL else extent.pages

    cdef int c_fetch(self, uint32_t region, uint64_t first, uint64_t count, PageAnswer *answer) noexcept nogil:
        cdef uint64_t position, holes, data
        cdef uint8_t *staging
        cdef int error
        answer.region = region
        answer.first = first
        answer.count = count
        error = self._locate(region, first, count, &position)
        if error:
            return fail(answer, error, b"outside the file")
        if self.sparse:
            error = self._split(position, count, &holes, &data)
            if error:
                return fail(answer, error, b"lseek")
            if holes:
                # Behind the end there are no holes either: a file that was cut says so.
                error = self._check_size(position + holes * self.page_size)
                if error:
                    return fail(answer, error, b"the file is shorter than it was")
                answer.kind = ANSWER_ZEROS
                answer.count = holes
                return answer.kind
            count = data
        count = min(count, <uint64_t>max(<size_t>1, STAGING_BYTES // self.page_size))
        staging = pagecore_staging_get(count * self.page_size)
        if staging == NULL:
            return fail(answer, ENOMEM, b"staging buffer")
        error = self._read(staging, count * self.page_size, position, &answer.first)
        if error == ENODATA:
            return fail(answer, error, b"the file is shorter than it was")
        if error:
            return fail(answer, error, b"pread")
        answer.kind = ANSWER_PAGES
        answer.count = count
        answer.data = staging
        return answer.kind

    cdef int _locate(self, uint32_t region, uint64_t first, uint64_t count, uint64_t *position) noexcept nogil:
        cdef const Extent *extent = self._find(region)
        if extent == NULL or count == 0 or count > extent.pages or first > extent.pages - count:
            return EINVAL
        position[0] = extent.offset + first * self.page_size
        return 0

    cdef int _read(self, void *into, size_t length, uint64_t position, uint64_t *page) noexcept nogil:
        """Read exactly `length` bytes. On failure `page` moves on to the first page that is not whole."""
        cdef size_t done = 0
        cdef ssize_t got
        while done < length:
            got = pread(self._fd, <uint8_t *>into + done, length - done, <int64_t>(position + done))
            if got > 0:
                done += got
            elif got == 0:
                page[0] += done // self.page_size
                return ENODATA
            elif errno != EINTR:
                page[0] += done // self.page_size
                return errno
        return 0

    cdef int _check_size(self, uint64_t end) noexcept nogil:
        cdef file_status status
        if fstat(self._fd, &status) < 0:
            return errno
        return ENODATA if <uint64_t>status.st_size < end else 0

    cdef int _split(self, uint64_t position, uint64_t count, uint64_t *holes, uint64_t *data) noexcept nogil:
        cdef uint64_t end = position + count * self.page_size
        # Relaxed: the word says all by itself. What was content stays content as far as we care: a hole punched into it
        # later is read as zeros.
        cdef uint64_t known = pagecore_load_relaxed(&self._known)
        cdef uint64_t first = (known >> 32) * UNIT
        cdef uint64_t stop = first + <uint32_t>known * <uint64_t>UNIT
        cdef int64_t at
        holes[0] = data[0] = 0
        if first <= position and position + self.page_size <= stop:
            data[0] = (min(stop, end) - position) // self.page_size
            return 0
        at = lseek(self._fd, <int64_t>position, SEEK_DATA)
        if at < 0:
            if errno != ENXIO:
                return errno
            at = <int64_t>end           # nothing but a hole from here on
        holes[0] = (min(<uint64_t>at, end) - position) // self.page_size
        if holes[0]:
            return 0
        first = <uint64_t>at
        at = lseek(self._fd, at, SEEK_HOLE)
        if at < 0:
            return errno
        # In shared memory finding the end of a run takes time in proportion to it: once, not for each page.
        first = (first + UNIT - 1) // UNIT
        stop = <uint64_t>at // UNIT
        if first < stop and stop >> 32 == 0:
            pagecore_store_relaxed(&self._known, first << 32 | (stop - first))
        data[0] = (min(<uint64_t>at, end) - position + self.page_size - 1) // self.page_size
        return 0


cdef int fail(PageAnswer *answer, int error, const char *what) noexcept nogil:
    answer.kind = ANSWER_FAILED
    answer.error = error
    answer.field = what
    return answer.kind


def _descriptor_of(file):
    number = file if isinstance(file, int) else file.fileno()
    if number < 0:
        raise ValueError(f"descriptor {number} is negative")
    return number


def _has_holes(fd, size):
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) < size
    except OSError as error:
        if error.errno != errno_names.EINVAL:
            raise
        return False        # a file system that knows no holes
