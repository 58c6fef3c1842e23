"""PageTracker from many threads: hints, syncs, takes and resolves side by side, and what must hold."""

import threading
import time

import numpy as np
import pytest

from concurrency import SECONDS, SEED, run_together
from pagecore import AnswerKind, Bitmap, DirtyLog, MemoryDirtyLog, PageTracker, TrackedRegion, settled_checksum
from tracker_rig import ManualLog

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


def test_a_sync_does_not_wait_for_a_whole_list_of_hints():
    """S4: a list of a million runs goes in pieces; a sync comes between two, and the rest of the list is stale."""
    npages = 1 << 22
    log = MemoryDirtyLog(npages)
    tracker = PageTracker(npages, dirty_log=log)
    runs = np.stack([np.arange(0, npages, 4), np.full(npages // 4, 3)], axis=1)
    end = time.monotonic() + DEADLINE
    cut = False
    while not cut and time.monotonic() < end:
        tracker.owe_all()
        session = tracker.hint_session()
        epoch = session.start()
        taken = []

        def hint(session=session, epoch=epoch, taken=taken):
            taken.append(session.clear_runs(runs, epoch))

        def sync():
            while tracker.hinted_count == 0 and time.monotonic() < end:
                pass
            tracker.sync()

        run_together(hint, sync)
        session.finish()
        assert taken[0] == tracker.hinted_count == session.hinted_pages
        # Whole runs but one are stale; what was done of that one is done.
        assert taken[0] // 3 <= len(runs) - session.stale <= taken[0] // 3 + 1
        cut = 0 < session.stale < len(runs)
    assert cut, "no sync ever came between two pieces"


@pytest.mark.parametrize("attempt", range(4))
def test_a_strict_peer_gets_no_page_twice(attempt):
    """After the switch: senders, requests, broken links and reloads; each page arrives once, or is filled (W2, S9)."""
    small, large = 6000, 32 * 512
    regions = {1: small, 2: large}
    rng = np.random.default_rng([SEED, attempt])
    tracker = PageTracker(
        regions=[
            TrackedRegion(id=1, npages=small),
            TrackedRegion(id=2, npages=large, host_page_size=2 << 20),
        ]
    )
    with tracker.hint_session() as session:
        epoch = session.start()
        first = rng.integers(0, small - 100, 20)
        session.clear_runs(np.stack([first, rng.integers(1, 100, 20)], axis=1), epoch, region=1)
        session.clear_runs([[1024, 2048]], epoch, region=2)
    tracker.sync(last=True)
    free = {}
    for id, npages in regions.items():
        tracker.discard_pages(id)
        free[id] = np.zeros(npages, bool)
        free[id][tracker.hinted_pages(id).indices()] = True
    arrived = {id: np.zeros(npages, np.int64) for id, npages in regions.items()}
    lock = threading.Lock()
    link = {"up": True}
    ended = threading.Event()
    quiet = threading.Barrier(4, timeout=DEADLINE)

    def deliver(id, runs, put_back):
        """A page that was handed to a broken link is lost, or its sender notices and puts it back."""
        with lock:
            if link["up"]:
                arrived[id][spread(runs)] += 1
                return
        if put_back:
            tracker.put_back(runs, region=id)

    def send(seed):
        rng = np.random.default_rng(seed)
        while not ended.is_set():
            while link["up"]:
                for id, runs in tracker.take_batch(max_pages=int(rng.integers(1, 900))):
                    deliver(id, runs, rng.random() < 0.5)
            quiet.wait()
            quiet.wait()

    def send_one():
        send([SEED, attempt, 1])

    def send_other():
        send([SEED, attempt, 2])

    def answer():
        rng = np.random.default_rng([SEED, attempt, 3])
        while not ended.is_set():
            while link["up"]:
                id = int(rng.integers(1, 3))
                for got in tracker.resolve(int(rng.integers(0, regions[id] - 8)), 8, region=id):
                    if got.kind is not AnswerKind.SENT:
                        deliver(id, np.array([[got.first, got.count]]), rng.random() < 0.5)
            quiet.wait()
            quiet.wait()

    def control():
        generation = 0
        while not ended.is_set():
            time.sleep(0.002)
            done = tracker.dirty_count == 0 and generation >= 5
            with lock:
                link["up"] = False
            quiet.wait()
            generation += 1
            tracker.begin_generation(generation)
            settled = {id: Bitmap(npages) for id, npages in regions.items()}
            for id, bitmap in settled.items():
                bitmap.set_indices(np.flatnonzero(arrived[id]))
            sums = {id: settled_checksum(b, region=id, generation=generation) for id, b in settled.items()}
            owed = tracker.reload(settled, generation=generation, checksum=sums)
            missing = sum(int((arrived[id] == 0).sum()) for id in regions)
            assert tracker.hinted_count + owed == missing
            if done and owed == 0:
                ended.set()
            link["up"] = not ended.is_set()
            quiet.wait()

    run_together(send_one, send_other, answer, control)
    for id, npages in regions.items():
        assert arrived[id].max() == 1, f"seed {SEED}"
        left = np.zeros(npages, bool)
        left[tracker.hinted_of(id).indices()] = True
        # What never arrived was free, and is still.
        assert np.array_equal(arrived[id] == 0, left), f"seed {SEED}"
        assert not (left & ~free[id]).any()
    assert tracker.counts()[:3] == (0, int(sum((a == 0).sum() for a in arrived.values())), 0)


def test_counts_are_exact_once_all_is_quiet():
    """Each call adds to the counts once; whoever raced whom, they end as what the planes hold."""
    npages = 1 << 14
    log = MemoryDirtyLog(npages)
    tracker = PageTracker(npages, dirty_log=log)
    tracker.sync()
    session = tracker.hint_session()
    stop = time.monotonic() + SECONDS / 2

    def worker(seed, step):
        rng = np.random.default_rng([SEED, seed])

        def body():
            while time.monotonic() < stop:
                first = rng.integers(0, npages - 64, 20)
                step(np.stack([first, rng.integers(1, 64, 20)], axis=1))

        body.__name__ = f"worker {seed}"
        return body

    def take_and_put_back(runs):
        tracker.put_back(tracker.take(int(runs[0, 1]) * 8))

    def sync(runs):
        log.bitmap.set_runs(runs)
        tracker.sync()
        session.start()

    run_together(
        worker(1, take_and_put_back),
        worker(2, take_and_put_back),
        worker(3, lambda runs: session.clear_runs(runs, tracker.epoch)),
        worker(4, sync),
        worker(5, lambda runs: (tracker.mark(runs[:2]), tracker.resolve(int(runs[0, 0]), 8))),
    )
    session.finish()
    counts = tracker.counts()
    dirty, hinted = tracker.dirty, tracker.hinted
    assert (counts.dirty, counts.hinted) == (dirty.count(), hinted.count())
    assert not (dirty & hinted).any()
    tracker.sync()
    assert tracker.counts().marked == 0
    assert tracker.dirty_count == tracker.dirty.count()


def test_a_lazy_log_is_never_cleared_for_nothing_or_twice():
    """S11 under threads: the log itself checks each clear. What was written after it was sent is owed."""
    npages = 2048
    log = ManualLog(npages)
    log_lock = threading.Lock()
    tracker = PageTracker(npages, dirty_log=LockedLog(log, log_lock), rearm="lazy", chunk_shift=6)
    version = np.zeros(npages, np.int64)
    sent = np.full(npages, -1, np.int64)
    sent_lock = threading.Lock()
    stop = threading.Event()
    tracker.sync()

    def guest():
        rng = np.random.default_rng([SEED, 1])
        while not stop.is_set():
            page = int(rng.integers(0, npages))
            with log_lock:
                version[page] += 1
                log.write(page)

    def sender(seed):
        rng = np.random.default_rng([SEED, seed])
        while not stop.is_set():
            runs = tracker.take(int(rng.integers(1, 200)))
            pages = spread(runs)
            content = version[pages].copy()
            if rng.random() < 0.1:
                tracker.put_back(runs)
                continue
            with sent_lock:
                sent[pages] = np.maximum(sent[pages], content)

    def send_one():
        sender(2)

    def send_other():
        sender(3)

    def control():
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            tracker.sync()
        stop.set()

    run_together(guest, send_one, send_other, control)
    tracker.sync(last=True)
    owed = np.zeros(npages, bool)
    owed[tracker.dirty.indices()] = True
    lost = ~owed & (sent != version)
    assert not lost.any(), (SEED, np.flatnonzero(lost))
    assert log.cleared


class LockedLog(DirtyLog):
    """The strict model of a log, for several threads."""

    def __init__(self, log, lock):
        super().__init__(log.size, rearms_at_collect=False)
        self.log, self.lock = log, lock

    def collect_into(self, bitmap):
        with self.lock:
            return self.log.collect_into(bitmap)

    def rearm_seen(self, first, count, seen):
        with self.lock:
            self.log.rearm_seen(first, count, seen)
