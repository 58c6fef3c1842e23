# _frame.h. Not for consumers: they have no include path to the header.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "page_source/_frame.h" nogil:
    enum:
        PAGECORE_FRAME_MAGIC
        PAGECORE_FRAME_AGAIN
        PAGECORE_FRAME_CHECKSUM
        PAGECORE_FRAME_PAGES
        PAGECORE_FRAME_ZEROS
        PAGECORE_FRAME_FILL
        PAGECORE_FRAME_SENT
        PAGECORE_FRAME_GONE
        PAGECORE_FRAME_REQUEST
        PAGECORE_FRAME_END
    ctypedef struct pagecore_frame:
        uint32_t magic
        uint8_t type
        uint8_t flags
        uint16_t region
        uint32_t generation
        uint32_t round
        uint64_t first
        uint64_t count
        uint32_t length
        uint32_t checksum
