"""PageTracker: planes, senders, requests, recovery; and the shortest trace of each source rule."""

import ctypes
import threading

import numpy as np
import pytest

import pagecore
from pagecore import Answer, AnswerKind, Bitmap, BusyError, DirtyLog, MemoryDirtyLog, PageTracker

OWED, FREE, SENT, GONE = AnswerKind
DEADLINE = 20


class StepLog(DirtyLog):
    """A log as the dirty ring is one: a page that was fetched logs nothing more until it is re-armed."""

    def __init__(self, size, *, rearms_at_collect=False, misses=()):
        super().__init__(size, rearms_at_collect=rearms_at_collect, misses=misses)
        self.armed = set(range(size))
        self.logged = set()
        self.at_collect = lambda: None
        self.at_rearm = lambda: None

    def write(self, page):
        if page in self.armed:
            self.armed.discard(page)
            self.logged.add(page)

    def collect_into(self, bitmap):
        newly = bitmap.set_indices(np.array(sorted(self.logged), dtype=np.int64))
        if self.rearms_at_collect:
            self.armed |= self.logged
        self.logged.clear()
        self.at_collect()
        return newly

    def rearm(self, first, count):
        self.at_rearm()
        self.armed |= set(range(first, first + count)) - self.logged


def tracked(npages=200, **options):
    log = MemoryDirtyLog(npages)
    tracker = PageTracker(npages, dirty_log=log, **options)
    tracker.sync()
    return tracker, log


def pages(runs):
    return [page for first, count in runs.tolist() for page in range(first, first + count)]


def kinds(tracker, page=0, count=None):
    """What a request for each page would be told, without asking."""
    dirty, hinted = tracker.dirty, tracker.hinted
    last = page + (tracker.size - page if count is None else count)
    return [OWED if dirty[p] else FREE if hinted[p] else SENT for p in range(page, last)]


# ---- construction ----


def test_starts_owing_everything_or_nothing():
    assert PageTracker(130).dirty.runs().tolist() == [[0, 130]]
    tracker = PageTracker(130, all_dirty=False)
    assert (tracker.dirty_count, tracker.hinted_count, tracker.epoch, len(tracker)) == (0, 0, 0, 130)
    assert tracker.dirty_log is None
    assert "130 pages, 0 owed, 0 free" in repr(tracker)


