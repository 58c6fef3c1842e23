from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class Background:
    def __new__(cls, enabled: bool) -> Self: ...
    @property
    def step(self) -> int: ...
