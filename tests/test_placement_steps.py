"""Design rules D1 to D15, one chosen interleaving at a time: the test takes the steps of the loop's threads."""

import contextlib

import numpy as np
import pytest

from concurrency import Worker, wait_until
from pagecore import PagecoreError, ProtocolError
from placement_rig import AGAIN, pushed, served
from uffd_helpers import PAGE, map_afresh

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(256) as rig:
        yield rig


@pytest.fixture
def stepped(rig):
    """(rig, loop, peer); no thread of the loop runs."""
    with pushed(rig, start=False) as (loop, peer):
        yield rig, loop, peer


def fault(rig, loop, door, page):
    """Touch a page, and have the reader take the fault. Returns the waiter."""
    waiter = rig.touch(page)
    rig.wait_readable()
    door.read_batch(loop)
    return waiter


def discard_and_read(rig, loop, door, page, count=1):
    thread = rig.discard(page, count)
    rig.wait_readable()
    door.read_batch(loop)
    thread.value()


def test_a_page_is_placed_once_and_a_duplicate_is_dropped(stepped, door):
    """D1."""
    rig, loop, _ = stepped
    door.place(loop, 3, rig.page(3, 20))
    door.place(loop, 10, bytes(PAGE))
    stats = loop.stats()
    assert (stats.placed, stats.duplicates, stats.foreign) == (20, 1, 0)
    assert rig.touch(10).value() == rig.page(10)


def test_a_strict_session_names_page_and_session(rig, door):
    """W2."""
    with pushed(rig, start=False, duplicates="strict", name="s-1") as (loop, _):
        door.place(loop, 3, rig.page(3))
        assert loop.error is None
        door.place(loop, 3, rig.page(3))
        with pytest.raises(ProtocolError, match=r"duplicate: page 3 came twice in session 's-1'"):
            loop.wait_ended(0)


def test_a_foreign_page_is_never_overwritten(rig, door):
    """D2: placed behind our back: EEXIST, counted apart, and the content stays."""
    rig.region.place(7, b"\x5a" * PAGE)
    with pushed(rig, start=False) as (loop, _):
        door.place(loop, 6, rig.page(6, 3))
        assert loop.stats().foreign == 1
        assert loop.stats().placed == 2
        assert loop.states[0].received.runs().tolist() == [[6, 3]]
    assert rig.touch(7).value() == b"\x5a" * PAGE
    assert rig.touch(8).value() == rig.page(8)


def test_a_foreign_page_fails_a_strict_session(rig, door):
    rig.region.place(7, bytes(PAGE))
    with pushed(rig, start=False, duplicates="strict") as (loop, _):
        door.place(loop, 7, rig.page(7))
        with pytest.raises(PagecoreError, match="page 7 was present although nobody placed it"):
            loop.wait_ended(0)


def test_a_foreign_page_wakes_its_waiter(stepped, door):
    """D2, D10: EEXIST wakes nobody, so the placer does."""
    rig, loop, peer = stepped
    waiter = fault(rig, loop, door, 7)
    assert peer.next_request() == (7, 1, 0)
    rig.region.place(7, b"\x5a" * PAGE, wake=False)
    assert not waiter.done()
    door.place(loop, 7, rig.page(7))
    assert waiter.value() == b"\x5a" * PAGE
    assert loop.stats().latency["present"].count == 1


def test_a_duplicate_wakes(stepped, door):
    """D10: whoever sleeps on a page that is there is woken by the copy that came too late."""
    rig, loop, _ = stepped
    waiter = fault(rig, loop, door, 7)
    state = loop.states[0]
    state.claimed.set(7)
    rig.region.place(7, rig.page(7), wake=False)
    state.received.set(7)
    assert not waiter.done()
    door.place(loop, 7, rig.page(7))
    assert waiter.value() == rig.page(7)


