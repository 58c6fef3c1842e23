import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy
import numpy.typing
from typing_extensions import disjoint_base

from pagecore._bitmap import Bitmap
from pagecore._source_planes import SourcePlanes
from pagecore.dirty_log._protocol import DirtyLog
from pagecore.hints import Command, HintSession

PAGE_SIZE: int

class AnswerKind(enum.Enum):
    OWED = 0
    FREE = 1
    SENT = 2
    GONE = 3

class Answer(NamedTuple):
    kind: AnswerKind
    first: int
    count: int  # type: ignore[assignment]  # as every namedtuple with this field

@disjoint_base
class PageTracker(SourcePlanes):
    def __new__(
        cls,
        npages: int,
        *,
        dirty_log: DirtyLog | None = None,
        all_dirty: bool = True,
        page_size: int = 4096,
    ) -> PageTracker: ...
    @property
    def page_size(self) -> int: ...
    @property
    def dirty_log(self) -> DirtyLog | None: ...
    def sync(self) -> int: ...
    def take(self, max_pages: int = 512, max_runs: int | None = None) -> numpy.typing.NDArray[numpy.int64]: ...
    def put_back(self, runs: numpy.typing.ArrayLike) -> None: ...
    def mark(self, runs: numpy.typing.ArrayLike) -> None: ...
    def resolve(self, page: int, count: int = 1, again: bool = False) -> list[Answer]: ...
    def hint_session(
        self,
        promise: str = "armed",
        fill: int = 0,
        *,
        marked: Iterable[str] = (),
        on_command: Callable[[Command, int], object] | None = None,
    ) -> HintSession: ...
    def discard_runs(self) -> numpy.typing.NDArray[numpy.int64]: ...
    def hinted_runs(self) -> numpy.typing.NDArray[numpy.int64]: ...
    def owe_hinted(self) -> int: ...
    def owe_all(self) -> int: ...
    def reload(self, settled: Bitmap) -> int: ...
    def _begin_session(self, session: HintSession) -> None: ...
    def _open_epoch(self) -> int: ...
    def _close_epoch(self, epoch: int) -> bool: ...
    def _hint(self, runs: numpy.typing.ArrayLike, epoch: int) -> tuple[int, int]: ...

def _use_session_type(session_type: type[HintSession]) -> None: ...
