"""The shortest trace of each source rule, as the table of design section 6 has them; and the lists and recovery."""

import numpy as np
import pytest

import pagecore
from pagecore import AnswerKind, Bitmap, BusyError, PageTracker
from tracker_rig import StepLog, pages, tracked

OWED, FREE, SENT, _ = AnswerKind


def kinds(tracker, page=0, count=None):
    """What a request for each page would be told, without asking."""
    dirty, hinted = tracker.dirty, tracker.hinted
    last = page + (tracker.size - page if count is None else count)
    return [OWED if dirty[p] else FREE if hinted[p] else SENT for p in range(page, last)]


def test_trace_hinted_plane():
    """Free, hint, switch, run, fault, request: today's QEMU ignores it, and the guest stalls."""
    tracker, _ = tracked()
    with tracker.hint_session() as session:
        session.clear_runs([[7, 1]], session.start())
        tracker.take(1000)
        tracker.sync()
        assert tracker.hinted_runs().tolist() == [[7, 1]]
    assert tracker.resolve(7) == [(FREE, 7, 1)]


def test_trace_hint_epochs():
    """Free, send, write, sync, late hint, switch: the late hint must not take the page off the debt."""
    tracker, log = tracked()
    with tracker.hint_session() as session:
        epoch = session.start()
        tracker.take(1000)
        log.bitmap[7] = True
        tracker.sync()
        session.start()
        assert session.clear_runs([[7, 1]], epoch) == 0
        assert session.stale == 1
        tracker.sync()
    assert tracker.resolve(7) == [(OWED, 7, 1)]


def test_trace_stop_ends_the_epoch():
    tracker, _ = tracked()
    with tracker.hint_session() as session:
        epoch = session.start()
        session.stop()
        assert session.clear_runs([[7, 1]], epoch) == 0
    assert tracker.resolve(7) == [(OWED, 7, 1)]


def test_trace_recovery_reload():
    """Push, the link breaks, request: what never arrived is owed again."""
    tracker, _ = tracked(10)
    with tracker.hint_session() as session:
        session.clear_runs([[0, 4]], session.start())
        tracker.take(1000)
        tracker.sync()
    settled = Bitmap(10)
    settled.set_range(2, 5)
    assert tracker.reload(settled) == 3
    assert tracker.hinted_runs().tolist() == [[0, 2]]
    assert tracker.dirty.indices().tolist() == [7, 8, 9]
    assert tracker.resolve(0, 10) == [(FREE, 0, 2), (SENT, 2, 5), (OWED, 7, 3)]


def test_reload_owes_a_page_that_was_both():
    """Taken, written, hinted, and put back: both bits are set, and that reads as dirty."""
    tracker, log = tracked(10)
    taken = tracker.take(1)
    log.bitmap[0] = True
    tracker.sync()
    with tracker.hint_session() as session:
        assert session.clear_runs([[0, 1]], session.start()) == 1
    tracker.put_back(taken)
    assert kinds(tracker)[0] is OWED
    assert tracker.hinted_count == 0
    tracker.reload(Bitmap(10))
    assert tracker.resolve(0) == [(OWED, 0, 1)]


@pytest.mark.parametrize("lists", [PageTracker.discard_runs, PageTracker.hinted_runs])
def test_the_lists_settle_a_page_that_was_both(lists):
    """Sent after the switch, it is not free as well: its fill would be a second copy."""
    tracker, log = tracked(10)
    taken = tracker.take(1)
    log.bitmap[0] = True
    tracker.sync()
    with tracker.hint_session() as session:
        session.clear_runs([[0, 1], [5, 1]], session.start())
    tracker.put_back(taken)
    tracker.sync()
    lists(tracker)
    assert tracker.take(10).tolist() == [[1, 4], [6, 4], [0, 1]]
    assert tracker.resolve(0) == [(SENT, 0, 1)]
    assert tracker.resolve(5) == [(FREE, 5, 1)]


def test_a_refused_reload_changes_nothing():
    tracker, _ = tracked(10)
    with pytest.raises(ValueError, match="settled bitmap of 11 pages does not fit a region of 10"):
        tracker.reload(Bitmap(11))
    with pytest.raises(TypeError):
        tracker.reload(b"\xff\xff")
    assert tracker.dirty_count == 10


def test_trace_reload_before_the_list():
    """Send, write, arrive, sync, link lost: before a list no version is known, and all is owed."""
    tracker, log = tracked(10)
    with tracker.hint_session() as session:
        epoch = session.start()
        session.clear_runs([[0, 4]], epoch)
        tracker.take(1000)
        log.bitmap[9] = True
        tracker.mark([[5, 1]])
        assert tracker.owe_all() == 10
        assert session.clear_runs([[0, 1]], epoch) == 0
    assert (tracker.dirty_count, tracker.hinted_count) == (10, 0)
    # The log was collected and re-armed with it; and what is sent is not free any more.
    tracker.take(1000)
    assert tracker.hinted_count == 0
    assert tracker.sync() == 0


def test_owe_all_owes_even_where_the_log_fails():
    log = StepLog(10)
    tracker = PageTracker(10, dirty_log=log, all_dirty=False)
    log.write(3)
    log.at_rearm = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tracker.owe_all()
    assert tracker.dirty_count == 10
    log.at_rearm = lambda: None
    tracker.take(1000)
    assert tracker.sync() == 1


def test_trace_armed_or_held():
    """A lazy log, the guest reuses at once: QEMU's order loses the write. `armed` is refused there."""
    tracker = PageTracker(10, dirty_log=StepLog(10), rearm="lazy")
    with pytest.raises(pagecore.UnsupportedError, match="held"):
        tracker.hint_session("armed")
    tracker.sync()
    with tracker.hint_session("held") as session:
        assert session.clear_runs([[0, 10]], session.start()) == 10


