"""SnapshotServer: sessions, their ends, and what is refused. What it does page by page is in test_conformance.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import Feature, conformance
from pagecore.conformance.snapshot import PAGE, Snapshot
from pagecore.conformance.vmm import Vmm
from pagecore.snapshot_server import SnapshotServer
from uffd_helpers import Child

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]


@pytest.fixture
def snapshot(tmp_path: pathlib.Path) -> Snapshot:
    conformance.make_snapshot(tmp_path / "snapshot")
    return Snapshot(tmp_path / "snapshot")


@contextlib.contextmanager
def serving(snapshot: Snapshot, **options: Any) -> Iterator[SnapshotServer]:
    with SnapshotServer(snapshot.path + ".socket", snapshot.path, **options) as server:
        worker = Worker(server.serve)
        try:
            yield server
        finally:
            server.stop()
            worker.value()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "pagecore.serve")
    return lambda: caplog.text


def guest(server: SnapshotServer, snapshot: Snapshot, body: Callable[[Vmm], Any]) -> Child:
    """A VMM in a process of its own."""

    def play() -> Any:
        vmm = Vmm(server.socket_path, snapshot, DEADLINE, may_kill=False)
        return body(vmm)

    return Child(play)


def test_guests_are_served_side_by_side(snapshot: Snapshot, said: Callable[[], str]) -> None:
    def body(vmm: Vmm) -> bool:
        vmm.start()
        for page in range(200):
            vmm.expect(page, snapshot.page(page))
        return True

    with serving(snapshot, threads=2) as server:
        children = [guest(server, snapshot, body) for _ in range(3)]
        assert [child.value() for child in children] == [True] * 3
        wait_until(lambda: server.sessions == 0, "the end of the sessions")
    ends = re.findall(r"ended; (\d+) pages placed, 0 zero, 0 filled after a discard, 0 discarded, 0 lost, ", said())
    assert len(ends) == 3
    assert all(int(placed) >= 200 for placed in ends)


def test_guests_beyond_what_select_can_watch(snapshot: Snapshot, said: Callable[[], str]) -> None:
    """A server of some hundred guests has descriptors above 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    gate, opener = os.pipe()
    taken = [gate, opener]

    def body(vmm: Vmm) -> bool:
        os.read(gate, 1)
        vmm.start()
        vmm.expect(5, snapshot.page(5))
        return True

    try:
        with serving(snapshot) as server:
            child = guest(server, snapshot, body)
            while taken[-1] < 1100:
                taken.append(os.dup(gate))
            os.write(opener, b"x")
            assert child.value()
            wait_until(lambda: server.sessions == 0, "the end of the session")
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert re.search(r"ended; [1-9]\d* pages placed", said())


def test_a_prefetch_places_all_of_it(snapshot: Snapshot, said: Callable[[], str]) -> None:
    def body(vmm: Vmm) -> bool:
        vmm.start(cuts=(100, 200))
        wait_until(lambda: all(present(area.address, area.count) == area.count for area in vmm.areas), "all pages")
        return bytes(vmm.areas[1].memory[:]) == snapshot.page(100, 100)

    with serving(snapshot, prefetch=True) as server:
        assert guest(server, snapshot, body).value() is True
    assert "960 pages placed, 64 zero" in said()


def present(address: int, count: int) -> int:
    """How many pages of this process are there, without touching them."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        entries = memoryview(file.read(8 * count)).cast("Q")
    return sum(entry >> 63 for entry in entries)


def test_nothing_is_left_of_a_session(snapshot: Snapshot) -> None:
    """Descriptors and threads, after good guests, killed ones, and refused ones."""

    def good(vmm: Vmm) -> None:
        vmm.start()
        vmm.expect(5, snapshot.page(5))

    def killed(vmm: Vmm) -> None:
        good(vmm)
        vmm.touch(9)
        os.kill(os.getpid(), signal.SIGKILL)

    def refused(vmm: Vmm) -> None:
        vmm.map()
        vmm.hand_over(b"[]")
        vmm.wait_refused()

    with serving(snapshot) as server:
        before = (len(os.listdir("/proc/self/fd")), threading.active_count())
        for _ in range(3):
            guest(server, snapshot, good).value()
            guest(server, snapshot, refused).value()
            assert guest(server, snapshot, killed).ended() == -signal.SIGKILL
        wait_until(lambda: server.sessions == 0, "the end of the sessions")
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


class Halted:
    """A guest that was served one page, and touches a missing one only when the test lets it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._served, self._serve = os.pipe()
        self._waits, self._goes = os.pipe()

    def touch_missing(self, vmm: Vmm, seconds: float) -> threading.Thread:
        """In the guest, which holds no descriptor itself: a thread that had so many seconds for its touch."""
        vmm.start()
        vmm.uffd.close()
        vmm.expect(5, self._snapshot.page(5))
        os.write(self._serve, b"s")
        os.read(self._waits, 1)
        touch = vmm.touch(6)
        touch.join(seconds)
        return touch

    def wait_served(self) -> None:
        assert os.read(self._served, 1) == b"s"

    def let_go(self) -> None:
        os.write(self._goes, b"g")

    def close(self) -> None:
        for number in (self._served, self._serve, self._waits, self._goes):
            os.close(number)


