"""What a loop places before anybody asks: around a fault, and in the background."""

import os
import random

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PlacementLoop
from pagecore._window import Window
from pagecore.page_source import BufferSource
from placement_rig import pushed, served
from uffd_helpers import PAGE, discard, map_afresh, read_bytes

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(512) as rig:
        yield rig


def fault(rig, loop, door, page):
    """Touch a page and take the reader's turn."""
    waiter = rig.touch(page)
    rig.wait_readable()
    door.read_batch(loop)
    return waiter


def walk(window, first, last):
    """Fault on every page that no window has covered; the sizes of the windows."""
    sizes = []
    while first < last:
        sizes.append(window.faulted(first))
        first += sizes[-1]
    return sizes


def test_a_window_doubles_as_long_as_faults_follow_it():
    window = Window(64)
    assert walk(window, 100, 400) == [1, 4, 8, 16, 32, 64, 64, 64, 64]
    assert (window.right, window.wrong) == (7, 0)


def test_a_window_of_one_page_never_guesses():
    assert walk(Window(1), 0, 20) == [1] * 20


def test_faults_without_order_are_no_reason_to_guess():
    window = Window(64)
    pages = random.Random(1).sample(range(0, 1 << 30, 1024), 2000)
    assert {window.faulted(page) for page in pages} == {1}


def test_two_sequences_at_once_are_followed_both():
    window = Window(64)
    first, second = 0, 1 << 20
    for _ in range(8):
        one, two = window.faulted(first), window.faulted(second)
        first, second = first + one, second + two
    assert (one, two) == (64, 64)


def test_guesses_that_were_left_behind_make_the_next_ones_smaller():
    """Two pages here, two pages there: what was placed behind them was for nothing."""
    window = Window(64)
    base, sizes = 0, []
    for _ in range(200):
        base += 1 << 20
        for page in (base, base + 1):
            sizes.append(window.faulted(page))
    assert 6 <= window.wrong < 20
    assert set(sizes[-200:]) == {1}
    walk(window, 0, 200)
    assert window.cap == 64, "and a sequence makes them large again"


def test_a_sequence_is_placed_ahead(rig):
    with PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        seen = Worker(lambda: [read_bytes(rig.address(page), PAGE) for page in range(512)]).value()
        wait_until(lambda: loop.stats().placed == 512, "the counts, which come after the wakes")
        stats = loop.stats()
    assert b"".join(seen) == rig.content.tobytes()
    assert stats.ahead > 300
    assert stats.faults < 200
    assert stats.windows_right >= 3


def test_no_page_is_placed_ahead_where_that_was_refused(rig):
    with PlacementLoop([rig.region], BufferSource(rig.content), around=1) as loop:
        Worker(lambda: [read_bytes(rig.address(page), PAGE) for page in range(100)]).value()
        wait_until(lambda: loop.stats().placed == 100, "the counts")
        assert (loop.stats().ahead, loop.stats().faults) == (0, 100)


def test_a_guess_never_brings_back_what_the_guest_has_discarded(rig, door):
    """D3: it takes the claims and looks at `released` like every placement."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    state = loop.states[0]
    thread = rig.discard(103, 2)
    rig.wait_readable()
    door.read_batch(loop)
    thread.value()
    loop.give_up([(106, 1)])
    state.claimed.set(107)
    for page in (100, 101):
        assert fault(rig, loop, door, page).value() == rig.page(page)
    # 101 opened a window of four: 101, and of the three behind it what is neither released nor excluded nor claimed.
    assert state.received.runs().tolist() == [[100, 3]]
    assert fault(rig, loop, door, 105).value() == rig.page(105)
    assert loop.stats().dropped == 0
    assert not state.received.test(107)
    assert state.excluded.test(106)
    state.claimed.clear(107)
    loop.stop()


def test_a_window_is_cut_at_the_end_of_the_region_and_of_the_source(rig, door):
    """A guess that the source cannot meet is not the failure of the page that was asked for."""
    loop = PlacementLoop([rig.region], door.GatedSource(rig.content[: 203 * PAGE], -1, 512, slow=False))
    for page in (200, 201, 202):
        assert fault(rig, loop, door, page).value() == rig.page(page)
    assert loop.error is None
    loop.stop()
    with PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        for page in (509, 510, 511):
            assert rig.touch(page).value() == rig.page(page)
        assert loop.error is None


def test_a_guess_that_meets_a_pending_discard_gives_its_claims_back(rig, door):
    """D7: it is not parked, nobody waits for it."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    thread = rig.discard(300)
    rig.wait_readable()
    door.place_ahead(loop, 79, 16)
    assert door.parked(loop) == 0
    assert loop.stats().outcomes["new"]["deferred"] == 16
    assert not loop.states[0].claimed.any()
    door.read_batch(loop)
    thread.value()
    wait_until(lambda: door.place_ahead(loop, 79, 16) or loop.stats().placed == 16, "the kernel takes them again")
    loop.stop()


