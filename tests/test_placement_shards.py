"""Several descriptors in one loop, and a guest that forks."""

import contextlib
import os
import select
import threading

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import BusyError, Feature, PageState, PlacementLoop, UnsupportedError, Userfaultfd
from pagecore.page_source import BufferSource, FileSource
from placement_rig import pages_frame, pushed
from test_uffd_events import ForkingPeer
from uffd_helpers import PAGE, address_of, anonymous, discard, page, read_bytes

pytestmark = pytest.mark.kernel
NPAGES = 96


class Sharded:
    """96 pages in two pieces, registered with a descriptor each."""

    def __init__(self):
        self.memory = anonymous(NPAGES)
        self.content = page(1, NPAGES)
        self.uffds = [Userfaultfd(Feature.EVENT_REMOVE) for _ in range(2)]
        base = address_of(self.memory)
        self.address = base
        self.regions = [
            self.uffds[which].register_address(base + first * PAGE, count * PAGE)
            for which, first, count in ((0, 0, 40), (1, 40, 56))
        ]

    def touch(self, index, count=1):
        return Worker(read_bytes, self.address + index * PAGE, count * PAGE)

    def close(self):
        for uffd in self.uffds:
            uffd.close()


@pytest.fixture
def sharded():
    sharded = Sharded()
    yield sharded
    sharded.close()


def test_pieces_of_one_region_share_the_planes(sharded):
    with PlacementLoop(sharded.regions, BufferSource(sharded.content), around=1) as loop:
        (state,) = loop.states
        assert state.size == NPAGES
        assert sharded.touch(39).value() == page(40)
        assert sharded.touch(40).value() == page(41)
        assert sharded.touch(95).value() == page(96)
        # The waiter runs as soon as the page is there, and it is marked after that.
        wait_until(lambda: state.received.runs().tolist() == [[39, 2], [95, 1]], "three marks")
        loop.prefetch([(30, 20)])
        assert loop.wait_ended(DEADLINE)
        assert state.received.runs().tolist() == [[30, 20], [95, 1]]
        assert loop.stats().faults == 3
    assert read_bytes(sharded.address + 30 * PAGE, 20 * PAGE) == page(31, 20)


def test_a_copy_over_the_edge_wakes_the_waiters_of_both_descriptors(sharded):
    """D10, trap 9: through another descriptor it would succeed and wake nobody."""
    with pushed_over(sharded) as (loop, peer):
        waiters = [sharded.touch(39), sharded.touch(40)]
        wait_until(lambda: loop.states[0].requested.count() == 2, "both are asked for")
        peer.bulk[0].sendall(pages_frame(36, page(37, 8)))
        assert [waiter.value() for waiter in waiters] == [page(40), page(41)]
        wait_until(lambda: loop.stats().latency["owed"].count == 2, "both are counted")


def test_discards_of_each_piece_are_read_by_its_own_reader(sharded):
    """D3, D4: and what the other reader's placers bring late is dropped."""
    with pushed_over(sharded) as (loop, peer):
        for first in (10, 60):
            assert Worker(discard, sharded.address + first * PAGE, 2 * PAGE).value() is None
        wait_until(
            lambda: loop.states[0].released.runs().tolist() == [[10, 2], [60, 2]],
            "the mark, which comes after the read",
        )
        peer.bulk[0].sendall(pages_frame(0, sharded.content))
        wait_until(lambda: loop.stats().placed == NPAGES - 4, "all others")
        wait_until(lambda: loop.stats().dropped == 4, "the four that were discarded")
        for first in (10, 60):
            assert sharded.touch(first, 2).value() == bytes(2 * PAGE)
        assert loop.states[0].received.count() == NPAGES - 4
        assert loop.error is None


def asleep(worker, begun):
    """Whether it has gone to sleep after it gave the GIL away."""
    with open(f"/proc/self/task/{worker.native_id}/stat") as stat:
        return begun[0] and stat.read().rpartition(")")[2].split()[0] == "S"


def begun_and_asleep(what, function, *arguments):
    begun = bytearray(1)
    worker = Worker(function, begun, *arguments)
    wait_until(lambda: asleep(worker, begun), what)
    return worker


