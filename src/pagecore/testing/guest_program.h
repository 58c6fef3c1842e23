/* What the test guest is: where all lies in its memory, what it does at each step, what a page must hold.
 *
 * Three readers share this file, so that they cannot drift apart: the guest program itself (guest_program.c,
 * which runs on a vCPU or on a thread), the machine around it (machine.c), and the verifier (_verify.pyx),
 * which replays the same decisions without any content. A step is decided by (seed, vCPU, step number) and
 * the table alone, never by anything the host does; so what every page must hold follows from the seed and
 * the number of steps.
 *
 * Guest memory, in pages of 4 KiB:
 *
 *   0                  never touched
 *   1 ..               page tables of a 64-bit guest (a thread needs none; they migrate all the same)
 *   code ..            a copy of the guest program
 *   per vCPU           one control page, the hint ring, one page of stack
 *   table ..           a 32-bit entry for each data page: version << 1 | allocated
 *   data ..            the pages that the steps are about; each vCPU owns a contiguous share
 */
#ifndef PAGECORE_GUEST_PROGRAM_H
#define PAGECORE_GUEST_PROGRAM_H

#include <stdint.h>

#define PAGECORE_GUEST_PAGE_SIZE UINT64_C(4096)
#define PAGECORE_GUEST_WORDS (PAGECORE_GUEST_PAGE_SIZE / 8)
#define PAGECORE_GUEST_CODE_PAGES UINT64_C(4)
#define PAGECORE_GUEST_RING_ENTRIES UINT64_C(1024)
#define PAGECORE_GUEST_RING_PAGES (PAGECORE_GUEST_RING_ENTRIES * 16 / PAGECORE_GUEST_PAGE_SIZE)
/* control, ring, stack */
#define PAGECORE_GUEST_VCPU_PAGES (1 + PAGECORE_GUEST_RING_PAGES + 1)
#define PAGECORE_GUEST_MAGIC UINT64_C(0x3130747365756750)
#define PAGECORE_GUEST_NEVER UINT64_MAX
/* Entries of the table that a report reads before the guest leaves once: bounds the time in the guest. */
#define PAGECORE_GUEST_REPORT_SCAN UINT64_C(65536)

/* Command words in the control page: epoch << 2 | command. */
enum { PAGECORE_COMMAND_START = 1, PAGECORE_COMMAND_STOP = 2, PAGECORE_COMMAND_DONE = 3 };

/* Why the guest left to the machine. */
enum { PAGECORE_LEFT_TICK = 1, PAGECORE_LEFT_FULL = 2, PAGECORE_LEFT_STOPPED = 3 };

/* `count` of the ring entry that ends a report of free pages. */
#define PAGECORE_HINT_END UINT32_C(0)

struct pagecore_hint {
    uint64_t epoch;
    uint32_t first;
    uint32_t count;
};

/* One page a vCPU. The first part is written at boot, the second by the guest, the third by the machine. */
struct pagecore_control {
    uint64_t magic;
    uint64_t vcpu;
    uint64_t seed;
    uint64_t key;               /* of this vCPU's draws */
    uint64_t table;             /* byte offset of the entry of `first` */
    uint64_t first;             /* the first page of this vCPU's share */
    uint64_t count;
    uint64_t ring;              /* byte offset */
    uint64_t batch;             /* steps between two ticks */
    uint64_t free_below;        /* of 2^32: an allocated page is freed */
    uint64_t rewrite_below;     /* of 2^32, above free_below: it is written anew */
    uint64_t allocate_below;    /* of 2^32: a free page is allocated */

    uint64_t steps;
    uint64_t checks;
    uint64_t errors;
    uint64_t written;
    uint64_t freed;
    uint64_t allocated;
    uint64_t free_pages;
    uint64_t error_page;        /* the first page that was not what it must be, and the word in it */
    uint64_t error_step;
    uint64_t error_word;
    uint64_t error_found;
    uint64_t error_wanted;
    uint64_t seen;              /* the command word last acted on */
    uint64_t cursor;            /* how far the report of this epoch is; NEVER where none is under way */
    uint64_t produced;          /* ring entries written, ever */

