from pagecore._threads cimport PlacementThreads


cdef class PlacementWaits(PlacementThreads):
    """What a placement loop says of its progress. PlacementLoop is the face."""
