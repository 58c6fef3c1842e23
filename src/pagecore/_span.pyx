"""Span: registered memory as native code places runs of pages into it.

The facts of the kernel interface that this relies on stand at the head of _uffd_ioctl.pyx.
"""

import mmap

from libc.errno cimport EAGAIN, EEXIST, EFAULT, EIO, ENOENT, ENOMEM, ESRCH
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport strtoul
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open as os_open
from posix.unistd cimport close as os_close, getpid, read as os_read

from cpython.memoryview cimport PyMemoryView_GET_BUFFER

from pagecore._atomic cimport pagecore_load_acquire
from pagecore._bitmap cimport Bitmap
from pagecore._uffd_ioctl cimport (
    OPERATION_CONTINUE,
    OPERATION_COPY,
    OPERATION_MOVE,
    OPERATION_POISON,
    OPERATION_PROTECT,
    OPERATION_UNPROTECT,
    OPERATION_ZERO,
    PLACE_DONTWAKE,
    REGISTER_MINOR,
    REGISTER_WP,
    uffd_place,
)

__all__ = ["Span"]

cdef extern from *:
    int trailing_zeros "__builtin_ctzll"(uint64_t word) nogil
    int count_ones "__builtin_popcountll"(uint64_t word) nogil

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    Py_ssize_t process_vm_readv(int pid, const iovec *local, unsigned long nlocal,
                                const iovec *remote, unsigned long nremote, unsigned long flags)

cdef extern from "_kernel_abi.h" nogil:
    const uint64_t FEATURE_WP_ASYNC "UFFD_FEATURE_WP_ASYNC"

cdef extern from "sys/mman.h" nogil:
    int mincore(void *address, size_t length, unsigned char *vector)

cdef enum:
    KIND_HUGE = 3                   # MemoryKind.HUGE
    SMALL_PAGE = 4096
    ZERO_RUN = 64 << 10             # bytes of a COPY of zeros in small pages: nothing is gained beyond

_zero_sources = {}


cdef const uint8_t *zero_source(size_t page_size, size_t *npages) except NULL:
    cdef size_t length = max(page_size, <size_t>ZERO_RUN)
    view = _zero_sources.get(length)
    if view is None:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        if length >= 2 << 20:
            memory.madvise(mmap.MADV_HUGEPAGE)      # then it is the kernel's one huge page of zeros, again and again
        # Of two threads that are first, one's mapping is kept, and the other's is dropped unused.
        view = _zero_sources.setdefault(length, memoryview(memory))
        for position in range(0, length, SMALL_PAGE if length < 2 << 20 else 2 << 20):
            view[position]          # resident, so that the ioctl takes no faults on it (D5)
    npages[0] = length // page_size
    return <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf


cdef bint _is_readable(const uint8_t *data, size_t length) noexcept nogil:
    """Whether the kernel can read this much of our memory; asked where a COPY said EFAULT, which has two reasons."""
    cdef iovec local
    cdef iovec remote
    cdef char byte
    cdef size_t position = 0
    local.iov_base = &byte
    local.iov_len = remote.iov_len = 1
    while True:
        remote.iov_base = <void *>(data + position)
        if process_vm_readv(getpid(), &local, 1, &remote, 1, 0) != 1:
            return False
        if position == length - 1:
            return True
        position = min(position + SMALL_PAGE, length - 1)


cdef bint _has_free_huge_pages(size_t page_size) noexcept nogil:
    cdef char path[96]
    cdef char text[24]
    cdef int fd
    cdef Py_ssize_t length
    snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%zukB/free_hugepages", page_size >> 10)
    fd = os_open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return True
    length = os_read(fd, text, sizeof(text) - 1)
    os_close(fd)
    text[max(length, 0)] = 0
    return length <= 0 or strtoul(text, NULL, 10) > 0


