"""Every dirty log with a guest whose writes it logs: what the tests of lost writes are about."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import pathlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kvm_poker
from concurrency import wait_until
from kvm_poker import NPAGES, PAGE
from kvm_raw_logs import RawClear, RawRing
from lost_write_moments import Moments
from pagecore import Bitmap, DirtyLog, Feature, MemoryDirtyLog, RegisterMode, Userfaultfd
from pagecore.dirty_log import (
    KvmDirtyLog,
    KvmDirtyRing,
    KvmManualDirtyLog,
    KvmRingDirtyLog,
    PagemapDirtyLog,
    VhostLog,
    WriteProtectDirtyLog,
)
from tracker_rig import ManualLog, StepLog
from uffd_helpers import DEADLINE, Child, address_of, anonymous

RING_BYTES = 4096


@dataclass
class Subject:
    """A guest of NPAGES pages, and the log of its writes."""

    log: DirtyLog
    write: Callable[[int, int], None]
    read: Callable[[int], int]
    # Waits until writes that had to wait are done.
    quiet: Callable[[], None] = lambda: None


@contextlib.contextmanager
def memory_subject(_: Moments) -> Iterator[Subject]:
    log = MemoryDirtyLog(NPAGES)
    content = [0] * NPAGES

    def write(page: int, value: int) -> None:
        content[page] = value
        log.bitmap.set(page)

    yield Subject(log, write, content.__getitem__)


@contextlib.contextmanager
def vhost_subject(_: Moments) -> Iterator[Subject]:
    """A device that has mapped the log for itself: the byte of a page is OR-ed once the page is written."""
    content = [0] * NPAGES
    with VhostLog(NPAGES * PAGE) as vhost, mmap.mmap(vhost.fileno(), vhost.nbytes) as bits:

        def write(page: int, value: int) -> None:
            content[page] = value
            bits[page // 8] |= 1 << page % 8

        yield Subject(vhost.region(0, NPAGES), write, content.__getitem__)


@contextlib.contextmanager
def kvm_subject(log_type: type[KvmDirtyLog | KvmManualDirtyLog], _: Moments) -> Iterator[Subject]:
    with kvm_poker.poker() as machine:
        log = log_type(machine.vm_fd, NPAGES, host_address=machine.address)
        log.enable()
        yield Subject(log, machine.poke, machine.peek)
        log.close()


@contextlib.contextmanager
def kvm_ring_subject(_: Moments) -> Iterator[Subject]:
    with kvm_poker.poker(RING_BYTES) as machine:
        ring = KvmDirtyRing(machine.vm_fd, [machine.vcpu_fd], RING_BYTES)
        log = KvmRingDirtyLog(ring, NPAGES, host_address=machine.address)
        log.enable()
        yield Subject(log, machine.poke, machine.peek)
        log.close()
        ring.close()


@contextlib.contextmanager
def raw_subject(make: Callable[[kvm_poker.Poker], DirtyLog], ring_bytes: int, _: Moments) -> Iterator[Subject]:
    with kvm_poker.poker(ring_bytes) as machine:
        yield Subject(make(machine), machine.poke, machine.peek)


@contextlib.contextmanager
def kvm_pagemap_subject(_: Moments) -> Iterator[Subject]:
    """The kernel's notes of what a vCPU wrote."""
    with kvm_poker.poker() as machine, PagemapDirtyLog(machine.memory) as log:
        yield Subject(log, machine.poke, machine.peek)


@contextlib.contextmanager
def pagemap_subject(_: Moments) -> Iterator[Subject]:
    """The kernel's notes of what a thread wrote."""
    memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with PagemapDirtyLog(memory) as log:

        def write(page: int, value: int) -> None:
            # By a call of C, which lets go of the GIL: the memory is registered.
            ctypes.memmove(log.address + page * PAGE, value.to_bytes(8, "little"), 8)

        yield Subject(log, write, lambda page: int.from_bytes(memory[page * PAGE : page * PAGE + 8], "little"))
    memory.close()


def write_as_told(control: socket.socket) -> None:
    """What the other process does: has its memory tracked, and writes a word where it is told to."""
    memory = anonymous(NPAGES)
    with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
        uffd.register(memory, mode=RegisterMode.WP)
        control.send(struct.pack("<Q", address_of(memory)))
        while told := control.recv(16):
            page, value = struct.unpack("<2Q", told)
            ctypes.memmove(address_of(memory) + page * PAGE, value.to_bytes(8, "little"), 8)
            control.send(b".")


