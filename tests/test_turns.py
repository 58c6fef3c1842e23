"""Bulk threads run behind those that somebody waits for: their niceness, and the turns that they leave to others."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PageTracker, let_by
from pagecore.migrate import sender
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.sender import Outgoing, Pacer
from pagecore.wire import HEADER_BYTES, FrameType, Hello, Session, decode_header, encode_header
from placement_rig import pushed, served

PAGE = 4096

# One processor, and a child that never sleeps on it; what the child has counted is what it ran.
BESIDE_A_BUSY_THREAD = """
import json, mmap, os, signal, time
import numpy as np
from pagecore import give_way, let_by
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
shared = mmap.mmap(-1, 4096)
counter = np.frombuffer(shared, np.uint64)
child = os.fork()
if child == 0:
    signal.alarm(30)
    while True:
        counter[0] += np.uint64(1)
deadline = time.monotonic() + 20
while not counter[0] and time.monotonic() < deadline:
    time.sleep(0.001)
def turn():
    before = int(counter[0])
    let_by()
    return int(counter[0]) != before
def spin(seconds, clock):
    until = clock() + seconds
    while clock() < until:
        pass
tries = 0
while tries < 20:
    # Past the switch that ended a sleep, and the 0.1 s in which who has had a long turn is not let by.
    spin(0.12, time.monotonic)
    if turn():
        break
    # The kernel may find that it is our turn still.
    tries += 1
