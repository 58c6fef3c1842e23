from typing_extensions import disjoint_base

@disjoint_base
class Waiters:
    def __new__(cls, size: int) -> Waiters: ...
