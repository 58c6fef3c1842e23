from typing_extensions import disjoint_base

from pagecore._uffd import Userfaultfd
from pagecore.page_source._protocol import PageSource

@disjoint_base
class PlacementEngine:
    @property
    def uffd(self) -> Userfaultfd: ...
    @property
    def source(self) -> PageSource: ...
