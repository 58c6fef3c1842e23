import socket
from collections.abc import Sequence
from typing import Self

from typing_extensions import disjoint_base

from pagecore.page_source._protocol import PageSource

@disjoint_base
class SocketSource(PageSource):
    def __new__(
        cls,
        bulk: Sequence[socket.socket],
        urgent: socket.socket,
        *,
        page_size: int = 4096,
        max_pages: int = 256,
        generation: int = 0,
        round: int = 0,
    ) -> Self: ...
    @property
    def max_pages(self) -> int: ...
