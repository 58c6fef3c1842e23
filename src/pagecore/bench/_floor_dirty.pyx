"""The plain C that dirty logs are measured against, and the virtual machine whose guest writes what they log.

Addresses in, no checks; an errno of C becomes an OSError.
"""

import os

cimport cython

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t


cdef extern from "writer_vm.h" nogil:
    struct writer_vm:
        int vm
        int vcpu
        void *ring
    enum: WRITER_RING_FULL
    int writer_vm_open(writer_vm *vm, void *memory, size_t size, uint32_t ring)
    int writer_vm_load(writer_vm *vm, const uint32_t *pages, size_t count)
    int writer_vm_run(writer_vm *vm)
    int writer_vm_go_on(writer_vm *vm)
    void writer_vm_close(writer_vm *vm)

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>
    struct region;
    struct ring_entry;
    void floor_write(uint8_t *, const uint32_t *, size_t);
    void floor_write_and_mark(uint8_t *, const uint32_t *, size_t, uint64_t *);
    long floor_kvm_get(int, uint32_t, uint64_t *);
    long floor_kvm_clear(int, uint32_t, uint64_t *, uint32_t);
    long floor_ring(struct ring_entry *, uint32_t, uint32_t *, uint64_t *, int);
    void floor_ring_fill(struct ring_entry *, const uint32_t *, size_t);
    long floor_scan(int, uint64_t, uint64_t, struct region *, size_t);
    long floor_read_pagemap(int, uint64_t, size_t, uint64_t *, uint64_t *);
    long floor_compare(const uint8_t *, uint8_t *, size_t, uint64_t *);
    long floor_trap_on(uint8_t *, size_t, uint64_t *);
    long floor_trap_arm(void);
    long floor_trap_off(void);
    """
    struct region:
        pass
    struct ring_entry:
        pass
    void floor_write(uint8_t *memory, const uint32_t *pages, size_t count)
    void floor_write_and_mark(uint8_t *memory, const uint32_t *pages, size_t count, uint64_t *words)
    long floor_kvm_get(int vm, uint32_t slot, uint64_t *words)
    long floor_kvm_clear(int vm, uint32_t slot, uint64_t *words, uint32_t npages)
    long floor_ring(ring_entry *entries, uint32_t mask, uint32_t *next, uint64_t *words, int vm)
    void floor_ring_fill(ring_entry *entries, const uint32_t *pages, size_t count)
    long floor_scan(int pagemap, uint64_t start, uint64_t length, region *regions, size_t capacity)
    long floor_read_pagemap(int pagemap, uint64_t start, size_t npages, uint64_t *entries, uint64_t *words)
    long floor_compare(const uint8_t *memory, uint8_t *shadow, size_t npages, uint64_t *words)
    long floor_trap_on(uint8_t *memory, size_t size, uint64_t *words)
    long floor_trap_arm()
    long floor_trap_off()


cdef extern from "dirty_log/_kvm_ring.h" nogil:
    struct pagecore_ring_slot:
        uint32_t slot
        size_t npages
        uint64_t *pending
        int wrong
    struct pagecore_ring_vcpu:
        void *entries
        uint32_t next
        int found
    struct pagecore_ring:
        uint32_t entries
        uint32_t slots
        pagecore_ring_slot **slot
    uint64_t pagecore_ring_take(pagecore_ring *ring, pagecore_ring_vcpu *vcpu)


cdef object _answer(long result):
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def write(uintptr_t memory, uintptr_t pages, size_t count):
    with nogil:
        floor_write(<uint8_t *>memory, <const uint32_t *>pages, count)


def write_and_mark(uintptr_t memory, uintptr_t pages, size_t count, uintptr_t words):
    with nogil:
        floor_write_and_mark(<uint8_t *>memory, <const uint32_t *>pages, count, <uint64_t *>words)


def kvm_get(int vm, uint32_t slot, uintptr_t words):
    cdef long result
    with nogil:
        result = floor_kvm_get(vm, slot, <uint64_t *>words)
    return _answer(result)


def kvm_clear(int vm, uint32_t slot, uintptr_t words, uint32_t npages):
    cdef long result
    with nogil:
        result = floor_kvm_clear(vm, slot, <uint64_t *>words, npages)
    return _answer(result)


def ring(uintptr_t entries, uint32_t mask, uintptr_t next_entry, uintptr_t words, int vm):
    cdef long result
    with nogil:
        result = floor_ring(<ring_entry *>entries, mask, <uint32_t *>next_entry, <uint64_t *>words, vm)
    return _answer(result)


def ring_fill(uintptr_t entries, uintptr_t pages, size_t count):
    with nogil:
        floor_ring_fill(<ring_entry *>entries, <const uint32_t *>pages, count)


def ring_take(uintptr_t entries, uint32_t mask, uintptr_t words, size_t npages):
    """What a reap does with the entries of a ring, from the first one on; without its reset."""
    cdef pagecore_ring_slot log = pagecore_ring_slot(slot=0, npages=npages, pending=<uint64_t *>words, wrong=0)
    cdef pagecore_ring_slot *logs = &log
    cdef pagecore_ring_vcpu vcpu = pagecore_ring_vcpu(entries=<void *>entries, next=0, found=1)
    cdef pagecore_ring ring
    cdef uint64_t taken
    ring.entries = mask + 1
    ring.slots = 1
    ring.slot = &logs
    with nogil:
        taken = pagecore_ring_take(&ring, &vcpu)
    return taken


def scan(int pagemap, uint64_t start, uint64_t length, uintptr_t regions, size_t capacity):
    cdef long result
    with nogil:
        result = floor_scan(pagemap, start, length, <region *>regions, capacity)
    return _answer(result)


def read_pagemap(int pagemap, uint64_t start, size_t npages, uintptr_t entries, uintptr_t words):
    cdef long result
    with nogil:
        result = floor_read_pagemap(pagemap, start, npages, <uint64_t *>entries, <uint64_t *>words)
    return _answer(result)


def compare(uintptr_t memory, uintptr_t shadow, size_t npages, uintptr_t words):
    cdef long result
    with nogil:
        result = floor_compare(<const uint8_t *>memory, <uint8_t *>shadow, npages, <uint64_t *>words)
    return _answer(result)


def trap_on(uintptr_t memory, size_t size, uintptr_t words):
    return _answer(floor_trap_on(<uint8_t *>memory, size, <uint64_t *>words))


def trap_arm():
    cdef long result
    with nogil:
        result = floor_trap_arm()
    return _answer(result)


def trap_off():
    return _answer(floor_trap_off())


@cython.final
cdef class WriterVm:
    """WriterVm(memory, size, ring=0)
    --

    A virtual machine over `size` bytes at the address `memory`, whose guest writes to the pages of a list.
    """

    cdef writer_vm _vm
    cdef bint _open

    def __cinit__(self, uintptr_t memory, size_t size, uint32_t ring=0):
        _answer(writer_vm_open(&self._vm, <void *>memory, size, ring))
        self._open = True

    def __dealloc__(self):
        self.close()

    def close(self):
        """End it."""
        if self._open:
            self._open = False
            writer_vm_close(&self._vm)

    @property
    def vm_fd(self):
        """int"""
        return self._vm.vm

    @property
    def vcpu_fd(self):
        """int"""
        return self._vm.vcpu

    @property
    def ring_address(self):
        """int: where the entries of its dirty ring are; 0 where it has none."""
        return <uintptr_t>self._vm.ring

    def load(self, uintptr_t pages, size_t count):
        """The list: uint32, at that address; it is copied."""
        _answer(writer_vm_load(&self._vm, <const uint32_t *>pages, count))

    def run(self, ring_full=None):
        """Write to each page once; whenever a dirty ring is full, `ring_full` is called."""
        cdef int result
        with nogil:
            result = writer_vm_run(&self._vm)
        while result == WRITER_RING_FULL:
            ring_full()
            with nogil:
                result = writer_vm_go_on(&self._vm)
        _answer(result)
