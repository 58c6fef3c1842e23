from libc.stdint cimport uint64_t

from pagecore._shared cimport PlacementShared, QueuedRun

cdef enum:
    STEP_FIRST = 16             # pages of 4 KiB
    STEP_LAST = 1024
    STEP_PAUSE_NS = 500000


cdef class Background:
    """What is placed while nobody asks: small steps at first, larger ones as long as no fault comes."""

    cdef bint c_enabled
    cdef uint64_t _step                 # pages of 4 KiB between two pauses; stored relaxed inside the monitor
    cdef bint _done                     # a whole pass found nothing left
    cdef uint64_t _left                 # pages of this step
    cdef uint64_t _faults               # how many had come when the step began
    cdef uint64_t _resume_ns
    cdef int _index                     # of the placer, and the page there, to go on from
    cdef uint64_t _page
    cdef bint _found                    # in this pass

    cdef void _begin_step(self, uint64_t pages, uint64_t now) noexcept nogil
    # Inside the monitor. True: a run to place, of one chunk at most. False: nothing before `until`.
    cdef bint c_take(self, PlacementShared *shared, void **placers, int count,
                     QueuedRun *run, uint64_t *until) noexcept nogil
