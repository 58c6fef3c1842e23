from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from typing_extensions import Buffer, disjoint_base

from pagecore._region import Region
from pagecore.page_source._protocol import PageSource

@disjoint_base
class CallableSource(PageSource):
    def __new__(
        cls,
        function: Callable[[int, int, int], Buffer | None],
        *,
        timeout: float,
        page_size: int = 4096,
        max_pages: int = 16,
        allow_own_process: bool = False,
    ) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def accept(self, regions: Iterable[Region]) -> None: ...
    def close(self) -> None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def max_pages(self) -> int: ...
    @property
    def allow_own_process(self) -> bool: ...
    @property
    def last_error(self) -> BaseException | None: ...
    @property
    def pending(self) -> int: ...
