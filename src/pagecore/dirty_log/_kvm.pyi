from typing import final

from typing_extensions import disjoint_base

from pagecore.dirty_log._protocol import DirtyLog

@disjoint_base
class KvmSlotLog(DirtyLog):
    def __init__(
        self,
        vm_fd: int,
        size: int,
        *,
        host_address: int,
        guest_address: int = 0,
        slot: int = 0,
        rearms_at_collect: bool = True,
    ) -> None: ...
    @property
    def slot(self) -> int: ...
    @property
    def enabled(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    def enable(self) -> None: ...
    def disable(self) -> None: ...
    def close(self) -> None: ...

@final
class KvmDirtyLog(KvmSlotLog):
    def __init__(self, vm_fd: int, size: int, *, host_address: int, guest_address: int = 0, slot: int = 0) -> None: ...

@final
class KvmManualDirtyLog(KvmSlotLog):
    def __init__(self, vm_fd: int, size: int, *, host_address: int, guest_address: int = 0, slot: int = 0) -> None: ...
    @property
    def initially_set(self) -> bool: ...
