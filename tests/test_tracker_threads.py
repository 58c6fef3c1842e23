"""PageTracker from many threads: hints, syncs, takes and resolves side by side, and what must hold."""

import threading
import time

import numpy as np
import pytest

from concurrency import SECONDS, SEED, run_together
from pagecore import AnswerKind, Bitmap, MemoryDirtyLog, PageTracker

DEADLINE = 30 + SECONDS

pytestmark = pytest.mark.stress


def spread(runs):
    """The pages of runs, as an index array."""
    if len(runs) == 0:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(first, first + count) for first, count in runs])


def test_each_owed_page_goes_one_way():
    """Takers, resolvers and hints compete for pages that are owed once: each goes to exactly one of them."""
    npages = 1 << 16
    for attempt in range(8):
        tracker = PageTracker(npages)
        got = np.zeros(npages, np.int64)
        lock = threading.Lock()
        session = tracker.hint_session()
        epoch = session.start()
        off = []

        def take(tracker=tracker, got=got, lock=lock):
            while len(runs := tracker.take(97)):
                with lock:
                    got[spread(runs)] += 1

        def take_by_single_runs(tracker=tracker, got=got, lock=lock):
            while len(runs := tracker.take(100, max_runs=1)):
                with lock:
                    got[spread(runs)] += 1

        def resolve(tracker=tracker, got=got, lock=lock, attempt=attempt):
            rng = np.random.default_rng(SEED + attempt)
            for first in rng.integers(0, npages - 64, 400).tolist():
                answers = tracker.resolve(first, 64)
                with lock:
                    for answer in answers:
                        if answer.kind is not AnswerKind.SENT:
                            got[answer.first : answer.first + answer.count] += 1

        def hint(session=session, epoch=epoch, off=off, attempt=attempt):
            rng = np.random.default_rng(SEED - attempt)
            for _ in range(40):
                first = rng.integers(0, npages - 300, 50)
                off.append(session.clear_runs(np.stack([first, rng.integers(1, 300, 50)], axis=1), epoch))

        run_together(take, take_by_single_runs, resolve, hint)
        session.finish()
        assert tracker.dirty_count == 0
        left = tracker.hinted.indices()
        got[left] += 1
        assert got.min() == 1
        assert got.max() == 1
        assert sum(off) >= len(left)


def test_a_hint_and_a_taker_meet_in_one_word():
    """Each owed page ends free or taken, never both: the hint undoes what a faster sender took (S3).

    One call of each covers the region. Whoever starts later skips what the other has done and catches up, and
    from there on they compete for every word, where the machine lets them run side by side. The interleavings
    that must be seen for certain are in test_planes.py.
    """
    npages, rounds = 1 << 20, 60
    tracker = PageTracker(npages)
    session = tracker.hint_session()
    meet = threading.Barrier(2, timeout=DEADLINE)

    def hint():
        for _ in range(rounds):
            epoch = session.start()
            meet.wait()
            session.clear_runs([(0, npages)], epoch)
            meet.wait()
            meet.wait()

    def take():
        for _ in range(rounds):
            meet.wait()
            runs = tracker.take(npages)
            meet.wait()
            taken, hinted = Bitmap(npages), tracker.hinted
            taken.set_runs(runs)
            assert tracker.dirty_count == 0
            assert not (taken & hinted).any()
            assert taken.count() + hinted.count() == npages
            tracker.owe_all()
            meet.wait()

    run_together(hint, take)
    session.finish()


