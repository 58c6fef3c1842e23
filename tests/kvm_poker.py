"""A virtual machine with one vCPU that writes one word to one page each time that it is entered, and nothing else.

What the dirty logs of KVM are shown is therefore the write of a real vCPU, and it lies exactly between two lines of a
test. The machine hands out what a VMM hands to pagecore: the descriptors of the VM and of the vCPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

from pagecore import UnsupportedError

PAGE = 4096
NPAGES = 200  # the last word of a bitmap is not full
PAGING, CODE, MAILBOX = 1, 4, 5
FIRST_DATA = 8
DOORBELL = 2 << 20  # behind the memory: a store there leaves the guest

GET_SUPPORTED_CPUID, SET_CPUID2 = 0xC008AE05, 0x4008AE90
CREATE_VM, GET_VCPU_MMAP_SIZE, CREATE_VCPU, RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
SET_USER_MEMORY_REGION = 0x4020AE46
SET_REGS, GET_SREGS, SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
ENABLE_CAP, CHECK_EXTENSION = 0x4068AEA3, 0xAE03
CAP_DIRTY_LOG_RING = 192
MEM_LOG_DIRTY_PAGES = 1
EXIT_MMIO = 6
REASON, PHYSICAL = 8, 32  # in struct kvm_run

# mov rdi, [rbx]; mov rsi, [rbx + 8]; mov [rdi], rsi; mov [rdx], rsi; back to the first
PROGRAM = bytes.fromhex("488b3b 488b7308 488937 488932 ebf1")


class Poker:
    """The machine.

    Parameters
    ----------
    ring_bytes : int
        0, or the size of the vCPU's dirty ring.

    Raises
    ------
    UnsupportedError
        If there is no KVM here.
    """

    def __init__(self, ring_bytes: int = 0) -> None:
        try:
            self._open(ring_bytes)
        except OSError as error:
            raise UnsupportedError("a virtual machine", f"{error}; pagecore doctor says more") from error

    def _open(self, ring_bytes: int) -> None:
        with contextlib.ExitStack() as stack:
            self.memory = stack.enter_context(mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            pin = ctypes.c_char.from_buffer(self.memory)
            self.address = ctypes.addressof(pin)
            del pin
            self._write_image()
            kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, kvm)
            self.vm_fd = fcntl.ioctl(kvm, CREATE_VM, 0)
            stack.callback(os.close, self.vm_fd)
            self._set_slot(0)
            self.ring_bytes = ring_bytes
            if ring_bytes:
                fcntl.ioctl(
                    self.vm_fd, ENABLE_CAP, struct.pack("<IIQQQQ64x", CAP_DIRTY_LOG_RING, 0, ring_bytes, 0, 0, 0)
                )
            self.vcpu_fd = fcntl.ioctl(self.vm_fd, CREATE_VCPU, 0)
            stack.callback(os.close, self.vcpu_fd)
            self._run = stack.enter_context(mmap.mmap(self.vcpu_fd, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0)))
            cpuid = bytearray(8 + 256 * 40)
            struct.pack_into("<I", cpuid, 0, 256)
            fcntl.ioctl(kvm, GET_SUPPORTED_CPUID, cpuid)
            fcntl.ioctl(self.vcpu_fd, SET_CPUID2, cpuid)
            self._set_registers()
            self._stack = stack.pop_all()

    def _write_image(self) -> None:
        tables = [[(PAGING + 1) * PAGE | 0x27], [(PAGING + 2) * PAGE | 0x27], [0xE7, DOORBELL | 0xE7]]
        for level, entries in enumerate(tables):
            struct.pack_into(f"<{len(entries)}Q", self.memory, (PAGING + level) * PAGE, *entries)
        self.memory[CODE * PAGE : CODE * PAGE + len(PROGRAM)] = PROGRAM

    def _set_registers(self) -> None:
        """64-bit user mode, as src/pagecore/testing/kvm_machine.c has it and says why."""
        segments = bytearray(312)
        fcntl.ioctl(self.vcpu_fd, GET_SREGS, segments)
        code = struct.pack("<QIH10B", 0, 0xFFFFFFFF, 0x33, 11, 1, 3, 0, 1, 1, 1, 0, 0, 0)
        data = struct.pack("<QIH10B", 0, 0xFFFFFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
        segments[: 6 * 24] = code + 5 * data
        cr0, cr2, _, cr4, cr8, _ = struct.unpack_from("<6Q", segments, 224)
        del cr0
        struct.pack_into("<6Q", segments, 224, 0x80050033, cr2, PAGING * PAGE, cr4 | 0x220, cr8, 0x501)
        fcntl.ioctl(self.vcpu_fd, SET_SREGS, bytes(segments))
        # rax, rbx, rcx, rdx, ..., rip, rflags
        registers = [0, MAILBOX * PAGE, 0, DOORBELL, *[0] * 12, CODE * PAGE, 2]
        fcntl.ioctl(self.vcpu_fd, SET_REGS, struct.pack("<18Q", *registers))

    def _set_slot(self, flags: int) -> None:
        slot = struct.pack("<IIQQQ", 0, flags, 0, len(self.memory), self.address)
        fcntl.ioctl(self.vm_fd, SET_USER_MEMORY_REGION, slot)

    def log_dirty_pages(self) -> None:
        """Have KVM log what the vCPU writes."""
        self._set_slot(MEM_LOG_DIRTY_PAGES)

    def enable_cap(self, cap: int, argument: int) -> None:
        """Switch a capability of the VM on."""
        fcntl.ioctl(self.vm_fd, ENABLE_CAP, struct.pack("<IIQ88x", cap, 0, argument))

    def poke(self, page: int, value: int) -> None:
        """Let the vCPU write `value` to the first word of `page`; it stands still again on return."""
        struct.pack_into("<2Q", self.memory, MAILBOX * PAGE, page * PAGE, value)
        fcntl.ioctl(self.vcpu_fd, RUN, 0)
        (reason,) = struct.unpack_from("<I", self._run, REASON)
        (where,) = struct.unpack_from("<Q", self._run, PHYSICAL)
        if (reason, where) != (EXIT_MMIO, DOORBELL):
            raise AssertionError(f"the vCPU left with exit reason {reason}, address {where:#x}")

    def peek(self, page: int) -> int:
        """The first word of `page`."""
        return struct.unpack_from("<Q", self.memory, page * PAGE)[0]

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def poker(ring_bytes: int = 0) -> Iterator[Poker]:
    machine = Poker(ring_bytes)
    try:
        yield machine
    finally:
        machine.close()
