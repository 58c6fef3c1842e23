from collections.abc import Callable, Iterable, Mapping
from typing import SupportsIndex

import numpy
import numpy.typing
from typing_extensions import disjoint_base

from pagecore._bitmap import Bitmap
from pagecore._tracker_core import PageCounts as PageCounts
from pagecore._tracker_sends import Answer as Answer
from pagecore._tracker_sends import AnswerKind as AnswerKind
from pagecore._tracker_sends import RegionRuns as RegionRuns
from pagecore._tracker_sends import TrackerSends
from pagecore.dirty_log._protocol import DirtyLog
from pagecore.hints import Command, HintSession
from pagecore.tracked_region import TrackedRegion

__all__ = ["Answer", "AnswerKind", "PageCounts", "PageTracker", "RegionRuns"]

@disjoint_base
class PageTracker(TrackerSends):
    def __new__(
        cls,
        npages: SupportsIndex | None = None,
        *,
        regions: Iterable[TrackedRegion] | None = None,
        dirty_log: DirtyLog | None = None,
        all_dirty: bool = True,
        page_size: int = 4096,
        host_page_size: int | None = None,
        rearm: str = "sync",
        chunk_shift: int | None = None,
    ) -> PageTracker: ...
    def hint_session(
        self,
        promise: str = "armed",
        fill: int = 0,
        *,
        marked: Iterable[str] = (),
        on_command: Callable[[Command, int], object] | None = None,
    ) -> HintSession: ...
    def discard_pages(self, region: int | None = None) -> Bitmap: ...
    def hinted_pages(self, region: int | None = None) -> Bitmap: ...
    def discard_runs(self, region: int | None = None) -> numpy.typing.NDArray[numpy.int64]: ...
    def hinted_runs(self, region: int | None = None) -> numpy.typing.NDArray[numpy.int64]: ...
    def owe_hinted(self) -> int: ...
    @property
    def generation(self) -> int: ...
    def begin_generation(self, generation: int) -> None: ...
    def reload(
        self,
        settled: Bitmap | Mapping[int, Bitmap],
        *,
        generation: int | None = None,
        checksum: int | Mapping[int, int] | None = None,
    ) -> int: ...
    def _begin_session(self, session: HintSession) -> None: ...
    def _open_epoch(self) -> int: ...
    def _close_epoch(self, epoch: int) -> bool: ...
    def _hint(self, runs: numpy.typing.ArrayLike, epoch: int, region: int | None) -> tuple[int, int, int, bool]: ...

def _use_session_type(session_type: type[HintSession]) -> None: ...
