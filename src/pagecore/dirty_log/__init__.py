"""Dirty logs: the protocol, one in memory, KVM's, the kernel's own, one by write-protection, and that of vhost."""

from __future__ import annotations

from pagecore.dirty_log._kvm import KvmDirtyLog, KvmManualDirtyLog
from pagecore.dirty_log._kvm_ring import KvmDirtyRing, KvmRingDirtyLog
from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.dirty_log._pagemap import PagemapDirtyLog
from pagecore.dirty_log._protocol import DirtyLog
from pagecore.dirty_log._write_protect import WriteProtectDirtyLog
from pagecore.dirty_log.vhost import VhostLog

__all__ = [
    "DirtyLog",
    "KvmDirtyLog",
    "KvmDirtyRing",
    "KvmManualDirtyLog",
    "KvmRingDirtyLog",
    "MemoryDirtyLog",
    "PagemapDirtyLog",
    "VhostLog",
    "WriteProtectDirtyLog",
]
