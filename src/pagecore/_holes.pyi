from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class Holes:
    def __new__(cls, npages: int, page_size: int) -> Self: ...