def test_conservation():
    """A page written after it was last sent is owed, or in the log; one that is taken for free is free.

    Two guest threads own a half each: they write, free, hint and reuse pages, at random, in bursts. A VMM
    thread writes what no log sees, and marks it. The controller stops, syncs and starts; senders take, read,
    send, and now and then put back; requests are resolved.
    """
    npages = 4096
    log = MemoryDirtyLog(npages, misses={"vmm"})
    tracker = PageTracker(npages, dirty_log=log)
    version = np.zeros(npages, np.int64)
    sent = np.full(npages, -1, np.int64)
    free = np.zeros(npages, bool)
    sent_lock = threading.Lock()
    stop = threading.Event()
    tracker.sync()
    session = tracker.hint_session(marked={"vmm"})
    vmm_first = npages - 256

    def send(runs):
        pages = spread(runs)
        content = version[pages].copy()
        with sent_lock:
            sent[pages] = np.maximum(sent[pages], content)

    def guest(low, high, seed):
        rng = np.random.default_rng(seed)
        late = []
        while not stop.is_set():
            first = int(rng.integers(low, high - 32))
            count = int(rng.integers(1, 32))
            pages = slice(first, first + count)
            if rng.random() < 0.5:
                free[pages] = False
                version[pages] += 1
                # After the write: a bit set before it could be collected, and the page sent, too early.
                log.bitmap.set_range(first, count)
            else:
                epoch = tracker.epoch
                free[pages] = True
                late.append((epoch, (first, count)))
            if len(late) > 3:
                epoch, run = late.pop(int(rng.integers(0, len(late))))
                session.clear_runs([run], epoch)

    def guest_low():
        guest(0, vmm_first // 2, SEED + 1)

    def guest_high():
        guest(vmm_first // 2, vmm_first, SEED + 2)

    def vmm():
        rng = np.random.default_rng(SEED + 3)
        while not stop.is_set():
            first = int(rng.integers(vmm_first, npages - 8))
            epoch = tracker.epoch
            free[first : first + 8] = True
            session.clear_runs([(first, 8)], epoch)
            free[first : first + 8] = False
            version[first : first + 8] += 1
            tracker.mark([(first, 8)])
            # The late hint of the same epoch that must not wipe the mark (S12).
            session.clear_runs([(first, 8)], epoch)

    def control():
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            session.start()
            send(tracker.take(16))
            session.stop()
            tracker.sync()
        stop.set()

    def sender():
        rng = np.random.default_rng(SEED + 4)
        while not stop.is_set():
            runs = tracker.take(64)
            if rng.random() < 0.1:
                tracker.put_back(runs)
            else:
                send(runs)

    def answerer():
        rng = np.random.default_rng(SEED + 5)
        while not stop.is_set():
            answers = tracker.resolve(int(rng.integers(0, npages - 16)), 16)
            send([(a.first, a.count) for a in answers if a.kind is not AnswerKind.SENT])

    run_together(guest_low, guest_high, vmm, control, sender, answerer)
    tracker.sync()
    session.finish()
    owed, hinted = np.zeros(npages, bool), np.zeros(npages, bool)
    owed[tracker.dirty.indices()] = True
    hinted[tracker.hinted.indices()] = True
    in_use = ~free
    assert not (in_use & hinted).any(), np.flatnonzero(in_use & hinted)
    lost = in_use & ~owed & (sent != version)
    assert not lost.any(), np.flatnonzero(lost)
    assert session.epoch > 1
    assert version.sum() > 0


def test_hints_and_syncs_of_many_threads_do_not_deadlock():
    """The lock is never waited for with the GIL held, however long the list of hints is."""
    npages = 1 << 18
    log = MemoryDirtyLog(npages)
    tracker = PageTracker(npages, dirty_log=log)
    tracker.sync()
    session = tracker.hint_session()
    runs = np.stack([np.arange(0, npages, 2), np.ones(npages // 2, np.int64)], axis=1)
    taken = []

    def hint():
        for _ in range(10):
            taken.append(session.clear_runs(runs, tracker.epoch))

    def sync():
        for _ in range(20):
            log.bitmap.fill()
            tracker.sync()
            session.start()

    def resolve():
        for page in range(0, npages, npages // 50):
            assert len(tracker.resolve(page)) == 1

    run_together(hint, sync, resolve)
    session.finish()
    assert len(taken) == 10
    assert tracker.dirty_count + tracker.hinted_count <= npages
