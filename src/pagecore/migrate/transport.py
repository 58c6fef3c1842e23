"""Carries connected sockets to the link helper, the process in which TLS and zstd are done (design section 9)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import threading
from types import TracebackType
from typing import Any, Final, Self

from pagecore.errors import PeerGoneError, UnsupportedError
from pagecore.migrate.address import Terms
from pagecore.migrate.children import start_python
from pagecore.migrate.tcp import tune_tcp

__all__ = ["Transport", "agreed_compression", "has_zstd"]

# Between helper and controller: what one large sendmsg of the native lane takes.
BUFFER: Final = 1 << 20
END_SECONDS: Final = 10.0


def has_zstd() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("zstandard") is not None


class Transport:
    """The way of a controller's streams, on certain terms; a context manager. Any thread may use it.

    Streams without TLS and compression are plain sockets, and no process is started for them.

    Parameters
    ----------
    terms : Terms
    """

    def __init__(self, terms: Terms | None = None) -> None:
        self.terms = terms or Terms()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The helper's process id; None where none runs."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        if self.terms.tls or self.terms.compress != "none":
            # It is needed in any case, and ready by the time that there is a peer.
            with self._lock:
                self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wrap(
        self, sock: socket.socket, *, server: bool = False, host: str = "", tls: bool = False, compress: str = "none"
    ) -> socket.socket:
        """Hand a connected socket to the helper; returns the end of a pair on which its plain bytes travel.

        The first bytes on it are the helper's word of how it went: two of length, and the reason of a failure;
        `expect_plain_bytes` reads them. `sock` is the helper's from here on, and closed here.

        Parameters
        ----------
        sock : socket.socket
        server : bool
            Which side of TLS is ours.
        host : str
            What the certificate of a server must name.
        tls : bool
        compress : str
            Of what is sent, as in `Terms`; what is received is unpacked as it says itself.

        Raises
        ------
        PeerGoneError
            If the helper cannot be reached.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            sock.close()
            raise PeerGoneError(f"the link helper cannot be reached: {error.strerror or error}") from None
        with theirs, sock, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            tune_tcp(sock)
            request = {"server": server, "host": host, "tls": tls, "compress": compress}
            with self._lock:
                # Ours first: where the helper has room for one alone, it can still say so.
                self._send(request, [theirs.fileno(), sock.fileno()])
            undo.pop_all()
        return ours

    def close(self) -> None:
        """End the helper, and wait for it; what it still holds for a peer that takes it is delivered."""
        with self._lock:
            self._end()

    def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        message = json.dumps(request).encode()
        if self._requests is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(self._requests, [message], descriptors)
                return
            # It died and took its streams along, or hangs; the next generation of the session gets another one.
            self._end()
        try:
            self._start()
            assert self._requests is not None
            socket.send_fds(self._requests, [message], descriptors)
        except OSError as error:
            self._end()
            raise PeerGoneError(f"the link helper is gone: {error.strerror or error}") from None

    def _end(self) -> None:
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._requests = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                # No signal of the terminal ends a link before the controller says so.
                self._process = start_python(
                    "pagecore.migrate.helper", stdin=theirs.fileno(), stdout=subprocess.DEVNULL
                )
            except BaseException:
                ours.close()
                raise
        # One that hangs takes requests until the socket is full.
        ours.settimeout(END_SECONDS)
        self._requests = ours
        try:
            ours.send(json.dumps(self.terms.to_json()).encode())
        except OSError:
            self._end()
            raise


def agreed_compression(wish: str, peer: object) -> str:
    """What the bulk streams of a session do, of what the source wishes and the destination can.

    Raises
    ------
    UnsupportedError
        If zstd is insisted on, and the peer has none.
    """
    if wish == "none" or peer is True:
        return wish
    if wish == "zstd":
        raise UnsupportedError("zstd at the destination", "python -m pip install 'pagecore[zstd]' there")
    return "none"
