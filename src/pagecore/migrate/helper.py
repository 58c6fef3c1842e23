"""The link helper: ``python -m pagecore.migrate.helper``, the process in which TLS and zstd are done.

Standard input is a socket: first the terms, then a request with two descriptors for each stream. It ends when the other
end of that socket is closed and its streams have ended; nothing else ends it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import select
import signal
import socket
import ssl
import sys
import threading
import time
from typing import Any, Final, NoReturn

from pagecore.errors import ProtocolError
from pagecore.migrate.address import Terms
from pagecore.migrate.chunks import PREFACE, Packer, Unpacker
from pagecore.migrate.greeting import WORD
from pagecore.migrate.pays import LinkPace, Pays
from pagecore.migrate.pump import LINGER, Pump
from pagecore.migrate.tls import tls_context
from pagecore.migrate.transport import has_zstd

__all__ = ["Helper"]

log = logging.getLogger("pagecore.migrate")

MAX_REQUEST: Final = 64 << 10
# For the handshake of TLS, and the preface after it.
HANDSHAKE_SECONDS: Final = 10.0
# A peer that is refused gets so long to read why, unless there are too many of them.
HANG_UP_SECONDS: Final = 0.5
MAX_POLITE: Final = 64


class Helper:
    """Makes links as it is asked to, each on a thread of its own.

    Parameters
    ----------
    terms : Terms
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._context = functools.lru_cache(lambda server: tls_context(terms, server=server))

    def carry(self, request: dict[str, Any], far: socket.socket, near: socket.socket) -> None:
        """Make one link and serve it to its end; both sockets are closed then."""
        with far, near:
            try:
                near.setblocking(False)
                far.setblocking(False)
                peer = self._open(request, far, near)
            # A thread has nobody to raise it to: the controller waits for a word.
            except Exception as error:
                _tell(near, _reason(error))
                return
            with peer:
                _tell(near, "")
                pace = LinkPace(peer)
                compress = request["compress"]
                pays = None if compress == "none" else Pays(pace, always=compress == "zstd")
                pump = Pump(near, peer, Packer(pays), Unpacker(zstd=has_zstd()), pace)
                pump.run()
                if pump.lost is not None:
                    log.info("a stream was lost: %s", _reason(pump.lost))

    def _open(self, request: dict[str, Any], far: socket.socket, near: socket.socket) -> socket.socket:
        """The socket on which chunks travel, proved where there is TLS.

        Raises
        ------
        OSError, ValueError, ProtocolError
        """
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        peer = far
        if request["tls"]:
            server = bool(request["server"])
            peer = self._context(server).wrap_socket(
                far,
                server_side=server,
                server_hostname=None if server else request["host"],
                do_handshake_on_connect=False,
            )
        try:
            if isinstance(peer, ssl.SSLSocket):
                _until(peer, near, deadline, peer.do_handshake)
            _until(peer, near, deadline, functools.partial(peer.send, PREFACE))
            # The listening side has checked who we are only when this comes.
            said = b""
            while len(said) < len(PREFACE):
                some = _until(peer, near, deadline, functools.partial(peer.recv, len(PREFACE) - len(said)))
                if not some:
                    raise ConnectionResetError("the peer closed the connection")
                said += some
            if said != PREFACE:
                raise ProtocolError("preface", f"{said!r} is not {PREFACE!r}")
        except BaseException:
            _hang_up(peer)
            raise
        return peer


def _refuse(ends: list[socket.socket], reason: str) -> None:
    """Close what came of a request where there were no descriptors left, or no threads; the links that are there go on.

    The controller's end is the first: it is told why, or hears nothing more where not even that one came.
    """
    log.warning("a link is refused: %s", reason)
    for end in ends[:1]:
        _tell(end, reason)
    for end in ends:
        end.close()


def _tell(near: socket.socket, reason: str) -> None:
    text = reason.encode()[:1000]
    # A few bytes, the first on their socket: they fit.
    with contextlib.suppress(OSError):
        near.send(WORD.pack(len(text)) + text)


def _until(peer: socket.socket, near: socket.socket, deadline: float, step: Any) -> Any:
    """Take one step of the handshake, however often it has to wait; not for ever, and not for nobody."""
    while True:
        try:
            return step()
        except ssl.SSLWantWriteError:
            wanted = select.POLLOUT
        except (BlockingIOError, ssl.SSLWantReadError):
            wanted = select.POLLIN
        poll = select.poll()
        poll.register(peer, wanted)
        poll.register(near, 0)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the peer did not prove itself within {HANDSHAKE_SECONDS:g} s")
        if any(descriptor == near.fileno() for descriptor, _ in poll.poll(left * 1000)):
            raise ConnectionAbortedError("nobody waits for this link any more")


def _hang_up(peer: socket.socket) -> None:
    """Close so that the peer hears the alert: what was not read would reset the connection, and the alert with it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(peer, socket.SHUT_WR)
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        deadline = time.monotonic() + HANG_UP_SECONDS
        while threading.active_count() < MAX_POLITE and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            # Below TLS: it is not to be understood any more.
            if not os.read(peer.fileno(), 1 << 16):
                break
    peer.close()


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return "the peer does not speak TLS"
        return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValueError | ProtocolError):
        return str(error)
    log.error("unexpected: %r", error, exc_info=error)
    return repr(error)


def main() -> NoReturn:
    """Serve requests until the controller closes its end."""
    # The controller decides when a link ends, and it has its own way with signals.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # The urgent stream shares the interpreter with the bulk streams: let it in soon.
    sys.setswitchinterval(0.0005)
    logging.basicConfig(stream=sys.stderr, level=os.environ.get("PAGECORE_LOG", "WARNING"), format="link: %(message)s")
    threads: list[threading.Thread] = []
    with socket.socket(fileno=0) as requests:
        helper = Helper(Terms.from_json(json.loads(requests.recv(MAX_REQUEST))))
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST, 2)
            if not message:
                break
            ends = [socket.socket(fileno=descriptor) for descriptor in descriptors]
            if len(ends) < 2:
                _refuse(ends, os.strerror(errno.EMFILE))
                continue
            near, far = ends
            threads = [thread for thread in threads if thread.is_alive()]
            thread = threading.Thread(target=helper.carry, args=(json.loads(message), far, near), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _refuse(ends, str(error))
            else:
                threads.append(thread)
    deadline = time.monotonic() + LINGER + 1
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
