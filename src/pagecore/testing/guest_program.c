/* The program that a test guest runs: the same machine code natively on a thread and, copied into guest
 * memory, on a vCPU at CPL 3. Hence: one function in its own section, general registers only (so that
 * KVM_GET_REGS and KVM_GET_SREGS are its whole state), no calls, no constants outside the instructions, and
 * nothing kept but in guest memory, at offsets from `base`.
 *
 * A batch: act on a new command, go on with a report of free pages, take up to `batch` steps, publish, leave.
 */
#if defined(__GNUC__) && !defined(__clang__) && (defined(__x86_64__) || defined(__aarch64__))
/* Before the headers: an inline function of another target would not be inlined, but called. */
#pragma GCC target("general-regs-only")
#endif

#include <stddef.h>

#include "_atomic.h"
#include "guest_program.h"

#ifndef __OPTIMIZE__
#error "build the guest program with -O1 or more: it must be free of calls to be copied into a guest"
#endif

_Static_assert(sizeof(struct pagecore_control) <= PAGECORE_GUEST_PAGE_SIZE, "one control page");
_Static_assert(sizeof(struct pagecore_hint) == 16, "the ring is packed");

/* A thread marks a page AFTER it wrote it: a sender that drained the bit earlier finds it set again. */
static inline void mark(uint64_t *dirty, uint64_t page)
{
    if (dirty)
        pagecore_or(&dirty[page >> 6], UINT64_C(1) << (page & 63));
}

static inline void mark_bytes(uint64_t *dirty, const uint8_t *base, const void *written)
{
    mark(dirty, (uint64_t)((const uint8_t *)written - base) / PAGECORE_GUEST_PAGE_SIZE);
}

static inline void push(uint8_t *base, uint64_t ring, uint64_t index, uint64_t epoch, uint64_t first,
                        uint64_t count, uint64_t *dirty)
{
    struct pagecore_hint *hint =
        (struct pagecore_hint *)(base + ring) + (index & (PAGECORE_GUEST_RING_ENTRIES - 1));
    hint->epoch = epoch;
    hint->first = (uint32_t)first;
    hint->count = (uint32_t)count;
    mark_bytes(dirty, base, hint);
}

__attribute__((section("pagecore_guest"), used, noinline, flatten, noclone, no_instrument_function,
               no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined")))
uint64_t pagecore_guest_program(uint8_t *base, uint64_t control_offset, uint64_t *dirty, uint64_t *doorbell)
{
    struct pagecore_control *const control = (struct pagecore_control *)(base + control_offset);

    for (;;) {
        uint32_t *const table = (uint32_t *)(base + control->table);
        const uint64_t seed = control->seed, key = control->key, ring = control->ring;
        const uint64_t first = control->first, count = control->count;
        const uint64_t free_below = control->free_below, rewrite_below = control->rewrite_below;
        const uint64_t allocate_below = control->allocate_below;
        uint64_t steps = control->steps, free_pages = control->free_pages;
        uint64_t produced = control->produced, cursor = control->cursor;
        uint64_t left = PAGECORE_LEFT_TICK;
        /* acquire: pairs with the release in the machine's announce(): a hint that carries this epoch must
         * come after everything that the machine did before it opened the epoch (S4) */
        const uint64_t command = pagecore_load_acquire(&control->command);
        /* acquire: pairs with the release of the machine's drain: the entries may be written over now */
        const uint64_t full = pagecore_load_acquire(&control->consumed) + PAGECORE_GUEST_RING_ENTRIES;
        const uint64_t stop_at = pagecore_load_acquire(&control->stop_at);
        const uint64_t epoch = command >> 2;
        const int hinting = (command & 3) == PAGECORE_COMMAND_START;

        if (command != control->seen) {
            control->seen = command;
            cursor = hinting ? 0 : PAGECORE_GUEST_NEVER;
        }

        /* The report of a new epoch: every free page of the share, as runs, then the entry that ends it. It
         * leaves to the machine until it is through; the steps wait, so that the epoch is as long as
         * possible. */
        if (cursor != PAGECORE_GUEST_NEVER) {
            uint64_t scanned = 0;
            while (cursor < count && produced < full && scanned < PAGECORE_GUEST_REPORT_SCAN) {
                uint64_t end = cursor;
                while (end < count && !(table[end] & 1) && scanned < PAGECORE_GUEST_REPORT_SCAN) {
                    end++;
                    scanned++;
                }
                if (end > cursor)
                    push(base, ring, produced++, epoch, first + cursor, end - cursor, dirty);
                while (end < count && (table[end] & 1) && scanned < PAGECORE_GUEST_REPORT_SCAN) {
                    end++;
                    scanned++;
                }
                cursor = end;
            }
            if (cursor >= count && produced < full) {
                push(base, ring, produced++, epoch, 0, PAGECORE_HINT_END, dirty);
                cursor = PAGECORE_GUEST_NEVER;
            }
            left = PAGECORE_LEFT_FULL;
        }

        if (cursor == PAGECORE_GUEST_NEVER) {
            uint64_t budget = control->batch;
            if (steps >= stop_at)
                budget = 0;
            else if (budget > stop_at - steps)
                budget = stop_at - steps;
            for (; budget; budget--, steps++) {
                const uint64_t draw = pagecore_guest_draw(key, steps);
                const uint64_t index = pagecore_guest_pick(draw, count);
                const uint32_t entry = table[index];
                const int action =
                    pagecore_guest_decide(draw, entry, free_below, rewrite_below, allocate_below);
                const uint64_t page = first + index;
                uint64_t *const words = (uint64_t *)(base + page * PAGECORE_GUEST_PAGE_SIZE);

                /* A free needs room in the ring; without it, the step comes again after the drain. */
                if (action == PAGECORE_STEP_FREE && hinting && produced >= full) {
                    left = PAGECORE_LEFT_FULL;
                    break;
                }
                if (entry & 1) {
                    const uint64_t word = pagecore_guest_check_page(words, seed, page, entry >> 1);
                    control->checks++;
                    if (word < PAGECORE_GUEST_WORDS && control->errors++ == 0) {
                        const uint64_t content = pagecore_guest_content_key(seed, page, entry >> 1);
                        control->error_page = page;
                        control->error_step = steps;
                        control->error_word = word;
                        control->error_found = words[word];
                        control->error_wanted =
                            pagecore_guest_word(content, pagecore_guest_content_mask(content), word);
                    }
                }
                if (action == PAGECORE_STEP_NOTHING)
                    continue;
                const uint32_t next = pagecore_guest_next_entry(entry, action);
                if (action != PAGECORE_STEP_FREE) {
                    pagecore_guest_write_page(words, seed, page, next >> 1);
                    mark(dirty, page);
                    control->written++;
                }
                table[index] = next;
                mark_bytes(dirty, base, &table[index]);
                if (action == PAGECORE_STEP_ALLOCATE) {
                    free_pages--;
                    control->allocated++;
                } else if (action == PAGECORE_STEP_FREE) {
                    free_pages++;
                    control->freed++;
                    if (hinting)
                        push(base, ring, produced++, epoch, page, 1, dirty);
                }
            }
            if (steps >= stop_at)
                left = PAGECORE_LEFT_STOPPED;
        }

        control->steps = steps;
        control->free_pages = free_pages;
        control->cursor = cursor;
        /* release: pairs with the acquire of the machine's drain: whoever sees the index sees the entries */
        pagecore_store_release(&control->produced, produced);
        mark_bytes(dirty, base, control);
        if (!doorbell)
            return left;
        *(volatile uint64_t *)doorbell = left;
    }
}
