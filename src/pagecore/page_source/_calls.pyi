from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class Calls:
    def __new__(cls, timeout_ns: int, page_size: int, max_pages: int) -> Self: ...
    @property
    def pending(self) -> int: ...
