/* KVM's dirty rings: one for each vCPU, mapped from its descriptor, all reaped together under one lock.
 *
 * An entry goes round: KVM fills it and sets DIRTY; we take it and set RESET; KVM_RESET_DIRTY_RINGS write-protects its
 * page again and clears the flags. Entries are taken in order, none is left out. The order of rule S2 is built in:
 * pages go into pending words that nobody else can see, all rings are reset, and only then may a log hand the words on.
 *
 * What stands in an entry is not trusted: the slot is looked up and the page is checked before any bit is set (D14).
 */
#ifndef PAGECORE_KVM_RING_H
#define PAGECORE_KVM_RING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "_atomic.h"
#include "_sync.h"
#include "dirty_log/_kvm_abi.h"

/* The log of one slot, as the rings know it. */
struct pagecore_ring_slot {
    uint32_t slot;
    size_t npages;
    uint64_t *pending;   /* pages that were taken and not handed on */
    int wrong;           /* some page may not be protected again: an entry named none, or a reset was cut short */
};

struct pagecore_ring_vcpu {
    struct pagecore_ring_entry *entries;
    uint32_t next;   /* the entry to look at, modulo the size */
    int found;       /* whether `next` is known: a ring may have been in use before it was mapped here */
};

struct pagecore_ring {
    pagecore_fair_lock lock; /* for all that follows, and the pending words */
    pid_t process;           /* whose threads take the lock */
    int vm_fd;               /* -1 once closed */
    uint32_t entries;        /* of one ring; a power of two */
    uint32_t vcpus;
    struct pagecore_ring_vcpu *vcpu;
    uint32_t slots;
    struct pagecore_ring_slot **slot;
    uint64_t foreign; /* entries of slots without a log here, or of pages outside their slot */
};

enum {
    /* Resets without progress before we give up: each is one that was cut short. */
    PAGECORE_RING_PATIENCE = 1000
};

/* ---- the lock. In a forked child nobody would ever give it back: whoever has it there is a thread of the parent's. */

static inline int pagecore_ring_is_own(const struct pagecore_ring *ring)
{
    return ring->process == getpid();
}

static inline int pagecore_ring_init(struct pagecore_ring *ring)
{
    ring->process = getpid();
    return pagecore_fair_lock_init(&ring->lock);
}

static inline void pagecore_ring_enter(struct pagecore_ring *ring)
{
    if (pagecore_ring_is_own(ring))
        pagecore_fair_acquire(&ring->lock);
}

static inline void pagecore_ring_leave(struct pagecore_ring *ring)
{
    if (pagecore_ring_is_own(ring))
        pagecore_fair_release(&ring->lock);
}

static inline void pagecore_ring_destroy(struct pagecore_ring *ring)
{
    if (pagecore_ring_is_own(ring)) /* else it would wait for those who waited at the fork */
        pagecore_fair_lock_destroy(&ring->lock);
}

/* ---- before the first vCPU */

/* Gives every vCPU that the VM will have a ring of `bytes`; 0, -ENOTSUP where this KVM has none, or -errno. */
static inline int pagecore_ring_switch_on(int vm_fd, uint32_t bytes)
{
    struct kvm_enable_cap request;

    memset(&request, 0, sizeof request);
    if (KVM_DIRTY_LOG_PAGE_OFFSET == 0)
        return -ENOTSUP;
    /* The same on x86; elsewhere only the first promises the order in which the flags hand an entry over. */
    if (ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0)
        request.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
    else if (ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0)
        request.cap = KVM_CAP_DIRTY_LOG_RING;
    else
        return -ENOTSUP;
    request.args[0] = bytes;
    return ioctl(vm_fd, KVM_ENABLE_CAP, &request) ? -errno : 0;
}

/* ---- mapping */

static inline uint32_t pagecore_ring_bytes(const struct pagecore_ring *ring)
{
    return ring->entries * (uint32_t)sizeof(struct pagecore_ring_entry);
}

/* Whether the byte can be read: outside of a ring the mapping is there, and nothing behind it (SIGBUS). */
static inline int pagecore_ring_readable(int pipe_end, const void *byte)
{
    return write(pipe_end, byte, 1) == 1;
}

