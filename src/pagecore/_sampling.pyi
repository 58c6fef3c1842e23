from typing import Final

import numpy as np
from numpy.typing import NDArray

UNKNOWN: Final = 0

def page_checksums_of(
    pid: int, pagemap: int, addresses: NDArray[np.int64], anonymous: NDArray[np.uint8]
) -> NDArray[np.uint64]: ...
def zero_checksum() -> int: ...
