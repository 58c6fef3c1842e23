import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

def split_zero(
    memory: Buffer, runs: ArrayLike, page_size: int = 4096
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
