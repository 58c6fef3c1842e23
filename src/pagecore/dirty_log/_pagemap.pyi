from collections.abc import Iterable
from typing import Literal, Self, final

from _typeshed import WriteableBuffer

from pagecore._bitmap import Bitmap
from pagecore._uffd import Userfaultfd
from pagecore.dirty_log._protocol import DirtyLog

__all__ = ["PagemapDirtyLog"]

@final
class PagemapDirtyLog(DirtyLog):
    # `marked`: the writers that the log misses and that call PageTracker.mark after each write (S12).
    def __init__(
        self,
        memory: WriteableBuffer,
        *,
        page_size: int = 4096,
        marked: Iterable[Literal["mappings", "pins"]] = (),
    ) -> None: ...
    # With `uffd` (of that process, with WP_ASYNC) the memory is registered here; without, it must be already.
    @classmethod
    def of_process(
        cls,
        pid: int,
        address: int,
        length: int,
        *,
        uffd: Userfaultfd | None = None,
        page_size: int = 4096,
        marked: Iterable[Literal["mappings", "pins"]] = (),
    ) -> Self: ...
    @property
    def pid(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    # What may have held something else than zeros when the log was made; a copy.
    @property
    def populated(self) -> Bitmap: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...
