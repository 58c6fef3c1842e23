from numpy.typing import ArrayLike
from typing_extensions import Buffer

from pagecore._page_state import PageState

def encode_pages(
    memory: Buffer,
    runs: ArrayLike,
    *,
    page_size: int = 4096,
    flags: int = 0,
    generation: int = 0,
    round: int = 0,
) -> bytes: ...
def store_pages(
    frames: Buffer,
    memory: Buffer,
    state: PageState,
    *,
    page_size: int = 4096,
    generation: int = 0,
    round: int = 0,
) -> tuple[int, int, int]: ...