    uint64_t command;
    uint64_t consumed;          /* ring entries read, ever */
    uint64_t stop_at;           /* the guest stops itself before this step */
};

struct pagecore_layout {
    uint64_t pages;
    uint64_t vcpus;
    uint64_t paging_first;
    uint64_t paging_pages;      /* PML4, PDPT, one directory for each GiB begun and the doorbell's */
    uint64_t code_first;
    uint64_t vcpu_first;
    uint64_t table_first;
    uint64_t table_pages;
    uint64_t data_first;
    uint64_t data_pages;
};

static inline struct pagecore_layout pagecore_guest_layout(uint64_t pages, uint64_t vcpus)
{
    struct pagecore_layout layout;
    layout.pages = pages;
    layout.vcpus = vcpus;
    layout.paging_first = 1;
    layout.paging_pages = 2 + (pages >> 18) + 1;
    layout.code_first = layout.paging_first + layout.paging_pages;
    layout.vcpu_first = layout.code_first + PAGECORE_GUEST_CODE_PAGES;
    layout.table_first = layout.vcpu_first + vcpus * PAGECORE_GUEST_VCPU_PAGES;
    layout.table_pages = (pages * 4 + PAGECORE_GUEST_PAGE_SIZE - 1) / PAGECORE_GUEST_PAGE_SIZE;
    layout.data_first = layout.table_first + layout.table_pages;
    layout.data_pages = pages - layout.data_first;
    return layout;
}

static inline uint64_t pagecore_guest_control_page(const struct pagecore_layout *layout, uint64_t vcpu)
{
    return layout->vcpu_first + vcpu * PAGECORE_GUEST_VCPU_PAGES;
}