cdef class Span:
    """A registered piece of memory; what Region is to native code. Its methods trust their arguments."""

    cdef int c_place(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                     size_t *limit, PlaceStep *step) noexcept nogil:
        cdef size_t pages
        cdef int64_t moved = 0
        cdef uint64_t address
        cdef const uint8_t *source = data
        cdef bint zeros = operation == OPERATION_ZERO and self.c_zeros != NULL
        cdef bint retried = False
        cdef int rc = self.uffd.c_enter()
        cdef int outcome = PLACE_DONE
        step.done = 0
        step.error = 0
        if rc < 0:
            step.error = -rc
            return PLACE_FAILED
        if zeros:
            # D11: in one step, by COPY. ZEROPAGE gives EEXIST over a marker of write-protection, though the page is
            # missing, and does not exist for huge pages.
            operation = OPERATION_COPY
            flags |= self.c_flags
        while step.done < count:
            pages = min(count - step.done, limit[0])
            address = self.c_address + (first + step.done) * self.page_size
            if zeros:
                source = self.c_zeros
                pages = min(pages, self.c_zero_pages)
            elif operation == OPERATION_COPY or operation == OPERATION_MOVE:
                source = data + step.done * self.page_size
            rc = uffd_place(self.uffd.c_fd, operation, address, <uintptr_t>source, pages * self.page_size, flags, &moved)
            if rc == 0:
                step.done += pages
                retried = False
                limit[0] = max(limit[0], min(limit[0] * 2, count))
            elif moved > 0:
                if moved % <int64_t>self.page_size or <uint64_t>moved >= pages * self.page_size:
                    step.error = EIO            # D14: not even the kernel's numbers go unchecked
                    outcome = PLACE_FAILED
                    break
                step.done += moved // self.page_size
                retried = False
            elif rc == -ENOENT and pages > 1:
                limit[0] = pages // 2           # fact 5: the edge lies in here
            elif rc == -EEXIST and operation == OPERATION_COPY and self._is_out_of_huge_pages(address):
                outcome = PLACE_FAILED
                step.error = ENOMEM
                break
            elif rc == -EFAULT and operation == OPERATION_COPY and not retried and _is_readable(source, self.page_size):
                retried = True                  # fact 14: the source is good now; if it was before, it is the other
            else:
                if rc == -EEXIST and operation == OPERATION_POISON and self.c_modes & REGISTER_WP:
                    rc = self._poison_marker(address)
                    if rc == 0:
                        step.done += 1
                        continue
                if rc == -EEXIST and operation <= OPERATION_ZERO and self.c_modes & REGISTER_MINOR:
                    rc = self._map_cached(address, flags)
                if rc == -EEXIST:
                    outcome = PLACE_PRESENT
                elif rc == -EAGAIN:
                    outcome = PLACE_AGAIN
                elif rc == -ENOENT or (rc == -EFAULT and retried):
                    outcome = PLACE_GONE
                elif rc == -ESRCH:
                    outcome = PLACE_PEER_GONE
                elif rc == -EFAULT and operation == OPERATION_CONTINUE:
                    outcome = PLACE_ABSENT
                else:
                    outcome = PLACE_FAILED
                    step.error = -rc
                break
        self.uffd.c_leave()
        return outcome

    cdef bint _is_out_of_huge_pages(self, uint64_t address) noexcept nogil:
        """Whether an EEXIST of COPY means that the pool of huge pages is empty (fact 18)."""
        cdef unsigned char mapped = 0
        if self.page_size == SMALL_PAGE or self.uffd.remote:
            return False
        if mincore(<void *>address, SMALL_PAGE, &mapped) < 0 or mapped & 1:
            return False
        # A page that is in the cache of shared memory and not in this mapping is EEXIST too, and rightly.
        return self.c_kind == KIND_HUGE or not _has_free_huge_pages(self.page_size)

    cdef int _map_cached(self, uint64_t address, int flags) noexcept nogil:
        """What a page is that COPY found present, where minor faults are reported: -EEXIST once it is mapped.

        D2, D15: the page cache may have it, and this mapping not. COPY can do nothing more then, and whoever touches it
        would wait for a CONTINUE.
        """
        cdef int64_t moved = 0
        cdef int rc = uffd_place(self.uffd.c_fd, OPERATION_CONTINUE, address, 0, self.page_size, flags, &moved)
        return rc if rc == -EAGAIN or rc == -ENOMEM else -EEXIST

    cdef int _poison_marker(self, uint64_t address) noexcept nogil:
        """POISON a missing page that carries a marker of write-protection, which it takes for a present one (fact 7).

        A page that is there keeps what its protection says, so far as can be told: not of another process, nor of what
        is in swap or comes in between. With WP_ASYNC that one then reads as written, which costs a second copy of it at
        most. Protected again it would read as clean, and what the guest wrote before, or meanwhile, would be lost.
        """
        cdef int64_t moved = 0
        cdef unsigned char there = 0
        cdef bint noted = self.uffd.features & FEATURE_WP_ASYNC != 0
        cdef int rc
        if self.uffd.remote:
            if not noted:
                return -EEXIST          # a write while it is not protected would trap nowhere
        elif mincore(<void *>address, SMALL_PAGE, &there) == 0 and there & 1:
            return -EEXIST
        rc = uffd_place(self.uffd.c_fd, OPERATION_UNPROTECT, address, 0, self.page_size, PLACE_DONTWAKE, &moved)
        if rc == 0:
            rc = uffd_place(self.uffd.c_fd, OPERATION_POISON, address, 0, self.page_size, 0, &moved)
            if rc < 0 and not noted:
                # Here the protection is no record, only a trap: set again, it costs one more.
                uffd_place(self.uffd.c_fd, OPERATION_PROTECT, address, 0, self.page_size, 0, &moved)
        return rc

    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, bint wake,
                    PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self.c_place(OPERATION_COPY, first, count, data, self.c_flags | (0 if wake else PLACE_DONTWAKE), &limit, step)

    cdef int c_zero(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self.c_place(OPERATION_ZERO, first, count, NULL, 0 if wake else PLACE_DONTWAKE, &limit, step)

    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self.c_place(OPERATION_POISON, first, count, NULL, 0, &limit, step)

    cdef int c_continue(self, size_t first, size_t count, bint wake, PlaceStep *step) noexcept nogil:
        cdef size_t limit = count
        return self.c_place(OPERATION_CONTINUE, first, count, NULL, self.c_flags | (0 if wake else PLACE_DONTWAKE), &limit,
                            step)

    cdef int c_wake(self, size_t first, size_t count) noexcept nogil:
        return self.uffd.c_wake_range(self.c_address + first * self.page_size, count * self.page_size)

    cdef void c_place_span(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                           Bitmap claimed, Bitmap received, PlaceTally *tally) noexcept nogil:
        cdef PlaceStep step
        cdef size_t done = 0
        cdef int outcome
        while done < count:
            outcome = self.c_place(operation, first + done, count - done, data + done * self.page_size, flags,
                                   &tally.limit, &step)
            if received is not None and step.done:
                # D8, after the kernel accepted. Release: pairs with the acquire of whoever tests the bit.
                received.c_set_range(first + done, step.done)
            tally.placed += step.done
            done += step.done
            if outcome == PLACE_PRESENT:
                # D2, D10: a page that is there is settled; fact 3: its waiters would sleep on, DONTWAKE or
                # not.
                if received is not None:
                    received.c_set(first + done)
                self.c_wake(first + done, 1)
                tally.present += 1
                done += 1
            elif outcome == PLACE_GONE or outcome == PLACE_ABSENT:
                # A waiter on memory that went away must run on to its SIGSEGV; one whose page is not in the page cache
                # faults again, as missing.
                if claimed is not None:
                    claimed.c_clear(first + done)
                self.c_wake(first + done, 1)
                if outcome == PLACE_GONE:
                    tally.gone += 1
                    tally.limit = 1
                else:
                    tally.absent += 1
                done += 1
            elif outcome != PLACE_DONE:
                if claimed is not None:
                    claimed.c_clear_range(first + done, count - done)       # D8: another may place them
                tally.outcome = outcome
                tally.error = step.error
                break
        tally.settled += done

    cdef void c_place_run(self, int operation, size_t first, size_t count, const uint8_t *data, int flags,
                          Bitmap claimed, Bitmap received, Bitmap excluded, PlaceTally *tally) noexcept nogil:
        cdef size_t page = first, end = first + count, stop, run
        cdef uint64_t mask, won, blocked
        while page < end and tally.outcome == PLACE_DONE:
            stop = min(end, (page | 63) + 1)
            mask = (<uint64_t>-1 << (page & 63)) & (<uint64_t>-1 >> (63 - ((stop - 1) & 63)))
            # acquire and release: one placer wins each bit, and sees what one that gave it back had done
            # (D1).
            won = mask if claimed is None else claimed.c_set_word(page >> 6, mask)
            blocked = 0
            if excluded is not None:
                # After the claim: whoever excludes a page holds its claim, or waits for it (D12).
                blocked = pagecore_load_acquire(&excluded.c_words[page >> 6]) & mask
                if claimed is not None and blocked & won:
                    claimed.c_clear_word(page >> 6, blocked & won)
                won &= ~blocked
            while page < stop:
                # The pages of this word that are left, bit 0 being `page`.
                mask = won >> (page & 63)
                if mask & 1 == 0:
                    # Lost. No ioctl: whoever has the claim settles the page or gives it back, and wakes
                    # (D1, D10).
                    run = stop - page if mask == 0 else min(stop - page, <size_t>trailing_zeros(mask))
                    mask = blocked >> (page & 63)
                    if run < 64:
                        mask &= (<uint64_t>1 << run) - 1
                    tally.excluded += count_ones(mask)
                    tally.present += run - count_ones(mask)
                    tally.settled += run
                else:
                    run = stop - page if ~mask == 0 else min(stop - page, <size_t>trailing_zeros(~mask))
                    self.c_place_span(operation, page, run, data + (page - first) * self.page_size, flags,
                                      claimed, received, tally)
                    if tally.outcome != PLACE_DONE:
                        # What this word's claims won beyond the run is given back too.
                        page += run
                        mask = won & (<uint64_t>-1 << (page & 63)) if page < stop else 0
                        if claimed is not None:
                            claimed.c_clear_word((stop - 1) >> 6, mask)
                        break
                page += run
