import os
from collections.abc import Iterable
from typing import Protocol, Self

from typing_extensions import disjoint_base

from pagecore.page_source._protocol import PageSource

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@disjoint_base
class FileSource(PageSource):
    def __new__(
        cls,
        file: str | bytes | os.PathLike[str] | int | _HasFileno,
        extents: Iterable[tuple[int, int, int]] | None = None,
        *,
        page_size: int = 4096,
    ) -> Self: ...
    @property
    def sparse(self) -> bool: ...
    @property
    def extents(self) -> tuple[tuple[int, int, int], ...]: ...
