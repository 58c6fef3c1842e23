from typing_extensions import disjoint_base

from pagecore.page_source._protocol import PageSource

@disjoint_base
class PlacementEngine:
    @property
    def source(self) -> PageSource: ...