def of_child():
    with open(f"/proc/{child}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
give_way()
started, ours, theirs = time.monotonic(), time.thread_time(), of_child()
while time.monotonic() - started < 1.0:
    spin(0.0001, time.thread_time)
    let_by()
ours = time.thread_time() - ours
theirs = of_child() - theirs
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(json.dumps({"tries": tries, "share": ours / (ours + theirs)}))
"""


@pytest.mark.timing
def test_a_turn_is_left_to_who_is_ready_but_not_every_turn_to_who_never_sleeps() -> None:
    result = subprocess.run(
        [sys.executable, "-c", BESIDE_A_BUSY_THREAD], check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(result.stdout)
    # There is little more than a system call between the two looks: only who was let run in it can have counted.
    assert found["tries"] < 20
    # Nine or ten hundredths by its niceness; if every turn were left to the other it would be less than one.
    assert found["share"] > 0.03


def test_a_thread_that_ends_leaves_nothing_of_its_turns_behind() -> None:
    """ThreadSanitizer runs this: what was a thread's own must not be freed by another without a lock that it sees."""
    ended: list[int] = []

    def take(number: int) -> None:
        for _ in range(3):
            let_by()
        ended.append(number)

    for first in range(0, 400, 8):
        threads = [threading.Thread(target=take, args=(first + number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    assert sorted(ended) == list(range(400))


@pytest.mark.kernel
def test_the_bulk_lanes_give_way_to_the_guest_and_to_the_urgent_one() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def niceness() -> dict[str, int]:
        return {
            thread.name.removeprefix("pagecore-").rsplit("-", 1)[0]: os.getpriority(
                os.PRIO_PROCESS, thread.native_id or 0
            )
            - ours
            for thread in threading.enumerate()
            if thread.name.startswith("pagecore-") and thread.native_id
        }

    with served(64) as rig, pushed(rig):
        wait_until(lambda: niceness().get("lane-0") == min(10, 19 - ours), "the bulk lane to give way")
        assert {name: value for name, value in niceness().items() if name != "lane-0"} == {
            "reader": 0,
            "retry": 0,
            "lane-1": 0,
        }


def test_a_bulk_stream_over_tcp_keeps_little_unsent() -> None:
    hello = Hello("control", "turns", 0, PAGE, {0: 512})
    names = ("control", "bulk-0", "urgent")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = [socket.create_connection(listener.getsockname()) for _ in names]
        theirs = [listener.accept()[0] for _ in names]
    with Link({name: Stream(sock, DEADLINE) for name, sock in zip(names, ours, strict=True)}, hello, hello):
        bounds = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) for sock in ours]
    for sock in theirs:
        sock.close()
    assert bounds[1] == 128 << 10
    # Not set: the default of the system.
    assert bounds[0] == bounds[2] == 0


def test_bulk_leaves_turns_after_each_system_call_where_answers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    monkeypatch.setattr(sender, "let_by", lambda: turns.append(1))
    with sending(512) as (outgoing, _):
        everything = np.array([(0, 512)], np.int64)
        outgoing.bulk[0].pages(everything)
        # Nobody asks for anything: they would only cost throughput.
        assert not turns
        outgoing.urgent.answer(FrameType.SENT, 0, 1)
        outgoing.bulk[0].pages(everything)
        # 2 MiB, in pieces of at most 256 KiB and what belongs to them.
        assert len(turns) >= 7
        # A writer of bulk gives up on turns when no answer follows for long: at the latest after 64 pieces of any size.
        for _ in range(64):
            outgoing.bulk[0].answer(FrameType.SENT, 0, 1)
        assert len(turns) == 64
        outgoing.urgent.answer(FrameType.SENT, 0, 1)
        outgoing.bulk[0].answer(FrameType.SENT, 0, 1)
        assert len(turns) == 65


def test_frames_are_large_while_nobody_asks_and_none_crosses_the_bounds_of_a_huge_page() -> None:
    """A frame is taken whole: while pages are asked for, whoever waits for one of it waits for the frame."""
    runs = np.array([(100, 900)], np.int64)
    with sending(1024) as (outgoing, frames):

        def answered() -> None:
            outgoing.urgent.answer(FrameType.SENT, 0, 1)

        def after(pieces: int) -> None:
            for _ in range(pieces):
                outgoing.bulk[0].answer(FrameType.SENT, 0, 1)

        def cut() -> list[tuple[int, int]]:
            outgoing.bulk[0].pages(runs)
            return frames()

        large = [(100, 156), (256, 256), (512, 256), (768, 232)]
        small = [(100, 28), *((first, 64) for first in range(128, 960, 64)), (960, 40)]
        assert cut() == large
        answered()
        # It is known before the first piece goes.
        assert cut() == small
        answered()
        after(63)
        assert cut() == small
        answered()
        after(64)
        assert cut() == large
    assert all(first // 512 == (first + count - 1) // 512 for first, count in large + small)


@contextmanager
def sending(npages: int) -> Iterator[tuple[Outgoing, Callable[[], list[tuple[int, int]]]]]:
    """The source's end of a link with one bulk stream, whose memory has no zero page; and a function that returns the
    frames of pages that have come on that stream since it was called before.
    """
    pairs = {name: socket.socketpair() for name in ("control", "bulk-0", "urgent")}
    hello = Hello("control", "turns", 0, PAGE, {0: npages})
    link = Link({name: Stream(ours, DEADLINE) for name, (ours, _) in pairs.items()}, hello, hello)
    memory = np.ones(npages * PAGE, np.uint8)
    peer = pairs["bulk-0"][1]
    came: list[tuple[int, int]] = []
    taken = threading.Semaphore(0)

    def receive() -> None:
        while raw := peer.recv(HEADER_BYTES, socket.MSG_WAITALL):
            header = decode_header(raw, Session(PAGE, {0: npages}))
            if header.type is FrameType.PAGES:
                assert len(peer.recv(header.length, socket.MSG_WAITALL)) == header.length
                came.append((header.first, header.count))
            elif header.type is FrameType.FILL:
                taken.release()

    def frames() -> list[tuple[int, int]]:
        link.bulk[0].send([encode_header(FrameType.FILL, round=link.round, count=1)])
        assert taken.acquire(timeout=DEADLINE)
        so_far = came.copy()
        came.clear()
        return so_far

    worker = Worker(receive)
    try:
        yield Outgoing(link, memoryview(memory).toreadonly(), PageTracker(npages), Pacer(None)), frames
    finally:
        link.close()
        worker.value()
        for _, theirs in pairs.values():
            theirs.close()
