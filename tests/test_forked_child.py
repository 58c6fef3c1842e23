"""What a forked child ends, leaves or drops is its own copy: the parent's threads, pages, sessions and guest go on."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import Bitmap, MemoryDirtyLog, Mover, PageTracker, PlacementLoop, UnsupportedError
from pagecore.background_snapshot import BackgroundSnapshot
from pagecore.dirty_log import PagemapDirtyLog
from pagecore.page_source import BufferSource, CallableSource
from pagecore.snapshot_server import SnapshotServer
from placement_rig import Served, pushed, served
from uffd_helpers import PAGE, Child, anonymous

pytestmark = pytest.mark.kernel

# Where the child hangs, so long.
SOON = 5.0


@pytest.fixture
def rig() -> Iterator[Served]:
    with served(64) as rig:
        yield rig


def answer(call: Callable[[], Any]) -> str:
    try:
        return repr(call())
    except UnsupportedError as error:
        return str(error)


def open_descriptors() -> set[int]:
    listed = os.listdir("/proc/self/fd")
    # The list itself was read through one.
    return {int(number) for number in listed if os.path.lexists(f"/proc/self/fd/{number}")}


def test_a_child_that_leaves_a_loop_neither_stops_nor_poisons_it(rig: Served) -> None:
    gc.collect()  # what other tests left is not to be closed amid this one
    before = open_descriptors()
    with PlacementLoop([rig.region], BufferSource(rig.content), on_stop="poison", around=1, watchdog=60.0) as loop:
        opened = open_descriptors() - before
        waiting = Worker(loop.wait_resident, 0.5, DEADLINE)

        def leave() -> tuple[bool, set[int]]:
            loop.__exit__(None, None, None)
            loop.stop()
            return loop.running, opened & open_descriptors()

        assert opened
        assert Child(leave).value(SOON) == (False, set()), "its copies are closed"
        assert not waiting.done()
        reader, writer = os.pipe()
        # By a system call, which a poisoned page fails.
        Worker(os.write, writer, memoryview(rig.memory)[2 * PAGE :][:8]).value(SOON)
        assert os.read(reader, 8) == rig.page(2)[:8]
        os.close(reader)
        os.close(writer)
        assert (loop.running, loop.error, loop.stats().poisoned) == (True, None, 0)
        loop.prefetch([(0, 64)])
        assert waiting.value()


def test_in_a_child_a_loop_says_whose_it_is(rig: Served) -> None:
    with PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        calls: list[Callable[[], Any]] = [
            loop.start,
            lambda: loop.prefetch([(3, 1)]),
            lambda: loop.forget([(3, 1)]),
            lambda: loop.give_up([(3, 1)]),
            lambda: loop.wait_resident(1.0, DEADLINE),
            lambda: loop.wait_settled(DEADLINE),
            lambda: loop.wait_ended(DEADLINE),
            lambda: loop.wake_once(0),
        ]
        said = Child(lambda: [answer(call) for call in calls]).value(SOON)
        assert [f"process {os.getpid()} in its child" in words for words in said] == [True] * len(calls), said
        quiet = Child(lambda: (loop.wake_once(-1), loop.running, loop.error, loop.stats().placed)).value(SOON)
        assert quiet == (None, False, None, 0)
        assert rig.touch(3).value() == rig.page(3)
        assert loop.stats().poisoned == 0
    with pushed(rig) as (loop, _):
        words = Child(lambda: answer(lambda: loop.request_again([(3, 1)]))).value(SOON)
        assert "in its child" in words


def test_a_child_that_drops_a_mover_keeps_its_own_memory() -> None:
    movers = [Mover(8)]
    movers[0].prepare()

    def drop() -> tuple[int, bool]:
        # The stages are a hole here, and the next mappings lie in it.
        kept = [mmap.mmap(-1, 1 << 20) for _ in range(12)]
        for memory in kept:
            memory.write(b"C" * (1 << 20))
        made = movers[0].prepare()
        movers.clear()
        gc.collect()
        return made, all(memory[:] == b"C" * (1 << 20) for memory in kept)

    assert Child(drop).value(SOON) == (0, True)
    assert movers[0].prepare() == 0, "the parent's are ready still"


def test_a_child_places_without_the_movers_stages() -> None:
    """The stages are the parent's; what cannot be moved is copied, there as everywhere."""
    with served(1024) as rig:
        first = -rig.region.address // PAGE % 512
        mover = Mover(1)
        mover.prepare()
        data = bytes(rig.page(first, 512))

        def place() -> tuple[int, int]:
            result = mover.place(rig.region, first, data)
            return result.placed, result.moved

        assert Child(place).value(SOON) == (512, 0)
        assert rig.touch(first + 511).value() == rig.page(first + 511)


