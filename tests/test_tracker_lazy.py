"""Late re-arm of a dirty log, by chunks (design rules S1, S3 and S11): when, of what, and in which order."""

import threading

import pytest

import pagecore
from pagecore import AnswerKind, BusyError, MemoryDirtyLog, PageTracker, TrackedRegion
from tracker_rig import ManualLog, StepLog, pages

DEADLINE = 20


def lazy(npages=256, chunk_shift=6, **options):
    log = ManualLog(npages)
    tracker = PageTracker(npages, dirty_log=log, all_dirty=False, rearm="lazy", chunk_shift=chunk_shift, **options)
    return tracker, log


def write(log, *pages):
    for page in pages:
        log.write(page)


def test_a_sync_arms_nothing_and_a_take_arms_its_chunk():
    tracker, log = lazy()
    write(log, 3, 70, 71, 200)
    assert tracker.sync() == 4
    assert log.cleared == []
    assert pages(tracker.take(1)) == [3]
    assert log.cleared == [(0, 64, [3])]
    assert pages(tracker.take(10)) == [70, 71, 200]
    assert log.cleared[1:] == [(64, 64, [70, 71]), (192, 64, [200])]
    assert tracker.sync() == 0


def test_one_call_for_a_chunk_however_often_it_is_taken_from():
    tracker, log = lazy()
    write(log, 1, 2, 3)
    tracker.sync()
    for page in (1, 2, 3):
        assert pages(tracker.take(1)) == [page]
    assert log.cleared == [(0, 64, [1, 2, 3])]


def test_armed_before_cleared_before_read():
    """S1: at the moment of the re-arm the page is still owed."""
    tracker, log = lazy()
    write(log, 5)
    tracker.sync()
    owed = []
    log.at_clear = lambda *_: owed.append(tracker.dirty.indices().tolist())
    assert pages(tracker.take()) == [5]
    assert owed == [[5]]
    # Written after the re-arm: reported by the next sync.
    write(log, 5)
    assert tracker.sync() == 1


def test_a_page_is_re_armed_once_for_a_sighting():
    """Seen, armed, sent and written again, unseen: no later re-arm of its chunk may clear that bit."""
    tracker, log = lazy()
    write(log, 5, 6)
    tracker.sync()
    assert pages(tracker.take(1)) == [5]
    write(log, 5)
    # Its chunk is armed: nothing is cleared for page 6.
    assert pages(tracker.take(1)) == [6]
    assert log.cleared == [(0, 64, [5, 6])]
    assert tracker.sync() == 1
    assert tracker.dirty.indices().tolist() == [5]


def test_a_used_sighting_is_not_used_again_for_a_page_that_is_still_owed():
    tracker, log = lazy()
    write(log, 5, 6)
    tracker.sync()
    assert pages(tracker.take(1)) == [5]
    write(log, 7)
    assert tracker.sync() == 1
    # Written after the collect: its bit is one that nobody has seen.
    write(log, 6)
    assert pages(tracker.take()) == [6, 7]
    assert log.cleared == [(0, 64, [5, 6]), (0, 64, [7])]
    assert tracker.sync() == 1


def test_a_sighting_of_a_page_that_is_not_owed_is_void():
    tracker, log = lazy()
    write(log, 5, 6)
    tracker.sync(last=True)
    assert pages(tracker.take(1)) == [5]
    assert log.cleared == []
    # The guest runs on here: seen again, owed again.
    log.sighted.discard(5)
    write(log, 5)
    settled = pagecore.Bitmap(256)
    settled.fill()
    settled.clear(6)
    tracker.reload(settled)
    tracker.sync()
    log.cleared.clear()
    assert sorted(pages(tracker.take())) == [5, 6]
    assert log.cleared == [(0, 64, [5, 6])]


def test_only_pages_that_are_still_owed_are_armed():
    """S11: what was settled meanwhile may have been written again, and that bit nobody has seen."""
    tracker, log = lazy()
    write(log, 5, 6)
    tracker.sync()
    settled = pagecore.Bitmap(256)
    settled.fill()
    settled.clear(6)
    assert tracker.reload(settled) == 1
    assert pages(tracker.take()) == [6]
    assert log.cleared == [(0, 64, [6])]
    # Page 5 is reported for as long as nobody has cleared it.
    assert tracker.sync() == 1


def test_nothing_is_armed_after_the_last_sync_until_the_guest_runs_on():
    tracker, log = lazy()
    write(log, 5, 70)
    tracker.sync()
    write(log, 6)
    assert tracker.sync(last=True) == 1
    assert pages(tracker.take()) == [5, 6, 70]
    assert [answer.kind for answer in tracker.resolve(5)] == [AnswerKind.SENT]
    assert log.cleared == []
    with tracker.hint_session("held") as session, pytest.raises(BusyError, match="sync"):
        session.start()
    # What was never cleared is reported for as long.
    assert tracker.sync() == 3
    # Behind the request for page 5.
    assert pages(tracker.take(2)) == [6, 70]
    assert log.cleared == [(0, 64, [5, 6]), (64, 64, [70])]