@pytest.fixture
def halted(snapshot: Snapshot) -> Iterator[Halted]:
    with contextlib.closing(Halted(snapshot)) as made:
        yield made


@pytest.mark.parametrize(("on_lost", "end"), [("poison", -signal.SIGBUS), ("stall", -signal.SIGKILL)])
def test_a_stop_with_missing_pages_fails_closed(snapshot: Snapshot, halted: Halted, on_lost: Any, end: int) -> None:
    """D12: by policy a SIGBUS, or a wait; zeros would be an exit status of 0."""

    def body(vmm: Vmm) -> int:
        if halted.touch_missing(vmm, 0.2).is_alive():
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with serving(snapshot, on_lost=on_lost) as server:
        child = guest(server, snapshot, body)
        halted.wait_served()
    halted.let_go()
    assert child.ended() == end


@contextlib.contextmanager
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """What is given is so many that can be had; never more than were before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def leave(count: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        for _ in range(count):
            os.close(taken.pop())

    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        yield leave
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in taken:
            os.close(number)


def test_a_server_that_runs_out_of_descriptors_refuses_the_guest_and_keeps_nothing_of_it(
    snapshot: Snapshot, said: Callable[[], str]
) -> None:
    def body(vmm: Vmm) -> int:
        """After how many attempts it is served; the next one comes when the last has left nothing."""
        for attempt in itertools.count():
            os.read(go, 1)
            vmm.stream = None
            vmm.start()
            touch = vmm.touch(5)
            while touch.is_alive():
                if not select.select([vmm.stream], [], [], 0.002)[0]:
                    continue
                vmm.place(5, snapshot.page(5))
                touch.join()
                os.write(writer, b"r")
                break
            else:
                assert touch.result == snapshot.page(5)
                return attempt
        raise AssertionError

    refused, writer = os.pipe()
    go, starter = os.pipe()
    with serving(snapshot, on_lost="stall") as server:
        before = (len(os.listdir("/proc/self/fd")), threading.active_count())
        child = guest(server, snapshot, body)
        os.close(writer)
        with few_descriptors() as leave:
            # One to accept it, and each time one more.
            for attempt in itertools.count():
                leave(1 + attempt)
                os.write(starter, b"g")
                if not os.read(refused, 1):
                    break
                wait_until(lambda: threading.active_count() == before[1], "the end of the session's threads")
            wait_until(lambda: threading.active_count() == before[1], "the end of the session's threads")
        assert child.value() == attempt >= 4
        assert len(os.listdir("/proc/self/fd")) + 1 == before[0]
    assert said().count("refused: ") == attempt
    for number in (refused, go, starter):
        os.close(number)


def test_a_server_without_threads_refuses_the_guest_and_goes_on(
    snapshot: Snapshot, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is the session's own, or one of its loop's."""
    start = threading.Thread.start
    left = [0]

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("pagecore-"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    def refused(vmm: Vmm) -> None:
        vmm.map()
        with contextlib.suppress(BrokenPipeError):  # the server may be faster
            vmm.hand_over()
            vmm.wait_refused()

    def served(vmm: Vmm) -> None:
        vmm.start()
        vmm.expect(5, snapshot.page(5))

    monkeypatch.setattr(threading.Thread, "start", limited)
    with serving(snapshot) as server:
        before = (len(os.listdir("/proc/self/fd")), threading.active_count())
        for most in range(3):
            left[0] = most
            guest(server, snapshot, refused).value()
            wait_until(lambda: server.sessions == 0, "the end of the session")
        left[0] = 100
        guest(server, snapshot, served).value()
        wait_until(lambda: server.sessions == 0, "the end of the session")
        wait_until(lambda: threading.active_count() == before[1], "the end of the session's threads")
        assert len(os.listdir("/proc/self/fd")) == before[0]
    assert said().count("refused: can't start new thread") == 3


def test_a_server_without_descriptors_still_fails_closed(snapshot: Snapshot, halted: Halted) -> None:
    """D12: the one that keeps missing pages from reading as zeros is there before it is needed."""

    def body(vmm: Vmm) -> bool:
        return halted.touch_missing(vmm, 0.1).is_alive()

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Whatever the session gives back is above it, and nobody's again.
    lowest = os.dup(2)
    os.close(lowest)
    try:
        with serving(snapshot, on_lost="stall") as server:
            child = guest(server, snapshot, body)
            halted.wait_served()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    halted.let_go()
    assert child.value() is True


def test_a_guest_without_discard_events_is_refused(snapshot: Snapshot, said: Callable[[], str]) -> None:
    """D3: its balloon's discards would go unseen."""

    def body(vmm: Vmm) -> None:
        vmm.map(features=Feature(0))
        vmm.hand_over()
        vmm.wait_refused()

    with serving(snapshot) as server:
        guest(server, snapshot, body).value()
    assert "refused: the descriptor was opened without EVENT_REMOVE" in said()


def test_memory_that_is_not_what_it_is_said_to_be_is_refused(snapshot: Snapshot, said: Callable[[], str]) -> None:
    def body(vmm: Vmm) -> None:
        vmm.map()
        fields = vmm.areas[0].fields()
        fields["base_host_virt_addr"] = 4096
        vmm.hand_over(json.dumps([fields]).encode())
        vmm.wait_refused()

    with serving(snapshot) as server:
        guest(server, snapshot, body).value()
    assert "is not wholly mapped" in said()


def test_a_descriptor_that_is_no_userfaultfd_is_refused(snapshot: Snapshot, said: Callable[[], str]) -> None:
    def body(vmm: Vmm) -> None:
        vmm.map()
        vmm.hand_over(fds=[0])
        vmm.wait_refused()

    with serving(snapshot) as server:
        guest(server, snapshot, body).value()
    assert "is no userfaultfd" in said()


def test_a_vmm_that_says_nothing_is_timed_out(snapshot: Snapshot, said: Callable[[], str]) -> None:
    with serving(snapshot, handshake_timeout=0.05) as server:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(server.socket_path)
            assert stream.recv(1) == b""
        wait_until(lambda: server.sessions == 0, "the end of the session")
    assert "0 bytes in 0.05 s, and not complete" in said()


def test_a_silent_vmm_does_not_hold_up_a_stop(snapshot: Snapshot) -> None:
    with socket.socket(socket.AF_UNIX) as stream, serving(snapshot, handshake_timeout=3600) as server:
        stream.connect(server.socket_path)
        wait_until(lambda: server.sessions == 1, "the session")


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(snapshot: Snapshot) -> None:
    path = snapshot.path + ".socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with SnapshotServer(path, snapshot.path), pytest.raises(OSError, match="Address already in use"):
        SnapshotServer(path, snapshot.path)
    assert not os.path.exists(path)
    pathlib.Path(path).write_text("a file of somebody's")
    with pytest.raises(OSError, match="Address already in use"):
        SnapshotServer(path, snapshot.path)
    assert pathlib.Path(path).read_text() == "a file of somebody's"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_lost": "zeros"}, "on_lost 'zeros' is neither 'poison' nor 'stall'"),
        ({"threads": 0}, "threads 0 is less than 1"),
        ({"handshake_timeout": 0}, "handshake timeout 0 is outside"),
    ],
)
def test_options_are_checked(snapshot: Snapshot, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SnapshotServer(snapshot.path + ".socket", snapshot.path, **options)


def test_a_missing_snapshot_leaves_no_socket(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        SnapshotServer(tmp_path / "socket", tmp_path / "nothing")
    assert not (tmp_path / "socket").exists()


def test_a_closed_server_stays_closed(snapshot: Snapshot) -> None:
    server = SnapshotServer(snapshot.path + ".socket", snapshot.path)
    server.stop()
    server.stop()
    server.serve()
    server.close()
    server.close()
    server.stop()
    assert not os.path.exists(server.socket_path)
