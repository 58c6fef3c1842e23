"""Dirty logs: the protocol, and those that need no kernel interface of their own."""

from __future__ import annotations

from pagecore.dirty_log._memory import MemoryDirtyLog
from pagecore.dirty_log._protocol import DirtyLog

__all__ = ["DirtyLog", "MemoryDirtyLog"]
