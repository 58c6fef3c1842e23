from typing_extensions import disjoint_base

@disjoint_base
class PageSource:
    @property
    def lanes(self) -> int: ...
    @property
    def bulk_lanes(self) -> int: ...
    @property
    def page_size(self) -> int: ...
