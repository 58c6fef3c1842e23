from pagecore._recorder cimport Recorder
from pagecore._threads cimport PlacementThreads


cdef class PlacementLoop(PlacementThreads):
    cdef Recorder _recorder
