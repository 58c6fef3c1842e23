from pagecore._engine cimport PlacementEngine


cdef class PlacementThreads(PlacementEngine):
    """A placement loop's threads; PlacementLoop is the face."""

    cdef readonly str name
    cdef tuple _placer_objects
    cdef tuple _reader_objects
    cdef list _threads
    cdef int _placer_threads
    cdef object _life               # one start or stop at a time
    cdef bint _fill_is_zero
    cdef bint _poison_rest          # at a stop
    cdef object _patience           # seconds, or None
    cdef object _watchdog
    cdef int _process               # who made it: a forked child has copies of descriptors and planes, and no threads

    cdef int _check_not_stopped(self) except -1
    cdef int _check_process(self) except -1
