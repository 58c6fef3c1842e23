from collections.abc import Iterator
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from pagecore._words import Words

class Listing(Words):
    def runs(self) -> NDArray[np.int64]: ...
    def indices(self) -> NDArray[np.int64]: ...
    def iter_runs(self) -> Iterator[tuple[int, int]]: ...
    def take_runs(
        self,
        first: SupportsIndex = 0,
        max_pages: SupportsIndex | None = None,
        max_runs: SupportsIndex | None = None,
    ) -> NDArray[np.int64]: ...
