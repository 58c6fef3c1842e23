from types import TracebackType
from typing import Self

from typing_extensions import disjoint_base

from pagecore._engine import PlacementEngine

@disjoint_base
class PlacementThreads(PlacementEngine):
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def running(self) -> bool: ...
    def start(self) -> Self: ...
    def stop(self) -> None: ...
