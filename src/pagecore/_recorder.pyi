from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

@disjoint_base
class Recorder:
    @property
    def active(self) -> bool: ...
    def begin(self, sizes: Iterable[int]) -> None: ...
    def touches(self) -> NDArray[np.int64]: ...