def test_what_one_reader_released_is_not_forgotten_by_another(open_uffd, door):
    """D3: two readers mark pages of one region, and each serves who waited for its own, whoever is done first.

    Region 0 is read by the first descriptor, region 2 by the second, and region 1 by both. The second is held between
    its mark and its waiter until the first has marked; the first is held there until the second is through.
    """
    memory = anonymous(32)
    uffds = [open_uffd(Feature.EVENT_REMOVE) for _ in range(2)]
    base = address_of(memory)
    regions = [
        uffds[which].register_address(base + 8 * piece * PAGE, 8 * PAGE, region_id=region_id)
        for piece, (which, region_id) in enumerate([(0, 0), (0, 1), (1, 1), (1, 2)])
    ]
    gate = os.pipe()
    try:
        with pushed(None, regions=regions, start=False) as (loop, _):
            waiters = [Worker(read_bytes, base + index * PAGE, PAGE) for index in (7, 8, 18)]
            wait_until(lambda: door.read_batch(loop) and loop.stats().faults == 3, "three faults")
            discards = [Worker(discard, base + index * PAGE, count * PAGE) for index, count in ((7, 2), (18, 1))]
            for uffd in uffds:
                assert select.select([uffd], [], [], DEADLINE)[0]
            # The second reader has the exclusive side of region 1 and waits for that of region 2; behind it the first,
            # which has that of region 0; and behind that somebody who will keep it.
            door.lock_shared(loop.states[2])
            second = begun_and_asleep("the second reader", door.read_batch_of, loop, 1)
            first = begun_and_asleep("the first reader", door.read_batch_of, loop, 0)
            holder = begun_and_asleep("the holder", door.hold_exclusive, loop.states[0], gate[0])
            door.unlock(loop.states[2])
            second.value()
            assert not first.done(), "it was held before it could serve its waiter in region 1"
            os.write(gate[1], b"x")
            for worker in (holder, first, *discards):
                worker.value()
            wait_until(lambda: not door.retry(loop), "nothing is left to retry")
            assert [waiter.value() for waiter in waiters] == [bytes(PAGE)] * 3
    finally:
        for end in gate:
            os.close(end)


@contextlib.contextmanager
def pushed_over(sharded):
    """A push loop over the pieces."""
    with pushed(None, regions=sharded.regions) as found:
        yield found


def test_a_region_that_another_loop_reads_is_refused_whole(sharded):
    """The first descriptor was free: its role is given back."""
    source = BufferSource(sharded.content)
    with PlacementLoop(sharded.regions[1:], source) as other:
        loop = PlacementLoop(sharded.regions, source)
        with pytest.raises(BusyError, match="another reader"):
            loop.start()
        assert sharded.uffds[0].read_events() == []
        assert sharded.touch(45).value() == page(6), "page 5 of the piece that the other loop serves alone"
        assert other.error is None


def test_planes_have_the_pages_of_all_pieces(sharded):
    with pytest.raises(ValueError, match="the planes have 40 pages, the region has 96"):
        PlacementLoop(sharded.regions, BufferSource(sharded.content), states=[PageState(40)])


def test_a_source_without_pages_for_all_pieces_is_refused(sharded, tmp_path):
    """Each piece by itself is smaller than the file."""
    path = tmp_path / "content"
    path.write_bytes(sharded.content[: 60 * PAGE])
    with pytest.raises(ValueError, match="has 60 pages for region 0, which has 96"):
        PlacementLoop(sharded.regions, FileSource(path))


@pytest.mark.stress
def test_readers_of_one_region_stop_together(sharded):
    threads = threading.active_count()
    loop = PlacementLoop(sharded.regions, BufferSource(sharded.content)).start()
    assert threading.active_count() == threads + 4
    seen = [sharded.touch(first, 48) for first in (0, 48)]
    assert b"".join(worker.value() for worker in seen) == sharded.content
    loop.stop()
    assert threading.active_count() == threads


# A guest that forks -------------------------------------------------------------------------------------------------


def test_the_child_of_a_guest_never_reads_zeros():
    """Trap 23, 24: it is not served; what it has not got is a SIGBUS, what it has got stays, and the parent goes on."""
    forking = ForkingPeer()
    uffd = Userfaultfd.adopt(forking.fd)
    region = uffd.region_at(forking.address, 8 * PAGE)
    with uffd, PlacementLoop([region], BufferSource(page(20, 8))) as loop:
        loop.prefetch([(2, 1)])
        assert loop.wait_ended(DEADLINE)
        loop.states[0].released.set(6)
        forking.fork()
        wait_until(lambda: loop.stats().forks == 1, "the event")
        with pytest.raises(UnsupportedError, match="child of the process"):
            loop.wait_settled(DEADLINE)
        assert forking.touch(2, child=True) == 22
        assert forking.touch(6, child=True) == 0, "the guest had discarded it"
        assert forking.touch(3, child=False) == 23
        with pytest.raises(IndexError):  # its socket is at its end: it died
            forking.touch(5, child=True)
    forking.close()
