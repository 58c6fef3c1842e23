"""What a loop tells about itself: outcomes, milestones, who waits; and the watchdog."""

import dataclasses
import logging

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PlacementLoop
from pagecore.page_source import BufferSource
from placement_rig import pages_frame, pushed, served
from uffd_helpers import PAGE, discard, map_afresh, read_bytes

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(200) as rig:
        yield rig


def test_outcomes_are_counted_by_class_and_result(rig, door):
    with pushed(rig, start=False) as (loop, _):
        rig.region.place(7, bytes(PAGE))
        map_afresh(rig.address(20), PAGE)
        door.place(loop, 5, rig.page(5, 4))  # one of them foreign
        door.place(loop, 6, rig.page(6))  # a duplicate
        door.place(loop, 20, rig.page(20))  # gone
        door.place_zeros(loop, 30, 3)
        thread = rig.discard(40, 2)
        rig.wait_readable()
        door.place(loop, 60, rig.page(60))  # deferred
        door.place_zeros(loop, 61, 1)
        door.read_batch(loop)
        thread.value()
        wait_until(lambda: not door.retry(loop), "nothing is left to retry")
        door.place(loop, 40, rig.page(40))  # discarded
        door.place_zeros(loop, 41, 1)
        door.serve(loop, 5)  # a fault on a received page
        outcomes = loop.stats().outcomes
        nbytes = loop.stats().bytes
    assert outcomes["new"].pop("deferred") >= 1
    assert outcomes["zero"].pop("deferred") >= 1
    assert outcomes == {
        "new": {"installed": 4, "present": 2, "discarded": 2, "error": 0},
        "zero": {"installed": 4, "present": 0, "discarded": 1, "error": 0},
        "resident": {"installed": 0, "present": 1, "deferred": 0, "discarded": 0, "error": 0},
    }
    assert nbytes["new"]["installed"] == 4 * PAGE


def test_a_placement_that_failed_is_an_error(rig, door):
    with pushed(rig, start=False) as (loop, _):
        rig.uffd.close()
        door.place(loop, 5, rig.page(5, 3))
        assert loop.stats().outcomes["new"]["error"] == 3
        assert not loop.states[0].claimed.any()


def test_statistics_are_frozen(rig):
    with pushed(rig, start=False) as (loop, _), pytest.raises(dataclasses.FrozenInstanceError):
        loop.stats().placed = 1


def test_the_time_to_each_share_of_the_pages_is_kept(rig):
    with PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        loop.prefetch([(0, 100)])
        assert loop.wait_ended(DEADLINE)
        stats = loop.stats()
        assert sorted(stats.reached_ns) == list(range(1, 51))
        assert list(stats.reached_ns.values()) == sorted(stats.reached_ns.values())
        assert stats.seconds_to_resident(51) is None
        loop.prefetch([(100, 100)])
        assert loop.wait_ended(DEADLINE)
        assert loop.stats().seconds_to_resident(50) <= loop.stats().seconds_to_resident(100) < DEADLINE
    with PlacementLoop([rig.region], BufferSource(rig.content), states=loop.states) as again:
        assert again.stats().reached_ns == {}, "reached before the start"


def test_a_latency_includes_the_time_in_the_parking_lot(rig, door):
    with pushed(rig, start=False) as (loop, _):
        waiter = rig.touch(70)
        rig.wait_readable()
        door.read_batch(loop)
        thread = rig.discard(10)
        rig.wait_readable()
        door.place(loop, 70, rig.page(70))
        assert door.parked(loop) == 1
        assert not waiter.done(0.02)
        door.read_batch(loop)
        thread.value()
        wait_until(lambda: not door.retry(loop), "nothing is left to retry")
        assert waiter.value() == rig.page(70)
        assert loop.stats().latency["owed"].max_ns > 20_000_000


def test_a_latency_slot_is_given_back_by_every_fault(rig):
    """256 slots, and more faults than that."""
    with PlacementLoop([rig.region], BufferSource(rig.content), around=1) as loop:
        for _ in range(2):
            Worker(lambda: [read_bytes(rig.address(page), 1) for page in range(200)]).value()
            Worker(discard, rig.address(0), 200 * PAGE).value()
        stats = loop.stats()
        wait_until(lambda: loop.stuck() == [], "nobody waits")
    assert stats.faults == 400
    assert stats.unsampled == 0


def test_who_waits_is_named_with_what_the_loop_believes(rig):
    with pushed(rig) as (loop, peer):
        waiter = rig.touch(33)
        assert peer.next_request() == (33, 1, 0)
        (found,) = loop.stuck()
        assert (found.region_id, found.page, found.planes) == (0, 33, ("requested",))
        assert found.seconds >= 0
        assert loop.stuck(3600) == []
        assert loop.waiter_figures() == [(0, 1)]
        peer.urgent.sendall(pages_frame(33, rig.page(33)))
        assert waiter.value() == rig.page(33)
        wait_until(lambda: loop.stuck() == [], "nobody waits")


def test_the_watchdog_says_who_is_stuck(rig, caplog):
    """And says nothing as long as something is placed, or nobody waits."""
    caplog.set_level(logging.WARNING, "pagecore.placement")
    with pushed(rig, watchdog=0.08, name="s-7") as (loop, peer):
        peer.bulk[0].sendall(pages_frame(1, rig.page(1)))
        wait_until(lambda: loop.stats().placed == 1, "a placement")
        assert not caplog.messages
        waiter = rig.touch(33)
        assert peer.next_request() == (33, 1, 0)
        wait_until(lambda: caplog.messages, "a warning")
        assert "'s-7'" in caplog.messages[0]
        assert "page 33 of region 0 for" in caplog.messages[0]
        assert "(requested)" in caplog.messages[0]
        peer.urgent.sendall(pages_frame(33, rig.page(33)))
        assert waiter.value() == rig.page(33)


def test_a_watchdog_needs_patience(rig):
    with pytest.raises(ValueError, match="watchdog 0 is not"):
        PlacementLoop([rig.region], BufferSource(rig.content), watchdog=0)
