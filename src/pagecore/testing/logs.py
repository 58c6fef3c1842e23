"""The dirty logs that a test guest can keep of its writes."""

from __future__ import annotations

import contextlib
import mmap

from pagecore.dirty_log import KvmDirtyLog, KvmDirtyRing, KvmManualDirtyLog, KvmRingDirtyLog, PagemapDirtyLog
from pagecore.dirty_log._kvm import KvmSlotLog
from pagecore.testing._guest import Machine
from pagecore.testing.config import PAGE_SIZE

__all__ = ["LOGS", "RING_SIZE", "open_kvm_logs", "open_pagemap_logs"]

# By kind of guest; "auto" is the first.
LOGS = {"kvm": ("get", "clear", "ring", "pagemap"), "process": ("marks", "pagemap")}
RING_SIZE = 1 << 16


def open_kvm_logs(machine: Machine, name: str, ring: KvmDirtyRing | None) -> tuple[KvmSlotLog, ...]:
    """The log of each memory slot, switched on; all of them or none."""
    with contextlib.ExitStack() as stack:
        logs: list[KvmSlotLog] = []
        for number, (first, pages) in enumerate(machine.slots):
            host, at = machine.address + first * PAGE_SIZE, first * PAGE_SIZE
            if ring is not None:
                logs.append(KvmRingDirtyLog(ring, pages, host_address=host, guest_address=at, slot=number))
            else:
                kind = KvmManualDirtyLog if name == "clear" else KvmDirtyLog
                logs.append(kind(machine.vm_fd, pages, host_address=host, guest_address=at, slot=number))
            stack.callback(logs[-1].close)
            logs[-1].enable()
        stack.pop_all()
    return tuple(logs)


def open_pagemap_logs(memory: mmap.mmap, slots: tuple[tuple[int, int], ...]) -> tuple[PagemapDirtyLog, ...]:
    """The kernel's log of the memory of each slot: all of them or none."""
    with contextlib.ExitStack() as stack, memoryview(memory) as view:
        parts = [view[first * PAGE_SIZE : (first + pages) * PAGE_SIZE] for first, pages in slots]
        logs = tuple(stack.enter_context(PagemapDirtyLog(part)) for part in parts)
        stack.pop_all()
    return logs
