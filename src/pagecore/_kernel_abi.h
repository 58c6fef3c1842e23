/* Kernel interface: what the headers of the build host may be too old to have, and proof that the rest is as we think.
 *
 * Presence in a header says nothing about the running kernel: everything here is gated at run time, by the answer of
 * UFFDIO_API, by the mask that UFFDIO_REGISTER returns, or by trying (probe.py). Structs that older headers lack carry
 * our own names, so that a newer header cannot collide with them.
 */
#ifndef PAGECORE_KERNEL_ABI_H
#define PAGECORE_KERNEL_ABI_H

#include <linux/fs.h>
#include <linux/ioctl.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sys/syscall.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434 /* 5.3; the same on every architecture, as all numbers since then */
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440 /* 5.10 */
#endif

/* Linux 5.11: faults of the kernel itself (read(2), KVM) are not delivered; allowed to everyone. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* Linux 6.1: /dev/userfaultfd, where the permissions of the file decide and not the sysctl. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#ifndef UFFD_FEATURE_MINOR_HUGETLBFS
#define UFFD_FEATURE_MINOR_HUGETLBFS (1 << 9) /* 5.13 */
#endif
#ifndef UFFD_FEATURE_MINOR_SHMEM
#define UFFD_FEATURE_MINOR_SHMEM (1 << 10) /* 5.14 */
#endif
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11) /* 5.18 */
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* 5.19 */
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13) /* 6.4 */
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14) /* 6.6 */
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15) /* 6.7 */
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16) /* 6.8 */
#endif
#ifndef UFFD_PAGEFAULT_FLAG_MINOR
#define UFFD_PAGEFAULT_FLAG_MINOR (1 << 2)
#endif

#ifndef _UFFDIO_MOVE
#define _UFFDIO_MOVE 0x05
#endif
#ifndef _UFFDIO_CONTINUE
#define _UFFDIO_CONTINUE 0x07
#endif
#ifndef _UFFDIO_POISON
#define _UFFDIO_POISON 0x08
#endif

/* struct uffdio_continue of Linux 5.13. */
struct pagecore_uffdio_continue {
    struct uffdio_range range;
    __u64 mode;
    __s64 mapped;
};

/* struct uffdio_poison of Linux 6.6. */
struct pagecore_uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};

/* struct uffdio_move of Linux 6.8. */
struct pagecore_uffdio_move {
    __u64 dst;
    __u64 src;
    __u64 len;
    __u64 mode;
    __s64 move;
};

#define PAGECORE_UFFDIO_POISON _IOWR(0xAA, _UFFDIO_POISON, struct pagecore_uffdio_poison)
#define PAGECORE_UFFDIO_MOVE _IOWR(0xAA, _UFFDIO_MOVE, struct pagecore_uffdio_move)
#define PAGECORE_UFFDIO_CONTINUE _IOWR(0xAA, _UFFDIO_CONTINUE, struct pagecore_uffdio_continue)
#define PAGECORE_POISON_MODE_DONTWAKE ((__u64)1 << 0)
#define PAGECORE_CONTINUE_MODE_DONTWAKE ((__u64)1 << 0)
#define PAGECORE_CONTINUE_MODE_WP ((__u64)1 << 1) /* 6.4 */
#define PAGECORE_MOVE_MODE_DONTWAKE ((__u64)1 << 0)

/* struct pm_scan_arg of Linux 6.7. */
struct pagecore_pm_scan_arg {
    __u64 size;
    __u64 flags;
    __u64 start;
    __u64 end;
    __u64 walk_end;
    __u64 vec;
    __u64 vec_len;
    __u64 max_pages;
    __u64 category_inverted;
    __u64 category_mask;
    __u64 category_anyof_mask;
    __u64 return_mask;
};

/* struct page_region of Linux 6.7: [start, end) and the categories of return_mask that all its pages are in. */
struct pagecore_page_region {
    __u64 start;
    __u64 end;
    __u64 categories;
};

#define PAGECORE_PAGEMAP_SCAN _IOWR('f', 16, struct pagecore_pm_scan_arg)
#define PAGECORE_PM_SCAN_WP_MATCHING (1 << 0)
#define PAGECORE_PM_SCAN_CHECK_WPASYNC (1 << 1)
#define PAGECORE_PAGE_IS_WPALLOWED (1 << 0)
#define PAGECORE_PAGE_IS_WRITTEN (1 << 1)
#define PAGECORE_PAGE_IS_PRESENT (1 << 3)
#define PAGECORE_PAGE_IS_SWAPPED (1 << 4)
#define PAGECORE_PAGE_IS_PFNZERO (1 << 5)

