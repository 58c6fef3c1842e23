from pagecore._engine cimport PlacementEngine


cdef class PlacementLoop(PlacementEngine):
    cdef readonly str name
    cdef tuple _placer_objects
    cdef list _threads
    cdef int _placer_threads
