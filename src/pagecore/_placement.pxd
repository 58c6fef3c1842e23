from pagecore._engine cimport PlacementEngine


cdef class PlacementLoop(PlacementEngine):
    cdef readonly str name
    cdef tuple _placer_objects
    cdef list _threads
    cdef int _placer_threads
    cdef object _life               # one start or stop at a time
    cdef bint _reading              # the reader's role is ours

    cdef int _check_not_stopped(self) except -1
