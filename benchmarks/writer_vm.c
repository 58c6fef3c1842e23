/* See writer_vm.h. The guest runs 64-bit user mode code: where ring 0 is emulated (PVM), ring 3 is native. */
#define _GNU_SOURCE
#include "writer_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__)

#include <linux/kvm.h>
#include <stdlib.h>

enum {
    PAGE = 4096,
    GIB = 1 << 30,
    /* In the slot of our own, from its start. */
    PML4 = 0,
    PDPT = PAGE,
    DIRECTORIES = 2 * PAGE, /* two: 2 GiB */
    CODE = 4 * PAGE,
    LIST = 5 * PAGE,
    OWN_SIZE = 4 << 20,
    RING_CAP = 192, /* KVM_CAP_DIRTY_LOG_RING */
    RING_AT = 64,   /* KVM_DIRTY_LOG_PAGE_OFFSET */
    RING_FULL = 31, /* KVM_EXIT_DIRTY_RING_FULL */
};

/* Nothing backs it: a store to it leaves the guest. */
static const uint64_t DOORBELL = (uint64_t)GIB + (512 << 20);

static const uint8_t PROGRAM[] = {
    0x48, 0x8b, 0x07,       /* again: mov rax, [rdi] */
    0x48, 0xff, 0x00,       /* inc qword ptr [rax] */
    0x48, 0x83, 0xc7, 0x08, /* add rdi, 8 */
    0x48, 0xff, 0xce,       /* dec rsi */
    0x75, 0xf1,             /* jnz again */
    0x88, 0x02,             /* mov [rdx], al */
    0xeb, 0xfe,             /* jmp here */
};

static void map_everything(struct writer_vm *vm)
{
    uint64_t *pml4 = (uint64_t *)(vm->own + PML4), *pdpt = (uint64_t *)(vm->own + PDPT);
    uint64_t *entries = (uint64_t *)(vm->own + DIRECTORIES);

    pml4[0] = (vm->own_at + PDPT) | 7;
    for (uint64_t gib = 0; gib < 2; gib++)
        pdpt[gib] = (vm->own_at + DIRECTORIES + gib * PAGE) | 7;
    for (uint64_t block = 0; block < 1024; block++)
        entries[block] = block << 21 | 0x87; /* present, writable, user, 2 MiB */
    memcpy(vm->own + CODE, PROGRAM, sizeof PROGRAM);
}

static int set_up_vcpu(struct writer_vm *vm)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + 256 * sizeof cpuid->entries[0]);
    const struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1,
    };
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1,
    };
    struct kvm_sregs sregs;
    int error = 0;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = 256;
    if (ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) || ioctl(vm->vcpu, KVM_SET_CPUID2, cpuid)
        || ioctl(vm->vcpu, KVM_GET_SREGS, &sregs))
        error = -errno;
    free(cpuid);
    if (error)
        return error;
    sregs.cr3 = vm->own_at + PML4;
    sregs.cr4 |= 0x220;
    sregs.cr0 = 0x80050033;
    sregs.efer = 0x501;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    return ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) ? -errno : 0;
}

static int open_vm(struct writer_vm *vm, void *memory, size_t size, uint32_t ring)
{
    struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
    int run_size;

    if (!size || size > GIB || size % (2 << 20))
        return -EINVAL;
    if ((vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0)
        return -errno;
    if ((vm->vm = ioctl(vm->kvm, KVM_CREATE_VM, 0)) < 0)
        return -errno;
    vm->own = mmap(NULL, OWN_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (vm->own == MAP_FAILED) {
        vm->own = NULL;
        return -errno;
    }
    vm->own_size = OWN_SIZE;
    vm->own_at = GIB;
    if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &slot))
        return -errno;
    slot = (struct kvm_userspace_memory_region){
        .slot = 1, .guest_phys_addr = vm->own_at, .memory_size = OWN_SIZE, .userspace_addr = (uintptr_t)vm->own,
    };
    if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &slot))
        return -errno;
    if (ring) {
        struct kvm_enable_cap request = {.cap = RING_CAP, .args = {ring}};
        if (ioctl(vm->vm, KVM_ENABLE_CAP, &request))
            return -errno;
    }
    if ((vm->vcpu = ioctl(vm->vm, KVM_CREATE_VCPU, 0)) < 0)
        return -errno;
    if ((run_size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0)) < 0)
        return -errno;
    vm->run = mmap(NULL, (size_t)run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
    if (vm->run == MAP_FAILED) {
        vm->run = NULL;
        return -errno;
    }
    vm->run_size = (size_t)run_size;
    if (ring) {
        vm->ring = mmap(NULL, ring, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, (off_t)RING_AT * PAGE);
        if (vm->ring == MAP_FAILED) {
            vm->ring = NULL;
            return -errno;
        }
        vm->ring_size = ring;
    }
    map_everything(vm);
    return set_up_vcpu(vm);
}

