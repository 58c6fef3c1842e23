from pagecore._recorder cimport Recorder
from pagecore._waits cimport PlacementWaits


cdef class PlacementLoop(PlacementWaits):
    cdef Recorder _recorder
