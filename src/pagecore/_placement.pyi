from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

from pagecore._page_state import PageState
from pagecore._placing import PlacementObserver
from pagecore._region import Region
from pagecore._uffd import Userfaultfd
from pagecore._uffd_types import Waiting
from pagecore._waits import PlacementWaits
from pagecore._watchdog import StuckWaiter
from pagecore.page_source._protocol import PageSource
from pagecore.placement_stats import PlacementStats
from pagecore.working_set import WorkingSet

@disjoint_base
class PlacementLoop(PlacementWaits):
    def __new__(
        cls,
        regions: Sequence[Region],
        source: PageSource,
        *,
        states: Sequence[PageState] | None = None,
        threads: int = 1,
        fill: int = 0,
        duplicates: Literal["tolerant", "strict"] = "tolerant",
        on_lost: Literal["poison", "stall"] = "poison",
        on_stop: Literal["wake", "poison"] = "wake",
        on_remove: Literal["release", "keep"] | None = None,
        around: int = 64,
        background: bool = False,
        watchdog: float | None = None,
        observer: PlacementObserver | None = None,
        name: str = "",
    ) -> Self: ...
    def prefetch(self, runs: ArrayLike, *, region_id: int = 0) -> None: ...
    def request_again(self, runs: ArrayLike, *, region_id: int = 0) -> None: ...
    def forget(self, runs: ArrayLike, *, region_id: int = 0) -> None: ...
    def give_up(self, runs: ArrayLike, *, region_id: int = 0) -> None: ...
    def unsettled(self, *, region_id: int = 0, fill_is_zero: bool = True) -> NDArray[np.int64]: ...
    def stats(self) -> PlacementStats: ...
    @property
    def uffd(self) -> Userfaultfd: ...
    @property
    def background_step(self) -> int: ...
    def record_working_set(self) -> None: ...
    def working_set(self) -> WorkingSet: ...
    def replay(self, working_set: WorkingSet) -> None: ...
    def stuck(self, seconds: float = 0.0) -> list[StuckWaiter]: ...
    def waiter_figures(self) -> list[Waiting]: ...
