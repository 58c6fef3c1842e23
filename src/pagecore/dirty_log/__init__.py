"""Dirty logs: the protocol, one in memory, KVM's, and one by write-protection."""

from __future__ import annotations

from pagecore.dirty_log._kvm import KvmDirtyLog
from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.dirty_log._protocol import DirtyLog
from pagecore.dirty_log._write_protect import WriteProtectDirtyLog

__all__ = ["DirtyLog", "KvmDirtyLog", "MemoryDirtyLog", "WriteProtectDirtyLog"]