def test_a_long_window_is_there_before_the_guest_is_woken(rig, door):
    """Woken first, it would fault at the end of the first chunk before the second is there."""
    observer = door.RecordingObserver()
    loop = PlacementLoop([rig.region], BufferSource(rig.content), observer=observer)
    for page in (50, 51, 55, 63, 79):
        assert fault(rig, loop, door, page).value() == rig.page(page)
    assert [call[:2] for call in observer.calls()] == [(50, 1), (51, 4), (55, 8), (63, 16), (95, 16), (79, 16)]
    loop.stop()


def test_a_fault_on_a_guess_under_way_is_not_lost(rig, door):
    """Its claim is given back after EAGAIN: whoever came to wait for it in between is served by the retry thread."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    loop.states[0].claimed.set_range(51, 3)
    waiter = fault(rig, loop, door, 52)
    assert not waiter.done(0.01), "under way"
    door.give_back(loop, 51, 3)
    assert not loop.states[0].claimed.any()
    assert door.pending(loop) == 1
    wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert waiter.value() == rig.page(52)
    loop.stop()


def test_memory_that_is_gone_ends_a_guess_without_a_failure(rig, door):
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    map_afresh(rig.address(102), PAGE)
    assert fault(rig, loop, door, 100).value() == rig.page(100)
    assert fault(rig, loop, door, 101).value() == rig.page(101)
    assert loop.stats().gone == 1
    assert loop.states[0].received.runs().tolist() == [[100, 2], [103, 2]]
    assert loop.error is None
    loop.stop()


def test_the_background_places_everything_and_stops(rig):
    with PlacementLoop([rig.region], BufferSource(rig.content), background=True) as loop:
        assert loop.wait_settled(DEADLINE)
        # Counted when they are settled: maybe a moment later.
        wait_until(lambda: loop.stats().background == 512, "the count")
        assert loop.stats().faults == 0
    assert read_bytes(rig.address(0), 512 * PAGE) == rig.content.tobytes()


def test_the_background_goes_around_what_is_not_owed(rig):
    """D3, D11, D12: released, hinted and excluded pages are none of its business."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content), background=True)
    state = loop.states[0]
    state.hinted.set_range(64, 5)
    state.released.set_range(100, 30)
    loop.give_up([(7, 2)])
    with loop:
        wait_until(lambda: state.received.count() == 512 - 37, "all others")
        assert loop.wait_settled(DEADLINE)
        assert loop.stats().dropped == 0
        wait_until(lambda: loop.stats().background == 512 - 37, "the count")
    assert not state.received.test_range(64, 5)


def test_a_fault_makes_the_background_start_small_again(rig, door, gate):
    """Its steps grow as long as no fault comes. Each of its fetches takes a byte from a pipe."""
    loop = PlacementLoop([rig.region], door.GatedSource(rig.content, gate[0], slow=False), background=True)
    loop.states[0].hinted.set(0)
    with loop:
        try:
            os.write(gate[1], bytes(1 + 2 + 4 + 8))
            wait_until(lambda: loop.background_step == 256, "steps of 16 to 128 pages, and a larger one begun")
            assert rig.touch(0).value() == bytes(PAGE), "hinted: the source is not asked"
            os.write(gate[1], bytes(1))
            wait_until(lambda: loop.background_step == 16, "a small step")
        finally:
            os.write(gate[1], bytes(100))  # whatever was found: stopping waits for the fetch
        assert loop.wait_settled(DEADLINE)


def test_a_source_that_pushes_has_no_background(rig):
    with pushed(rig) as (_, peer), pytest.raises(ValueError, match="pushes fills in the background"):
        PlacementLoop([rig.region], peer.source, background=True)


# Sources that sleep --------------------------------------------------------------------------------------------------