def test_no_pages_at_all():
    tracker, _ = tracked(0)
    assert tracker.take().shape == (0, 2)
    assert tracker.sync() == 0
    assert tracker.resolve(0) == [(GONE, 0, 1)]
    assert tracker.reload(Bitmap(0)) == 0
    assert tracker.owe_all() == 0
    assert tracker.discard_runs().shape == (0, 2)
    with tracker.hint_session() as session:
        assert session.clear_runs([], session.start()) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"npages": -1}, ValueError, "npages -1 is negative"),
        ({"npages": 4.0}, TypeError, "float"),
        ({"npages": 10, "dirty_log": MemoryDirtyLog(9)}, ValueError, "log of 9 pages .* region of 10"),
        ({"npages": 10, "dirty_log": [MemoryDirtyLog(10)]}, TypeError, "DirtyLog"),
        ({"npages": 10, "page_size": 2 << 20}, pagecore.UnsupportedError, "2097152 bytes"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        PageTracker(**arguments)


# ---- take and put_back ----


def test_take_resumes_and_wraps():
    tracker = PageTracker(200)
    assert tracker.take(70).tolist() == [[0, 70]]
    tracker.put_back([[3, 1]])
    assert tracker.take(70).tolist() == [[70, 70]]
    assert tracker.take(1000).tolist() == [[140, 60], [3, 1]]
    assert tracker.take().shape == (0, 2)
    assert tracker.take().dtype == np.int64


def test_take_keeps_to_both_limits():
    tracker = PageTracker(200, all_dirty=False)
    tracker.put_back([[p, 1] for p in range(0, 200, 2)])
    assert tracker.take(max_pages=3).tolist() == [[0, 1], [2, 1], [4, 1]]
    assert tracker.take(max_pages=50, max_runs=2).tolist() == [[6, 1], [8, 1]]
    tracker.put_back([[11, 118]])
    assert tracker.take(max_runs=1).tolist() == [[10, 119]]
    rest = tracker.take(max_pages=10_000)
    assert pages(rest) == list(range(130, 200, 2))
    assert tracker.dirty_count == 0


def test_take_of_more_runs_than_one_piece():
    tracker = PageTracker(40_000, all_dirty=False)
    tracker.put_back(np.stack([np.arange(0, 40_000, 2), np.ones(20_000, np.int64)], axis=1))
    assert len(tracker.take(max_pages=9_000)) == 9_000
    runs = tracker.take(max_pages=40_000)
    assert pages(runs) == list(range(18_000, 40_000, 2))


@pytest.mark.parametrize("limits", [{"max_pages": 0}, {"max_pages": -3}, {"max_runs": 0}])
def test_take_refuses_limits_below_one(limits):
    tracker = PageTracker(10)
    with pytest.raises(ValueError, match=r"is less than 1|is negative"):
        tracker.take(**limits)
    assert tracker.dirty_count == 10


BAD_RUNS = [
    ([[0, 5], [9, 2]], IndexError, r"\[0, 10\)"),
    ([[-1, 2]], IndexError, r"\[0, 10\)"),
    ([[0, -1]], ValueError, "-1"),
    ([[0, 1 << 62]], IndexError, r"\[0, 10\)"),
    (np.array([[1 << 63, 1]], dtype=np.uint64), IndexError, "9223372036854775808"),
    ([[0.0, 1.0]], TypeError, "float64"),
    ([[float("nan"), 1]], TypeError, "float64"),
    ([["a", "b"]], TypeError, "U1"),
    ([[True, True]], TypeError, "bool"),
    ([1, 2], ValueError, r"\(2,\)"),
    ([[1, 2, 3]], ValueError, r"\(1, 3\)"),
]


@pytest.mark.parametrize(("runs", "error", "message"), BAD_RUNS)
@pytest.mark.parametrize("method", ["put_back", "mark", "clear_runs"])
def test_bad_runs_change_nothing(method, runs, error, message):
    tracker = PageTracker(10)
    with tracker.hint_session() as session:
        epoch = session.start()
        if method == "clear_runs":
            before = (tracker.dirty_count, 0)
            with pytest.raises(error, match=message):
                session.clear_runs(runs, epoch)
        else:
            tracker.take()
            before = (0, 0)
            with pytest.raises(error, match=message):
                getattr(tracker, method)(runs)
            tracker.sync()
        assert (tracker.dirty_count, tracker.hinted_count) == before


@pytest.mark.parametrize(
    "runs",
    [
        [(2, 3), (4, 1), (9, 1)],
        ((2, 3), (9, 1)),
        np.array([[2, 3], [9, 1]], dtype=np.uint8),
        np.array([[2, 9], [3, 1]], dtype=">i4").T,
        memoryview(np.array([[9, 1], [2, 3], [0, 0]], dtype=np.int64)),
    ],
)
def test_runs_of_any_form(runs):
    tracker = PageTracker(10, all_dirty=False)
    tracker.put_back(runs)
    assert tracker.dirty.indices().tolist() == [2, 3, 4, 9]
    tracker.take()
    tracker.mark(runs)
    assert tracker.dirty_count == 0
    assert tracker.sync() == 4
    with tracker.hint_session() as session:
        assert session.clear_runs(runs, session.start()) == 4


def test_read_only_runs_are_fine():
    runs = np.array([[2, 3]], dtype=np.int64)
    runs.flags.writeable = False
    tracker = PageTracker(10)
    with tracker.hint_session() as session:
        assert session.clear_runs(runs, session.start()) == 3


# ---- sync ----


def test_sync_counts_the_newly_dirty_alone():
    tracker, log = tracked(200, all_dirty=False)
    log.bitmap.set_range(0, 10)
    tracker.mark([[5, 10]])
    assert tracker.sync() == 15
    log.bitmap.set_range(10, 10)
    assert tracker.sync() == 5
    assert tracker.sync() == 0


def test_sync_masks_bits_past_the_end():
    class Padded(DirtyLog):
        """KVM hands out whole words; a Bitmap would refuse to set such bits."""

        def collect_into(self, bitmap):
            ctypes.memset(np.frombuffer(bitmap, np.uint64).ctypes.data, 0xFF, 16)
            return 100

    tracker = PageTracker(100, dirty_log=Padded(100, rearms_at_collect=True), all_dirty=False)
    assert tracker.sync() == 100
    assert tracker.dirty_count == 100


def test_a_failed_sync_loses_nothing():
    log = StepLog(10)
    tracker = PageTracker(10, dirty_log=log, all_dirty=False)
    tracker.sync()
    with tracker.hint_session("held") as session:
        epoch = session.start()
        log.write(4)
        tracker.mark([[6, 1]])
        log.at_rearm = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            tracker.sync()
        # Not published: page 4 was fetched and is not re-armed.
        assert tracker.dirty_count == 0
        # The epoch has ended, and the next cannot begin on a log that is not armed.
        assert session.clear_runs([[0, 10]], epoch) == 0
        with pytest.raises(BusyError, match="sync"):
            session.start()
        log.at_rearm = lambda: None
        assert tracker.sync() == 2
        assert tracker.dirty.indices().tolist() == [4, 6]
        assert session.start() == 2


def test_a_dirty_log_that_calls_back_is_refused_and_takes_are_not():
    log = StepLog(10)
    tracker = PageTracker(10, dirty_log=log)
    session = tracker.hint_session("held")
    seen = []

    def call_back():
        seen.append(tracker.take(1).tolist())
        for call in (
            tracker.sync,
            tracker.owe_all,
            tracker.owe_hinted,
            tracker.discard_runs,
            tracker.hinted_runs,
            lambda: tracker.resolve(0),
            lambda: tracker.reload(Bitmap(10)),
            lambda: session.clear_runs([[0, 1]], 1),
            session.start,
        ):
            with pytest.raises(BusyError, match="syncing"):
                call()
        session.finish()

    log.at_collect = call_back
    tracker.sync()
    assert seen == [[[0, 1]]]


def test_takers_do_not_wait_for_a_sync_and_hints_do():
    log = StepLog(10)
    tracker = PageTracker(10, dirty_log=log)
    tracker.sync()
    entered, leave = threading.Event(), threading.Event()
    with tracker.hint_session("held") as session:
        epoch = session.start()
        log.at_collect = lambda: (entered.set(), leave.wait(DEADLINE))
        result = []
        syncing = threading.Thread(target=tracker.sync)
        syncing.start()
        assert entered.wait(DEADLINE)
        hinting = threading.Thread(target=lambda: result.append(session.clear_runs([[0, 10]], epoch)))
        hinting.start()
        # The hint waits without the GIL, or the following would never run.
        assert pages(tracker.take(4)) == [0, 1, 2, 3]
        tracker.put_back([[0, 1]])
        tracker.mark([[9, 1]])
        leave.set()
        syncing.join(DEADLINE)
        hinting.join(DEADLINE)
        assert not syncing.is_alive()
        assert not hinting.is_alive()
        assert result == [0]
        assert session.stale == 1


# ---- resolve ----


def test_resolve_answers_run_by_run_and_sends():
    tracker, _ = tracked(200)
    tracker.take(70)
    with tracker.hint_session() as session:
        assert session.clear_runs([[60, 70]], session.start()) == 60
    assert tracker.resolve(0, 200) == [(SENT, 0, 70), (FREE, 70, 60), (OWED, 130, 70)]
    assert tracker.resolve(0, 200) == [Answer(SENT, 0, 200)]
    assert (tracker.dirty_count, tracker.hinted_count) == (0, 0)
    tracker.put_back([[100, 1]])
    assert tracker.resolve(100)[0].kind is OWED


def test_resolve_again_is_content_whatever_the_planes_say():
    tracker, _ = tracked(200)
    with tracker.hint_session() as session:
        session.clear_runs([[60, 70]], session.start())
    tracker.take(30)
    assert tracker.resolve(0, 250, again=True) == [(OWED, 0, 200), (GONE, 200, 50)]
    assert tracker.resolve(0, 200) == [(SENT, 0, 200)]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("page", "count", "answers"),
    [
        (10, 1, [(GONE, 10, 1)]),
        (1 << 64, 3, [(GONE, 1 << 64, 3)]),
        (-5, 5, [(GONE, -5, 5)]),
        (-5, 7, [(GONE, -5, 5), (OWED, 0, 2)]),
        (8, 1 << 64, [(OWED, 8, 2), (GONE, 10, (1 << 64) - 2)]),
        (-1, 12, [(GONE, -1, 1), (OWED, 0, 10), (GONE, 10, 1)]),
    ],
)
def test_every_request_gets_an_answer(page, count, answers, again):
    assert PageTracker(10).resolve(page, count, again) == answers


def test_resolve_refuses_a_run_of_nothing():
    with pytest.raises(ValueError, match="count 0 is below 1"):
        PageTracker(10).resolve(0, 0)


def test_resolve_merges_over_its_pieces():
    tracker = PageTracker(10_000)
    tracker.take(5_000)
    assert tracker.resolve(0, 10_000) == [(SENT, 0, 5_000), (OWED, 5_000, 5_000)]


# ---- the traces of design section 6 ----


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
    tracker = PageTracker(10, dirty_log=StepLog(10))
    with pytest.raises(pagecore.UnsupportedError, match="held"):
        tracker.hint_session("armed")
    tracker.sync()
    with tracker.hint_session("held") as session:
        assert session.clear_runs([[0, 10]], session.start()) == 10


def test_trace_armed_keeps_the_write_of_a_reused_page():
    """Free and hint, write, late hint, switch: the hint leaves the log alone, so the write is not lost."""
    log = StepLog(10, rearms_at_collect=True)
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
