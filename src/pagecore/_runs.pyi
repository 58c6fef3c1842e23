from typing import final

from _typeshed import ReadableBuffer

@final
class Pinned:
    def __new__(cls, exporter: ReadableBuffer = ..., writable: bool = False, entry_size: int = 1) -> Pinned: ...
