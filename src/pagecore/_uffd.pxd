cimport cython
from libc.stdint cimport uint64_t

from pagecore._descriptor cimport Descriptor
from pagecore._place_result cimport PlaceResult
from pagecore._region cimport Region
from pagecore._span cimport (
    PLACE_ABSENT,
    PLACE_AGAIN,
    PLACE_DONE,
    PLACE_FAILED,
    PLACE_GONE,
    PLACE_PEER_GONE,
    PLACE_PRESENT,
    PlaceOutcome,
    PlaceStep,
    PlaceTally,
)
from pagecore._uffd_ioctl cimport (
    EVENT_FAULT,
    EVENT_FORK,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    FAULT_MINOR,
    FAULT_WP,
    FAULT_WRITE,
    UffdEvent,
)


@cython.final
cdef class Userfaultfd(Descriptor):
    cdef list _ranges                   # (first byte, byte after, owner of the memory) of each region

    cdef Region _region(self, object address, object length, object page_size, object region_id, int modes, int kind,
                        object owner)
    cdef Region _register(self, object address, object length, object page_size, object region_id, object mode,
                          object kind, object owner)
    cdef int _remember(self, Region region, uint64_t ioctls) except -1
