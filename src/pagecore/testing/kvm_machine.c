/* The KVM half of the machine: a 64-bit guest at CPL 3 without interrupts, descriptor tables or devices.
 *
 * - User mode, because some hypervisors (PVM) emulate ring 0 one instruction at a time and run ring 3
 *   natively.
 * - HLT would be a triple fault there: the guest leaves by a store to an address that no memory backs. Such
 *   a store is finished by the next KVM_RUN; before registers are read, one KVM_RUN with immediate_exit does
 *   that alone.
 * - The whole state is KVM_GET_REGS and KVM_GET_SREGS: the program uses general registers only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest_image.h"
#include "machine.h"

#if defined(__x86_64__) && defined(__linux__)

#include <linux/kvm.h>

#include "dirty_log/_kvm_ring.h"

#define CPUID_ENTRIES 256

static int set_cpuid(struct pagecore_machine *machine, int vcpu_fd)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + CPUID_ENTRIES * sizeof cpuid->entries[0]);
    int error = 0;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = CPUID_ENTRIES;
    if (ioctl(machine->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) || ioctl(vcpu_fd, KVM_SET_CPUID2, cpuid))
        error = -errno;
    free(cpuid);
    return error;
}

static int set_registers(struct pagecore_machine *machine, struct pagecore_vcpu *vcpu)
{
    const struct pagecore_layout *layout = &machine->layout;
    const struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1,
    };
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1,
    };
    const uint64_t entry = layout->code_first * PAGECORE_GUEST_PAGE_SIZE
                           + (uint64_t)((const uint8_t *)pagecore_guest_program - __start_pagecore_guest);
    const uint64_t stack_top = vcpu->control_offset + PAGECORE_GUEST_VCPU_PAGES * PAGECORE_GUEST_PAGE_SIZE;
    struct kvm_sregs sregs;
    struct kvm_regs regs = {
        .rip = entry,
        .rsp = stack_top - 8,           /* where a call would have left its return address */
        .rflags = 2,
        .rdi = 0,                       /* base: guest memory starts at 0 */
        .rsi = vcpu->control_offset,
        .rdx = 0,                       /* no log of its own: KVM keeps one */
        .rcx = machine->doorbell,
    };

    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
        return -errno;
    sregs.cr3 = layout->paging_first * PAGECORE_GUEST_PAGE_SIZE;
    sregs.cr4 |= 0x220;                 /* PAE, OSFXSR */
    sregs.cr0 = 0x80050033;             /* PG, AM, WP, NE, ET, MP, PE */
    sregs.efer = 0x501;                 /* LMA, LME, SCE */
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) || ioctl(vcpu->fd, KVM_SET_REGS, &regs))
        return -errno;
    return 0;
}

int pagecore_kvm_open(struct pagecore_machine *machine, const char *device, const char **what)
{
    int run_size, version, error;

    *what = "open";
    if ((machine->kvm_fd = open(device, O_RDWR | O_CLOEXEC)) < 0)
        return -errno;
    *what = "KVM_GET_API_VERSION";
    if ((version = ioctl(machine->kvm_fd, KVM_GET_API_VERSION, 0)) != KVM_API_VERSION)
        return version < 0 ? -errno : -EPROTO;
    *what = "KVM_CAP_IMMEDIATE_EXIT";
    if (ioctl(machine->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
        return -ENOTSUP;
    *what = "KVM_CREATE_VM";
    if ((machine->vm_fd = ioctl(machine->kvm_fd, KVM_CREATE_VM, 0)) < 0)
        return -errno;
    for (uint32_t number = 0; number < machine->slots; number++) {
        const uint64_t address = machine->slot[number].first * PAGECORE_GUEST_PAGE_SIZE;
        struct kvm_userspace_memory_region slot = {
            .slot = number,
            .guest_phys_addr = address,
            .memory_size = machine->slot[number].pages * PAGECORE_GUEST_PAGE_SIZE,
            .userspace_addr = (uintptr_t)machine->memory + address,
        };

        *what = "KVM_SET_USER_MEMORY_REGION";
        if (ioctl(machine->vm_fd, KVM_SET_USER_MEMORY_REGION, &slot))
            return -errno;
    }
    if (machine->ring_size) {
        *what = "KVM_CAP_DIRTY_LOG_RING";
        if ((error = pagecore_ring_switch_on(machine->vm_fd, machine->ring_size)))
            return error;
    }
    *what = "KVM_GET_VCPU_MMAP_SIZE";
    if ((run_size = ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0)) < 0)
        return -errno;
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        void *run;

        *what = "KVM_CREATE_VCPU";
        if ((vcpu->fd = ioctl(machine->vm_fd, KVM_CREATE_VCPU, index)) < 0)
            return -errno;
        *what = "mmap of a vCPU";
        run = mmap(NULL, (size_t)run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
        if (run == MAP_FAILED)
            return -errno;
        vcpu->run = run;
        vcpu->run_size = (size_t)run_size;
        *what = "KVM_SET_CPUID2";
        if ((error = set_cpuid(machine, vcpu->fd)))
            return error;
        *what = "KVM_SET_SREGS";
        if ((error = set_registers(machine, vcpu)))
            return error;
    }
    machine->kind = PAGECORE_KIND_KVM;
    return 0;
}

void pagecore_kvm_close(struct pagecore_machine *machine)
{
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        if (vcpu->run)
            munmap(vcpu->run, vcpu->run_size);
        if (vcpu->fd >= 0)
            close(vcpu->fd);
        vcpu->run = NULL;
        vcpu->fd = -1;
    }
    if (machine->vm_fd >= 0)
        close(machine->vm_fd);
    if (machine->kvm_fd >= 0)
        close(machine->kvm_fd);
    machine->vm_fd = machine->kvm_fd = -1;
}