/* struct procmap_query of Linux 6.11. */
struct pagecore_procmap_query {
    __u64 size;
    __u64 query_flags;
    __u64 query_addr;
    __u64 vma_start;
    __u64 vma_end;
    __u64 vma_flags;
    __u64 vma_page_size;
    __u64 vma_offset;
    __u64 inode;
    __u32 dev_major;
    __u32 dev_minor;
    __u32 vma_name_size;
    __u32 build_id_size;
    __u64 vma_name_addr;
    __u64 build_id_addr;
};

#define PAGECORE_PROCMAP_QUERY _IOWR('f', 17, struct pagecore_procmap_query)
#define PAGECORE_PROCMAP_QUERY_COVERING_OR_NEXT 0x10

#ifndef __NR_userfaultfd
#error "this architecture's headers have no userfaultfd system call"
#endif

/* A number typed in by hand that is wrong by its direction bits gets EINVAL for ever and looks like bad luck:
 * WAKE and UNREGISTER are _IOR, although nothing is read back. */
_Static_assert(UFFDIO_API == _IOWR(0xAA, 0x3F, struct uffdio_api), "UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == _IOWR(0xAA, 0x00, struct uffdio_register), "UFFDIO_REGISTER");
_Static_assert(UFFDIO_UNREGISTER == _IOR(0xAA, 0x01, struct uffdio_range), "UFFDIO_UNREGISTER");
_Static_assert(UFFDIO_WAKE == _IOR(0xAA, 0x02, struct uffdio_range), "UFFDIO_WAKE");
_Static_assert(UFFDIO_COPY == _IOWR(0xAA, 0x03, struct uffdio_copy), "UFFDIO_COPY");
_Static_assert(UFFDIO_ZEROPAGE == _IOWR(0xAA, 0x04, struct uffdio_zeropage), "UFFDIO_ZEROPAGE");
_Static_assert(UFFDIO_WRITEPROTECT == _IOWR(0xAA, 0x06, struct uffdio_writeprotect), "UFFDIO_WRITEPROTECT");
_Static_assert(USERFAULTFD_IOC_NEW == _IO(0xAA, 0x00), "USERFAULTFD_IOC_NEW");
#if _IOC_NONE == 0 && _IOC_WRITE == 1 /* the encoding of x86, arm64, riscv; others put the direction elsewhere */
_Static_assert(UFFDIO_API == 0xC018AA3F, "UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == 0xC020AA00, "UFFDIO_REGISTER");
_Static_assert(UFFDIO_UNREGISTER == 0x8010AA01, "UFFDIO_UNREGISTER");
_Static_assert(UFFDIO_WAKE == 0x8010AA02, "UFFDIO_WAKE");
_Static_assert(UFFDIO_COPY == 0xC028AA03, "UFFDIO_COPY");
_Static_assert(UFFDIO_ZEROPAGE == 0xC020AA04, "UFFDIO_ZEROPAGE");
_Static_assert(PAGECORE_UFFDIO_MOVE == 0xC028AA05, "UFFDIO_MOVE");
_Static_assert(PAGECORE_UFFDIO_POISON == 0xC020AA08, "UFFDIO_POISON");
_Static_assert(UFFDIO_WRITEPROTECT == 0xC018AA06, "UFFDIO_WRITEPROTECT");
_Static_assert(PAGECORE_UFFDIO_CONTINUE == 0xC020AA07, "UFFDIO_CONTINUE");
_Static_assert(PAGECORE_PAGEMAP_SCAN == 0xC0606610, "PAGEMAP_SCAN");
_Static_assert(PAGECORE_PROCMAP_QUERY == 0xC0686611, "PROCMAP_QUERY");
#endif
#ifdef UFFDIO_CONTINUE
_Static_assert(UFFDIO_CONTINUE == PAGECORE_UFFDIO_CONTINUE, "UFFDIO_CONTINUE");
_Static_assert(UFFDIO_CONTINUE_MODE_DONTWAKE == PAGECORE_CONTINUE_MODE_DONTWAKE, "UFFDIO_CONTINUE_MODE_DONTWAKE");
#endif
#ifdef UFFDIO_CONTINUE_MODE_WP
_Static_assert(UFFDIO_CONTINUE_MODE_WP == PAGECORE_CONTINUE_MODE_WP, "UFFDIO_CONTINUE_MODE_WP");
#endif
#ifdef UFFDIO_POISON_MODE_DONTWAKE
_Static_assert(UFFDIO_POISON_MODE_DONTWAKE == PAGECORE_POISON_MODE_DONTWAKE, "UFFDIO_POISON_MODE_DONTWAKE");
#endif
#ifdef UFFDIO_MOVE_MODE_DONTWAKE
_Static_assert(UFFDIO_MOVE_MODE_DONTWAKE == PAGECORE_MOVE_MODE_DONTWAKE, "UFFDIO_MOVE_MODE_DONTWAKE");
#endif
#ifdef UFFDIO_POISON
_Static_assert(UFFDIO_POISON == PAGECORE_UFFDIO_POISON, "UFFDIO_POISON");
#endif
#ifdef UFFDIO_MOVE
_Static_assert(UFFDIO_MOVE == PAGECORE_UFFDIO_MOVE, "UFFDIO_MOVE");
#endif
#ifdef PAGEMAP_SCAN
_Static_assert(PAGEMAP_SCAN == PAGECORE_PAGEMAP_SCAN, "PAGEMAP_SCAN");
_Static_assert(PM_SCAN_WP_MATCHING == PAGECORE_PM_SCAN_WP_MATCHING, "PM_SCAN_WP_MATCHING");
_Static_assert(PM_SCAN_CHECK_WPASYNC == PAGECORE_PM_SCAN_CHECK_WPASYNC, "PM_SCAN_CHECK_WPASYNC");
_Static_assert(PAGE_IS_WPALLOWED == PAGECORE_PAGE_IS_WPALLOWED, "PAGE_IS_WPALLOWED");
_Static_assert(PAGE_IS_WRITTEN == PAGECORE_PAGE_IS_WRITTEN, "PAGE_IS_WRITTEN");
_Static_assert(PAGE_IS_PRESENT == PAGECORE_PAGE_IS_PRESENT, "PAGE_IS_PRESENT");
_Static_assert(PAGE_IS_SWAPPED == PAGECORE_PAGE_IS_SWAPPED, "PAGE_IS_SWAPPED");
_Static_assert(PAGE_IS_PFNZERO == PAGECORE_PAGE_IS_PFNZERO, "PAGE_IS_PFNZERO");
#endif
#ifdef PROCMAP_QUERY
_Static_assert(PROCMAP_QUERY == PAGECORE_PROCMAP_QUERY, "PROCMAP_QUERY");
_Static_assert(PROCMAP_QUERY_COVERING_OR_NEXT_VMA == PAGECORE_PROCMAP_QUERY_COVERING_OR_NEXT, "COVERING_OR_NEXT_VMA");
#endif

/* The Python side (_uffd_types.Feature) spells these bits as numbers. */
_Static_assert(UFFD_FEATURE_PAGEFAULT_FLAG_WP == 1 << 0, "PAGEFAULT_FLAG_WP");
_Static_assert(UFFD_FEATURE_EVENT_FORK == 1 << 1, "EVENT_FORK");
_Static_assert(UFFD_FEATURE_EVENT_REMAP == 1 << 2, "EVENT_REMAP");
_Static_assert(UFFD_FEATURE_EVENT_REMOVE == 1 << 3, "EVENT_REMOVE");
_Static_assert(UFFD_FEATURE_MISSING_HUGETLBFS == 1 << 4, "MISSING_HUGETLBFS");
_Static_assert(UFFD_FEATURE_MISSING_SHMEM == 1 << 5, "MISSING_SHMEM");
_Static_assert(UFFD_FEATURE_EVENT_UNMAP == 1 << 6, "EVENT_UNMAP");
_Static_assert(UFFD_FEATURE_SIGBUS == 1 << 7, "SIGBUS");
_Static_assert(UFFD_FEATURE_THREAD_ID == 1 << 8, "THREAD_ID");
_Static_assert(UFFD_FEATURE_MINOR_HUGETLBFS == 1 << 9, "MINOR_HUGETLBFS");
_Static_assert(UFFD_FEATURE_MINOR_SHMEM == 1 << 10, "MINOR_SHMEM");
_Static_assert(UFFD_FEATURE_EXACT_ADDRESS == 1 << 11, "EXACT_ADDRESS");
_Static_assert(UFFD_FEATURE_WP_HUGETLBFS_SHMEM == 1 << 12, "WP_HUGETLBFS_SHMEM");
_Static_assert(UFFD_FEATURE_WP_UNPOPULATED == 1 << 13, "WP_UNPOPULATED");
_Static_assert(UFFD_FEATURE_POISON == 1 << 14, "POISON");
_Static_assert(UFFD_FEATURE_WP_ASYNC == 1 << 15, "WP_ASYNC");
_Static_assert(UFFD_FEATURE_MOVE == 1 << 16, "MOVE");
_Static_assert(UFFD_EVENT_PAGEFAULT == 0x12 && UFFD_EVENT_FORK == 0x13 && UFFD_EVENT_REMAP == 0x14 &&
                   UFFD_EVENT_REMOVE == 0x15 && UFFD_EVENT_UNMAP == 0x16,
               "the event numbers of _uffd.pxd");
_Static_assert(sizeof(struct uffd_msg) == 32, "read() takes buffers of whole messages");

#endif
