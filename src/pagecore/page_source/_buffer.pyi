from typing_extensions import Buffer

from pagecore.page_source._protocol import PageSource

class BufferSource(PageSource):
    def __init__(self, buffer: Buffer, page_size: int = 4096, *, region_id: int = 0) -> None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def size(self) -> int: ...
