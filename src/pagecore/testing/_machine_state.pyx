"""MachineState: a test guest's memory and registers, in a process or under KVM.

The C behind it is linked into this module alone: guest_program.c is what the guest runs, machine.c the loop
around it, kvm_machine.c the KVM half. Every access to guest memory is made there or under ``with nogil`` here:
at the destination a page may be missing, and a thread that faults while it holds the GIL would keep whatever
fills the page from running.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_acquire
from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport Pinned
from pagecore.dirty_log._kvm_ring cimport KvmDirtyRing
from pagecore.testing._machine cimport *

import os
from operator import index as as_index

from pagecore.errors import BusyError, ClosedError, PagecoreError



MAX_VCPUS = PAGECORE_MAX_VCPUS
MAX_SLOTS = PAGECORE_MAX_SLOTS
RING_ENTRIES = PAGECORE_GUEST_RING_ENTRIES


class KvmRefusedError(PagecoreError, OSError):
    """A step of building the VM failed; ``step`` names it."""

    def __init__(self, number: int, step: str) -> None:
        super().__init__(number, f"{step}: {os.strerror(number)}")
        self.step = step


def program_code():
    """program_code()
    --

    The bytes of the guest program, as they lie in guest memory from the first code page on.

    Returns
    -------
    bytes

    Notes
    -----
    Holds the GIL: it copies a few kilobytes of this library's own text.
    Thread-safe with everything.
    Needs no kernel interface.
    """
    return (<char *>__start_pagecore_guest)[:__stop_pagecore_guest - __start_pagecore_guest]


def layout(npages, vcpus=1):
    """layout(npages, vcpus=1)
    --

    Where everything lies in the memory of a test guest.

    Parameters
    ----------
    npages : int
        Pages of 4 KiB.
    vcpus : int

    Returns
    -------
    dict of str to int
        ``paging_first``, ``paging_pages``, ``code_first``, ``vcpu_first``, ``table_first``, ``table_pages``,
        ``data_first``, ``data_pages``: page numbers and counts.

    Notes
    -----
    Holds the GIL.
    Thread-safe with everything.
    Needs no kernel interface.
    """
    return pagecore_guest_layout(npages, vcpus)


cdef class MachineState:
    """Base of Machine, which says what the arguments are: what a test guest consists of, and its life."""

    def __cinit__(
        self, memory, *, vcpus=1, Bitmap dirty=None, double pages_per_second=0.0, kvm_device=None, slots=1, ring_size=0
    ):
        cdef const char *what = NULL
        cdef const char *device
        cdef bytes path
        cdef int error
        if not 1 <= vcpus <= PAGECORE_MAX_VCPUS:
            raise ValueError(f"{vcpus} vCPUs are outside [1, {PAGECORE_MAX_VCPUS}]")
        if not 1 <= slots <= PAGECORE_MAX_SLOTS:
            raise ValueError(f"{slots} memory slots are outside [1, {PAGECORE_MAX_SLOTS}]")
        PyObject_GetBuffer(memory, &self._view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self._held = True
        if (
            <uintptr_t>self._view.buf % PAGECORE_GUEST_PAGE_SIZE
            or self._view.len % (1 << 21)
            or self._view.len == 0
        ):
            raise ValueError(
                f"memory of {self._view.len} bytes at {<uintptr_t>self._view.buf:#x} is not page-aligned"
                " or not a multiple of 2 MiB"
            )
        self.npages = self._view.len // PAGECORE_GUEST_PAGE_SIZE
        if dirty is not None and dirty.size != self.npages:
            raise ValueError(f"a log of {dirty.size} pages does not fit memory of {self.npages} pages")
        if <size_t>(__stop_pagecore_guest - __start_pagecore_guest) > (
            PAGECORE_GUEST_CODE_PAGES * PAGECORE_GUEST_PAGE_SIZE
        ):
            raise PagecoreError("the guest program is larger than the pages kept for it")
        self._machine = <pagecore_machine *>calloc(1, sizeof(pagecore_machine))
        if self._machine == NULL:
            raise MemoryError()
        error = pagecore_machine_init(self._machine, <uint8_t *>self._view.buf, self._view.len, vcpus, slots)
        if error:
            free(self._machine)
            self._machine = NULL
            raise OSError(-error, os.strerror(-error))
        self._machine.pages_per_second = pages_per_second
        self._machine.ring_size = ring_size
        if dirty is not None:
            self._dirty = dirty
            self._machine.dirty = dirty.c_share_words()
        if kvm_device is not None:
            path = os.fsencode(kvm_device)
            device = path
            with nogil:
                error = pagecore_kvm_open(self._machine, device, &what)
            if error:
                raise KvmRefusedError(-error, what.decode())

    def __dealloc__(self):
        if self._machine != NULL:
            pagecore_machine_destroy(self._machine)
            free(self._machine)
        if self._held:
            PyBuffer_Release(&self._view)

    cdef pagecore_machine *_open(self) except NULL:
        if self._machine == NULL:
            raise ClosedError("this guest is closed")
        return self._machine

    cdef pagecore_machine *_enter(self) except NULL:
        cdef pagecore_machine *machine = self._open()
        # With the GIL still held: close() either sees the call, or was before it.
        pagecore_fetch_add(&self._running, 1)
        return machine

    cdef void _leave(self) noexcept nogil:
        pagecore_fetch_add(&self._running, <uint64_t>-1)

    cdef pagecore_vcpu *_vcpu(self, object number) except NULL:
        cdef pagecore_machine *machine = self._open()
        if not 0 <= number < machine.vcpus:
            raise IndexError(f"vCPU {number} is outside [0, {machine.vcpus})")
        return &machine.vcpu[<size_t>number]

    @property
    def kvm(self):
        """bool: whether a VM runs the guest."""
        return self._open().kind == PAGECORE_KIND_KVM

    @property
    def vm_fd(self):
        """int: the descriptor of the VM, -1 where there is none."""
        return self._open().vm_fd

    @property
    def vcpu_fds(self):
        """list of int: the descriptors of the vCPUs, -1 where there is no VM."""
        cdef pagecore_machine *machine = self._open()
        return [machine.vcpu[number].fd for number in range(machine.vcpus)]

    @property
    def full_exits(self):
        """int: how often a vCPU left because its dirty ring was full."""
        cdef pagecore_machine *machine = self._open()
        return sum([machine.vcpu[number].full_exits for number in range(machine.vcpus)])

    def use_ring(self, KvmDirtyRing ring not None):
        """use_ring(ring)
        --

        Have vCPUs whose dirty ring is full reap it. Before the guest runs.

        Parameters
        ----------
        ring : KvmDirtyRing
        """
        cdef pagecore_machine *machine = self._open()
        self._ring = ring
        machine.ring = <pagecore_ring *>ring._ring

    @property
    def slots(self):
        """tuple: first page and page count of each memory slot of the VM, which begin at slot 0."""
        cdef pagecore_machine *machine = self._open()
        return tuple([(machine.slot[number].first, machine.slot[number].pages) for number in range(machine.slots)])

    @property
    def address(self):
        """int: where guest memory begins in this process."""
        self._open()
        return <uintptr_t>self._view.buf

    @property
    def failed(self):
        """bool: whether a vCPU cannot go on."""
        cdef pagecore_machine *machine = self._open()
        cdef bint failed
        self._enter()
        with nogil:
            failed = pagecore_machine_failed(machine)
            self._leave()
        return failed

    def close(self):
        """close()
        --

        Close the VM and let go of the memory, after :meth:`quit` and the end of every :meth:`run_vcpu`.

        Raises
        ------
        BusyError
            If another call is under way, which may sleep on a page that is missing; everything stays open.

        Notes
        -----
        Holds the GIL; touches no guest memory.
        Thread-safe with everything.
        Needs no kernel interface.
        """
        cdef pagecore_machine *machine = self._machine
        if machine == NULL:
            return
        # acquire: pairs with the release by which a call says that it is out
        running = pagecore_load_acquire(&self._running)
        if running:
            raise BusyError(f"{running} calls of this guest are still running")
        self._machine = NULL
        pagecore_machine_destroy(machine)
        free(machine)
        self._dirty = None
        self._ring = None
        self._held = False
        PyBuffer_Release(&self._view)

    def boot(self, seed, share, batch):
        """boot(seed, share, batch)
        --

        Write all of guest memory as it is before the first step.

        Parameters
        ----------
        seed : int
            64 bits.
        share : int
            Of 2**32: how much of the data pages is free.
        batch : int
            Steps between two ticks.

        Not thread-safe with a guest that runs.
        """
        cdef pagecore_machine *machine = self._open()
        cdef uint64_t c_seed = seed, c_share = share, c_batch = batch
        self._enter()
        with nogil:
            pagecore_machine_boot(machine, c_seed, c_share, c_batch)
            self._leave()

    def registers(self):
        """registers()
        --

        The registers of every vCPU of a paused guest: what its memory does not hold.

        Returns
        -------
        bytes
            Empty for a process guest.

        Raises
        ------
        PagecoreError
            If a vCPU has failed.
        OSError
            If KVM refused.

        Notes
        -----
        Releases the GIL.
        Not thread-safe with a guest that runs.
        KVM_GET_REGS and KVM_GET_SREGS, any KVM.
        """
        cdef pagecore_machine *machine = self._open()
        cdef size_t size = pagecore_kvm_state_size()
        cdef bytearray state
        cdef uint8_t *at
        cdef uint32_t number
        cdef int error = 0
        if machine.kind != PAGECORE_KIND_KVM:
            return b""
        state = bytearray(size * machine.vcpus)
        at = state
        for number in range(machine.vcpus):
            if machine.vcpu[number].state == PAGECORE_VCPU_FAILED:
                raise PagecoreError(f"vCPU {number} has failed: it has no state to save")
            self._enter()
            with nogil:
                error = pagecore_kvm_get_state(&machine.vcpu[number], at + number * size)
                self._leave()
            if error:
                raise OSError(-error, f"KVM_GET_REGS of vCPU {number}: {os.strerror(-error)}")
        return bytes(state)

    def set_registers(self, bytes state not None):
        """set_registers(state)
        --

        Give a guest that has not run the registers of another one.

        Parameters
        ----------
        state : bytes
            From :meth:`registers`.

        Raises
        ------
        ValueError
            If the length does not fit this kind of guest and its vCPUs.
        OSError
            If KVM refused.

        Notes
        -----
        Releases the GIL.
        Not thread-safe with a guest that runs.
        KVM_SET_REGS and KVM_SET_SREGS, any KVM.
        """
        cdef pagecore_machine *machine = self._open()
        cdef size_t size = pagecore_kvm_state_size() if machine.kind == PAGECORE_KIND_KVM else 0
        cdef const uint8_t *at = state
        cdef uint32_t number
        cdef int error = 0
        if <size_t>len(state) != size * machine.vcpus:
            raise ValueError(f"registers of {len(state)} bytes, need {size * machine.vcpus}")
        if size == 0:
            return
        for number in range(machine.vcpus):
            self._enter()
            with nogil:
                error = pagecore_kvm_set_state(&machine.vcpu[number], at + number * size)
                self._leave()
            if error:
                raise OSError(-error, f"KVM_SET_REGS of vCPU {number}: {os.strerror(-error)}")

    def call_copy(self, code, number=0):
        """call_copy(code, number=0)
        --

        Run one batch of the guest program from a copy of it, on the calling thread. Used in tests.

        Parameters
        ----------
        code : buffer
            Executable memory that begins with :func:`program_code`.
        number : int
            The vCPU.

        Returns
        -------
        int
            Why the program left: 1 tick, 2 ring full or report under way, 3 stopped.

        Not thread-safe with a guest that runs.
        """
        cdef pagecore_vcpu *vcpu = self._vcpu(number)
        cdef uint64_t offset = vcpu.control_offset, left
        cdef uint8_t *memory = <uint8_t *>self._view.buf
        cdef Pinned program = Pinned(code, False)
        self._enter()
        with nogil:
            left = pagecore_machine_call(program.view.buf, memory, offset)
            self._leave()
        return left

    def read(self, offset, length):
        """read(offset, length)
        --

        Copy bytes out of guest memory without the GIL, so that a missing page may be filled meanwhile.

        Parameters
        ----------
        offset, length : int
            Bytes.

        Returns
        -------
        bytes

        Raises
        ------
        IndexError
            If the bytes are not inside the memory.

        Notes
        -----
        Releases the GIL.
        Thread-safe; a page that the guest writes meanwhile may come out torn.
        Needs no kernel interface.
        """
        cdef size_t begin, count
        cdef bytearray copy
        cdef uint8_t *to
        self._open()
        first, size = as_index(offset), as_index(length)
        if first < 0 or size < 0 or first + size > self._view.len:
            raise IndexError(f"bytes [{first}, {first + size}) are outside [0, {self._view.len})")
        begin, count = first, size
        copy = bytearray(count)
        to = copy
        self._enter()
        with nogil:
            memcpy(to, <const uint8_t *>self._view.buf + begin, count)
            self._leave()
        return bytes(copy)

    # ---- the C face: trusts its arguments

    cdef int c_run(self, pagecore_vcpu *vcpu) noexcept nogil:
        return pagecore_vcpu_run(vcpu)

    cdef int c_pause(self, uint64_t timeout, uint64_t *at) noexcept nogil:
        return pagecore_machine_pause(self._machine, timeout, at)

    cdef int c_resume(self, uint64_t timeout, uint64_t *at) noexcept nogil:
        return pagecore_machine_resume(self._machine, timeout, at)

    cdef bint c_wait_stopped(self, uint64_t timeout) noexcept nogil:
        return pagecore_machine_wait_stopped(self._machine, timeout)

    cdef void c_quit(self) noexcept nogil:
        pagecore_machine_quit(self._machine)

    cdef void c_throttle(self, double share) noexcept nogil:
        pagecore_machine_throttle(self._machine, share)

    cdef void c_announce(self, uint64_t command) noexcept nogil:
        pagecore_machine_announce(self._machine, command)

    cdef uint32_t c_stop_after(self, uint64_t steps, uint64_t *written) noexcept nogil:
        return pagecore_machine_stop_after(self._machine, steps, written)

    cdef void c_seen(self, uint32_t number, pagecore_control *control) noexcept nogil:
        pagecore_machine_seen(self._machine, number, control)
