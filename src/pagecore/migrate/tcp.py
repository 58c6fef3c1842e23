"""What a link asks of a TCP socket."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

__all__ = ["tune_tcp"]

# Always built in, and allowed to everybody where the system's owner has not forbidden it.
UNPACED: Final = b"reno"


def tune_tcp(sock: socket.socket) -> None:
    """Prepare a connected socket for pages; no-op for one that is not TCP.

    Parameters
    ----------
    sock : socket.socket
    """
    if sock.family == socket.AF_UNIX:
        return
    # An urgent page of 4 KiB must not wait for the acknowledgement of the one before it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Within one machine there is no bottleneck to look for, and BBR would sleep between its pieces all the same: that
    # cost a quarter of the throughput. Across a network it is the choice of who runs it.
    with contextlib.suppress(OSError):
        if sock.getsockname()[0] == sock.getpeername()[0]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