def test_a_child_that_leaves_a_snapshot_does_not_wait_for_it(rig: Served) -> None:
    memory = anonymous(64)
    memory[:] = rig.page(0, 64)
    # It is held up where it saves to: that memory has no page, and nobody serves it before the child has ended.
    with BackgroundSnapshot(memory, rig.memory) as snapshot:
        rig.wait_fault_pending()

        def leave() -> tuple[str, bool]:
            words = answer(snapshot.wait)
            snapshot.__exit__(None, None, None)
            return words, snapshot.closed

        words, closed = Child(leave).value(SOON)
        assert "in its child" in words
        assert closed
        assert snapshot.state == "running"
        rig.region.place_zeros(0, 64)
        assert snapshot.wait(DEADLINE)
    assert bytes(rig.memory) == rig.page(0, 64)


def test_a_child_that_leaves_a_server_ends_no_session(tmp_path: pathlib.Path) -> None:
    (tmp_path / "memory").write_bytes(bytes(16 * PAGE))
    with SnapshotServer(tmp_path / "socket", tmp_path / "memory") as server:
        serving = Worker(server.serve)

        def leave() -> None:
            server.stop()  # what a signal handler of the parent's does, here too
            server.close()
            server.close()

        Child(leave).value(SOON)
        assert not serving.done(0.05)
        assert os.path.exists(server.socket_path)
        server.stop()
        serving.value()


def test_a_child_may_serve_what_its_parent_listens_at(tmp_path: pathlib.Path) -> None:
    (tmp_path / "memory").write_bytes(bytes(16 * PAGE))
    server = SnapshotServer(tmp_path / "socket", tmp_path / "memory")
    try:

        def serve() -> None:
            serving = Worker(server.serve)
            wait_until(lambda: server.stop() or serving.done(0.01), "the end")
            serving.value()

        Child(serve).value(SOON)
        assert os.path.exists(server.socket_path), "the address is the parent's"
        serving = Worker(server.serve)
        assert not serving.done(0.05)
        server.stop()
        serving.value()
    finally:
        server.close()


def event_counts() -> dict[int, int]:
    """How much is in each eventfd of this process."""
    counts = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{name}") as lines:
            for line in lines:
                if line.startswith("eventfd-count:"):
                    counts[int(name)] = int(line.split()[1], 16)
    return counts


def test_a_child_that_closes_a_callable_source_tells_the_parents_lane_nothing() -> None:
    with CallableSource(lambda *_: None, timeout=DEADLINE) as source:
        before = event_counts()
        assert Child(lambda: (source.close(), source.pending)).value(SOON) == (None, 0)
        assert event_counts() == before


def test_a_child_gives_the_guest_nothing_back() -> None:
    heard: list[str] = []
    reader, writer = os.pipe()
    tracker = PageTracker(64, dirty_log=MemoryDirtyLog(64))

    def tell(command: Any, _epoch: int) -> None:
        heard.append(command.name)
        os.write(writer, b".")

    with tracker.hint_session("armed", on_command=tell) as session:
        assert Child(lambda: (session.finish(), session.__exit__(None, None, None))).value(SOON) == (False, None)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    assert heard == ["DONE"]
    os.close(reader)
    os.close(writer)


def test_a_child_closes_a_log_that_its_parent_collects_from() -> None:
    memory = anonymous(65536)
    over: list[bool] = []
    try:
        log = PagemapDirtyLog(memory)
    except UnsupportedError as error:
        pytest.skip(str(error))

    def collect() -> None:
        bitmap = Bitmap(log.size)
        while not over:
            log.collect_into(bitmap)

    with log:
        collecting = Worker(collect)
        for _ in range(4):
            Child(log.close).value(SOON)
        over.append(True)
        collecting.value()
