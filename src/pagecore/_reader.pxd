from libc.stdint cimport uint64_t

from pagecore._recorder cimport Recorder
from pagecore._shared cimport PlacementShared
from pagecore._uffd cimport UffdEvent, Userfaultfd

cdef enum:
    EVENT_BATCH = 64
    FAULT_BATCH = 256
    AHEAD_RUNS = 8

cdef struct ServedFault:
    int index                   # of the placer
    uint64_t page

cdef struct AheadRun:
    int index
    uint64_t first
    uint64_t end


cdef class Reader:
    """The one reader of one descriptor (D4): drains it, applies events, serves faults. All methods are nogil."""

    cdef readonly Userfaultfd uffd
    cdef readonly tuple windows
    cdef tuple _objects             # the placers
    cdef int c_poll_fd              # a duplicate of the descriptor, to poll
    cdef int c_stop_fd              # readable once the threads are to end
    cdef bint c_reading             # the reader's role is ours
    cdef PlacementShared *_shared
    cdef Recorder _recorder
    cdef void **_placers            # borrowed
    cdef void **_windows            # borrowed
    cdef int _count
    cdef AheadRun *_removed         # for each placer: the hull of what this batch released
    cdef AheadRun _ahead[AHEAD_RUNS]
    cdef int _ahead_count
    cdef uint64_t _came             # messages of the last batch
    cdef uint64_t _polled
    cdef bint _eager                # read before polling

    cdef void c_join(self, PlacementShared *shared) noexcept nogil
    cdef void c_run(self) noexcept nogil
    # One turn: drain, apply events, serve faults. False when reading is over.
    cdef bint c_read_batch(self) noexcept nogil
    # One chunk of what is worth placing around the last faults. False: there is none.
    cdef bint c_place_ahead(self) noexcept nogil

    cdef void _note_fault(self, uint64_t address, uint64_t now, ServedFault *faults, size_t *count) noexcept nogil
    cdef void _apply_event(self, const UffdEvent *event) noexcept nogil
    cdef void _refuse_child(self, int child) noexcept nogil
    cdef bint _is_newest(self, int index, uint64_t end) noexcept nogil
    cdef bint _is_readable(self) noexcept nogil
    cdef void _remember_ahead(self, int index, uint64_t first, uint64_t end) noexcept nogil
