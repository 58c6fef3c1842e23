from libc.stdint cimport int64_t, uint32_t, uint64_t

from pagecore._background cimport Background
from pagecore._move cimport Mover
from pagecore._shared cimport PlacementShared, QueuedRun
from pagecore.page_source._protocol cimport PageSource

cdef enum:
    RETRY_FIRST_NS = 50000          # D7: 50 to 250 microseconds
    RETRY_LAST_NS = 250000
    IDLE_NS = 1000000000            # an idle wait is cut short by every notification


cdef class PlacementEngine:
    """The native half of a placement loop: its threads' loops, and what they share. PlacementLoop is the face."""

    cdef readonly PageSource source
    cdef void **_placers            # borrowed; PlacementLoop owns the objects
    cdef int _count
    cdef PlacementShared _shared
    cdef int _stop_fd               # readable once the threads are to end
    cdef void **_readers            # borrowed, one for each descriptor
    cdef int _reader_count
    cdef uint64_t _lanes_ended      # bulk lanes that have seen END
    cdef QueuedRun *_queue          # prefetch of a pull source, guarded by the monitor
    cdef size_t _queue_length
    cdef size_t _queue_capacity
    cdef uint64_t _busy             # prefetching threads that hold a run
    cdef Background _background
    cdef readonly Mover _mover               # None where no lane brings whole blocks to move
    cdef list _movable                       # regions that they are moved into

    # The threads' bodies.
    cdef void c_run_demand(self) noexcept nogil
    cdef void c_run_lane(self, int lane) noexcept nogil
    cdef void c_run_prefetch(self) noexcept nogil
    cdef void c_run_retry(self) noexcept nogil
    # One turn of every reader: drain, apply events, serve faults (D4). False when reading is over.
    cdef bint c_read_batch(self) noexcept nogil
    cdef void c_request(self, void *placer, const int64_t *pairs, size_t n, bint again) noexcept nogil
    cdef bint c_enqueue(self, void *placer, const int64_t *pairs, size_t n) noexcept nogil
    cdef bint c_bulk_done(self) noexcept nogil

    cdef void *_placer_of_region(self, uint32_t region) noexcept nogil
