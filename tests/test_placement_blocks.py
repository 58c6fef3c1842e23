"""Whole blocks of 2 MiB that arrive on a stream: moved in as huge pages, or copied where anything is against it."""

from __future__ import annotations

import errno
import pathlib
import socket

import numpy as np
import pytest

from concurrency import DEADLINE, run_together, wait_until
from memory_kinds import make
from pagecore import BusyError, Mover, PlacementLoop, ProtocolError, SourceError
from pagecore.testing import PlacementAudit, compare_placed
from placement_rig import END, PAGES, Served, header, pages_frame, pushed
from uffd_helpers import PAGE

pytestmark = pytest.mark.kernel

BLOCK = 512
FRAME = 64
QUIET = 65
# Of the kernel; Python has no name for it.
SO_SNDBUFFORCE = 32


class Blocks(Served):
    """Three aligned blocks, with something before and behind them."""

    def __init__(self):
        super().__init__(5 * BLOCK)
        self.first = -self.region.address // PAGE % BLOCK or BLOCK

    def frames(self, first, count, each=FRAME):
        return b"".join(
            pages_frame(start, self.page(start, min(each, first + count - start)))
            for start in range(first, first + count, each)
        )

    def holds(self, first, count):
        """Whether these pages, which are all present, are what the source has."""
        start = self.address(first) - self.region.address
        return self.memory[start : start + count * PAGE] == self.page(first, count)


@pytest.fixture
def blocks():
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip(f"no transparent huge pages; fix: echo madvise > {enabled}")
    blocks = Blocks()
    if blocks.region.ioctls >> 5 & 1 == 0:
        pytest.skip("no UFFDIO_MOVE; fix: boot Linux 6.8 or newer")
    yield blocks
    blocks.close()


def send(peer, *parts, lane=0):
    """All at once, whether the loop runs or not: a lane that has to wait for the rest of a block moves none of it."""
    try:
        peer.bulk[lane].setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
    except PermissionError:
        pytest.skip("a socket holds no block; fix: run as root")
    peer.bulk[lane].sendall(b"".join(parts))


def figures(loop):
    stats = loop.stats()
    return stats.placed, stats.moved


def test_a_block_that_follows_itself_is_moved(blocks):
    with pushed(blocks, start=False) as (loop, peer):
        send(peer, blocks.frames(blocks.first, 2 * BLOCK), header(END))
        loop.start()
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (2 * BLOCK, 2 * BLOCK)
        assert blocks.holds(blocks.first, 2 * BLOCK)
        assert loop.states[0].received.runs().tolist() == [[blocks.first, 2 * BLOCK]]


def test_two_lanes_move_at_the_same_time(blocks):
    with pushed(blocks, bulk_lanes=2, start=False) as (loop, peer):
        first = blocks.first
        send(peer, blocks.frames(first, BLOCK), header(END))
        send(peer, blocks.frames(first + BLOCK, 2 * BLOCK), header(END), lane=1)
        loop.start()
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (3 * BLOCK, 3 * BLOCK)
        assert blocks.holds(first, 3 * BLOCK)


def waiting(blocks, loop, *pages):
    """Threads that touch these pages of the first block, and whose faults have been read."""
    waiters = {page: blocks.touch(blocks.first + page) for page in pages}
    wait_until(lambda: loop.stats().faults == len(pages), "the faults")
    return waiters