def test_a_fault_is_asked_for_once(stepped, door):
    """D9: two threads on one page, one request."""
    rig, loop, peer = stepped
    waiters = [fault(rig, loop, door, 9), fault(rig, loop, door, 9)]
    assert peer.next_request() == (9, 1, 0)
    assert peer.no_request()
    door.place(loop, 9, rig.page(9))
    assert [waiter.value() for waiter in waiters] == [rig.page(9)] * 2
    assert loop.stats().requested == 1
    assert not loop.states[0].requested.any()


def test_a_fault_under_way_is_not_asked_for(stepped, door):
    rig, loop, peer = stepped
    loop.states[0].claimed.set(9)
    waiter = fault(rig, loop, door, 9)
    assert peer.no_request()
    loop.states[0].claimed.clear(9)
    door.place(loop, 9, rig.page(9))
    assert waiter.value() == rig.page(9)


def test_a_hinted_page_is_filled_without_a_request(stepped, door):
    """D11: filled once, through a claim."""
    rig, loop, peer = stepped
    loop.states[0].hinted.set_range(20, 4)
    waiter = fault(rig, loop, door, 21)
    assert waiter.value() == bytes(PAGE)
    assert peer.no_request()
    assert loop.stats().filled == 1
    assert loop.stats().latency["hinted"].count == 1
    door.place(loop, 21, rig.page(21))
    assert loop.stats().duplicates == 1
    assert rig.touch(21).value() == bytes(PAGE)


