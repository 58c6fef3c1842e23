/* What dirty logs are measured against: the bare ioctls, and the ways to find written pages without them.
 *
 * Pages are of 4 KiB. `words` are a plain bitmap, a bit for each page; nothing here is atomic and nothing checks its
 * arguments.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

/* struct kvm_clear_dirty_log and kvm_dirty_gfn, which headers older than Linux 5.2 and 5.11 lack. */
struct clear_log {
    uint32_t slot, num_pages;
    uint64_t first_page, words;
};
struct ring_entry {
    uint32_t flags, slot;
    uint64_t offset;
};
enum { DIRTY = 1, RESET = 2 };
#define CLEAR_LOG _IOWR(KVMIO, 0xc0, struct clear_log)
#define RESET_RINGS _IO(KVMIO, 0xc7)

static void mark(uint64_t *words, size_t page)
{
    words[page >> 6] |= UINT64_C(1) << (page & 63);
}

/* ---- writers */

/* A plain write to each of the pages. */
void floor_write(uint8_t *memory, const uint32_t *pages, size_t count)
{
    for (size_t at = 0; at < count; at++)
        ++*(volatile uint64_t *)(memory + (size_t)pages[at] * PAGE);
}

/* The same by a writer that logs by itself: its bit is set after the write. */
void floor_write_and_mark(uint8_t *memory, const uint32_t *pages, size_t count, uint64_t *words)
{
    for (size_t at = 0; at < count; at++) {
        ++*(volatile uint64_t *)(memory + (size_t)pages[at] * PAGE);
        __sync_fetch_and_or(&words[pages[at] >> 6], UINT64_C(1) << (pages[at] & 63));
    }
}

/* ---- KVM */

long floor_kvm_get(int vm, uint32_t slot, uint64_t *words)
{
    struct kvm_dirty_log request = {.slot = slot, .dirty_bitmap = words};

    return ioctl(vm, KVM_GET_DIRTY_LOG, &request) ? -errno : 0;
}

/* With manual protection: a copy, and all of it cleared. */
long floor_kvm_clear(int vm, uint32_t slot, uint64_t *words, uint32_t npages)
{
    struct clear_log clear = {.slot = slot, .num_pages = npages, .words = (uintptr_t)words};
    long error = floor_kvm_get(vm, slot, words);

    if (error)
        return error;
    return ioctl(vm, CLEAR_LOG, &clear) ? -errno : 0;
}

/* Takes every dirty entry of a ring, and has KVM reset them where `vm` is a VM; returns how many there were. */
long floor_ring(struct ring_entry *entries, uint32_t mask, uint32_t *next, uint64_t *words, int vm)
{
    long taken = 0;

    for (;; taken++) {
        struct ring_entry *entry = &entries[*next & mask];
        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != DIRTY)
            break;
        mark(words, entry->offset);
        __atomic_store_n(&entry->flags, RESET, __ATOMIC_RELEASE);
        ++*next;
    }
    if (vm >= 0 && taken && ioctl(vm, RESET_RINGS, 0) != taken)
        return -1;
    return taken;
}

/* What KVM would have put there. */
void floor_ring_fill(struct ring_entry *entries, const uint32_t *pages, size_t count)
{
    for (size_t at = 0; at < count; at++)
        entries[at] = (struct ring_entry){.flags = DIRTY, .offset = pages[at]};
}

/* ---- page tables */

/* struct pm_scan_arg and struct page_region of Linux 6.7. */
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};
struct region {
    uint64_t start, end, categories;
};

#define SCAN _IOWR('f', 16, struct scan)

/* Everything written is armed again and listed; returns how many runs that were. Without a list it is only armed. */
long floor_scan(int pagemap, uint64_t start, uint64_t length, struct region *regions, size_t capacity)
{
    struct scan scan = {.size = sizeof scan, .flags = 3, .start = start, .end = start + length, .mask = 2, .returned = 2};
    long runs = 0;

    scan.vec = (uintptr_t)regions;
    scan.vec_len = regions ? capacity : 0;
    while (scan.start < scan.end) {
        int got = ioctl(pagemap, SCAN, &scan);
        if (got < 0)
            return -errno;
        runs += got;
        scan.start = scan.walk_end;
    }
    return runs;
}

/* The entries of /proc/self/pagemap, of which those without the protection of userfaultfd are pages that were written.
 * Nothing is armed again. */
long floor_read_pagemap(int pagemap, uint64_t start, size_t npages, uint64_t *entries, uint64_t *words)
{
    long found = 0;

    if (pread(pagemap, entries, npages * sizeof *entries, (off_t)(start / PAGE * sizeof *entries))
        != (ssize_t)(npages * sizeof *entries))
        return -errno;
    for (size_t page = 0; page < npages; page++)
        if (!(entries[page] >> 57 & 1)) {
            mark(words, page);
            found++;
        }
    return found;
}

/* Each page beside a copy of it, which is brought up to date. */
long floor_compare(const uint8_t *memory, uint8_t *shadow, size_t npages, uint64_t *words)
{
    long found = 0;

    for (size_t at = 0; at < npages * PAGE; at += PAGE)
        if (memcmp(memory + at, shadow + at, PAGE) != 0) {
            memcpy(shadow + at, memory + at, PAGE);
            mark(words, at / PAGE);
            found++;
        }
    return found;
}

/* ---- mprotect and a signal handler */

static struct {
    uint8_t *memory;
    size_t size;
    uint64_t *words;
    struct sigaction before;
} trapped;

static void on_write(int number, siginfo_t *info, void *context)
{
    const size_t offset = (size_t)((uint8_t *)info->si_addr - trapped.memory);

    (void)number, (void)context;
    if (offset >= trapped.size) {
        sigaction(SIGSEGV, &trapped.before, NULL); /* not ours: it comes again, to whoever had it before */
        return;
    }
    mark(trapped.words, offset / PAGE);
    mprotect(trapped.memory + offset / PAGE * PAGE, PAGE, PROT_READ | PROT_WRITE);
}

/* Every write to memory that is armed afterwards sets its page's bit in `words`. One memory at a time. */
long floor_trap_on(uint8_t *memory, size_t size, uint64_t *words)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_write;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    trapped.memory = memory;
    trapped.size = size;
    trapped.words = words;
    return sigaction(SIGSEGV, &action, &trapped.before) ? -errno : 0;
}

long floor_trap_arm(void)
{
    return mprotect(trapped.memory, trapped.size, PROT_READ) ? -errno : 0;
}

long floor_trap_off(void)
{
    if (mprotect(trapped.memory, trapped.size, PROT_READ | PROT_WRITE))
        return -errno;
    return sigaction(SIGSEGV, &trapped.before, NULL) ? -errno : 0;
}
