"""Who is at the other end of a connection, as far as the kernel says."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Final, TypeVar

from pagecore.errors import ProtocolError

__all__ = ["check_user", "crowding", "origin"]

# pid, uid, gid of the other end of a Unix socket.
_CREDENTIALS: Final = struct.Struct("3i")

Name = TypeVar("Name")


def check_user(sock: socket.socket) -> None:
    """At a Unix socket, nobody but this user and root is a peer, whoever may reach the file or made it.

    Both sides ask: who listens at a path that others may write to may be anybody.

    Raises
    ------
    ProtocolError
    """
    if sock.family != socket.AF_UNIX:
        return
    given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user = _CREDENTIALS.unpack(given)[1]
    if user not in (0, os.geteuid()):
        raise ProtocolError("user", f"{user} is neither this side's {os.geteuid()} nor root")


def origin(where: object) -> Hashable:
    """What a peer has only one of, from the address that `accept` gives: of IPv6 that is a network, of Unix its user.

    Parameters
    ----------
    where : object
        ``(host, port, ...)``, or whatever stands for a Unix socket: `check_user` has seen that user.
    """
    if not isinstance(where, tuple):
        return ""
    address = ipaddress.ip_address(where[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address
    # Who has one address of IPv6 has 2**64 of them.
    return address.ipv4_mapped or int(address) >> 64


def crowding(origins: Mapping[Name, Hashable]) -> Name:
    """Who has to go where there are too many: of those whose origin has the most, the first.

    A flood from one place so keeps out nobody but itself.
    """
    counts = Counter(origins.values())
    most = max(counts.values())
    return next(name for name, place in origins.items() if counts[place] == most)
