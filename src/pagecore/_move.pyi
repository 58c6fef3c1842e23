from typing import NoReturn, Self, final

from _typeshed import ReadableBuffer

from pagecore._bitmap import Bitmap
from pagecore._place_result import PlaceResult
from pagecore._region import Region

__all__ = ["Mover"]

@final
class Mover:
    def __new__(cls, stages: int = 1) -> Self: ...
    def __reduce__(self) -> NoReturn: ...
    @property
    def stages(self) -> int: ...
    @property
    def blocks_moved(self) -> int: ...
    @property
    def blocks_huge(self) -> int: ...
    @property
    def blocks_split(self) -> int: ...
    @property
    def blocks_refused(self) -> int: ...
    @property
    def blocks_without_huge_page(self) -> int: ...
    def prepare(self, timeout: float = 0) -> int: ...
    def can_move(self, region: Region, first_page: int) -> bool: ...
    def place(
        self,
        region: Region,
        first_page: int,
        data: ReadableBuffer,
        *,
        wake: bool = True,
        claimed: Bitmap | None = None,
        received: Bitmap | None = None,
        excluded: Bitmap | None = None,
    ) -> PlaceResult: ...
