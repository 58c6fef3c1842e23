from collections.abc import Sequence
from typing import Any

import numpy as np
from _typeshed import ReadableBuffer
from numpy.typing import ArrayLike, NDArray

def verify(
    memory: ReadableBuffer,
    vcpus: int,
    seed: int,
    share: int,
    code: ReadableBuffer,
    steps: Sequence[int] | None = None,
    max_steps: int = ...,
) -> dict[str, Any]: ...
def page_checksums(memory: ReadableBuffer, runs: ArrayLike | None = None) -> NDArray[np.uint64]: ...