@pytest.fixture
def gate():
    reading, writing = os.pipe()
    yield reading, writing
    for number in (reading, writing):
        os.close(number)


def test_a_fault_never_waits_behind_the_bulk(rig, door, gate):
    """Trap 42: every thread of the bulk lane sleeps in the source; the demand lane serves all the same."""
    source = door.GatedSource(rig.content, gate[0], 100)
    with PlacementLoop([rig.region], source, threads=2) as loop:
        loop.prefetch([(100, 400)])
        wait_until(lambda: source.used == 2, "both bulk threads are asleep")
        assert rig.touch(3).value() == rig.page(3)
        assert loop.stats().fetches == 1, "the bulk is still asleep"
        os.write(gate[1], bytes(100))
        assert loop.wait_ended(DEADLINE)
        assert loop.stats().fetch_ns > 0
    assert read_bytes(rig.address(100), 400 * PAGE) == rig.page(100, 400)


def test_the_reader_never_sleeps_in_a_source(rig, door, gate):
    """D5, trap 2: a discard is read while every fetch is asleep."""
    with PlacementLoop([rig.region], door.GatedSource(rig.content, gate[0])) as loop:
        waiter = rig.touch(200)
        wait_until(lambda: loop.stats().requested == 1, "the fault is queued")
        assert Worker(discard, rig.address(300), PAGE).value() is None
        assert not waiter.done()
        os.write(gate[1], b"x")
        assert waiter.value() == rig.page(200)
        wait_until(lambda: loop.stats().latency["owed"].count == 1, "the latency is counted")


def test_two_faults_on_one_page_are_one_fetch(rig, door, gate):
    source = door.GatedSource(rig.content, gate[0])
    with PlacementLoop([rig.region], source) as loop:
        waiters = [rig.touch(200), rig.touch(200)]
        wait_until(lambda: loop.stats().faults == 2, "two faults")
        os.write(gate[1], b"x")
        assert [waiter.value() for waiter in waiters] == [rig.page(200)] * 2
        assert source.fetches() == [(200, 1)]


def test_a_discard_while_the_source_sleeps_wins(rig, door, gate):
    """D3: what arrives for a released page is dropped, and its waiter has had zeros already."""
    with PlacementLoop([rig.region], door.GatedSource(rig.content, gate[0])) as loop:
        waiter = rig.touch(200)
        wait_until(lambda: loop.stats().requested == 1, "the fault is queued")
        discard(rig.address(200), PAGE)
        assert waiter.value() == bytes(PAGE)
        os.write(gate[1], b"x")
        wait_until(lambda: loop.stats().dropped == 1, "the late copy is dropped")
        assert read_bytes(rig.address(200), PAGE) == bytes(PAGE)


def test_answers_for_fewer_pages_are_asked_for_again(rig, door, gate):
    source = door.GatedSource(rig.content, gate[0], 512, 3)
    with PlacementLoop([rig.region], source) as loop:
        loop.prefetch([(10, 20)])
        assert loop.wait_ended(DEADLINE)
        assert loop.states[0].received.runs().tolist() == [[10, 20]]
    assert source.fetches()[:6] == [(10, 16), (13, 13), (16, 10), (19, 7), (22, 4), (25, 1)]


def test_a_slow_source_that_fails_makes_no_zeros(rig, door, gate):
    """D12."""
    with PlacementLoop([rig.region], door.GatedSource(rig.content[: 100 * PAGE], gate[0], 512)) as loop:
        waiter = rig.touch(200)
        with pytest.raises(Exception, match="page 200"):
            loop.wait_settled(DEADLINE)
        assert not waiter.done()
    with PlacementLoop([rig.region], BufferSource(rig.content), states=loop.states):
        assert waiter.value() == rig.page(200)


def test_a_stop_with_fetches_asleep_ends_when_they_do(rig, door, gate):
    loop = PlacementLoop([rig.region], door.GatedSource(rig.content, gate[0])).start()
    waiter = rig.touch(200)
    wait_until(lambda: loop.source.used == 1, "the fetch sleeps")
    stopping = Worker(loop.stop)
    assert not stopping.done(0.02)
    os.write(gate[1], b"x")
    stopping.value()
    with PlacementLoop([rig.region], BufferSource(rig.content), states=loop.states):
        assert waiter.value() == rig.page(200)
