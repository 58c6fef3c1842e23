"""Dirty logs: the protocol, one in memory, KVM's, and the kernel's own of a process's memory."""

from __future__ import annotations

from pagecore.dirty_log._kvm import KvmDirtyLog, KvmManualDirtyLog
from pagecore.dirty_log._kvm_ring import KvmDirtyRing, KvmRingDirtyLog
from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.dirty_log._pagemap import PagemapDirtyLog
from pagecore.dirty_log._protocol import DirtyLog

__all__ = [
    "DirtyLog",
    "KvmDirtyLog",
    "KvmDirtyRing",
    "KvmManualDirtyLog",
    "KvmRingDirtyLog",
    "MemoryDirtyLog",
    "PagemapDirtyLog",
]
