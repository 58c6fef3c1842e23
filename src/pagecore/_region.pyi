from typing import NoReturn, final

from _typeshed import ReadableBuffer

from pagecore._bitmap import Bitmap
from pagecore._place_result import PlaceResult
from pagecore._span import Span
from pagecore._uffd_types import MemoryKind, RegisterMode

__all__ = ["Region"]

@final
class Region(Span):
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def __len__(self) -> int: ...
    def __reduce__(self) -> NoReturn: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def kind(self) -> MemoryKind: ...
    @property
    def modes(self) -> RegisterMode: ...
    def pages_at(self, address: int, length: int) -> tuple[int, int]: ...
    def place(
        self,
        first_page: int,
        data: ReadableBuffer,
        *,
        wake: bool = True,
        protect: bool | None = None,
        claimed: Bitmap | None = None,
        received: Bitmap | None = None,
        excluded: Bitmap | None = None,
    ) -> PlaceResult: ...
    def place_zeros(
        self,
        first_page: int,
        count: int,
        *,
        wake: bool = True,
        claimed: Bitmap | None = None,
        received: Bitmap | None = None,
        excluded: Bitmap | None = None,
    ) -> PlaceResult: ...
    def place_continue(
        self,
        first_page: int,
        count: int,
        *,
        wake: bool = True,
        protect: bool | None = None,
        claimed: Bitmap | None = None,
        received: Bitmap | None = None,
        excluded: Bitmap | None = None,
    ) -> PlaceResult: ...
    def protect(self, first_page: int, count: int) -> PlaceResult: ...
    def unprotect(self, first_page: int, count: int, *, wake: bool = True) -> PlaceResult: ...
    def poison(
        self, first_page: int, count: int, *, claimed: Bitmap | None = None, excluded: Bitmap | None = None
    ) -> PlaceResult: ...
    def wake(self, first_page: int, count: int) -> None: ...
