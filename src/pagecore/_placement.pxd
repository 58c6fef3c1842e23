from libc.stdint cimport int64_t, uint32_t, uint64_t

from pagecore._placer cimport PlacementObserver, PlacementShared, Placer
from pagecore._uffd cimport UffdEvent, Userfaultfd
from pagecore.page_source._protocol cimport PageSource

cdef struct QueuedRun:
    void *placer
    uint64_t first
    uint64_t count


cdef class PlacementLoop:
    cdef readonly Userfaultfd uffd
    cdef readonly PageSource source
    cdef readonly str name
    cdef tuple _placer_objects
    cdef void **_placers
    cdef int _count
    cdef PlacementShared _shared
    cdef bint _shared_ready
    cdef int _stop_fd
    cdef int _poll_fd
    cdef uint64_t _lanes_ended      # bulk lanes that have seen END
    cdef list _threads
    cdef int _placer_threads
    cdef QueuedRun *_queue          # prefetch of a pull source, guarded by the monitor
    cdef size_t _queue_length
    cdef size_t _queue_capacity
    cdef uint64_t _busy             # prefetching threads that hold a run

    cdef void _read_events(self) noexcept nogil
    cdef bint _read_batch(self) noexcept nogil
    cdef void _note_fault(self, uint64_t address, uint64_t now, uint64_t *addresses, size_t *faults) noexcept nogil
    cdef void _apply_event(self, const UffdEvent *event) noexcept nogil
    cdef void _run_lane(self, int lane) noexcept nogil
    cdef void _run_prefetch(self) noexcept nogil
    cdef void _run_retry(self) noexcept nogil
    cdef void *_placer_of_region(self, uint32_t region) noexcept nogil
    cdef bint _bulk_done(self) noexcept nogil
    cdef void _request(self, void *placer, const int64_t *pairs, size_t n, bint again) noexcept nogil
    cdef bint _enqueue(self, void *placer, const int64_t *pairs, size_t n) noexcept nogil