def test_the_fill_is_the_sessions_pattern(rig, door):
    """S6: a guest that poisons free pages finds its poison."""
    with pushed(rig, start=False, fill=0xAABBCCDD) as (loop, _):
        loop.states[0].hinted.set_range(20, 40)
        waiter = fault(rig, loop, door, 20)
        assert waiter.value() == b"\xdd\xcc\xbb\xaa" * (PAGE // 4)
        door.place_fill(loop, 21, 39)
        assert rig.touch(59).value() == b"\xdd\xcc\xbb\xaa" * (PAGE // 4)
        assert loop.stats().filled == 40


def test_zeros_are_placed_as_zeros(stepped, door):
    rig, loop, _ = stepped
    door.place_zeros(loop, 30, 50)
    assert loop.stats().zeroed == 50
    assert rig.touch(79).value() == bytes(PAGE)


def test_a_discard_before_arrival_releases_the_page(stepped, door):
    """D3: the copy that arrives afterwards is dropped, and the page reads as zeros."""
    rig, loop, peer = stepped
    discard_and_read(rig, loop, door, 40, 2)
    door.place(loop, 40, rig.page(40, 3))
    stats = loop.stats()
    assert (stats.removed, stats.dropped, stats.placed) == (2, 2, 1)
    assert fault(rig, loop, door, 41).value() == bytes(PAGE)
    assert loop.stats().latency["released"].count == 1
    assert peer.no_request()
    assert rig.touch(42).value() == rig.page(42)


def test_a_discard_after_placement_reads_as_zeros_for_ever(stepped, door):
    """D3: neither a second copy nor a fill brings the old data back, however often the guest discards."""
    rig, loop, _ = stepped
    door.place(loop, 50, rig.page(50))
    for _ in range(2):
        discard_and_read(rig, loop, door, 50)
        door.place(loop, 50, rig.page(50))
        assert fault(rig, loop, door, 50).value() == bytes(PAGE)
    assert loop.stats().dropped == 2
    assert loop.stats().removed == 1


def test_a_discard_with_a_fault_outstanding_wakes_the_waiter(stepped, door):
    """D3: no second message will come, so the waiter gets zeros there and then."""
    rig, loop, peer = stepped
    waiter = fault(rig, loop, door, 60)
    assert peer.next_request() == (60, 1, 0)
    discard_and_read(rig, loop, door, 60)
    wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert waiter.value() == bytes(PAGE)
    assert not loop.states[0].requested.any()
    door.place(loop, 60, rig.page(60))
    assert loop.stats().dropped == 1


def test_a_discard_of_a_page_under_way_drops_its_data(stepped, door):
    """D3, D7, D8: EAGAIN parks the page under its claim; released meanwhile, its data are dropped."""
    rig, loop, _ = stepped
    waiter = fault(rig, loop, door, 70)
    thread = rig.discard(70)
    rig.wait_readable()  # the event is queued and nobody has read it: the address space "is changing"
    door.place(loop, 70, rig.page(70, 2))
    assert door.parked(loop) == 2
    assert loop.stats().deferred == 2
    assert loop.states[0].claimed.runs().tolist() == [[70, 2]]
    assert not loop.states[0].received.any()
    assert door.retry(loop), "still EAGAIN: it is kept"
    door.read_batch(loop)
    thread.value()
    wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert waiter.value() == bytes(PAGE)
    assert rig.touch(71).value() == rig.page(71)
    stats = loop.stats()
    assert (stats.placed, stats.dropped) == (1, 1)
    assert loop.states[0].settled().runs().tolist() == [[70, 2]]


def test_one_page_asks_the_kernel_again_for_all_that_are_parked(stepped, door):
    """D7: what it says to one it says to all; asking for each would be a spin."""
    rig, loop, _ = stepped
    thread = rig.discard(5)
    rig.wait_readable()
    door.place(loop, 100, rig.page(100, 30))
    before = loop.stats().outcomes["new"]["deferred"]
    assert door.retry(loop)
    assert loop.stats().outcomes["new"]["deferred"] == before + 1
    door.read_batch(loop)
    thread.value()
    wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert loop.states[0].received.runs().tolist() == [[100, 30]]


def test_events_of_a_batch_come_before_its_faults(stepped, door):
    """D4: read() hands over the fault first although the discard came first."""
    rig, loop, peer = stepped
    thread = rig.discard(80)
    rig.wait_readable()
    waiter = rig.touch(80)
    rig.wait_fault_pending()
    door.read_batch(loop)
    thread.value()

    def woken():
        door.retry(loop)
        door.read_batch(loop)
        return waiter.done(0.001)

    wait_until(woken, "the waiter is woken")
    assert waiter.value() == bytes(PAGE)
    assert peer.no_request(), "the fault was served before the event was applied: old data would have come"


def test_reading_waits_for_a_placer_that_has_checked(stepped, door):
    """D5: between a placer's check and its mark no event is read, so no discard can finish in between."""
    rig, loop, _ = stepped
    state = loop.states[0]
    door.lock_shared(state)
    thread = rig.discard(90)
    rig.wait_readable()
    reader = Worker(door.read_batch, loop)
    assert not reader.done(0.05)
    assert not thread.done()
    assert not state.released.any()
    door.unlock(state)
    assert reader.value()
    thread.value()
    assert state.released.runs().tolist() == [[90, 1]]


def test_stopping_gives_parked_claims_back(stepped, door):
    """D8: at recovery nothing is under way, so the settled bitmap is exact."""
    rig, loop, _ = stepped
    thread = rig.discard(5)
    rig.wait_readable()
    door.place(loop, 100, rig.page(100))
    assert loop.states[0].claimed.count() == 1
    loop.stop()
    assert door.parked(loop) == 0
    assert not loop.states[0].claimed.any()
    assert len(rig.uffd.read_events()) == 1
    thread.value()


def test_a_page_that_is_marked_received_and_missing_fails_closed(stepped, door):
    """D15: never zeros. At first it is only woken; then the kernel is asked, and the loop says what it lost."""
    _, loop, _ = stepped
    state = loop.states[0]
    state.claimed.set(110)
    state.received.set(110)
    door.serve(loop, 110)
    assert loop.error is None
    door.serve(loop, 110)
    with pytest.raises(PagecoreError, match="page 110 was received and is missing"):
        loop.wait_ended(0)
    assert state.excluded.runs().tolist() == [[110, 1]]
    assert loop.stats().lost == 1


def test_a_page_that_is_received_and_present_is_only_woken(stepped, door):
    rig, loop, _ = stepped
    door.place(loop, 110, rig.page(110))
    for _ in range(3):
        door.serve(loop, 110)
    assert loop.error is None
    assert not loop.states[0].excluded.any()
    assert rig.touch(110).value() == rig.page(110)


def test_a_page_that_comes_while_it_is_found_missing_is_not_asked_for(stepped, door):
    """D9: its first request has been answered; a second would stay asked for with nobody to answer it."""
    rig, loop, _ = stepped
    door.place(loop, 110, rig.page(110))
    door.ask(loop, 110)
    assert loop.stats().requested == 0
    assert not loop.states[0].requested.any()
    door.ask(loop, 111)
    assert loop.stats().requested == 1


def test_an_excluded_page_is_never_copied_to(stepped, door):
    """D12: a COPY would silently undo the marker."""
    rig, loop, _ = stepped
    loop.give_up([(120, 1)])
    assert loop.stats().poisoned == 1
    door.place(loop, 119, rig.page(119, 3))
    assert loop.stats().dropped == 1
    assert loop.states[0].excluded.runs().tolist() == [[120, 1]]
    assert rig.region.place_zeros(120, 1).present == 1, "the marker still stands"


def test_a_discard_of_an_excluded_page_releases_it(stepped, door):
    rig, loop, _ = stepped
    loop.give_up([(120, 1)])
    discard_and_read(rig, loop, door, 120)
    assert not loop.states[0].excluded.any()
    assert fault(rig, loop, door, 120).value() == bytes(PAGE)


def test_a_stalling_session_poisons_nothing(rig, door):
    with pushed(rig, start=False, on_lost="stall") as (loop, _):
        loop.give_up([(120, 1)])
        assert loop.stats().poisoned == 0
        assert loop.unsettled().tolist() == [[0, 256]]


def test_giving_up_wakes_whoever_waits_for_a_page_that_is_there(stepped, door):
    """D10: POISON says EEXIST, and that wakes nobody."""
    rig, loop, _ = stepped
    waiter = fault(rig, loop, door, 7)
    rig.region.place(7, b"\x5a" * PAGE, wake=False)
    loop.give_up([(7, 1)])
    assert waiter.value() == b"\x5a" * PAGE
    assert loop.stats().poisoned == 0


def test_giving_up_a_page_under_way_does_not_forget_its_waiter(stepped, door):
    """D3, D10: its data are dropped after a discard; then the waiter must still be known."""
    rig, loop, _ = stepped
    waiter = fault(rig, loop, door, 60)
    thread = rig.discard(60)
    rig.wait_readable()
    door.place(loop, 60, rig.page(60))
    assert door.parked(loop) == 1
    loop.give_up([(60, 1)])
    assert loop.stats().latency["present"].count == 0, "nobody was woken"
    door.read_batch(loop)
    thread.value()
    wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert waiter.value() == bytes(PAGE)


def test_a_page_that_could_not_be_poisoned_stays_unsettled(stepped):
    """D12: as before Linux 6.6; called settled, it would read as zeros after the unregister."""
    rig, loop, _ = stepped
    rig.uffd.close()
    loop.give_up([(7, 1)])
    assert loop.error is not None
    assert loop.unsettled().tolist() == [[0, 256]]
    assert not loop.states[0].claimed.any()


def test_a_received_page_that_the_kernel_cannot_be_asked_about_is_an_error(stepped, door):
    """D15: woken and nothing else, its waiter would fault and be woken for ever."""
    rig, loop, _ = stepped
    loop.states[0].claimed.set(110)
    loop.states[0].received.set(110)
    rig.uffd.close()
    door.serve(loop, 110)
    assert loop.error is None
    door.serve(loop, 110)
    assert loop.error is not None


def test_giving_up_leaves_settled_pages_alone(stepped, door):
    rig, loop, _ = stepped
    door.place(loop, 0, rig.page(0, 10))
    loop.give_up([(5, 10)])
    assert loop.stats().poisoned == 5
    assert rig.touch(9).value() == rig.page(9)


def test_forget_releases_before_the_owner_punches(stepped, door):
    """D3: no event comes for a punched hole; from the call on nothing that arrives is placed."""
    rig, loop, peer = stepped
    waiter = fault(rig, loop, door, 130)
    assert peer.next_request() == (130, 1, 0)
    loop.forget([(130, 2)])
    assert waiter.value() == bytes(PAGE)
    door.place(loop, 131, rig.page(131))
    assert loop.stats().dropped == 1


def test_again_is_flagged(stepped):
    """S7."""
    _, loop, peer = stepped
    loop.request_again([(4, 2)])
    assert peer.next_request() == (4, 2, AGAIN)


def test_runs_that_another_thread_changes_meanwhile_are_those_that_were_checked(stepped):
    """D14: the array is the caller's. The call waits at its first run while the peer takes no request."""
    _, loop, peer = stepped
    peer.near_urgent.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            peer.near_urgent.send(bytes(4096))
    runs = np.array([(4, 1), (5, 1)])
    asking = Worker(loop.request_again, runs)
    wait_until(lambda: loop.states[0].requested[4], "the first run")
    runs[1] = (9, 1)

    def answered():
        with contextlib.suppress(BlockingIOError):
            peer.urgent.recv(1 << 20)
        return asking.done()

    peer.urgent.setblocking(False)
    wait_until(answered, "the end of the call")
    asking.value()
    assert loop.states[0].requested.runs().tolist() == [[4, 2]]


def test_a_strict_session_forgives_a_second_copy_of_what_it_asked_for_again(rig, door):
    """S7: the first copy may still be on its way."""
    with pushed(rig, start=False, duplicates="strict") as (loop, _):
        loop.request_again([(4, 1)])
        door.place(loop, 4, rig.page(4))
        door.place(loop, 4, rig.page(4))
        assert loop.error is None
        assert loop.stats().duplicates == 1


def test_zeros_that_were_parked_are_zeros_to_the_observer(rig, door):
    observer = door.RecordingObserver()
    with pushed(rig, start=False, observer=observer) as (loop, _):
        thread = rig.discard(5)
        rig.wait_readable()
        door.place(loop, 9, rig.page(9))
        door.place_zeros(loop, 10, 1)
        door.place_fill(loop, 11, 1)
        assert door.parked(loop) == 3
        door.read_batch(loop)
        thread.value()
        wait_until(lambda: not door.retry(loop), "nothing is left to retry")
    assert observer.calls() == [(9, 1, rig.page(9)[0]), (10, 1, -1), (11, 1, -1)]


def test_the_observer_sees_every_placed_page_once(rig, door):
    observer = door.RecordingObserver()
    with pushed(rig, start=False, observer=observer) as (loop, _):
        door.place(loop, 0, rig.page(0, 17))
        door.place(loop, 0, rig.page(0))
        door.place_zeros(loop, 17, 1)
    assert observer.calls() == [(0, 16, rig.page(0)[0]), (16, 1, rig.page(16)[0]), (17, 1, -1)]


def test_pages_over_the_edge_of_a_mapping_are_gone_and_the_rest_is_placed(rig, door):
    """Trap 21: the ioctl fails as a whole with ENOENT; page by page the good part is placed."""
    with pushed(rig, start=False) as (loop, _):
        map_afresh(rig.address(140), 2 * PAGE)
        door.place(loop, 136, rig.page(136, 8))
        assert loop.stats().gone == 2
        assert loop.stats().placed == 6
        assert loop.error is None
        assert loop.states[0].excluded.runs().tolist() == [[140, 2]], "nobody waits for them"
    assert rig.touch(139).value() == rig.page(139)
    assert rig.touch(143).value() == rig.page(143)


def test_a_page_without_memory_is_asked_for_no_longer(stepped, door):
    """D9, D10: gone is settled, and whoever waited runs on."""
    rig, loop, peer = stepped
    waiter = fault(rig, loop, door, 140)
    assert peer.next_request() == (140, 1, 0)
    map_afresh(rig.address(140), PAGE)
    door.place(loop, 140, rig.page(140))
    assert waiter.value() == bytes(PAGE), "of the memory that was mapped there"
    assert not loop.states[0].requested.any()
    assert not door.waiting(loop)