int writer_vm_open(struct writer_vm *vm, void *memory, size_t size, uint32_t ring)
{
    int error;

    memset(vm, 0, sizeof *vm);
    vm->kvm = vm->vm = vm->vcpu = -1;
    if ((error = open_vm(vm, memory, size, ring)))
        writer_vm_close(vm);
    return error;
}

int writer_vm_load(struct writer_vm *vm, const uint32_t *pages, size_t count)
{
    uint64_t *list = (uint64_t *)(vm->own + LIST);

    if (!count || count > (OWN_SIZE - LIST) / sizeof *list)
        return -EINVAL;
    for (size_t at = 0; at < count; at++)
        list[at] = (uint64_t)pages[at] * PAGE;
    vm->count = count;
    return 0;
}

int writer_vm_go_on(struct writer_vm *vm)
{
    int result;

    for (;;) {
        if (ioctl(vm->vcpu, KVM_RUN, 0)) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            return -errno;
        }
        if (vm->run->exit_reason == KVM_EXIT_INTR)
            continue;
        if (vm->run->exit_reason == RING_FULL)
            return WRITER_RING_FULL;
        if (vm->run->exit_reason != KVM_EXIT_MMIO || vm->run->mmio.phys_addr != DOORBELL)
            return -EPROTO;
        break;
    }
    /* The store is finished by the next KVM_RUN, which must not go on beyond it. */
    vm->run->immediate_exit = 1;
    result = ioctl(vm->vcpu, KVM_RUN, 0) == -1 && errno == EINTR ? WRITER_DONE : -EPROTO;
    vm->run->immediate_exit = 0;
    return result;
}

int writer_vm_run(struct writer_vm *vm)
{
    const struct kvm_regs regs = {
        .rip = vm->own_at + CODE, .rflags = 2, .rdi = vm->own_at + LIST, .rsi = vm->count, .rdx = DOORBELL,
    };

    if (!vm->count)
        return -EINVAL;
    return ioctl(vm->vcpu, KVM_SET_REGS, &regs) ? -errno : writer_vm_go_on(vm);
}

void writer_vm_close(struct writer_vm *vm)
{
    const int descriptors[] = {vm->vcpu, vm->vm, vm->kvm};

    if (vm->ring)
        munmap(vm->ring, vm->ring_size);
    if (vm->run)
        munmap(vm->run, vm->run_size);
    for (int at = 0; at < 3; at++)
        if (descriptors[at] >= 0)
            close(descriptors[at]);
    if (vm->own)
        munmap(vm->own, vm->own_size);
    memset(vm, 0, sizeof *vm);
    vm->kvm = vm->vm = vm->vcpu = -1;
}

#else

int writer_vm_open(struct writer_vm *vm, void *memory, size_t size, uint32_t ring)
{
    (void)memory, (void)size, (void)ring;
    memset(vm, 0, sizeof *vm);
    vm->kvm = vm->vm = vm->vcpu = -1;
    return -ENOSYS;
}

int writer_vm_load(struct writer_vm *vm, const uint32_t *pages, size_t count)
{
    (void)vm, (void)pages, (void)count;
    return -ENOSYS;
}

int writer_vm_run(struct writer_vm *vm)
{
    (void)vm;
    return -ENOSYS;
}

int writer_vm_go_on(struct writer_vm *vm)
{
    (void)vm;
    return -ENOSYS;
}

void writer_vm_close(struct writer_vm *vm)
{
    (void)vm;
}

#endif
