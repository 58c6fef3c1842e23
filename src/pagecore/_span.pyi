from typing_extensions import disjoint_base

from pagecore._uffd import Userfaultfd

__all__ = ["Span"]

@disjoint_base
class Span:
    @property
    def uffd(self) -> Userfaultfd: ...
    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def ioctls(self) -> int: ...
