/* A 64-bit checksum of one page of 4 KiB: four multiply-and-rotate lanes, folded. Not cryptographic: it tells
 * apart pages that differ by accident (stale, torn, zeroed, misplaced), not by intent. */
#ifndef PAGECORE_PAGE_HASH_H
#define PAGECORE_PAGE_HASH_H

#include <stdint.h>
#include <string.h>

static inline uint64_t pagecore_page_hash(const uint8_t *page)
{
    const uint64_t odd[4] = {UINT64_C(0x9e3779b185ebca87), UINT64_C(0xc2b2ae3d27d4eb4f),
                             UINT64_C(0x165667b19e3779f9), UINT64_C(0x85ebca77c2b2ae63)};
    uint64_t lane[4] = {odd[0], odd[1], odd[2], odd[3]};
    uint64_t hash = 0;

    for (int offset = 0; offset < 4096; offset += 32) {
        for (int index = 0; index < 4; index++) {
            uint64_t word;
            memcpy(&word, page + offset + 8 * index, 8);
            lane[index] = (lane[index] ^ word) * odd[index];
            lane[index] = lane[index] << 31 | lane[index] >> 33;
        }
    }
    for (int index = 0; index < 4; index++) {
        hash = (hash ^ lane[index]) * odd[index];
        hash ^= hash >> 32;
    }
    return hash;
}

/* What a page adds to the sum of its block: its checksum, and where it is, so that two that changed places differ. */
static inline uint64_t pagecore_placed_hash(const uint8_t *page, uint64_t number)
{
    const uint64_t hash = (pagecore_page_hash(page) ^ number) * UINT64_C(0x9e3779b185ebca87);
    return hash ^ hash >> 32;
}

#endif
