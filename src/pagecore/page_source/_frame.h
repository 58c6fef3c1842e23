/* The frame header of every stream, little-endian, 40 bytes. pagecore.wire spells the same in Python; a test compares them. */
#ifndef PAGECORE_FRAME_H
#define PAGECORE_FRAME_H

#include <stdint.h>

#define PAGECORE_FRAME_MAGIC 0x31434750u /* "PGC1" */
#define PAGECORE_FRAME_AGAIN 0x01u
#define PAGECORE_FRAME_CHECKSUM 0x80u

enum {
    PAGECORE_FRAME_PAGES = 10,
    PAGECORE_FRAME_ZEROS = 11,
    PAGECORE_FRAME_FILL = 12,
    PAGECORE_FRAME_SENT = 13,
    PAGECORE_FRAME_GONE = 14,
    PAGECORE_FRAME_REQUEST = 15,
    PAGECORE_FRAME_END = 18
};

typedef struct {
    uint32_t magic;
    uint8_t type;
    uint8_t flags;
    uint16_t region;
    uint32_t generation;
    uint32_t round;
    uint64_t first; /* page */
    uint64_t count; /* pages */
    uint32_t length; /* payload, bytes */
    uint32_t checksum; /* CRC-32 of the payload where flag 0x80 says so; page frames carry none */
} pagecore_frame;

_Static_assert(sizeof(pagecore_frame) == 40, "the header has no padding");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the frame header is read in place: this needs a little-endian machine"
#endif

#endif
