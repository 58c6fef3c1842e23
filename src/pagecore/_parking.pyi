from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class Parking:
    def __new__(cls, page_size: int) -> Self: ...
