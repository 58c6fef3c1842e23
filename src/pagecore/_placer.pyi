from pagecore._page_state import PageState
from pagecore._uffd import Region
from pagecore.page_source._protocol import PageSource

class PlacementObserver: ...

class Placer:
    def __init__(
        self,
        region: Region,
        state: PageState,
        source: PageSource,
        observer: PlacementObserver | None,
        fill: int,
    ) -> None: ...
    @property
    def region(self) -> Region: ...
    @property
    def state(self) -> PageState: ...
