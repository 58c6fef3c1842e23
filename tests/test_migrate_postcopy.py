"""The end of postcopy at the destination: what is settled, what is asked again, what fails closed."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from concurrency import Worker, wait_until
from link_rig import no_descriptors, no_thread
from pagecore import PageState, Userfaultfd
from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError, SourceError
from pagecore.migrate.link import Link, Stream
from pagecore.migrate.lists import Lists, apply_lists, discard_and_register, read_lists
from pagecore.wire import (
    HEADER_BYTES,
    FrameFlags,
    FrameType,
    Hello,
    decode_audit,
    decode_header,
    encode_frame,
    encode_page_set,
)
from postcopy_rig import DEADLINE, NPAGES, PAGE, Rig, content, postcopy_rig, runs
from uffd_helpers import discard, queued, sleeping

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with postcopy_rig() as rig:
        yield rig


def test_what_came_is_right_and_what_is_hinted_or_zero_reads_as_zeros(rig: Rig) -> None:
    for page in range(32, 64):
        rig.send("bulk-0" if page % 2 else "urgent", page)
    rig.finish((16, 16))
    rig.postcopy.run()
    rig.postcopy.end()
    for page in range(64):
        assert rig.memory[page * PAGE : (page + 1) * PAGE] == (bytes(PAGE) if 8 <= page < 32 else content(page))


class Answering:
    """Answers so many requests with content, and remembers them."""

    def __init__(self, rig: Rig, count: int) -> None:
        self.asked: list[tuple[int, int, bool]] = []
        self._rig = rig
        self._count = count
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        self._rig.source["urgent"].settimeout(DEADLINE)
        for _ in range(self._count):
            raw = self._rig.source["urgent"].recv(HEADER_BYTES, socket.MSG_WAITALL)
            request = decode_header(raw, self._rig.link.session)
            self.asked.append((request.first, request.count, FrameFlags.AGAIN in request.flags))
            self._rig.send("urgent", request.first, flags=FrameFlags.AGAIN)

    def join(self) -> list[tuple[int, int, bool]]:
        self._thread.join(DEADLINE)
        return self.asked


def test_a_page_that_did_not_come_is_asked_for_again_after_the_end(rig: Rig) -> None:
    # D16: the bulk stream is at its end, one page is missing, and COMPLETE would make zeros of it.
    answering = Answering(rig, 1)
    for page in range(32, 64):
        if page != 50:
            rig.send("bulk-0", page)
    rig.finish((16, 16))
    rig.postcopy.run()
    assert answering.join() == [(50, 1, True)]
    rig.postcopy.end()
    assert rig.memory[50 * PAGE : 51 * PAGE] == content(50)


def test_a_hinted_page_that_the_source_does_not_name_is_asked_for(rig: Rig) -> None:
    # Only pages that both sides hold for hinted may be left to read as zeros.
    answering = Answering(rig, 1)
    for page in range(32, 64):
        rig.send("bulk-0", page)
    rig.finish((16, 4), (21, 11))
    rig.postcopy.run()
    assert answering.join() == [(20, 1, True)]
    rig.postcopy.end()
    assert rig.memory[20 * PAGE : 21 * PAGE] == content(20)


def test_missing_pages_are_never_unregistered_into_zeros(rig: Rig) -> None:
    rig.send("bulk-0", 32)
    with pytest.raises(SourceError, match="missing"):
        rig.postcopy.end()


def test_when_the_source_is_lost_missing_pages_fail_closed(rig: Rig) -> None:
    for page in range(32, 40):
        rig.send("bulk-0", page)
    deadline = time.monotonic() + DEADLINE
    while not rig.state.received.test_range(32, 8):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for sock in rig.source.values():
        sock.close()
    with pytest.raises((PagecoreError, OSError)):
        rig.postcopy.run()
    assert rig.postcopy.missing() == 24
    rig.postcopy.fail_closed()
    for page in range(64):
        if page >= 40:
            # SIGBUS for a thread of this process; never zeros.
            with pytest.raises(OSError):
                rig.read(page)
        else:
            assert rig.read(page) == (bytes(PAGE) if 8 <= page < 32 else content(page))


def test_pages_that_cannot_be_poisoned_stay_registered(rig: Rig) -> None:
    # The guest discards in the last moment: POISON says EAGAIN, and nobody reads the event any more.
    rig.postcopy.quiesce()
    discarding = Worker(discard, rig.region.address + 3 * PAGE, PAGE)
    queued(rig.region.uffd)
    rig.postcopy.fail_closed()
    assert rig.postcopy.missing() == 32
    waiter = rig.touch(40)
    sleeping(rig.region.uffd, 1)
    rig.region.uffd.read_events()
    discarding.value()
    assert not waiter.done()
    # It must not outlive the memory.
    rig.region.place_zeros(40, 1)
    waiter.value()


def test_a_silent_source_is_given_up(rig: Rig) -> None:
    rig.send("bulk-0", 32)
    with pytest.raises(PeerGoneError, match="silent"):
        rig.postcopy.run()


@pytest.mark.ci
def test_a_source_that_pauses_is_not_silent(rig: Rig) -> None:
    """Twice as long as a silent one would be waited for; it says so on the control stream, and nothing else."""
    rig.send("bulk-0", 32)
    waiting = Worker(rig.postcopy.run)
    ends = time.monotonic() + 2.0
    said = 0
    while time.monotonic() < ends:
        rig.alive(paused=True)
        said += 1
        assert not waiting.done(0.2)
    rig.alive(paused=False)
    for page in range(33, 64):
        rig.send("bulk-0", page)
    rig.finish((16, 16))
    waiting.value()
    rig.postcopy.end()
    assert rig.heard == [b'{"paused":true}'] * said + [b'{"paused":false}']


@pytest.mark.ci
def test_a_source_that_was_paused_and_is_dead_is_given_up(rig: Rig) -> None:
    rig.alive(paused=True)
    with pytest.raises(PeerGoneError, match="silent"):
        rig.postcopy.run()


def test_the_audit_leaves_out_what_fills_pages_that_the_guest_discarded(rig: Rig) -> None:
    for page in range(32, 64):
        rig.send("bulk-0", page)
    rig.finish((16, 16))
    rig.postcopy.run()
    # On a thread of its own: the discard waits until the loop has read its event (D3).
    thread = threading.Thread(target=rig.memory.madvise, args=(mmap.MADV_DONTNEED, 40 * PAGE, PAGE))
    thread.start()
    thread.join(DEADLINE)
    assert rig.touch(40).value() == bytes(PAGE)
    assert rig.touch(20).value() == bytes(PAGE)
    rig.postcopy.end()
    found = decode_audit(rig.postcopy.audit(0), NPAGES)
    # Page 40 came before it was discarded; the zeros that fill it since have nobody's content to be compared with.
    assert found.content.runs().tolist() == [[32, 32]]
    assert found.zeros.runs().tolist() == [[20, 1]]


# ----------------------------------------------------------------------------------------------- a lost link


def lose_the_link(rig: Rig) -> None:
    rig.hang_up()
    with pytest.raises(PeerGoneError):
        rig.postcopy.run()


def test_without_the_source_the_guest_goes_on_as_far_as_it_can(rig: Rig) -> None:
    lose_the_link(rig)
    # Hinted pages are filled, and its own discards are read; it waits for what only the source has.
    assert rig.touch(20).value() == bytes(PAGE)
    Worker(discard, rig.region.address + 3 * PAGE, PAGE).value()
    assert rig.touch(3).value() == bytes(PAGE)
    waiter = rig.touch(50)
    wait_until(lambda: rig.state.requested.test(50), "the fault is read")
    rig.postcopy.quiesce()
    # S9: what is reported is exact: received, or released by the guest.
    assert rig.state.settled().indices().tolist() == [*range(16), 20]
    assert rig.state.claimed.indices().tolist() == [*range(8), 20]
    assert not waiter.done()
    # Nobody serves it while it waits; the page comes with the next generation.
    rig.return_to()
    rig.postcopy.resume(rig.link)
    rig.send("bulk-0", 50)
    assert waiter.value() == content(50)


def test_what_is_still_requested_is_asked_for_again_over_the_next_link(rig: Rig) -> None:
    # D9: the request, or the answer to it, went down with the link; without another the guest waits for the bulk.
    waiter = rig.touch(50)
    assert rig.request() == (50, 0)
    lose_the_link(rig)
    rig.postcopy.quiesce()
    rig.return_to()
    rig.postcopy.resume(rig.link)
    assert rig.request() == (50, 1)
    assert not waiter.done()
    rig.send("urgent", 50)
    assert waiter.value() == content(50)
    for page in range(32, 64):
        if page != 50:
            rig.send("bulk-0", page)
    rig.finish((16, 16))
    rig.postcopy.run()
    rig.postcopy.end()
    counted = rig.postcopy.stats_json()
    assert (counted["twice"], counted["duplicates"]) == (0, 0)
    assert counted["placed"] == 32
    assert counted["requested"] == 2
    assert counted["latency"]["owed"]["count"] == 1
    assert rig.postcopy.counters()["placed"] == 32


@pytest.mark.parametrize("short_of", ["descriptors", "threads"])
def test_a_link_that_finds_no_descriptors_or_threads_is_lost_and_the_next_one_serves(
    short_of: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in range(32, 64):
        rig.send("bulk-0", page)
    wait_until(lambda: rig.postcopy.counters()["placed"] == 32, "the pages are there")
    lose_the_link(rig)
    rig.postcopy.quiesce()
    rig.return_to()
    with monkeypatch.context() as patch:
        if short_of == "descriptors":
            patch.setattr(os, "dup", no_descriptors)
        else:
            # The last of them: those before it have to end again.
            patch.setattr(threading.Thread, "start", no_thread("pagecore-lane-1"))
        for _ in range(2):
            with pytest.raises(PeerGoneError, match=r"from this link: (Too many open files|can't start new thread)"):
                rig.postcopy.resume(rig.link)
    # As the destination does with each new link.
    rig.postcopy.quiesce()
    rig.return_to()
    rig.postcopy.resume(rig.link)
    rig.finish((16, 16))
    rig.postcopy.run()
    rig.postcopy.end()
    assert rig.postcopy.counters()["placed"] == 32


def test_a_page_of_an_older_generation_is_refused(rig: Rig) -> None:
    # W6.
    rig.postcopy.quiesce()
    rig.return_to()
    rig.postcopy.resume(rig.link)
    rig.generation = 0
    rig.send("bulk-0", 40)
    with pytest.raises(ProtocolError, match=r"^generation: "):
        rig.postcopy.run()
    assert not rig.state.claimed.test(40)


# ---------------------------------------------------------------------------------------------------- lists


def lists_over_a_link(*frames: bytes) -> Lists:
    ours, theirs = socket.socketpair()
    hello = Hello("control", "test", 0, PAGE, {0: NPAGES})
    spare = socket.socketpair()
    link = Link(
        {"control": Stream(ours, 1.0), "bulk-0": Stream(spare[0], 1.0), "urgent": Stream(spare[1], 1.0)},
        hello,
        hello,
    )
    with link:
        for frame in frames:
            theirs.sendall(frame)
        theirs.close()
        return read_lists(link, NPAGES)


def list_frame(kind: FrameType, *pairs: tuple[int, int], list_id: int = 1, generation: int = 0) -> bytes:
    return encode_frame(kind, encode_page_set(list(pairs), NPAGES, list_id=list_id, generation=generation))


def test_both_lists_belong_together() -> None:
    good = lists_over_a_link(list_frame(FrameType.DISCARD, (1, 5)), list_frame(FrameType.HINTED, (2, 2)))
    assert good.discard.runs().tolist() == [[1, 5]]
    assert good.hinted.runs().tolist() == [[2, 2]]
    for frames, named in (
        ((list_frame(FrameType.HINTED), list_frame(FrameType.DISCARD)), "type"),
        ((list_frame(FrameType.DISCARD), list_frame(FrameType.HINTED, list_id=2)), "list id"),
        ((list_frame(FrameType.DISCARD, generation=3),), "page set generation"),
    ):
        with pytest.raises(ProtocolError) as caught:
            lists_over_a_link(*frames)
        assert caught.value.field == named


def test_lists_that_would_lose_a_page_are_refused() -> None:
    with mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        state = PageState(NPAGES)
        state.store(0, 60)
        # Pages 60 to 63 never came, and no list names them.
        with pytest.raises(ProtocolError, match="page 60"):
            apply_lists(memory, state, Lists(runs((5, 1)), runs((5, 1)), 1))
        # Without postcopy nobody will send what is discarded and not hinted.
        with pytest.raises(ProtocolError, match="nobody will send"):
            apply_lists(memory, state, Lists(runs((5, 1), (60, 4)), runs((60, 4)), 1))
        with pytest.raises(ProtocolError, match="hinted but not discarded"), Userfaultfd() as uffd:
            discard_and_register(
                memory, state, Lists(runs((60, 4)), runs((3, 1), (60, 4)), 1), uffd, emulate_qemu=False
            )
        apply_lists(memory, state, Lists(runs((5, 1), (60, 4)), runs((5, 1), (60, 4)), 1))
        assert state.hinted.count() == 5
