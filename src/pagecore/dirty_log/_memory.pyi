from collections.abc import Iterable

from typing_extensions import disjoint_base

from pagecore._bitmap import Bitmap
from pagecore.dirty_log._protocol import DirtyLog

@disjoint_base
class MemoryDirtyLog(DirtyLog):
    def __init__(self, size: int, bitmap: Bitmap | None = None, *, misses: Iterable[str] = ()) -> None: ...
    @property
    def bitmap(self) -> Bitmap: ...
