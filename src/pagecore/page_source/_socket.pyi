import socket
from collections.abc import Sequence

from pagecore.page_source._protocol import PageSource

class SocketSource(PageSource):
    def __init__(
        self,
        bulk: Sequence[socket.socket],
        urgent: socket.socket,
        *,
        page_size: int = 4096,
        max_pages: int = 256,
        generation: int = 0,
        round: int = 0,
    ) -> None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_pages(self) -> int: ...
