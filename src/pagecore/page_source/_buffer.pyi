from collections.abc import Iterable
from typing import Self

from typing_extensions import Buffer, disjoint_base

from pagecore._region import Region
from pagecore.page_source._protocol import PageSource

@disjoint_base
class BufferSource(PageSource):
    def __new__(cls, buffer: Buffer, page_size: int = 4096, *, region_id: int = 0) -> Self: ...
    def accept(self, regions: Iterable[Region]) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def staged(self) -> bool: ...
