"""Dirty logs: the protocol, one in memory, KVM's, one by write-protection, and that of vhost devices."""

from __future__ import annotations

from pagecore.dirty_log._kvm import KvmDirtyLog
from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.dirty_log._protocol import DirtyLog
from pagecore.dirty_log._write_protect import WriteProtectDirtyLog
from pagecore.dirty_log.vhost import VhostLog

__all__ = ["DirtyLog", "KvmDirtyLog", "MemoryDirtyLog", "VhostLog", "WriteProtectDirtyLog"]
