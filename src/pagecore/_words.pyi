from typing import SupportsIndex

from typing_extensions import disjoint_base

@disjoint_base
class Words:
    def __new__(cls, npages: SupportsIndex, *, summary: bool | None = None) -> Words: ...
    @property
    def size(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
