from collections.abc import Iterable
from types import TracebackType
from typing import Literal, NoReturn, Self, final

from _typeshed import WriteableBuffer

from pagecore.dirty_log._protocol import DirtyLog

__all__ = ["WriteProtectDirtyLog"]

@final
class WriteProtectDirtyLog(DirtyLog):
    def __init__(self, memory: WriteableBuffer, *, marked: Iterable[Literal["mappings", "pins"]] = ()) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __del__(self) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    @property
    def closed(self) -> bool: ...
    @property
    def faults(self) -> int: ...
    def close(self) -> None: ...
