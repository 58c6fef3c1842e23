from collections.abc import Sequence
from typing import Self

from typing_extensions import disjoint_base

from pagecore._region import Region

@disjoint_base
class Shards:
    def __new__(cls, regions: Sequence[Region]) -> Self: ...
    @property
    def regions(self) -> tuple[Region, ...]: ...
    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def page_size(self) -> int: ...
