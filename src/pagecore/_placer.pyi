from typing import Self

from typing_extensions import disjoint_base

from pagecore._page_state import PageState
from pagecore._placing import PlacementObserver, Placing
from pagecore._shards import Shards
from pagecore.page_source._protocol import PageSource

@disjoint_base
class Placer(Placing):
    def __new__(
        cls,
        region: Shards,
        state: PageState,
        source: PageSource,
        observer: PlacementObserver | None,
        fill: int,
        keep_removed: bool,
    ) -> Self: ...
