from collections.abc import Iterable
from typing import Protocol, Self

from typing_extensions import disjoint_base

from pagecore._region import Region
from pagecore.page_source._protocol import PageSource

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@disjoint_base
class MemfdSource(PageSource):
    def __new__(
        cls,
        memfd: int | _HasFileno,
        extents: Iterable[tuple[int, int, int]] | None = None,
        *,
        page_size: int = 4096,
    ) -> Self: ...
    def accept(self, regions: Iterable[Region]) -> None: ...
