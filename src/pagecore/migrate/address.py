"""Where a peer is, and on what terms guest memory may travel there."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, NamedTuple

__all__ = ["Address", "Terms", "own_address", "parse_address"]

MAX_PATH: Final = 107


class Address(NamedTuple):
    """A socket family and what `socket.connect` takes; the family of a host name is not known before it is resolved."""

    family: socket.AddressFamily
    where: str | tuple[str, int]

    @property
    def host(self) -> str:
        """The host, or the path of a Unix socket."""
        return self.where if isinstance(self.where, str) else self.where[0]

    @property
    def text(self) -> str:
        """As `parse_address` reads it."""
        if isinstance(self.where, str):
            return f"unix:{self.where}"
        host, port = self.where
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    @property
    def is_local(self) -> bool:
        """Whether nothing sent there leaves this machine. A host name counts as elsewhere until it is resolved."""
        if self.family == socket.AF_UNIX:
            return True
        return self.family != socket.AF_UNSPEC and ipaddress.ip_address(self.host).is_loopback

    def resolved(self) -> list[Address]:
        """The numeric addresses of a host name; of everything else, itself.

        Raises
        ------
        OSError
            If the name is not known.
        """
        if isinstance(self.where, str) or self.family != socket.AF_UNSPEC:
            return [self]
        host, port = self.where
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [Address(family, (str(where[0]), port)) for family, _, _, _, where in found]


def parse_address(text: str) -> Address:
    """The address in ``unix:PATH`` or ``HOST:PORT``; ``tcp:HOST:PORT`` is the same. IPv6 stands in brackets.

    Raises
    ------
    ValueError
        If it is neither.
    """
    scheme, _, path = text.partition(":")
    if scheme == "unix":
        if not path or len(os.fsencode(path)) > MAX_PATH:
            raise ValueError(f"the socket path {path!r} has not 1 to {MAX_PATH} bytes")
        return Address(socket.AF_UNIX, path)
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isascii() or not port.isdecimal() or int(port) > 65535 or (":" in host and host == bare):
        raise ValueError(f"{text!r} is neither unix:PATH nor HOST:PORT; an IPv6 address stands in brackets")
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        if not all(part and part.replace("-", "").isalnum() for part in bare.removesuffix(".").split(".")):
            raise ValueError(f"{bare!r} is neither an IP address nor a host name") from None
        return Address(socket.AF_UNSPEC, (bare, int(port)))
    return Address(socket.AF_INET6 if version == 6 else socket.AF_INET, (bare, int(port)))


def own_address() -> str:
    """Where two sides on one machine meet unless somebody says where: a Unix socket of this user's.

    The directory may be everybody's: whoever is first there, each side asks the kernel who the other one is.
    """
    return f"unix:{os.environ.get('XDG_RUNTIME_DIR') or tempfile.gettempdir()}/pagecore-{os.geteuid()}.sock"


@dataclass(frozen=True, slots=True)
class Terms:
    """How the link is made.

    Attributes
    ----------
    tls_cert, tls_key, tls_ca : str or None
        Paths of PEM files: our certificate (with what leads from it to the authority), its key, and the authority
        that the peer's certificate must come from. All of them or none.
    insecure : bool
        Other machines may be spoken to without TLS: in the clear, and whoever they are.
    compress : str
        Of the bulk streams: ``none``, ``auto`` (zstd wherever measurement says that it pays) or ``zstd`` (always).
    """

    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    insecure: bool = False
    compress: Literal["none", "auto", "zstd"] = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        given = [name for name in ("tls_cert", "tls_key", "tls_ca") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError("TLS is mutual: --tls-cert, --tls-key and --tls-ca are needed together")
        if given and self.insecure:
            raise ValueError("--insecure is the way without TLS: leave it out, or the certificates")
        if self.compress not in ("none", "auto", "zstd"):
            raise ValueError(f"compress {self.compress!r} is not one of none, auto, zstd")

    @property
    def tls(self) -> bool:
        """Whether the link is encrypted, and both sides prove who they are."""
        return self.tls_cert is not None

    def check(self, address: Address) -> None:
        """Refuse an address that these terms are too weak for.

        Raises
        ------
        ValueError
        """
        if self.tls and address.family == socket.AF_UNIX:
            raise ValueError("a Unix socket needs no TLS: nothing leaves the machine")
        if not (self.tls or self.insecure or address.is_local):
            raise ValueError(
                f"{address.host} is refused: the link is neither encrypted nor authenticated, and only loopback and "
                "Unix sockets may be without; give --tls-cert, --tls-key and --tls-ca, or --insecure"
            )

    def strangers(self, address: Address) -> str:
        """Who else may come to an address on these terms, or listen there first; empty: nobody."""
        if self.tls or address.family == socket.AF_UNIX:
            return ""
        return "any user of this machine" if address.is_local else "anybody"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the configuration of a child process."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Terms:
        """The terms that `to_json` made.

        Raises
        ------
        ValueError
        """
        unknown = set(given) - {one.name for one in fields(cls)}
        if unknown:
            raise ValueError(f"terms {', '.join(sorted(unknown))} are not known")
        return cls(**given)