/* Maps one ring; 0, -errno, or -ENOTSUP where the vCPU has no ring of exactly this size. */
static inline int pagecore_ring_map(struct pagecore_ring *ring, uint32_t number, int vcpu_fd)
{
    const size_t bytes = pagecore_ring_bytes(ring), page = 4096;
    uint8_t *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd,
                         (off_t)(KVM_DIRTY_LOG_PAGE_OFFSET * page));
    uint8_t *past = mmap(NULL, page, PROT_READ, MAP_SHARED, vcpu_fd,
                         (off_t)(KVM_DIRTY_LOG_PAGE_OFFSET * page + bytes));
    int ends[2], error = 0;

    if (base == MAP_FAILED || past == MAP_FAILED)
        error = -errno;
    else if (pipe2(ends, O_CLOEXEC))
        error = -errno;
    else {
        if (!pagecore_ring_readable(ends[1], base + bytes - 1) || pagecore_ring_readable(ends[1], past))
            error = -ENOTSUP;
        close(ends[0]);
        close(ends[1]);
    }
    if (past != MAP_FAILED)
        munmap(past, page);
    if (error && base != MAP_FAILED)
        munmap(base, bytes);
    if (!error)
        ring->vcpu[number].entries = (struct pagecore_ring_entry *)base;
    return error;
}

static inline void pagecore_ring_unmap(struct pagecore_ring *ring)
{
    for (uint32_t number = 0; number < ring->vcpus; number++)
        if (ring->vcpu[number].entries)
            munmap(ring->vcpu[number].entries, pagecore_ring_bytes(ring));
    free(ring->vcpu);
    ring->vcpu = NULL;
    ring->vcpus = 0;
}

/* ---- reaping; all of it under the lock */

static inline struct pagecore_ring_slot *pagecore_ring_find(const struct pagecore_ring *ring, uint32_t slot)
{
    for (uint32_t at = 0; at < ring->slots; at++)
        if (ring->slot[at]->slot == slot)
            return ring->slot[at];
    return NULL;
}

/* A ring that somebody else reaped before begins wherever it is now: at the first entry of a run that is dirty. KVM
 * leaves room in a ring, so there is one that is not. */
static inline void pagecore_ring_seek(struct pagecore_ring_vcpu *vcpu, uint32_t mask)
{
    for (uint32_t at = 0; at <= mask; at++)
        if (pagecore_load_acquire_32(&vcpu->entries[at].flags) == PAGECORE_ENTRY_DIRTY
            && pagecore_load_acquire_32(&vcpu->entries[(at - 1) & mask].flags) != PAGECORE_ENTRY_DIRTY) {
            vcpu->next = at;
            vcpu->found = 1;
            return;
        }
}

/* Takes what stands in one ring; returns how many entries. */
static inline uint64_t pagecore_ring_take(struct pagecore_ring *ring, struct pagecore_ring_vcpu *vcpu)
{
    const uint32_t mask = ring->entries - 1;
    struct pagecore_ring_entry *const entries = vcpu->entries;
    struct pagecore_ring_slot *log = NULL;
    uint64_t *pending = NULL; /* of the log of the last entry's slot, like `npages`: 0 where that has none */
    size_t npages = 0;
    /* The head of the last entry that was looked up: nearly always that of this one, too. No slot has that number. */
    uint64_t last = (uint64_t)UINT32_MAX << 32 | PAGECORE_ENTRY_DIRTY;
    uint32_t begin, end;

    if (!vcpu->found)
        pagecore_ring_seek(vcpu, mask);
    begin = vcpu->next;
    /* No more than once around, whatever is written there beside us. */
    for (end = begin; end - begin <= mask; end++) {
        struct pagecore_ring_entry *entry = &entries[end & mask];
        /* acquire: pairs with KVM's release of the flags; slot and offset were there before. Both words are read once:
         * what was checked is what is used. */
        const uint64_t head = pagecore_load_acquire(&entry->head);
        uint64_t offset;

        if (__builtin_expect(head != last, 0)) {
            if ((uint32_t)head != PAGECORE_ENTRY_DIRTY)
                break;
            log = pagecore_ring_find(ring, (uint32_t)(head >> 32));
            pending = log ? log->pending : NULL;
            npages = log ? log->npages : 0;
            last = head;
        }
        offset = pagecore_load_relaxed(&entry->offset);
        if (__builtin_expect(offset < npages, 1)) {
            pending[offset >> 6] |= UINT64_C(1) << (offset & 63);
        } else {
            ring->foreign++;
            if (log)
                log->wrong = 1;
        }
        /* release: pairs with KVM's acquire at the reset; we are done with the entry */
        pagecore_store_release_32(&entry->flags, PAGECORE_ENTRY_RESET);
    }
    vcpu->next = end;
    return end - begin;
}

