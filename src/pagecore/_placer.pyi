from typing import Self

from typing_extensions import disjoint_base

from pagecore._page_state import PageState
from pagecore._region import Region
from pagecore.page_source._protocol import PageSource

@disjoint_base
class PlacementObserver: ...

@disjoint_base
class Placer:
    def __new__(
        cls,
        region: Region,
        state: PageState,
        source: PageSource,
        observer: PlacementObserver | None,
        fill: int,
    ) -> Self: ...
    @property
    def region(self) -> Region: ...
    @property
    def state(self) -> PageState: ...
