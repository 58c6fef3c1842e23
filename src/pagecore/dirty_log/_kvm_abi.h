/* KVM's dirty logs: what the headers of the build host may be too old to have, and proof that the rest is as we think.
 * As _kernel_abi.h: presence here says nothing about the running kernel, which is asked with KVM_CHECK_EXTENSION. */
#ifndef PAGECORE_KVM_ABI_H
#define PAGECORE_KVM_ABI_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

#ifndef KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 168 /* Linux 5.2 */
#endif
#ifndef KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE (1 << 0)
#endif
#ifndef KVM_DIRTY_LOG_INITIALLY_SET
#define KVM_DIRTY_LOG_INITIALLY_SET (1 << 1) /* Linux 5.7 */
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING
#define KVM_CAP_DIRTY_LOG_RING 192 /* Linux 5.11 */
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223 /* Linux 6.1 */
#endif
#ifndef KVM_EXIT_DIRTY_RING_FULL
#define KVM_EXIT_DIRTY_RING_FULL 31
#endif
#ifndef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 0 /* this processor's KVM has no rings */
#endif
#ifndef KVM_RESET_DIRTY_RINGS
#define KVM_RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)
#endif

/* struct kvm_clear_dirty_log of Linux 5.2. */
struct pagecore_kvm_clear {
    uint32_t slot;
    uint32_t num_pages;
    uint64_t first_page;
    uint64_t dirty_bitmap;
};

#define PAGECORE_KVM_CLEAR_DIRTY_LOG _IOWR(KVMIO, 0xc0, struct pagecore_kvm_clear)

/* struct kvm_dirty_gfn of Linux 5.11: one entry of a ring. */
struct pagecore_ring_entry {
    union {
        struct {
            uint32_t flags;
            uint32_t slot;
        };
        uint64_t head; /* both in one load: flags in the low half */
    };
    uint64_t offset;
};

enum {
    PAGECORE_ENTRY_DIRTY = 1,
    PAGECORE_ENTRY_RESET = 2
};

_Static_assert(sizeof(struct pagecore_kvm_clear) == 24 && sizeof(struct pagecore_ring_entry) == 16, "layout");
_Static_assert(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 == 168 && KVM_CAP_DIRTY_LOG_RING == 192 &&
                   KVM_CAP_DIRTY_LOG_RING_ACQ_REL == 223 && KVM_EXIT_DIRTY_RING_FULL == 31,
               "numbers of KVM");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "flags are the low half of an entry's head");
#ifdef KVM_CLEAR_DIRTY_LOG
_Static_assert(KVM_CLEAR_DIRTY_LOG == PAGECORE_KVM_CLEAR_DIRTY_LOG, "KVM_CLEAR_DIRTY_LOG");
#endif
#ifdef KVM_DIRTY_GFN_F_DIRTY
_Static_assert(KVM_DIRTY_GFN_F_DIRTY == PAGECORE_ENTRY_DIRTY && KVM_DIRTY_GFN_F_RESET == PAGECORE_ENTRY_RESET,
               "flags of an entry");
_Static_assert(sizeof(struct kvm_dirty_gfn) == sizeof(struct pagecore_ring_entry) &&
                   offsetof(struct kvm_dirty_gfn, offset) == offsetof(struct pagecore_ring_entry, offset),
               "struct kvm_dirty_gfn");
#endif

#endif