def test_a_failed_arm_hands_out_nothing_and_is_tried_again():
    tracker, log = lazy()
    write(log, 5, 70)
    tracker.sync()

    def fail(first, count):
        if first:
            raise OSError("no")

    log.at_clear = fail
    with pytest.raises(OSError, match="no"):
        tracker.take()
    # Page 5 was armed and taken, and came back.
    assert tracker.dirty.indices().tolist() == [5, 70]
    assert tracker.dirty_count == 2
    log.at_clear = lambda *_: None
    assert sorted(pages(tracker.take())) == [5, 70]


def test_hints_arm_before_they_clear():
    """S3: held. A write that follows the hint is logged; the bits of the pages go before dirty does."""
    tracker, log = lazy()
    write(log, *range(60, 70))
    tracker.sync()
    owed = []
    log.at_clear = lambda *_: owed.append(tracker.dirty_count)
    with tracker.hint_session("held") as session:
        epoch = session.start()
        assert session.clear_runs([[60, 10]], epoch) == 10
        assert owed == [10, 10]
        assert [clear[2] for clear in log.cleared] == [[60, 61, 62, 63], [64, 65, 66, 67, 68, 69]]
        # The guest got it back under memory pressure and wrote: that is in the log.
        write(log, 61)
        assert tracker.sync() == 1
        assert session.clear_runs([[60, 10]], epoch) == 0
        assert session.stale == 1
    assert tracker.hinted_count == 9


def test_a_request_before_the_switch_arms_too():
    tracker, log = lazy()
    write(log, 5, 6)
    tracker.sync()
    assert tracker.resolve(5, again=True)[0].kind is AnswerKind.OWED
    assert log.cleared == [(0, 64, [5, 6])]


def test_armed_is_refused_and_says_held():
    tracker, _ = lazy()
    with pytest.raises(pagecore.UnsupportedError, match="held"):
        tracker.hint_session("armed")


def test_drains_wait_for_the_arm():
    """S11: a collect that ran while a clear is under way would take the bit for a new sighting."""
    tracker, log = lazy()
    write(log, 5)
    tracker.sync()
    entered, leave = threading.Event(), threading.Event()
    collected = []
    log.at_clear = lambda *_: (entered.set(), leave.wait(DEADLINE))
    taken = []
    taking = threading.Thread(target=lambda: taken.extend(pages(tracker.take())))
    taking.start()
    assert entered.wait(DEADLINE)
    syncing = threading.Thread(target=lambda: collected.append(tracker.sync()))
    syncing.start()
    # The page is not handed out before the log is armed.
    assert tracker.dirty_count == 1
    leave.set()
    taking.join(DEADLINE)
    syncing.join(DEADLINE)
    assert not taking.is_alive()
    assert not syncing.is_alive()
    assert (taken, collected) == ([5], [0])


def test_a_session_that_ends_inside_the_log_does_not_wait_for_itself():
    tracker, log = lazy()
    write(log, 5, 100)
    tracker.sync()
    session = tracker.hint_session("held")
    epoch = session.start()
    log.at_clear = lambda *_: session.finish()
    assert session.clear_runs([[5, 1], [100, 1]], epoch) == 0
    assert session.stale == 2
    assert tracker.dirty_count == 2


@pytest.mark.parametrize("page_size", [8192, 64 << 10, 2 << 20])
def test_a_log_in_smaller_pages_than_the_region(page_size):
    """S10: one written part makes a page dirty; its sightings are all used by one arm."""
    ratio = page_size // 4096
    log = ManualLog(8 * ratio)
    tracker = PageTracker(8, page_size=page_size, dirty_log=log, all_dirty=False, rearm="lazy", chunk_shift=6)
    write(log, 3 * ratio, 4 * ratio - 1, 8 * ratio - 1)
    assert tracker.sync() == 2
    assert tracker.newly_dirty_bytes == 2 * page_size
    assert pages(tracker.take(1)) == [3]
    armed = {page for _, _, wanted in log.cleared for page in wanted}
    assert armed >= {3 * ratio, 4 * ratio - 1}
    assert pages(tracker.take()) == [7]
    assert log.bits == set()
    assert tracker.sync() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_shift": 5}, r"chunk_shift 5 is outside \[6, 31\]"),
        ({"chunk_shift": 32}, r"chunk_shift 32 is outside \[6, 31\]"),
        ({"dirty_log": None}, "re-armed apart"),
        ({"dirty_log": MemoryDirtyLog(10)}, "re-armed apart"),
        ({"rearm": "never"}, "'never' is neither"),
    ],
)
def test_bad_descriptions_are_refused(arguments, message):
    values = {"npages": 10, "dirty_log": StepLog(10), "rearm": "lazy", **arguments}
    with pytest.raises(ValueError, match=message):
        TrackedRegion(**values)


def test_a_chunk_is_a_gibibyte_by_default():
    assert TrackedRegion(npages=1 << 20, dirty_log=ManualLog(1 << 20), rearm="lazy").chunk_shift == 18
    assert TrackedRegion(npages=4, page_size=1 << 30).chunk_shift == 6


def test_the_last_sync_re_arms_no_log():
    """Nobody will ask for what would be logged; the sync after it, if there is one, re-arms all."""
    log = StepLog(10)
    armed = []
    log.at_rearm = lambda: armed.append(True)
    tracker = PageTracker(10, dirty_log=log, all_dirty=False)
    tracker.sync()
    log.write(3)
    assert tracker.sync(last=True) == 1
    assert len(armed) == 1
    tracker.sync()
    assert len(armed) == 2
    assert log.armed == set(range(10))
