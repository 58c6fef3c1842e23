/* Pages of a test guest that never change after boot: boot writes them, the verifier compares with them. */
#ifndef PAGECORE_GUEST_IMAGE_H
#define PAGECORE_GUEST_IMAGE_H

#include <string.h>

#include "guest_program.h"

/* Accessed and dirty are set beforehand in each entry: the hypervisor would set them by writes of its own. */
#define PAGECORE_PAGING_TABLE UINT64_C(0x27)    /* present, writable, user, accessed */
#define PAGECORE_PAGING_2M UINT64_C(0xe7)       /* and dirty, large */

/* One page of the identity map: all memory by 2 MiB entries for user mode, and one entry more for the
 * doorbell. */
static inline void pagecore_guest_paging_page(const struct pagecore_layout *layout, uint64_t index,
                                              uint64_t *words)
{
    const uint64_t blocks = layout->pages / 512 + 1;
    const uint64_t first = layout->paging_first * PAGECORE_GUEST_PAGE_SIZE;

    memset(words, 0, PAGECORE_GUEST_PAGE_SIZE);
    if (index == 0) {
        words[0] = (first + PAGECORE_GUEST_PAGE_SIZE) | PAGECORE_PAGING_TABLE;
    } else if (index == 1) {
        for (uint64_t entry = 0; entry < layout->paging_pages - 2; entry++)
            words[entry] = (first + (2 + entry) * PAGECORE_GUEST_PAGE_SIZE) | PAGECORE_PAGING_TABLE;
    } else {
        for (uint64_t entry = 0; entry < 512 && (index - 2) * 512 + entry < blocks; entry++)
            words[entry] = (((index - 2) * 512 + entry) << 21) | PAGECORE_PAGING_2M;
    }
}

/* Renders `page` if it is one of those that never change; 0 where it is not. */
static inline int pagecore_guest_fixed_page(const struct pagecore_layout *layout, uint64_t page,
                                            const uint8_t *code, uint64_t code_size, uint64_t *words)
{
    if (page >= layout->vcpu_first)
        return 0;
    memset(words, 0, PAGECORE_GUEST_PAGE_SIZE);
    if (page >= layout->code_first) {
        const uint64_t offset = (page - layout->code_first) * PAGECORE_GUEST_PAGE_SIZE;
        const uint64_t left = offset < code_size ? code_size - offset : 0;
        memcpy(words, code + offset, left < PAGECORE_GUEST_PAGE_SIZE ? left : PAGECORE_GUEST_PAGE_SIZE);
    } else if (page >= layout->paging_first) {
        pagecore_guest_paging_page(layout, page - layout->paging_first, words);
    }
    return 1;
}

#endif
