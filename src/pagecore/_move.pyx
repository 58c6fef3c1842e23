"""Mover: placing whole blocks of 2 MiB by moving a huge page that was filled beforehand.

UFFDIO_COPY allocates 512 pages for a block, one by one; that is what it costs. A huge page is allocated at once, filled
with plain stores, and moved into the guest's memory by changing one entry of a page table: over twice as fast, all 512
pages appear in one step, and the guest has a huge page afterwards. It works for private anonymous memory of this process,
in blocks that are aligned and wholly missing, and is only an attempt: whatever it leaves is copied page by page.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINVAL
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open as os_open
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close as os_close

from pagecore._atomic cimport (
    pagecore_compare_exchange,
    pagecore_fetch_add,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_store_release,
)
from pagecore._bitmap cimport Bitmap
from pagecore._place_result cimport clear_tally, tell
from pagecore._region cimport Region
from pagecore._span cimport PLACE_DONE, PLACE_FAILED, PlaceStep, PlaceTally, Span
from pagecore._sync cimport pagecore_now_ns
from pagecore._uffd_ioctl cimport OPERATION_COPY, OPERATION_MOVE, PLACE_DONTWAKE, uffd_place

__all__ = ["Mover"]

# How often `prepare` lets the handlers of signals run.
cdef uint64_t LOOK_NS = 50000000

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "sys/mman.h" nogil:
    void *c_mmap "mmap"(void *address, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_PRIVATE
    const int MAP_ANONYMOUS
    const int MAP_FIXED
    void *MAP_FAILED
    const int MADV_WIPEONFORK
    const int MADV_HUGEPAGE

cdef extern from "_kernel_abi.h" nogil:
    const unsigned long PAGEMAP_SCAN "PAGECORE_PAGEMAP_SCAN"

    cdef struct pagecore_pm_scan_arg:
        uint64_t size
        uint64_t start
        uint64_t end
        uint64_t vec
        uint64_t vec_len
        uint64_t category_mask
        uint64_t return_mask

cdef enum:
    PAGE = 4096
    BLOCK = 2 << 20
    PAGE_IS_HUGE = 1 << 6
    EMPTY = 0                   # of a stage: no page is in it, nor a page table
    READY = 1                   # a huge page is in it
    TORN = 2                    # small pages, or a page table: what a move has left of it
    IN_USE = 3                  # somebody has taken it
    LOST = 4                    # nobody knows whose its addresses are: not touched any more
    BLOCK_WORDS = 9             # words of a bitmap that 512 pages may touch


@cython.final
cdef class Mover:
    """Mover(stages=1)
    --

    Huge pages to fill and to move into registered memory, again and again.

    Most of what moving costs is the kernel clearing a huge page when it is first touched. ``prepare`` does that ahead of
    need, on another thread or when there is nothing else to do.

    Parameters
    ----------
    stages : int
        How many huge pages may be prepared, or be filled at once; 1 to 64. Each is 2 MiB of address space, and of memory
        while it is prepared.

    Attributes
    ----------
    stages : int
        As given.
    blocks_moved : int
        Blocks that went by MOVE as a whole.
    blocks_huge : int
        Of those, the ones that are a huge page where they are now. The others had a page table there, left by a fault on
        the block or by pages that were discarded one by one.
    blocks_split : int
        Blocks where something was present: the part before it was moved, the rest copied.
    blocks_refused : int
        Blocks of which nothing could be moved (present pages, a changing address space, memory of another kind).
    blocks_without_huge_page : int
        Blocks that were copied because the kernel had no huge page to fill, or all stages were in use, or lost: one that
        cannot be mapped anew is not used again.

    Raises
    ------
    ValueError
        `stages` is out of bounds.
    MemoryError
        No address space.

    Notes
    -----
    Holds the GIL to be made. Thread-safe. Moving since Linux 6.8; before, everything is copied.
    """

    def __cinit__(self, int stages=1):
        self._pagemap = -1
        if not 1 <= stages <= MOST_STAGES:
            raise ValueError(f"stages {stages} is outside [1, {MOST_STAGES}]")
        self._mapping = c_mmap(NULL, (stages + 1) * <size_t>BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self._mapping == MAP_FAILED:
            self._mapping = NULL
            raise MemoryError("no room for huge pages")
        self.stages = stages
        self._first = <uint8_t *>((<uintptr_t>self._mapping + BLOCK - 1) & ~<uintptr_t>(BLOCK - 1))
        for index in range(stages):
            self._states[index] = self._clear_stage(index)
        self._pagemap = os_open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)

    def __dealloc__(self):
        cdef int index
        cdef size_t lead
        if self._mapping != NULL:
            lead = <size_t>(self._first - <uint8_t *>self._mapping)
            munmap(self._mapping, lead)
            # One by one, from an end: none of it splits a mapping, which can fail, and none may be lost.
            for index in range(self.stages):
                if self._states[index] != LOST:
                    munmap(self.c_stage(index), BLOCK)
            munmap(self.c_stage(self.stages), BLOCK - lead)
        if self._pagemap >= 0:
            os_close(self._pagemap)

    def __reduce__(self):
        raise TypeError("a Mover is memory of this process and cannot be pickled")

    @property
    def blocks_moved(self):
        """Blocks that went by MOVE as a whole."""
        return pagecore_load_relaxed(&self._moved)

    @property
    def blocks_huge(self):
        """Of those, the ones that are a huge page where they are now."""
        return pagecore_load_relaxed(&self._huge)

    @property
    def blocks_split(self):
        """Blocks of which a part was moved."""
        return pagecore_load_relaxed(&self._split)

    @property
    def blocks_refused(self):
        """Blocks of which nothing could be moved."""
        return pagecore_load_relaxed(&self._refused)

    @property
    def blocks_without_huge_page(self):
        """Blocks that were copied for want of a huge page."""
        return pagecore_load_relaxed(&self._without)

    cdef int _clear_stage(self, int index) noexcept nogil:
        """Drop what is in a stage, and the page table of a huge page that was split: over that, none is made again.

        EMPTY; or LOST, where there was no memory for that.
        """
        cdef uint8_t *stage = self.c_stage(index)
        # Mapped anew: MADV_DONTNEED may leave the table.
        if c_mmap(stage, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED:
            # The old mapping may be there still, or be gone, and another's in its place by now (up to Linux 6.11).
            return LOST
        # A page that a child shares cannot be moved, and stays so after the child has gone. Nor may the room be another's
        # there, where a copy of this object unmaps it.
        madvise(stage, BLOCK, MADV_WIPEONFORK)
        madvise(stage, BLOCK, MADV_HUGEPAGE)
        return EMPTY

    cdef bint _is_huge(self, uint64_t address) noexcept nogil:
        cdef pagecore_pm_scan_arg scan
        cdef uint64_t found[3]
        if self._pagemap < 0:
            return False
        memset(&scan, 0, sizeof(scan))
        scan.size = sizeof(scan)
        scan.start = address
        scan.end = address + PAGE
        scan.vec = <uintptr_t>found
        scan.vec_len = 1
        scan.category_mask = scan.return_mask = PAGE_IS_HUGE
        return ioctl(self._pagemap, PAGEMAP_SCAN, &scan) > 0

    cdef bint _fault_in(self, int index) noexcept nogil:
        """Have the kernel put a huge page into an empty stage of ours; False where it has none."""
        self.c_stage(index)[0] = 0
        # Nobody to ask: moved in small pages it is slow, and correct.
        self._remains[index] = READY if self._pagemap < 0 or self._is_huge(<uintptr_t>self.c_stage(index)) else TORN
        return self._remains[index] == READY

    cdef uint8_t *c_stage(self, int index) noexcept nogil:
        return self._first + index * <size_t>BLOCK

    cdef bint _exchange(self, int index, uint64_t old, uint64_t new) noexcept nogil:
        # acquire and release: who takes a stage sees the mappings as who gave it back left them.
        cdef uint64_t expected = old
        return pagecore_compare_exchange(&self._states[index], &expected, new)

    cdef int c_take(self) noexcept nogil:
        cdef int index
        for index in range(self.stages):
            if self._exchange(index, READY, IN_USE):
                self._remains[index] = READY
                return index
        for index in range(self.stages):
            if self._exchange(index, EMPTY, IN_USE):
                if self._fault_in(index):
                    return index
                self.c_give_back(index)
                break
        pagecore_fetch_add(&self._without, 1)
        return -1

    cdef void c_give_back(self, int index) noexcept nogil:
        if self._remains[index] == TORN:
            self._remains[index] = self._clear_stage(index)
        # A huge page that was not moved serves the next block, whatever is in it. The release pairs with _exchange.
        pagecore_store_release(&self._states[index], self._remains[index])

    cdef int c_prepare(self) noexcept nogil:
        cdef int index
        cdef int prepared = 0
        for index in range(self.stages):
            if self._exchange(index, EMPTY, IN_USE):
                prepared += self._fault_in(index)
                self.c_give_back(index)
        return prepared

    def prepare(self, timeout=0):
        """Have the kernel make huge pages for stages that are empty.

        Parameters
        ----------
        timeout : float
            Seconds; for so long, the stages that ``place`` empties meanwhile are made ready again. 0: once.

        Returns
        -------
        int
            How many were made ready.

        Raises
        ------
        ValueError
            `timeout` is negative or longer than a day.

        Notes
        -----
        Releases the GIL. Thread-safe; meant for a thread of its own. Any kernel.
        """
        if not 0 <= timeout <= 86400:
            raise ValueError(f"timeout {timeout} is outside [0, 86400]")
        cdef uint64_t now = pagecore_now_ns()
        cdef uint64_t end = now + <uint64_t>(timeout * 1e9)
        cdef uint64_t look
        cdef int prepared, total = 0
        cdef timespec pause
        pause.tv_sec = 0
        pause.tv_nsec = 20_000
        while True:
            look = min(end, now + LOOK_NS)
            with nogil:
                while True:
                    prepared = self.c_prepare()
                    total += prepared
                    now = pagecore_now_ns()
                    if now >= look:
                        break
                    if prepared == 0:
                        nanosleep(&pause, NULL)
            if now >= end:
                return total
            PyErr_CheckSignals()

    cdef bint c_can_move(self, Span span, size_t first) noexcept nogil:
        # D14: `first` may be a peer's, and near the end of 64 bits.
        return (pagecore_load_acquire(&span.c_movable) != 0 and first < span.size and span.size - first >= BLOCK_PAGES
                and (span.c_address + first * PAGE) % BLOCK == 0)

    cdef size_t c_move(self, int index, Span span, size_t first, bint wake) noexcept nogil:
        cdef int64_t moved = 0
        cdef uint64_t address = span.c_address + first * PAGE
        cdef size_t pages = 0
        cdef int rc = span.uffd.c_enter()
        self._remains[index] = TORN
        if rc == 0:
            rc = uffd_place(span.uffd.c_fd, OPERATION_MOVE, address, <uintptr_t>self.c_stage(index), BLOCK,
                            0 if wake else PLACE_DONTWAKE, &moved)
            span.uffd.c_leave()
        if rc == 0:
            pages = BLOCK_PAGES
            pagecore_fetch_add(&self._moved, 1)
            if self._is_huge(address):
                pagecore_fetch_add(&self._huge, 1)
                self._remains[index] = EMPTY    # as a whole; in small pages, it would have left its page table here
        elif moved > 0 and moved < BLOCK and moved % PAGE == 0:     # D14
            pages = <size_t>moved // PAGE
            pagecore_fetch_add(&self._split, 1)
        else:
            if rc == -EINVAL:
                # Not this memory, not this kernel, or a block across two mappings: the region is copied from now on.
                pagecore_store_release(&span.c_movable, 0)
            pagecore_fetch_add(&self._refused, 1)
            if self._is_huge(<uintptr_t>self.c_stage(index)):
                self._remains[index] = READY
        return pages

    cdef size_t _move(self, Span span, size_t first, const uint8_t *data, bint wake) noexcept nogil:
        """Fill a stage and move it; how many pages went."""
        cdef size_t moved
        cdef int index = self.c_take()
        if index < 0:
            return 0
        memcpy(self.c_stage(index), data, BLOCK)
        moved = self.c_move(index, span, first, wake)
        self.c_give_back(index)
        return moved

    cdef int c_place_block(self, Span span, size_t first, const uint8_t *data, bint wake, PlaceStep *step,
                           size_t *moved) noexcept nogil:
        cdef int outcome
        moved[0] = self._move(span, first, data, wake)
        step.done = moved[0]
        step.error = 0
        if moved[0] == BLOCK_PAGES:
            return PLACE_DONE
        outcome = span.c_copy(first + moved[0], BLOCK_PAGES - moved[0], data + moved[0] * PAGE, wake, step)
        step.done += moved[0]
        return outcome

    cdef bint c_claim_block(self, size_t first, Bitmap claimed, Bitmap received, Bitmap excluded) noexcept nogil:
        cdef uint64_t won[BLOCK_WORDS]
        cdef size_t page = first, end = first + BLOCK_PAGES, stop
        cdef uint64_t mask
        cdef int words = 0
        if received is not None and received.c_count_range(first, BLOCK_PAGES):
            return False
        if excluded is not None and excluded.c_count_range(first, BLOCK_PAGES):
            return False
        if claimed is None:
            return True
        while page < end:
            stop = min(end, (page | 63) + 1)
            mask = (<uint64_t>-1 << (page & 63)) & (<uint64_t>-1 >> (63 - ((stop - 1) & 63)))
            won[words] = claimed.c_set_word(page >> 6, mask)
            if won[words] != mask:
                # A page is another's. The others are claimed again by whoever places this block in pieces.
                while words >= 0:
                    claimed.c_clear_word((first >> 6) + words, won[words])
                    words -= 1
                return False
            words += 1
            page = stop
        return True     # nor can any be excluded by now: whoever does that holds its claim (D12)

    cdef void _place_run(self, Region region, size_t first, size_t count, const uint8_t *data, int flags, Bitmap claimed,
                         Bitmap received, Bitmap excluded, PlaceTally *tally) noexcept nogil:
        cdef size_t page = first, end = first + count, part, moved
        cdef const uint8_t *bytes
        while page < end and tally.outcome == PLACE_DONE:
            bytes = data + (page - first) * PAGE
            part = min(end - page, BLOCK_PAGES - ((region.c_address // PAGE + page) % BLOCK_PAGES))
            if part == BLOCK_PAGES and self.c_can_move(region, page) and self.c_claim_block(page, claimed, received,
                                                                                          excluded):
                moved = self._move(region, page, bytes, not flags & PLACE_DONTWAKE)
                if received is not None and moved:
                    received.c_set_range(page, moved)       # D8
                tally.placed += moved
                tally.moved += moved
                tally.settled += moved
                if moved < BLOCK_PAGES:
                    region.c_place_span(OPERATION_COPY, page + moved, BLOCK_PAGES - moved, bytes + moved * PAGE, flags,
                                        claimed, received, tally)
            elif claimed is None and excluded is None:
                region.c_place_span(OPERATION_COPY, page, part, bytes, flags, None, received, tally)
            else:
                region.c_place_run(OPERATION_COPY, page, part, bytes, flags, claimed, received, excluded, tally)
            page += part

    def can_move(self, Region region not None, first_page):
        """Whether a block that begins at a page can be moved into; what is in it is not looked at.

        Parameters
        ----------
        region : Region
            Where to.
        first_page : int
            The first page of the block.

        Returns
        -------
        bool
            Its address is a multiple of 2 MiB, it lies in the region, and the region is private anonymous memory of this
            process in pages of 4096 bytes, not registered for write-protection.

        Notes
        -----
        Holds the GIL. Thread-safe. No system call.
        """
        cdef size_t first, count
        region._check_run(first_page, 0, &first, &count)
        return self.c_can_move(region, first)

    def place(self, Region region not None, first_page, data, *, wake=True, Bitmap claimed=None, Bitmap received=None,
              Bitmap excluded=None):
        """Place a run as ``Region.place`` does, whole blocks of it by MOVE.

        Parameters
        ----------
        region : Region
            Where to; any region: what cannot be moved is copied.
        first_page, data, wake, claimed, received, excluded
            As in ``Region.place``. A block of which a page is claimed, received or excluded is copied.

        Returns
        -------
        PlaceResult
            As of ``Region.place``; ``moved`` says how many of the pages ``placed`` went by MOVE.

        Raises
        ------
        IndexError, ValueError, UnreadableError, OutOfMemoryError, UffdError, ClosedError
            As ``Region.place``. Data that cannot be read is a SIGBUS or SIGSEGV where it is moved: it must be memory, not
            a file that may be cut off.

        Notes
        -----
        Releases the GIL. Thread-safe with everything except unregistering the region. Linux 6.8; before, everything is
        copied.
        """
        cdef Py_buffer view
        cdef PlaceTally tally
        cdef size_t first, count
        cdef int flags
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            region._check_live()
            if view.len % <Py_ssize_t>region.page_size:
                raise ValueError(f"length {view.len} is not a multiple of page size {region.page_size}")
            region._check_run(first_page, view.len // <Py_ssize_t>region.page_size, &first, &count)
            for plane in (claimed, received, excluded):
                region._check_plane(plane)
            flags = region._flags(wake, None)
            clear_tally(&tally, count)
            with nogil:
                if region.page_size == PAGE:
                    self._place_run(region, first, count, <const uint8_t *>view.buf, flags, claimed, received, excluded,
                                    &tally)
                elif claimed is None and excluded is None:
                    region.c_place_span(OPERATION_COPY, first, count, <const uint8_t *>view.buf, flags, None, received,
                                        &tally)
                else:
                    region.c_place_run(OPERATION_COPY, first, count, <const uint8_t *>view.buf, flags, claimed, received,
                                       excluded, &tally)
                if tally.outcome == PLACE_FAILED:
                    region.c_wake(first + tally.settled, count - tally.settled)     # D10
            return tell(region, OPERATION_COPY, first, count, &tally)
        finally:
            PyBuffer_Release(&view)
