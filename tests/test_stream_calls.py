"""How much a stream sends with one system call: little while somebody waits for pages, a batch while nobody does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from concurrency import DEADLINE, Worker
from pagecore.migrate.link import MAX_BYTES, MAX_QUIET_BYTES, Stream

MUCH = 3 * MAX_QUIET_BYTES


class Noting(socket.socket):
    """Notes how much each call was to send."""

    calls: list[int]

    def sendmsg(self, buffers: Any, *arguments: Any) -> int:
        self.calls.append(sum(map(len, buffers)))
        return super().sendmsg(buffers, *arguments)


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Noting, socket.socket]]:
    if request.param == "unix":
        plain, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            plain = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
    with Noting(fileno=plain.detach()) as ours, theirs:
        theirs.settimeout(DEADLINE)
        ours.calls = []
        yield ours, theirs


def test_a_call_is_large_only_where_nobody_waits_and_its_time_is_bounded(pair: tuple[Noting, socket.socket]) -> None:
    ours, theirs = pair
    stream = Stream(ours, DEADLINE)

    def receive() -> int:
        left = 2 * MUCH
        while left:
            left -= len(theirs.recv(min(left, 1 << 20)))
        return left

    reader = Worker(receive)
    stream.send([bytes(MUCH)])
    assert max(ours.calls) == MAX_BYTES
    ours.calls.clear()
    stream.send([bytes(MUCH)], quiet=True)
    # The time-out of a Unix socket is that of a small part: a slow reader would keep a long call from its check.
    assert max(ours.calls) == (MAX_BYTES if ours.family == socket.AF_UNIX else MAX_QUIET_BYTES)
    assert reader.value() == 0