/* The bijection of splitmix64 (Steele, Lea, Flood 2014). */
static inline uint64_t pagecore_guest_mix(uint64_t value)
{
    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

#define PAGECORE_GUEST_GOLDEN UINT64_C(0x9e3779b97f4a7c15)

/* f(seed, page, version): word i of the page is pagecore_guest_word(key, i). One version in sixteen is all
 * zeros, so that a migration meets zero pages, and content that becomes zeros. */
static inline uint64_t pagecore_guest_content_key(uint64_t seed, uint64_t page, uint64_t version)
{
    return pagecore_guest_mix(pagecore_guest_mix(seed + page * PAGECORE_GUEST_GOLDEN) + version);
}

static inline uint64_t pagecore_guest_content_mask(uint64_t key)
{
    return (key >> 60) == 0 ? 0 : UINT64_MAX;
}

static inline uint64_t pagecore_guest_word(uint64_t key, uint64_t mask, uint64_t index)
{
    const uint64_t value = key + index * PAGECORE_GUEST_GOLDEN;
    return (value ^ (value >> 29)) & mask;
}

static inline void pagecore_guest_write_page(uint64_t *words, uint64_t seed, uint64_t page, uint64_t version)
{
    const uint64_t key = pagecore_guest_content_key(seed, page, version);
    const uint64_t mask = pagecore_guest_content_mask(key);
    for (uint64_t index = 0; index < PAGECORE_GUEST_WORDS; index++)
        words[index] = pagecore_guest_word(key, mask, index);
}

/* The first word that is not what it must be, or PAGECORE_GUEST_WORDS. */
static inline uint64_t pagecore_guest_check_page(const uint64_t *words, uint64_t seed, uint64_t page,
                                                 uint64_t version)
{
    const uint64_t key = pagecore_guest_content_key(seed, page, version);
    const uint64_t mask = pagecore_guest_content_mask(key);
    uint64_t index = 0;
    while (index < PAGECORE_GUEST_WORDS && words[index] == pagecore_guest_word(key, mask, index))
        index++;
    return index;
}

/* What a step does: the high half of the draw picks the page of the share, the low half throws the dice. */
static inline uint64_t pagecore_guest_draw(uint64_t key, uint64_t step)
{
    return pagecore_guest_mix(key + step * PAGECORE_GUEST_GOLDEN);
}

static inline uint64_t pagecore_guest_pick(uint64_t draw, uint64_t count)
{
    return ((draw >> 32) * count) >> 32;
}

enum { PAGECORE_STEP_NOTHING, PAGECORE_STEP_REWRITE, PAGECORE_STEP_FREE, PAGECORE_STEP_ALLOCATE };

static inline int pagecore_guest_decide(uint64_t draw, uint32_t entry, uint64_t free_below,
                                        uint64_t rewrite_below, uint64_t allocate_below)
{
    const uint64_t dice = (uint32_t)draw;
    if (!(entry & 1))
        return dice < allocate_below ? PAGECORE_STEP_ALLOCATE : PAGECORE_STEP_NOTHING;
    if (dice < free_below)
        return PAGECORE_STEP_FREE;
    return dice < rewrite_below ? PAGECORE_STEP_REWRITE : PAGECORE_STEP_NOTHING;
}

/* Freed pages keep their version and their old content; whoever writes a page raises its version. */
static inline uint32_t pagecore_guest_next_entry(uint32_t entry, int action)
{
    const uint32_t version = entry >> 1;
    if (action == PAGECORE_STEP_FREE)
        return version << 1;
    if (action == PAGECORE_STEP_NOTHING)
        return entry;
    return (version + 1) << 1 | 1;
}

/* The part of the control page that boot writes. `share` is the free share as a fraction of 2^32; a quarter
 * of the picks of an allocated page rewrite it, and the two turnovers keep the share. */
static inline void pagecore_guest_configure(struct pagecore_control *control,
                                            const struct pagecore_layout *layout, uint64_t vcpu,
                                            uint64_t seed, uint64_t share, uint64_t batch)
{
    const uint64_t begin = layout->data_pages * vcpu / layout->vcpus;
    const uint64_t end = layout->data_pages * (vcpu + 1) / layout->vcpus;
    const uint64_t page = pagecore_guest_control_page(layout, vcpu);

    control->magic = PAGECORE_GUEST_MAGIC;
    control->vcpu = vcpu;
    control->seed = seed;
    control->key = pagecore_guest_mix(seed ^ pagecore_guest_mix(vcpu + 1));
    control->table = layout->table_first * PAGECORE_GUEST_PAGE_SIZE + begin * 4;
    control->first = layout->data_first + begin;
    control->count = end - begin;
    control->ring = (page + 1) * PAGECORE_GUEST_PAGE_SIZE;
    control->batch = batch;
    control->free_below = share / 4;
    control->rewrite_below = share / 4 + (UINT64_C(1) << 30);
    control->allocate_below = ((UINT64_C(1) << 32) - share) / 4;
}

/* The table of one share as boot leaves it: every page was written once, then extents of 16 to 1024 pages
 * were freed until the share is met. Returns the number of free pages. */
static inline uint64_t pagecore_guest_seed_table(uint32_t *entries, uint64_t count, uint64_t key,
                                                 uint64_t share)
{
    uint64_t longest = count / 16 < 16 ? 16 : count / 16;
    uint64_t position = 0, free_pages = 0;

    if (longest > 1024)
        longest = 1024;
    for (uint64_t page = 0; page < count; page++)
        entries[page] = 1 << 1 | 1;
    for (uint64_t extent = 0; share; extent++) {
        const uint64_t draw = pagecore_guest_mix(~key + extent * PAGECORE_GUEST_GOLDEN);
        uint64_t length = 16 + (draw >> 32) % (longest - 15);
        /* The extent ends where, all told, free pages are `share` of all pages. */
        uint64_t end = ((free_pages + length) << 32) / share;
        if (end < position + length)
            end = position + length;
        if (end > count)
            break;
        for (uint64_t page = end - length; page < end; page++)
            entries[page] = 1 << 1;
        free_pages += length;
        position = end;
    }
    return free_pages;
}

/* The guest program. `dirty` is the log that a thread marks after each of its writes, or NULL; with
 * `doorbell` (an address that no memory backs) the program never returns but leaves to the machine by a store
 * of the reason there; without, it returns the reason. See guest_program.c. */
uint64_t pagecore_guest_program(uint8_t *base, uint64_t control_offset, uint64_t *dirty, uint64_t *doorbell);

/* The section that holds the program and nothing else. */
extern const uint8_t __start_pagecore_guest[] __attribute__((visibility("hidden")));
extern const uint8_t __stop_pagecore_guest[] __attribute__((visibility("hidden")));

#endif