/* Whether an entry that was taken waits for its reset: KVM goes on in order, so the last one tells. */
static inline int pagecore_ring_waits(const struct pagecore_ring *ring)
{
    for (uint32_t number = 0; number < ring->vcpus; number++) {
        const struct pagecore_ring_vcpu *vcpu = &ring->vcpu[number];
        const struct pagecore_ring_entry *entry = &vcpu->entries[(vcpu->next - 1) & (ring->entries - 1)];
        if (vcpu->found && (pagecore_load_acquire_32(&entry->flags) & PAGECORE_ENTRY_RESET))
            return 1;
    }
    return 0;
}

/* One reset, without signals; how many entries, or -errno.
 *
 * From Linux 6.16 on KVM looks for a pending signal before each entry, and stops there. The entries before it count as
 * reset, but the last up to 64 pages of them are not write-protected: KVM collects these in a mask, applies it when an
 * entry does not fit in, and forgets it here. No later reset can make up for that, and where the signal came after the
 * last entry nothing tells: the count is full. So no signal may be pending. Straight from the kernel, because the C
 * library keeps two signals of its own (setuid, pthread_cancel) out of every mask. */
static inline int pagecore_ring_reset_once(int vm_fd)
{
    const uint64_t all = ~UINT64_C(0);
    uint64_t before;
    int done;

    if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all))
        return -errno;
    done = ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, 0);
    if (done < 0)
        done = -errno;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    return done;
}

/* No mask holds off SIGKILL, SIGSTOP, a debugger, the freezer or io_uring's task work. A reset that one of them cut
 * short is gone on with, or vCPUs would find their rings full for ever; but nobody knows which pages it left writable,
 * so every log fails until logging begins anew. Before Linux 6.16 no reset is cut short. */
static inline int pagecore_ring_reset(struct pagecore_ring *ring)
{
    int idle = 0;

    while (pagecore_ring_waits(ring)) {
        const int done = pagecore_ring_reset_once(ring->vm_fd);
        if (done < 0 && done != -EINTR)
            return done;
        if (done < 0 || pagecore_ring_waits(ring))
            for (uint32_t at = 0; at < ring->slots; at++)
                ring->slot[at]->wrong = 1;
        idle = done > 0 ? 0 : idle + 1;
        if (idle > PAGECORE_RING_PATIENCE)
            return -EIO;
    }
    return 0;
}

/* S2: fetch, re-arm; publishing is the caller's next step, under the same lock. Returns the entries taken, or -errno:
 * then nothing may be handed on, and the next call goes on with the reset. */
static inline int64_t pagecore_ring_reap_locked(struct pagecore_ring *ring)
{
    uint64_t taken = 0;
    int error;

    if (ring->vm_fd < 0)
        return -EBADF;
    for (uint32_t number = 0; number < ring->vcpus; number++)
        taken += pagecore_ring_take(ring, &ring->vcpu[number]);
    error = pagecore_ring_reset(ring);
    return error ? error : (int64_t)taken;
}

/* For any thread, and for that of a vCPU that left with KVM_EXIT_DIRTY_RING_FULL. */
static inline int64_t pagecore_ring_reap(struct pagecore_ring *ring)
{
    int64_t taken;

    pagecore_ring_enter(ring);
    taken = pagecore_ring_reap_locked(ring);
    pagecore_ring_leave(ring);
    return taken;
}

/* ---- slots; each call takes the lock */

/* 0, -ENOMEM, -EBADF, or -EEXIST where the slot has a log. */
static inline int pagecore_ring_add(struct pagecore_ring *ring, struct pagecore_ring_slot *slot)
{
    struct pagecore_ring_slot **more;
    int error = 0;

    pagecore_ring_enter(ring);
    if (ring->vm_fd < 0)
        error = -EBADF;
    else if (pagecore_ring_find(ring, slot->slot))
        error = -EEXIST;
    else if (!(more = realloc(ring->slot, (ring->slots + 1) * sizeof *more)))
        error = -ENOMEM;
    else {
        ring->slot = more;
        ring->slot[ring->slots++] = slot;
    }
    pagecore_ring_leave(ring);
    return error;
}

static inline void pagecore_ring_remove(struct pagecore_ring *ring, const struct pagecore_ring_slot *slot)
{
    pagecore_ring_enter(ring);
    for (uint32_t at = 0; at < ring->slots; at++)
        if (ring->slot[at] == slot) {
            ring->slot[at] = ring->slot[--ring->slots];
            break;
        }
    pagecore_ring_leave(ring);
}

#endif
