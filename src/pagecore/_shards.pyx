"""Shards: the pieces of one logical region, and through which descriptor each page is placed and woken."""

from pagecore._uffd_types import MemoryKind

from libc.errno cimport ENODATA
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from pagecore._uffd cimport PLACE_ABSENT, PLACE_DONE, PLACE_FAILED, PLACE_PRESENT, PlaceStep, Region, Userfaultfd
from pagecore._uffd_ioctl cimport REGISTER_MINOR

cdef enum:
    SHARD_COPY = 0
    SHARD_ZERO = 1
    SHARD_POISON = 2
    SHARD_CONTINUE = 3


cdef class Shards:
    def __cinit__(self, regions):
        cdef Region region
        cdef int index
        shared = False
        self.regions = tuple(regions)
        self.c_count = len(self.regions)
        self._pieces = <void **>calloc(self.c_count, sizeof(void *))
        self._starts = <size_t *>calloc(self.c_count + 1, sizeof(size_t))
        if self._pieces == NULL or self._starts == NULL:
            raise MemoryError()
        for index in range(self.c_count):
            region = self.regions[index]
            self._pieces[index] = <void *>region
            self._starts[index] = self.size
            self.size += region.size
            shared = shared or region.kind in (MemoryKind.SHARED, MemoryKind.HUGE_SHARED)
            self._minor = self._minor or region.c_modes & REGISTER_MINOR != 0
            if region.c_zeros != NULL or region.kind is not MemoryKind.ANONYMOUS:
                self.c_zeros_undo = True
        self.c_tells_loss = self._minor or not shared
        region = self.regions[0]
        self._starts[self.c_count] = self.size
        self.id = region.id
        self.page_size = region.page_size

    def __dealloc__(self):
        free(self._pieces)
        free(self._starts)

    cdef int _piece_of(self, size_t page) noexcept nogil:
        cdef int index = 0
        while self._starts[index + 1] <= page:
            index += 1
        return index

    cdef int _place(self, int operation, size_t first, size_t count, const uint8_t *data,
                    PlaceStep *step) noexcept nogil:
        cdef size_t done = 0
        cdef size_t at, length
        cdef int index
        cdef int outcome = PLACE_DONE
        step.done = 0
        step.error = 0
        while done < count and outcome == PLACE_DONE:
            index = self._piece_of(first + done)
            at = first + done - self._starts[index]
            length = min(count - done, self._starts[index + 1] - first - done)
            if self._minor and operation != SHARD_CONTINUE:
                outcome = self._place_minor(<Region>self._pieces[index], operation, at, length,
                                            data + done * self.page_size if operation == SHARD_COPY else NULL, step)
            elif operation == SHARD_CONTINUE:
                outcome = (<Region>self._pieces[index]).c_continue(at, length, True, step)
                if outcome == PLACE_ABSENT:
                    # The file was cut, or a hole was punched without forget(): never zeros (D12).
                    outcome = PLACE_FAILED
                    step.error = ENODATA
            elif operation == SHARD_COPY:
                outcome = (<Region>self._pieces[index]).c_copy(at, length, data + done * self.page_size, True, step)
            elif operation == SHARD_ZERO:
                outcome = (<Region>self._pieces[index]).c_zero(at, length, True, step)
            else:
                outcome = (<Region>self._pieces[index]).c_poison(at, length, step)
            done += step.done
        step.done = done
        return outcome

    cdef int _place_minor(self, Region piece, int operation, size_t first, size_t count, const uint8_t *data,
                          PlaceStep *step) noexcept nogil:
        """D2, D15: what the page cache has is only mapped, whatever was to be placed. The rest is placed page by page."""
        cdef size_t done = 0
        cdef int outcome = PLACE_DONE
        while done < count and outcome == PLACE_DONE:
            outcome = piece.c_continue(first + done, count - done, True, step)
            done += step.done
            if outcome == PLACE_DONE or outcome == PLACE_ABSENT:
                if operation == SHARD_POISON and step.done:
                    done -= step.done           # nothing was lost: it was there, as with EEXIST
                    outcome = PLACE_PRESENT
            if outcome != PLACE_ABSENT:
                continue
            if operation == SHARD_COPY:
                outcome = piece.c_copy(first + done, 1, data + done * self.page_size, True, step)
            elif operation == SHARD_ZERO:
                outcome = piece.c_zero(first + done, 1, True, step)
            else:
                outcome = piece.c_poison(first + done, 1, step)
            done += step.done
        step.done = done
        return outcome

    cdef int c_continue(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        return self._place(SHARD_CONTINUE, first, count, NULL, step)

    cdef int c_copy(self, size_t first, size_t count, const uint8_t *data, PlaceStep *step) noexcept nogil:
        return self._place(SHARD_COPY, first, count, data, step)

    cdef int c_zero(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        return self._place(SHARD_ZERO, first, count, NULL, step)

    cdef int c_poison(self, size_t first, size_t count, PlaceStep *step) noexcept nogil:
        return self._place(SHARD_POISON, first, count, NULL, step)

    cdef int c_wake(self, size_t first, size_t count) noexcept nogil:
        cdef size_t end = first + count
        cdef size_t stop
        cdef int index
        cdef int rc = 0
        while first < end:
            index = self._piece_of(first)
            stop = min(end, self._starts[index + 1])
            rc = min(rc, (<Region>self._pieces[index]).c_wake(first - self._starts[index], stop - first))
            first = stop
        return rc

    cdef bint c_served_by(self, Userfaultfd uffd) noexcept nogil:
        cdef int index
        for index in range(self.c_count):
            if (<Region>self._pieces[index]).uffd is uffd:
                return True
        return False

    cdef bint c_find(self, Userfaultfd uffd, uint64_t address, uint64_t *page) noexcept nogil:
        cdef uint64_t offset
        cdef int index
        for index in range(self.c_count):
            offset = address - (<Region>self._pieces[index]).c_address
            # Another descriptor may serve another process, with other memory at the same address.
            if (<Region>self._pieces[index]).uffd is uffd:
                if offset < (<Region>self._pieces[index]).size * self.page_size:
                    page[0] = self._starts[index] + offset // self.page_size
                    return True
        return False

    cdef bint c_clip(self, Userfaultfd uffd, int index, uint64_t start, uint64_t end,
                     uint64_t *from_byte, uint64_t *to_byte) noexcept nogil:
        cdef uint64_t base = (<Region>self._pieces[index]).c_address
        cdef uint64_t limit = base + (<Region>self._pieces[index]).size * self.page_size
        if (<Region>self._pieces[index]).uffd is not uffd or start >= limit or end <= base:
            return False
        from_byte[0] = max(start, base) - base + self._starts[index] * self.page_size
        to_byte[0] = min(end, limit) - base + self._starts[index] * self.page_size
        return True
