"""Discards: what the guest's events of REMOVE and UNMAP do to the planes of a region."""

from libc.stdint cimport uint64_t

from pagecore._atomic cimport pagecore_fetch_add
from pagecore._placer cimport Placer
from pagecore._shared cimport FAULT_PRESENT
from pagecore._uffd cimport Userfaultfd


cdef void apply_remove(Placer placer, Userfaultfd uffd, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t first, count, from_byte, to_byte
    cdef int piece
    if placer._keep_removed:
        return              # shared memory: its page cache keeps the content, which the kernel maps again
    for piece in range(placer.region.c_count):
        if not placer.region.c_clip(uffd, piece, start, end, &from_byte, &to_byte):
            continue
        first = (from_byte + placer.region.page_size - 1) // placer.region.page_size
        count = max(to_byte // placer.region.page_size, first) - first
        if count:
            pagecore_fetch_add(&placer._shared.counters.removed, count - placer.state.released.c_count_range(first, count))
            placer.state.c_release(first, count)
            placer._removed_first = min(placer._removed_first, first)
            placer._removed_end = max(placer._removed_end, first + count)
        if placer._holes is not None:
            _mark_part(placer, from_byte, min(to_byte, first * placer.region.page_size))
            _mark_part(placer, max(from_byte, (first + count) * placer.region.page_size), to_byte)


cdef void _mark_part(Placer placer, uint64_t start, uint64_t end) noexcept nogil:
    """Part of one huge page: in a page that is there the kernel writes the zeros itself."""
    if start < end and not placer.state.received.c_test(start // placer.region.page_size):
        placer._holes.c_mark(start, end)


cdef void apply_unmap(Placer placer, Userfaultfd uffd, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t first, count, from_byte, to_byte
    cdef int piece
    for piece in range(placer.region.c_count):
        if placer.region.c_clip(uffd, piece, start, end, &from_byte, &to_byte):
            first = from_byte // placer.region.page_size
            count = to_byte // placer.region.page_size - first
            placer.state.c_exclude(first, count)
            pagecore_fetch_add(&placer._shared.counters.gone, count)
            placer.region.c_wake(first, count)
            placer._finish_waiting(first, count, FAULT_PRESENT)