@pytest.mark.parametrize("rearms_at_collect", [True, False])
def test_trace_armed_keeps_the_write_of_a_reused_page(rearms_at_collect):
    """Free and hint, write, late hint, switch: the hint leaves the log alone, so the write is not lost. A log of two
    steps counts as armed where the sync re-arms all that it saw."""
    log = StepLog(10, rearms_at_collect=rearms_at_collect)
    tracker = PageTracker(10, dirty_log=log)
    tracker.sync()
    with tracker.hint_session() as session:
        epoch = session.start()
        log.write(7)
        assert session.clear_runs([[7, 1]], epoch) == 1
        tracker.sync()
    assert tracker.resolve(7) == [(OWED, 7, 1)]


def test_trace_mark_after_a_write_of_the_vmm():
    """The VMM wrote a sent page and the log missed it: mark() makes it owed at the last sync."""
    tracker, _ = tracked()
    tracker.take(1000)
    tracker.mark([[7, 1]])
    assert tracker.sync() == 1
    assert tracker.resolve(7) == [(OWED, 7, 1)]


def test_trace_hints_beside_a_silent_writer_are_refused():
    tracker = PageTracker(10, dirty_log=StepLog(10, rearms_at_collect=True, misses={"vmm", "vhost"}))
    with pytest.raises(pagecore.UnsupportedError, match=r"misses \(vhost, vmm\).*mark"):
        tracker.hint_session()
    with pytest.raises(pagecore.UnsupportedError, match=r"misses \(vhost\)"):
        tracker.hint_session(marked={"vmm"})
    tracker.hint_session(marked={"vmm", "vhost"}).finish()


def test_trace_side_plane():
    """Free and hint, reuse for DMA, the VMM writes and marks, late hint, switch: the write is not lost."""
    tracker, _ = tracked()
    with tracker.hint_session() as session:
        epoch = session.start()
        session.clear_runs([[7, 1]], epoch)
        tracker.mark([[7, 1]])
        session.clear_runs([[7, 1]], epoch)
        tracker.sync()
    assert tracker.resolve(7) == [(OWED, 7, 1)]


def test_trace_fetch_rearm_publish():
    """Published before it is re-armed, a page could be sent and then written unlogged."""
    log = StepLog(10)
    tracker = PageTracker(10, dirty_log=log, all_dirty=False)
    tracker.sync()
    sent = []

    def send_and_write():
        sent.extend(pages(tracker.take()))
        log.write(4)

    log.write(4)
    log.at_rearm = send_and_write
    tracker.sync()
    log.at_rearm = lambda: None
    tracker.sync()
    assert 4 not in sent
    assert tracker.resolve(4) == [(OWED, 4, 1)]


def test_trace_epoch_after_rearm():
    """An epoch opened before the re-arm would believe hints of writes that are not logged."""
    log = StepLog(10, rearms_at_collect=True)
    tracker = PageTracker(10, dirty_log=log)
    session = tracker.hint_session()
    with pytest.raises(BusyError, match="sync"):
        session.start()
    refused = []

    def open_early():
        try:
            session.start()
        except BusyError as error:
            refused.append(error)

    log.at_collect = open_early
    tracker.sync()
    assert len(refused) == 1
    assert tracker.epoch == 0
    assert session.start() == 1
    session.finish()


def test_trace_lists_after_quiet_senders():
    """Taken, send fails, put back: the page is in the lists."""
    tracker, _ = tracked(10)
    taken = tracker.take(1000)
    tracker.sync()
    assert tracker.discard_runs().shape == (0, 2)
    tracker.put_back(taken[:1])
    assert tracker.discard_runs().tolist() == [[0, 10]]


def test_lists_hold_what_is_not_sent_and_clean():
    tracker, _ = tracked(10)
    with tracker.hint_session() as session:
        session.clear_runs([[2, 3]], session.start())
    tracker.take(4)
    assert tracker.discard_runs().tolist() == [[2, 3], [7, 3]]
    assert tracker.hinted_runs().tolist() == [[2, 3]]
    assert tracker.discard_runs().dtype == np.int64


def test_lists_before_the_last_sync_are_refused():
    tracker, _ = tracked(10)
    tracker.mark([[2, 3]])
    with pytest.raises(BusyError, match="3 marked pages wait for a sync"):
        tracker.discard_runs()
    tracker.sync()
    assert tracker.discard_runs().tolist() == [[0, 10]]


def test_owe_hinted():
    tracker, _ = tracked(130)
    with tracker.hint_session() as session:
        session.clear_runs([[60, 70]], session.start())
    assert tracker.owe_hinted() == 70
    assert tracker.hinted_count == 0
    assert tracker.resolve(0, 130) == [(OWED, 0, 130)]


def test_a_hint_takes_only_what_is_owed_and_a_write_ends_it():
    tracker, log = tracked(10)
    tracker.take(4)
    with tracker.hint_session() as session:
        epoch = session.start()
        assert session.clear_runs([[0, 6], [5, 1], [4, 0]], epoch) == 2
        assert session.clear_runs([[0, 6]], epoch) == 0
        assert kinds(tracker) == [SENT] * 4 + [FREE] * 2 + [OWED] * 4
        log.bitmap[5] = True
        assert tracker.sync() == 1
    assert kinds(tracker) == [SENT] * 4 + [FREE] + [OWED] * 5
    # Sent after the write that ended the hint: sent, not free.
    assert tracker.take(1000).tolist() == [[5, 5]]
    assert kinds(tracker) == [SENT] * 4 + [FREE] + [SENT] * 5