int pagecore_kvm_enter(struct pagecore_vcpu *vcpu, uint64_t *left)
{
    struct kvm_run *run = vcpu->run;

    vcpu->unfinished = 0;       /* this very call finishes the store that left the guest */
    for (;;) {
        if (ioctl(vcpu->fd, KVM_RUN, 0)) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            /* EFAULT: a page of the guest could not be had, e.g. a userfaultfd that serves user mode only. */
            return pagecore_vcpu_fail(vcpu, errno, "KVM_RUN: %s", strerror(errno));
        }
        if (run->exit_reason == KVM_EXIT_INTR)
            continue;
        if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.len == 8
            && run->mmio.phys_addr == vcpu->machine->doorbell) {
            vcpu->unfinished = 1;
            memcpy(left, run->mmio.data, 8);
            return 0;
        }
        if (run->exit_reason == KVM_EXIT_DIRTY_RING_FULL && vcpu->machine->ring) {
            const int64_t taken = pagecore_ring_reap(vcpu->machine->ring);
            vcpu->full_exits++;
            if (taken >= 0)
                continue;
            return pagecore_vcpu_fail(vcpu, (int)-taken, "the dirty rings: %s", strerror((int)-taken));
        }
        struct kvm_regs regs = {0};
        (void)ioctl(vcpu->fd, KVM_GET_REGS, &regs);
        if (run->exit_reason == KVM_EXIT_MMIO)
            return pagecore_vcpu_fail(vcpu, 0, "the guest left by an access to %#llx, at rip %#llx",
                                      (unsigned long long)run->mmio.phys_addr, (unsigned long long)regs.rip);
        return pagecore_vcpu_fail(vcpu, 0, "the guest left with KVM exit reason %u, at rip %#llx",
                                  run->exit_reason, (unsigned long long)regs.rip);
    }
}

int pagecore_kvm_settle(struct pagecore_vcpu *vcpu)
{
    int result, error;

    if (!vcpu->unfinished)
        return 0;
    vcpu->run->immediate_exit = 1;
    result = ioctl(vcpu->fd, KVM_RUN, 0);
    error = errno;
    vcpu->run->immediate_exit = 0;
    if (result == 0 || error != EINTR)
        return pagecore_vcpu_fail(vcpu, result ? error : 0,
                                  "the store that left the guest could not be completed");
    vcpu->unfinished = 0;
    return 0;
}

size_t pagecore_kvm_state_size(void)
{
    return sizeof(struct kvm_regs) + sizeof(struct kvm_sregs);
}

int pagecore_kvm_get_state(struct pagecore_vcpu *vcpu, uint8_t *state)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;

    if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
        return -errno;
    memcpy(state, &regs, sizeof regs);
    memcpy(state + sizeof regs, &sregs, sizeof sregs);
    return 0;
}

int pagecore_kvm_set_state(struct pagecore_vcpu *vcpu, const uint8_t *state)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;

    memcpy(&regs, state, sizeof regs);
    memcpy(&sregs, state + sizeof regs, sizeof sregs);
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) || ioctl(vcpu->fd, KVM_SET_REGS, &regs))
        return -errno;
    return 0;
}

#else

int pagecore_kvm_open(struct pagecore_machine *machine, const char *device, const char **what)
{
    (void)machine, (void)device;
    *what = "this processor";
    return -ENOSYS;
}

void pagecore_kvm_close(struct pagecore_machine *machine)
{
    (void)machine;
}

int pagecore_kvm_enter(struct pagecore_vcpu *vcpu, uint64_t *left)
{
    (void)vcpu, (void)left;
    return -1;
}

int pagecore_kvm_settle(struct pagecore_vcpu *vcpu)
{
    (void)vcpu;
    return 0;
}

size_t pagecore_kvm_state_size(void)
{
    return 0;
}

int pagecore_kvm_get_state(struct pagecore_vcpu *vcpu, uint8_t *state)
{
    (void)vcpu, (void)state;
    return -ENOSYS;
}

int pagecore_kvm_set_state(struct pagecore_vcpu *vcpu, const uint8_t *state)
{
    (void)vcpu, (void)state;
    return -ENOSYS;
}

#endif
