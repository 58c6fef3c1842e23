"""PageTracker and HintSession against plain Python sets, with a guest whose every write has a version.

The guest owns the truth: for each page the version of its content, or that it is free. The model repeats the planes;
the invariants say what design section 3 is for: after a sync no page that the guest uses is taken for sent
with an older content, or for free.
"""

import itertools
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagecore import AnswerKind, Bitmap, BusyError, MemoryDirtyLog, PageTracker

SOAK = int(os.environ.get("PAGECORE_SOAK", "0"))
NPAGES = 130  # two words and a tail
PAGE = st.one_of(st.integers(0, NPAGES - 1), st.sampled_from([0, 63, 64, 127, 128, 129]))
RUN = st.builds(lambda first, count: (first, min(count, NPAGES - first)), PAGE, st.integers(1, 70))


def runs_of(pages):
    return [(page, 1) for page in sorted(pages)]


def pages_of(runs):
    return {page for first, count in runs for page in range(first, first + count)}


class TrackerMachine(RuleBasedStateMachine):
    @initialize(all_dirty=st.booleans())
    def start(self, all_dirty):
        self.log = MemoryDirtyLog(NPAGES)
        self.tracker = PageTracker(NPAGES, dirty_log=self.log, all_dirty=all_dirty)
        self.session = self.tracker.hint_session()
        self.dirty = set(range(NPAGES)) if all_dirty else set()
        self.hinted = set()
        self.side = set()
        self.logged = set()
        self.epoch = None
        self.passed = [0, 99]  # ids that are not open
        self.synced = False
        self.stale = 0
        self.version = [0] * NPAGES
        self.sent = [None if all_dirty else 0] * NPAGES
        self.free = set()  # the guest's view
        self.queued = []  # hints the guest gave that nobody has processed
        self.in_flight = set()  # taken, neither sent nor put back

    def teardown(self):
        if hasattr(self, "session"):
            self.session.finish()

    # ---- the guest and the VMM ----

    @rule(page=PAGE)
    def write(self, page):
        """The guest allocates the page if it was free, and writes it."""
        self.free.discard(page)
        self.version[page] += 1
        self.log.bitmap[page] = True
        self.logged.add(page)

    @rule(run=RUN)
    def write_by_the_vmm(self, run):
        pages = pages_of([run])
        self.free -= pages
        for page in pages:
            self.version[page] += 1
        self.tracker.mark([run])
        self.side |= pages

    @rule(run=RUN)
    def free_and_report(self, run):
        self.free |= pages_of([run])
        if self.epoch is not None:
            self.queued.append((self.epoch, run))

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def process_a_hint(self, data):
        """Hints come late: the guest may have reused the pages, and the epoch may have passed."""
        epoch, run = self.queued.pop(data.draw(st.integers(0, len(self.queued) - 1)))
        taken = self.session.clear_runs([run], epoch)
        if epoch == self.epoch:
            pages = pages_of([run]) & self.dirty
            assert taken == len(pages)
            self.dirty -= pages
            self.hinted |= pages
        else:
            assert taken == 0
            self.stale += 1

    @rule(run=RUN, data=st.data())
    def hint_of_a_wrong_epoch(self, run, data):
        assert self.session.clear_runs([run], data.draw(st.sampled_from(self.passed))) == 0
        self.stale += 1

    # ---- the controller ----

    @rule()
    def sync(self):
        found = self.logged | self.side
        assert self.tracker.sync() == len(found - self.dirty)
        self.dirty |= found
        self.hinted -= found
        self.logged.clear()
        self.side.clear()
        self.close_epoch()
        self.synced = True
        self.check_content()

    def close_epoch(self):
        if self.epoch is not None:
            self.passed.append(self.epoch)
            self.epoch = None

    @rule()
    def start_epoch(self):
        if self.epoch is not None or not self.synced:
            try:
                self.session.start()
            except BusyError:
                return
            raise AssertionError("an epoch was opened beside another or before a sync")
        self.epoch = self.session.start()
        assert self.epoch not in self.passed

    @rule()
    def stop_epoch(self):
        self.session.stop()
        self.close_epoch()

    # ---- senders ----

    @rule(max_pages=st.integers(1, 200), max_runs=st.one_of(st.none(), st.integers(1, 5)))
    def take(self, max_pages, max_runs):
        runs = self.tracker.take(max_pages, max_runs).tolist()
        pages = pages_of(runs)
        assert sum(count for _, count in runs) == len(pages) <= max_pages
        assert max_runs is None or len(runs) <= max_runs
        assert pages <= self.dirty
        if max_runs is None:
            assert len(pages) == min(max_pages, len(self.dirty))
        else:
            assert bool(runs) == bool(self.dirty)
        self.dirty -= pages
        self.in_flight |= pages

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def send(self, data):
        page = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.in_flight.discard(page)
        self.sent[page] = self.version[page]

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def put_back(self, data):
        pages = data.draw(st.sets(st.sampled_from(sorted(self.in_flight)), min_size=1))
        self.tracker.put_back(runs_of(pages))
        self.in_flight -= pages
        self.dirty |= pages
        # Owed pages are not free, whatever was said of them while they were under way.
        self.hinted -= pages

    @rule(run=RUN, again=st.booleans())
    def resolve(self, run, again):
        first, count = run
        answers = self.tracker.resolve(first, count + 50, again)
        assert [a.first for a in answers] == [first] + [a.first + a.count for a in answers[:-1]]
        assert sum(a.count for a in answers) == count + 50
        assert all(a.kind is not b.kind for a, b in itertools.pairwise(answers))
        for answer in answers:
            for page in range(answer.first, answer.first + answer.count):
                assert answer.kind is self.expected(page, again)
                if answer.kind in (AnswerKind.OWED, AnswerKind.FREE):
                    self.dirty.discard(page)
                    self.hinted.discard(page)
                    self.in_flight.add(page)

    def expected(self, page, again):
        if page >= NPAGES:
            return AnswerKind.GONE
        if again or page in self.dirty:
            return AnswerKind.OWED
        return AnswerKind.FREE if page in self.hinted else AnswerKind.SENT

    # ---- the switch and recovery ----

    @rule()
    def lists(self):
        if self.side:
            try:
                self.tracker.discard_runs()
            except BusyError:
                return
            raise AssertionError("a list was made before the last sync")
        assert pages_of(self.tracker.discard_runs().tolist()) == self.dirty | self.hinted
        self.hinted -= self.dirty
        assert pages_of(self.tracker.hinted_runs().tolist()) == self.hinted

    @rule()
    def owe_hinted(self):
        assert self.tracker.owe_hinted() == len(self.hinted - self.dirty)
        self.dirty |= self.hinted
        self.hinted.clear()

    @rule()
    def owe_all(self):
        assert self.tracker.owe_all() == NPAGES
        self.dirty = set(range(NPAGES))
        for plane in (self.hinted, self.logged, self.side, self.in_flight):
            plane.clear()
        self.sent = [None] * NPAGES
        self.close_epoch()
        self.synced = True

    @precondition(lambda self: not self.logged and not self.side)
    @rule(data=st.data())
    def reload(self, data):
        """The link broke after the switch: of what was sent a part was settled, and that is the newest."""
        sent = [p for p in range(NPAGES) if p not in self.dirty | self.hinted | self.in_flight]
        settled = data.draw(st.sets(st.sampled_from(sent))) if sent else set()
        bitmap = Bitmap(NPAGES)
        bitmap.set_runs(runs_of(settled))
        free = self.hinted - self.dirty - settled
        self.hinted = free
        self.dirty = set(range(NPAGES)) - settled - free
        self.in_flight.clear()
        self.close_epoch()
        assert self.tracker.reload(bitmap) == len(self.dirty)

    # ---- what must hold ----

    def check_content(self):
        """After a sync: each page in use is owed, in flight, or sent with the newest content."""
        for page in set(range(NPAGES)) - self.free:
            if page in self.dirty or page in self.in_flight:
                continue
            assert page not in self.hinted, f"page {page} is in use and taken for free"
            assert self.sent[page] == self.version[page], f"page {page} is taken for sent"

    @invariant()
    def planes_agree(self):
        assert set(self.tracker.dirty.indices().tolist()) == self.dirty
        assert set(self.tracker.hinted.indices().tolist()) == self.hinted - self.dirty
        assert self.tracker.dirty_count == len(self.dirty)
        assert self.tracker.hinted_count == len(self.hinted - self.dirty)
        assert self.session.stale == self.stale
        assert self.tracker.epoch == (self.epoch or 0)


TestTrackerMachine = TrackerMachine.TestCase
TestTrackerMachine.settings = settings(
    max_examples=SOAK or 250,
    stateful_step_count=60,
    deadline=None,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
