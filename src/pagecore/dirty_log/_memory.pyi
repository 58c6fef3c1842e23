from collections.abc import Iterable

from pagecore._bitmap import Bitmap
from pagecore.dirty_log._protocol import DirtyLog

class MemoryDirtyLog(DirtyLog):
    def __init__(self, size: int, bitmap: Bitmap | None = None, *, misses: Iterable[str] = ()) -> None: ...
    @property
    def bitmap(self) -> Bitmap: ...
