"""What the tests of the link share: certificates, a HELLO, and a listening side on a thread of its own."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import trustme

from concurrency import Worker
from pagecore.migrate.address import Terms, parse_address
from pagecore.migrate.link import Link
from pagecore.migrate.listener import Listener
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.transport import Transport
from pagecore.wire import Capabilities, FrameType, Hello, encode_frame, encode_hello

SESSION = "the-session"


class Authority:
    """Somebody who vouches for others, in files as the command line takes them."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self.path = str(directory / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.path)

    def terms(self, name: str, *, identity: str = "127.0.0.1", expired: bool = False, **more: Any) -> Terms:
        """The terms of somebody whom this authority vouches for, and who trusts it."""
        until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1) if expired else None
        since = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC) if expired else None
        issued = self._authority.issue_cert(identity, not_after=until, not_before=since)
        certificate, key = (str(self._directory / f"{name}.{kind}") for kind in ("pem", "key"))
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return Terms(certificate, key, more.pop("tls_ca", self.path), **more)


def hello(session_id: str = SESSION, **changes: Any) -> Hello:
    """What a source says."""
    values: dict[str, Any] = {
        "stream": "control",
        "session_id": session_id,
        "generation": 0,
        "page_size": 4096,
        "regions": {0: 100},
        "capabilities": Capabilities("strict"),
        "streams": 2,
    }
    return Hello(**{**values, **changes})


def hello_frame(session_id: str = SESSION, **changes: Any) -> bytes:
    """The bytes of it."""
    said = hello(session_id, **changes)
    return encode_frame(FrameType.HELLO, encode_hello(said), generation=said.generation)


def agree(theirs: Hello) -> Hello:
    """A destination that agrees with everything that is right."""
    return hello(theirs.session_id, generation=theirs.generation)


class Reception:
    """A listener, with one `accept` under way at a time."""

    def __init__(self, address: str, transport: Transport | None = None) -> None:
        self.refused: list[str] = []
        self.listener = Listener(address, transport, self.refused.append)
        self.address = self.listener.address

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def accept(self, session_id: str | None = SESSION, answer: Callable[[Hello], Hello] = agree, **more: Any) -> Worker:
        """Begin to wait for a session; the worker's value is the link."""
        values = {"timeout": 20.0, "patience": 5.0, "check": lambda: None, **more}
        return Worker(lambda: self.listener.accept(session_id, answer, **values))

    def connection(self, source: str = "") -> socket.socket:
        """A connection that has said nothing, from one of this machine's addresses."""
        family, where = parse_address(self.address)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(10)
        if source:
            sock.bind((source, 0))
        sock.connect(where)
        return sock


@contextlib.contextmanager
def session(
    reception: Reception, said: Hello | None = None, transport: Transport | None = None, **accepting: Any
) -> Iterator[tuple[Link, Link]]:
    """A session between two sides: the link of the one that connects, and of the one that listens."""
    waiting = reception.accept(**accepting)
    given = said or hello()
    with (
        connect(reception.address, given, transport=transport, timeout=20, patience=5) as ours,
        waiting.value() as theirs,
    ):
        yield ours, theirs


def exchange(ours: Link, theirs: Link) -> None:
    """Both sides can be heard on every stream."""
    streams = [(ours.control, theirs.control), (ours.urgent, theirs.urgent), *zip(ours.bulk, theirs.bulk, strict=True)]
    for near, far in streams:
        for sender, receiver in ((near, far), (far, near)):
            text = bytearray(5)
            sender.send([b"hello"])
            receiver.receive_into(memoryview(text))
            assert text == b"hello"


def no_descriptors(*_: object, **__: object) -> NoReturn:
    """What makes a descriptor, where there is none left."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_thread(*names: str) -> Callable[[threading.Thread], None]:
    """`Thread.start` where there is no room for threads whose names begin so; of other threads there are enough."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(names):
            raise RuntimeError("can't start new thread")
        start(thread)

    return refuse
