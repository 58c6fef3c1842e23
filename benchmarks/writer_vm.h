/* The least virtual machine for a dirty log: one vCPU that writes to each page of a list, at full speed. */
#ifndef WRITER_VM_H
#define WRITER_VM_H

#include <stddef.h>
#include <stdint.h>

struct writer_vm {
    int kvm, vm, vcpu;
    struct kvm_run *run;
    size_t run_size;
    uint8_t *own;       /* page tables, code, and the list: a slot of its own, which nobody logs */
    size_t own_size;
    uint64_t own_at;    /* its guest address */
    size_t count;       /* pages in the list */
    void *ring;         /* the entries of the dirty ring, or NULL */
    size_t ring_size;
};

enum { WRITER_DONE = 0, WRITER_RING_FULL = 1 };

/* Slot 0 is the memory, at guest address 0: at most 1 GiB, in 2 MiB. `ring` is the size of a dirty ring in bytes, or 0.
 * All return 0 (or what stands above) or -errno. */
int writer_vm_open(struct writer_vm *vm, void *memory, size_t size, uint32_t ring);
/* The pages that a run writes, in this order; at least one. */
int writer_vm_load(struct writer_vm *vm, const uint32_t *pages, size_t count);
/* Writes all of them. WRITER_RING_FULL: call writer_vm_go_on once the ring was reset. */
int writer_vm_run(struct writer_vm *vm);
int writer_vm_go_on(struct writer_vm *vm);
void writer_vm_close(struct writer_vm *vm);

#endif
