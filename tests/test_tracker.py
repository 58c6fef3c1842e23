"""PageTracker: senders, syncs and requests, and what bad input gets; see also test_tracker_traces.py."""

import ctypes
import threading

import numpy as np
import pytest

from concurrency import Worker
from pagecore import Answer, AnswerKind, Bitmap, BusyError, DirtyLog, MemoryDirtyLog, PageTracker
from tracker_rig import StepLog, pages, tracked

OWED, FREE, SENT, GONE = AnswerKind
DEADLINE = 20


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
        ({"npages": 10, "page_size": 3 << 20}, ValueError, "page_size 3145728 is no power of two"),
        ({}, TypeError, "needs npages, or regions"),
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


# Of a hint the part outside is left out; one that has no page inside is an error.
BAD_HINTS = [
    ([[0, 5], [10, 2]], IndexError, r"pages \[10, 12\) are outside \[0, 10\)"),
    ([[-2, 2]], IndexError, r"pages \[-2, 0\) are outside \[0, 10\)"),
    ([[-(1 << 63), (1 << 63) - 1]], IndexError, r"outside \[0, 10\)"),
    ([[(1 << 63) - 1, (1 << 63) - 1]], IndexError, r"outside \[0, 10\)"),
    ([[11, 0]], IndexError, r"outside \[0, 10\)"),
    ([[0, -1]], ValueError, "-1"),
    *BAD_RUNS[4:],
]


@pytest.mark.parametrize(
    ("method", "runs", "error", "message"),
    [(method, *case) for method in ("put_back", "mark") for case in BAD_RUNS]
    + [("clear_runs", *case) for case in BAD_HINTS],
)
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
        syncing = Worker(tracker.sync)
        assert entered.wait(DEADLINE)
        hinting = Worker(session.clear_runs, [[0, 10]], epoch)
        # The hint waits without the GIL, or the following would never run.
        assert pages(tracker.take(4)) == [0, 1, 2, 3]
        tracker.put_back([[0, 1]])
        tracker.mark([[9, 1]])
        leave.set()
        syncing.value()
        assert hinting.value() == 0
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