def test_while_faults_come_nothing_is_held_back_for_a_block(blocks):
    with pushed(blocks) as (loop, peer):
        waiters = waiting(blocks, loop, 77)
        # The lane looks for faults before it waits for a frame.
        send(peer, blocks.frames(blocks.first - 1, 1), blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert waiters[77].value() == blocks.page(blocks.first + 77)
        assert figures(loop) == (1 + BLOCK, 0)


def test_who_waits_for_a_page_of_it_is_woken(blocks):
    with pushed(blocks) as (loop, peer):
        waiters = waiting(blocks, loop, 0, 77, 511)
        # So many frames without a fault, and blocks are moved again.
        others = range(blocks.first + BLOCK + 1, blocks.first + BLOCK + 1 + 2 * QUIET, 2)
        send(peer, *(blocks.frames(page, 1) for page in others), blocks.frames(blocks.first, BLOCK), header(END))
        for page, waiter in waiters.items():
            assert waiter.value() == blocks.page(blocks.first + page)
        assert loop.wait_ended(DEADLINE)
        # Moved where it came in time: it is being sent while the lane runs.
        assert figures(loop) in ((BLOCK + QUIET, BLOCK), (BLOCK + QUIET, 0))
        assert not loop.states[0].requested.any()


def test_pages_beside_and_between_blocks_are_copied(blocks):
    with pushed(blocks, start=False) as (loop, peer):
        start, count = blocks.first - 32, BLOCK + 64
        send(peer, blocks.frames(start, count, each=16), header(END))
        loop.start()
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (count, BLOCK)
        assert blocks.holds(start, count)


def test_frames_across_the_edge_of_a_block_are_copied(blocks):
    with pushed(blocks) as (loop, peer):
        start, count = blocks.first - 8, BLOCK + 16
        send(peer, blocks.frames(start, count, each=16), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (count, 0)
        assert blocks.holds(start, count)


@pytest.mark.parametrize("there", [0, 300, 511])
def test_a_page_that_came_before_is_not_overwritten(blocks, there):
    with pushed(blocks) as (loop, peer):
        page = blocks.first + there
        send(peer, pages_frame(page, b"\x07" * PAGE))
        wait_until(lambda: loop.stats().placed == 1, "the first page")
        send(peer, blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK, 0)
        assert loop.stats().duplicates == 1
        assert blocks.touch(page).value() == b"\x07" * PAGE
        assert blocks.holds(blocks.first, there)
        assert blocks.holds(page + 1, BLOCK - 1 - there)


def test_a_page_that_nobody_placed_is_found_by_the_kernel(blocks):
    """What lies before it goes by MOVE; the rest by COPY, from what is left of the huge page."""
    audit = PlacementAudit(blocks.region.size)
    blocks.region.place(blocks.first + 200, b"\x07" * PAGE)
    with pushed(blocks, observer=audit, start=False) as (loop, peer):
        send(peer, blocks.frames(blocks.first, 2 * BLOCK), header(END))
        loop.start()
        assert loop.wait_ended(DEADLINE)
        assert loop.stats().foreign == 1
        assert figures(loop) == (2 * BLOCK - 1, 200 + BLOCK)
        assert blocks.touch(blocks.first + 200).value() == b"\x07" * PAGE
        assert blocks.holds(blocks.first, 200)
        assert blocks.holds(blocks.first + 201, 2 * BLOCK - 201)
    # Each page is counted once, as it was: what was not moved is not in the sums twice.
    assert audit.twice == 0
    assert audit.content.count() == 2 * BLOCK - 1
    assert not compare_placed(blocks.content, audit.content, audit.zeros, audit.sums()).any()


def test_a_page_that_the_guest_discarded_stays_zeros(blocks):
    """D3: `released` is looked at before the block is claimed."""
    with pushed(blocks) as (loop, peer):
        page = blocks.first + 100
        blocks.discard(page).value()
        wait_until(lambda: loop.states[0].released[page], "the discard is read")
        send(peer, blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK - 1, 0)
        assert loop.stats().dropped == 1
        assert blocks.touch(page).value() == bytes(PAGE)


def test_a_page_that_was_given_up_fails_closed(blocks):
    """D12: a block with a marker in it is copied around it."""
    with pushed(blocks) as (loop, peer):
        page = blocks.first + 100
        loop.give_up([(page, 1)])
        send(peer, blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK - 1, 0)
        assert loop.states[0].excluded.runs().tolist() == [[page, 1]]
        assert blocks.holds(blocks.first, 100)


def test_what_has_come_does_not_wait_for_the_rest(blocks):
    """The lane hears nothing more; whoever touches a page that has come gets it."""
    with pushed(blocks) as (loop, peer):
        send(peer, blocks.frames(blocks.first, 3 * FRAME))
        assert blocks.touch(blocks.first).value() == blocks.page(blocks.first)
        wait_until(lambda: loop.stats().placed == 3 * FRAME, "the beginning of a block is placed")
        send(peer, blocks.frames(blocks.first + 3 * FRAME, BLOCK - 3 * FRAME), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK, 0)
        assert blocks.holds(blocks.first, BLOCK)


@pytest.mark.parametrize("come", [1, 39, 40, 41, 40 + FRAME * PAGE - 1])
def test_half_a_frame_does_not_hold_up_those_before_it(blocks, come):
    """Cut in its header, behind it, or in its pages; they are placed, and it goes on where it stopped."""
    with pushed(blocks) as (loop, peer):
        following = blocks.frames(blocks.first + 3 * FRAME, FRAME)
        send(peer, blocks.frames(blocks.first, 3 * FRAME), following[:come])
        wait_until(lambda: loop.stats().placed == 3 * FRAME, "the whole frames are placed")
        send(peer, following[come:], blocks.frames(blocks.first + BLOCK, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert loop.stats().placed == 4 * FRAME + BLOCK
        assert blocks.holds(blocks.first, 4 * FRAME)
        assert blocks.holds(blocks.first + BLOCK, BLOCK)


def test_a_source_that_serves_again_forgets_the_stages_of_before(blocks):
    with pushed(blocks) as (loop, peer):
        send(peer, blocks.frames(blocks.first, FRAME))
        wait_until(lambda: loop.stats().placed == FRAME, "the beginning of a block")
        loop.stop()
        with PlacementLoop([blocks.region], peer.source, states=loop.states) as second:
            send(peer, blocks.frames(blocks.first + BLOCK, 2 * BLOCK), header(END))
            assert second.wait_ended(DEADLINE)
            assert second.stats().placed == 2 * BLOCK
            assert blocks.holds(blocks.first + BLOCK, 2 * BLOCK)


def test_a_loop_that_is_made_takes_no_source_from_the_one_that_runs(blocks):
    """Its lanes are amid a block of the other's; only a start is the next one's turn."""
    with pushed(blocks) as (loop, peer):
        second = PlacementLoop([blocks.region], peer.source, states=loop.states)
        with pytest.raises(BusyError):
            second.start()
        send(peer, blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK, BLOCK)
        assert blocks.holds(blocks.first, BLOCK)
        assert (loop._mover.blocks_moved, second._mover.blocks_moved) == (1, 0)


def test_a_source_that_serves_a_loop_without_blocks_takes_no_stage_of_before(blocks, door):
    """Nobody would give it back: the huge pages, and in the end the stages, would be gone."""
    with pushed(blocks) as (loop, peer):
        loop.stop()
        observer = door.RecordingObserver()
        with PlacementLoop([blocks.region], peer.source, states=loop.states, observer=observer) as second:
            send(peer, blocks.frames(blocks.first, 2 * BLOCK), header(END))
            assert second.wait_ended(DEADLINE)
            assert figures(second) == (2 * BLOCK, 0)
            assert blocks.holds(blocks.first, 2 * BLOCK)
        third = blocks.first + 2 * BLOCK
        assert loop._mover.place(blocks.region, third, blocks.page(third, BLOCK)).moved == BLOCK


@pytest.mark.parametrize("come", [7, 40, 40 + PAGE])
def test_a_source_that_was_stopped_within_a_frame_serves_no_more(blocks, come):
    """What had come of it went with the loop; the rest must not be taken for the whole."""
    with pushed(blocks) as (loop, peer):
        block = blocks.frames(blocks.first, BLOCK)
        send(peer, block[:come])
        wait_until(lambda: not peer.pending(0), "it is taken")
        loop.stop()
        with PlacementLoop([blocks.region], peer.source, states=loop.states) as second:
            send(peer, block[come:], header(END))
            with pytest.raises(SourceError, match="was stopped within a frame"):
                second.wait_ended(DEADLINE)
        assert not loop.states[0].claimed.any()


def test_a_source_that_was_stopped_between_the_frames_of_a_block_serves_no_more(blocks, native_sources):
    """What had come was held for the rest of the block, and went with the loop; its peer would say that it was sent."""
    with pushed(blocks, start=False) as (_, peer):
        peer.source.gather(Mover(1), [blocks.region])
        send(peer, blocks.frames(blocks.first, FRAME))
        lane = native_sources.Lane(peer.source)
        lane.stop()
        assert lane.next()[0] == lane.STOPPED
        assert not peer.pending(0), "a frame was taken"
        send(peer, header(END))
        kind, _, _, error = native_sources.Lane(peer.source).next()
        assert (kind, error) == (lane.FAILED, errno.ECONNABORTED)


def test_only_memory_that_can_be_moved_into_is_gathered_for(blocks):
    with pushed(blocks, start=False) as (_, peer):
        shared = blocks.uffd.register(make("shared", BLOCK).mapping, region_id=1)
        with pytest.raises(ValueError, match="region 1 is not memory that blocks can be moved into"):
            peer.source.gather(Mover(1), [shared])
        with pytest.raises(TypeError, match="None"):
            peer.source.gather(Mover(1), [None])


def test_a_frame_of_something_else_ends_a_block(blocks):
    with pushed(blocks, start=False) as (loop, peer):
        first = blocks.first
        send(peer, blocks.frames(first, 2 * FRAME), blocks.frames(first + BLOCK, BLOCK), header(END))
        loop.start()
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (2 * FRAME + BLOCK, BLOCK)
        assert blocks.holds(first, 2 * FRAME)
        assert blocks.holds(first + BLOCK, BLOCK)


def test_a_wrong_frame_behind_good_ones_loses_none_of_them(blocks):
    with pushed(blocks) as (loop, peer):
        send(peer, blocks.frames(blocks.first, 2 * FRAME), header(PAGES, blocks.first + 2 * FRAME, 2, PAGE))
        with pytest.raises(ProtocolError, match=r"^length: "):
            loop.wait_ended(DEADLINE)
        assert loop.states[0].received.runs().tolist() == [[blocks.first, 2 * FRAME]]
        assert blocks.holds(blocks.first, 2 * FRAME)


@pytest.mark.parametrize("torn", [b"", b"PGC1", "in a page"])
def test_a_peer_that_dies_within_a_block_loses_no_whole_frame(blocks, torn):
    with pushed(blocks) as (loop, peer):
        following = blocks.first + 2 * FRAME
        rest = pages_frame(following, blocks.page(following, FRAME))[:-1] if isinstance(torn, str) else torn
        send(peer, blocks.frames(blocks.first, 2 * FRAME), rest)
        peer.bulk[0].close()
        with pytest.raises(SourceError, match="a stream of pages"):
            loop.wait_ended(DEADLINE)
        assert loop.states[0].received.runs().tolist() == [[blocks.first, 2 * FRAME]]
        assert blocks.holds(blocks.first, 2 * FRAME)


def test_a_block_at_the_end_of_all_numbers_is_refused(blocks):
    """D14: its last page would be a small number."""
    with pushed(blocks) as (loop, peer):
        first = 2**64 - BLOCK + blocks.first % BLOCK
        send(peer, header(PAGES, first, FRAME, FRAME * PAGE), blocks.page(0, FRAME))
        with pytest.raises(ProtocolError, match=r"^first: "):
            loop.wait_ended(DEADLINE)
        assert not loop.states[0].claimed.any()


def test_a_stop_within_a_block_claims_nothing(blocks):
    with pushed(blocks) as (loop, peer):
        send(peer, blocks.frames(blocks.first, FRAME), header(PAGES, blocks.first + FRAME, FRAME, FRAME * PAGE))
        wait_until(lambda: not peer.pending(0), "all of it is taken")
        loop.stop()
        state = loop.states[0]
        assert state.claimed == state.received


def test_an_observer_that_cannot_follow_sees_every_page_copied(blocks, door):
    observer = door.RecordingObserver()
    with pushed(blocks, observer=observer) as (loop, peer):
        send(peer, blocks.frames(blocks.first, BLOCK), header(END))
        assert loop.wait_ended(DEADLINE)
        assert figures(loop) == (BLOCK, 0)
        assert sum(count for _, count, _ in observer.calls()) == BLOCK


def test_blocks_and_discards_at_once(blocks):
    """D5: whatever comes first, a page holds what the source sent, or zeros where it was discarded."""
    first, count = blocks.first, 3 * BLOCK
    discarded = np.random.default_rng(3).permutation(count)[:40] + first
    with pushed(blocks, bulk_lanes=2) as (loop, peer):
        half = count // 2
        run_together(
            lambda: send(peer, blocks.frames(first, half), header(END)),
            lambda: send(peer, blocks.frames(first + half, count - half), header(END), lane=1),
            lambda: [blocks.discard(int(page)).value() for page in discarded],
        )
        assert loop.wait_ended(DEADLINE)
        assert loop.states[0].released.count() == len(discarded)
        for page in range(first, first + count):
            found = blocks.touch(page).value() if page in discarded else None
            assert found is None or found == bytes(PAGE)
        kept = np.setdiff1d(np.arange(first, first + count), discarded)
        for page in kept.tolist():
            assert blocks.holds(page, 1), page
