from pagecore._uffd import Userfaultfd
from pagecore.page_source._protocol import PageSource

class PlacementEngine:
    @property
    def uffd(self) -> Userfaultfd: ...
    @property
    def source(self) -> PageSource: ...