@contextlib.contextmanager
def pagemap_process_subject(_: Moments) -> Iterator[Subject]:
    """The kernel's notes of what another process wrote."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE)

    def run() -> None:
        ours.close()
        write_as_told(theirs)

    child = Child(run)
    theirs.close()
    (address,) = struct.unpack("<Q", ours.recv(8))
    with (
        PagemapDirtyLog.of_process(child.pid, address, NPAGES * PAGE) as log,
        open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory,
    ):

        def write(page: int, value: int) -> None:
            ours.send(struct.pack("<2Q", page, value))
            assert ours.recv(1) == b"."

        def read(page: int) -> int:
            return int.from_bytes(os.pread(memory.fileno(), 8, address + page * PAGE), "little")

        yield Subject(log, write, read)
    ours.close()
    child.value()


class Writer(ctypes.Structure):
    """A native thread that writes; see ioctl_moments.c."""

    _fields_ = (
        ("where", ctypes.c_void_p),
        ("value", ctypes.c_uint64),
        ("thread", ctypes.c_int32),
        ("state", ctypes.c_int32),
        ("told", ctypes.c_char * 32),
    )
    DONE = 2

    def start(self) -> None:
        assert ctypes.CDLL(None).start_writer(ctypes.byref(self)) == 0
        wait_until(lambda: self.thread, "a writer")

    def write(self, address: int, value: int) -> None:
        ctypes.CDLL(None).tell_writer(ctypes.byref(self), ctypes.c_void_p(address), ctypes.c_uint64(value))

    def done(self) -> bool:
        return bool(self.state == self.DONE)

    def stuck(self) -> bool:
        """Whether it has begun to write, and sleeps: in the page fault, since it does nothing else."""
        if not self.state:
            return False
        stat = pathlib.Path(f"/proc/self/task/{self.thread}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] in "SD"


# They end with the process.
WRITERS: list[Writer] = []


@contextlib.contextmanager
def write_protect_subject(moments: Moments) -> Iterator[Subject]:
    """Writes that trap: where the collect keeps the handler out, the writer waits, too."""
    memory = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Nothing is missing: what this thread reads must not trap.
    memory[:] = b"\xff" * len(memory)
    pin = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(pin)
    busy: list[Writer] = []
    with WriteProtectDirtyLog(memory) as log:

        def write(page: int, value: int) -> None:
            idle = next((writer for writer in WRITERS if writer not in busy), None)
            if idle is None:
                idle = Writer()
                idle.start()
                WRITERS.append(idle)
            idle.write(address + page * PAGE, value)
            if moments.in_call:
                wait_until(lambda: idle.done() or idle.stuck(), "a write")
            else:
                wait_until(idle.done, "a write")
            if not idle.done():
                busy.append(idle)

        def quiet() -> None:
            while busy:
                wait_until(busy.pop().done, "a write")

        yield Subject(log, write, lambda page: int.from_bytes(memory[page * PAGE : page * PAGE + 8], "little"), quiet)
    del pin
    memory.close()


@contextlib.contextmanager
def model_subject(make: Callable[[int], Any], _: Moments) -> Iterator[Subject]:
    """A log in Python of the tests, as strict as the kernel may be."""
    log = make(NPAGES)
    content = [0] * NPAGES

    def write(page: int, value: int) -> None:
        content[page] = value
        log.write(page)

    yield Subject(log, write, content.__getitem__)


class LenientLog(ManualLog):
    """As the kernel is one: clears whatever it is told to."""

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        wanted = {page for page in seen.indices().tolist() if first <= page < first + count}
        self.sighted -= wanted
        self.bits -= wanted


SUBJECTS: dict[str, Callable[[Moments], contextlib.AbstractContextManager[Subject]]] = {
    "memory": memory_subject,
    "vhost": vhost_subject,
    "step-model": functools.partial(model_subject, StepLog),
    "strict-manual-model": functools.partial(model_subject, ManualLog),
    "manual-model": functools.partial(model_subject, LenientLog),
    "kvm-get": functools.partial(kvm_subject, KvmDirtyLog),
    "kvm-clear": functools.partial(kvm_subject, KvmManualDirtyLog),
    "kvm-ring": kvm_ring_subject,
    "kvm-raw-clear": functools.partial(raw_subject, RawClear, 0),
    "kvm-raw-ring": functools.partial(raw_subject, RawRing, RING_BYTES),
    "kvm-pagemap": kvm_pagemap_subject,
    "pagemap": pagemap_subject,
    "pagemap-process": pagemap_process_subject,
    "write-protect": write_protect_subject,
}
