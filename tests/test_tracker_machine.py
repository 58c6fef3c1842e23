"""Source and destination together, over several regions, from precopy to the end: the real planes against plain sets.

The tracker, its hint session, the lists on the wire and the destination's PageState are the real ones; the guest, the
link and what both sides should know are Python sets. The guest owns the truth: the version of each page, and which
pages are free. The invariants are what design sections 3 to 5 are for: no page in use is ever taken for sent with an
older content, or for free; a strict peer gets no page twice; every request is answered; in the end all is there.
"""

import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagecore import AnswerKind, MemoryDirtyLog, PageState, PageTracker, TrackedRegion, settled_checksum
from pagecore.wire import decode_page_set, encode_page_set
from tracker_rig import ManualLog

SOAK = int(os.environ.get("PAGECORE_SOAK", "0"))

# Region id: pages. The second has placing units of 8 pages, the third pages of 8 KiB over a log of 4 KiB.
SIZES = {0: 130, 5: 64, 9: 70}
UNIT = {0: 1, 5: 8, 9: 1}
REGION = st.sampled_from(sorted(SIZES))
WHERE = st.tuples(REGION, st.integers(0, 1 << 10), st.integers(1, 70))


def place(where):
    """A region and a run in it."""
    id, first, count = where
    first %= SIZES[id]
    return id, first, min(count, SIZES[id] - first)


def spread(id, runs):
    return {(id, page) for first, count in np.asarray(runs).tolist() for page in range(first, first + count)}


def of(id, pages):
    return {page for region, page in pages if region == id}


def runs_of(id, pages):
    return [(page, 1) for page in sorted(of(id, pages))]


def inward(id, first, count):
    unit = UNIT[id]
    low, high = -(-first // unit) * unit, (first + count) // unit * unit
    return {(id, page) for page in range(low, high)}


def unit_of(page):
    """The pages that are placed together with this one (S10)."""
    id, number = page
    low = number // UNIT[id] * UNIT[id]
    return [(id, low + i) for i in range(UNIT[id])]


EVERY = {(id, page) for id, npages in SIZES.items() for page in range(npages)}


class Migration(RuleBasedStateMachine):
    @initialize(held=st.booleans(), prelude=st.sampled_from(["nothing", "round", "switch"]), data=st.data())
    def start(self, held, prelude, data):
        self.held = held
        self.logs = {
            0: MemoryDirtyLog(SIZES[0]),
            5: MemoryDirtyLog(SIZES[5]),
            9: ManualLog(2 * SIZES[9]) if held else MemoryDirtyLog(2 * SIZES[9]),
        }
        options = {0: {}, 5: {"host_page_size": 32768}, 9: {"page_size": 8192}}
        if held:
            options[9].update(rearm="lazy", chunk_shift=6)
        self.tracker = PageTracker(
            regions=[TrackedRegion(id=id, npages=SIZES[id], dirty_log=self.logs[id], **options[id]) for id in SIZES]
        )
        self.session = self.tracker.hint_session("held" if held else "armed")
        self.states = {id: PageState(npages) for id, npages in SIZES.items()}
        self.dirty, self.hinted, self.side = set(EVERY), set(), set()
        self.in_flight = set()  # taken, and neither sent nor put back
        self.version = dict.fromkeys(EVERY, 0)
        self.sent = {}  # the version that went out last
        self.stored = {}  # what the destination holds
        self.free, self.reported, self.queued = set(), set(), []
        self.epoch, self.synced, self.stale = None, False, 0
        self.switched = False
        self.frames = []  # on the link: (the pages of a placing unit, their versions or Nones for the fill, again)
        self.lost = set()  # handed to a link that broke, for the counts of a strict peer
        self.generation = 0
        if prelude != "nothing":
            # Left to chance, hardly an example would come so far.
            self.round()
            for where in data.draw(st.lists(WHERE, min_size=1, max_size=4)):
                self.hint(where)
            self.take(data.draw(st.integers(1, 300)), None, False, 0)
            self.do_send(set(self.in_flight))
            for where in data.draw(st.lists(WHERE, max_size=3)):
                self.write(where)
            self.round()
            for where in data.draw(st.lists(WHERE, max_size=2)):
                self.hint(where)
        if prelude == "switch":
            self.switch(True)

    def teardown(self):
        if hasattr(self, "session"):
            self.session.finish()

    precopy = precondition(lambda self: not self.switched)
    postcopy = precondition(lambda self: self.switched)

    # ---- the guest, and whoever else writes its memory

    def writable(self, where):
        id, first, count = place(where)
        pages = {(id, page) for page in range(first, first + count)}
        # The other promise: reported pages stay with nobody until DONE.
        return id, pages - self.reported if self.held else pages

    @precopy
    @rule(where=WHERE)
    def write(self, where):
        id, pages = self.writable(where)
        for page in pages:
            self.version[page] += 1
        self.free -= pages
        numbers = sorted(of(id, pages))
        if isinstance(self.logs[id], ManualLog):
            for page in numbers:
                self.logs[id].write(2 * page + (page & 1))
        else:
            ratio = self.logs[id].size // SIZES[id]
            self.logs[id].bitmap.set_indices(np.array(numbers, np.int64) * ratio + (ratio - 1))

    @precopy
    @rule(where=WHERE)
    def write_unlogged(self, where):
        id, pages = self.writable(where)
        for page in pages:
            self.version[page] += 1
        self.free -= pages
        self.tracker.mark(runs_of(id, pages), region=id)
        self.side |= pages

    @precopy
    @rule(where=WHERE)
    def free_and_report(self, where):
        id, first, count = place(where)
        pages = {(id, page) for page in range(first, first + count)}
        self.free |= pages
        if self.epoch is not None:
            self.reported |= pages
            self.queued.append((self.epoch, id, first, count))

    @precopy
    @rule(where=WHERE)
    def hint(self, where):
        """Freed, reported, and processed at once."""
        self.free_and_report(where)
        if self.epoch is not None:
            self.process(*self.queued.pop(), in_bytes=False)

    @precopy
    @precondition(lambda self: self.queued)
    @rule(data=st.data(), in_bytes=st.booleans())
    def process_a_hint(self, data, in_bytes):
        self.process(*self.queued.pop(data.draw(st.integers(0, len(self.queued) - 1))), in_bytes=in_bytes)

    def process(self, epoch, id, first, count, *, in_bytes):
        # In bytes, or as runs that reach past the end of their region.
        taken = (
            self.session.clear_runs([(first, count + (first + count == SIZES[id]))], epoch, region=id)
            if not in_bytes
            else self.session.clear_bytes(
                [(first * self.tracker.region(id).page_size, count * self.tracker.region(id).page_size)],
                epoch,
                region=id,
            )
        )
        if epoch != self.epoch:
            assert taken == 0
            self.stale += 1
            return
        pages = inward(id, first, count) & self.dirty
        assert taken == len(pages)
        self.dirty -= pages
        self.hinted |= pages

    # ---- the controller

    def logged(self):
        found = set()
        for id, log in self.logs.items():
            ratio = log.size // SIZES[id]
            bits = log.bits if isinstance(log, ManualLog) else log.bitmap.indices().tolist()
            found |= {(id, page // ratio) for page in bits}
        return found

    @precopy
    @rule()
    def sync(self):
        self.do_sync(last=False)

    def do_sync(self, last):
        found = self.logged() | self.side
        assert self.tracker.sync(last=last) == len(found - self.dirty)
        self.dirty |= found
        self.hinted -= found
        self.side = set()
        self.epoch = None
        self.synced = not last
        for page in EVERY - self.free - self.dirty - self.in_flight:
            assert page not in self.hinted, f"{page} is in use and taken for free"
            assert self.sent[page] == self.version[page], f"{page} is taken for sent"

    @precopy
    @rule()
    def round(self):
        self.close_epoch()
        self.do_sync(last=False)
        self.open_epoch()

    @precopy
    @precondition(lambda self: self.synced and self.epoch is None)
    @rule()
    def open_epoch(self):
        self.epoch = self.session.start()

    @precopy
    @rule()
    def close_epoch(self):
        self.session.stop()
        self.epoch = None

    @rule(
        max_pages=st.integers(1, 300), max_runs=st.one_of(st.none(), st.integers(1, 5)), sole=st.booleans(), id=REGION
    )
    def take(self, max_pages, max_runs, sole, id):
        if sole:
            batch = [(id, self.tracker.take(max_pages, max_runs, region=id))]
        else:
            batch = self.tracker.take_batch(max_pages, max_runs)
        pages = set().union(*(spread(id, runs) for id, runs in batch))
        assert sum(int(runs[:, 1].sum()) for _, runs in batch) == len(pages)
        assert len(pages) <= max(max_pages, *UNIT.values())
        assert pages <= self.dirty
        assert bool(pages) == bool(self.dirty & spread(id, [(0, SIZES[id])]) if sole else self.dirty)
        self.dirty -= pages
        self.in_flight |= pages

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def send(self, data):
        self.do_send(data.draw(st.sets(st.sampled_from(sorted(self.in_flight)), min_size=1)))

    def do_send(self, pages):
        if self.switched:
            # What is placed together goes out together.
            units = {tuple(unit_of(page)) for page in pages}
            pages = {page for unit in units for page in unit}
            assert pages <= self.in_flight
            for unit in sorted(units):
                self.frames.append((unit, [self.version[page] for page in unit], False))
        self.in_flight -= pages
        for page in pages:
            self.sent[page] = self.version[page]
            if not self.switched:
                # Rounds are barriers, and no frame of an older one comes after: stored as it is.
                self.states[page[0]].store(page[1], 1)
                self.stored[page] = self.version[page]

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def put_back(self, data):
        self.do_put_back(data.draw(st.sets(st.sampled_from(sorted(self.in_flight)), min_size=1)))

    def do_put_back(self, pages):
        if self.switched:
            pages = {other for page in pages for other in unit_of(page)}
            assert pages <= self.in_flight
        for id in SIZES:
            self.tracker.put_back(runs_of(id, pages), region=id)
        self.in_flight -= pages
        self.dirty |= pages
        self.hinted -= pages

    # ---- the switch

    @precopy
    @precondition(lambda self: self.synced)
    @rule(put_back=st.booleans())
    def switch(self, put_back):
        (self.do_put_back if put_back else self.do_send)(set(self.in_flight))
        if self.session.state.value != "done":
            self.session.finish()
        self.do_sync(last=True)
        self.whole_units()
        for id, npages in SIZES.items():
            lists = []
            for pages in (self.tracker.discard_pages(id), self.tracker.hinted_pages(id)):
                lists.append(decode_page_set(encode_page_set(pages, generation=0, list_id=1), npages).runs)
            assert spread(id, lists[0]) == spread(id, runs_of(id, self.dirty | self.hinted))
            assert spread(id, lists[1]) == spread(id, runs_of(id, self.hinted))
            self.states[id].switch(*lists)
        for page in self.dirty | self.hinted:
            self.stored.pop(page, None)
        self.switched = True
        self.queued = []
        for page in EVERY - self.free - self.dirty:
            assert self.stored[page] == self.version[page]

    def whole_units(self):
        self.hinted -= self.dirty
        for id, unit in UNIT.items():
            for first in range(0, SIZES[id], unit):
                pages = {(id, page) for page in range(first, first + unit)}
                if pages & self.dirty or (pages & self.hinted and not pages <= self.hinted):
                    self.dirty |= pages
                    self.hinted -= pages

    # ---- the destination after it

    def unreleased(self, unit):
        return [page for page in unit if not self.states[page[0]].released[page[1]]]

    def settled(self, page):
        state = self.states[page[0]]
        return state.received[page[1]] or state.released[page[1]]

    @postcopy
    @rule(data=st.data(), where=WHERE)
    def fault(self, data, where):
        """D9: released, received, under way, hinted, else request; every request gets an answer."""
        missing = [page for page in sorted(EVERY) if not self.settled(page)]
        id, number = data.draw(st.sampled_from(missing)) if missing else place(where)[:2]
        state = self.states[id]
        if self.settled((id, number)):
            return
        if state.hinted[number] and not state.claimed[number]:
            for page in self.unreleased(unit_of((id, number))):
                assert page in self.free
                assert not state.claimed.test_and_set(page[1])
                state.received.set(page[1])
                self.stored[page] = None
            return
        if not state.requested.test_and_set(number):
            self.request(id, number, again=False)

    def request(self, id, number, again):
        answers = self.tracker.resolve(number, again=again, region=id)
        low, high = number // UNIT[id] * UNIT[id], number // UNIT[id] * UNIT[id] + UNIT[id]
        assert (answers[0].first, answers[-1].first + answers[-1].count) == (low, high)
        # Owed, free or sent as a whole: one answer.
        (answer,) = answers
        unit = unit_of((id, number))
        page = unit[0]
        expected = (
            AnswerKind.OWED
            if again or page in self.dirty
            else AnswerKind.FREE
            if page in self.hinted
            else AnswerKind.SENT
        )
        assert answer.kind is expected
        if expected is AnswerKind.SENT:
            # It is on its way, or its sender still has it: silence would be a stall.
            assert (
                page in self.in_flight
                or any(frame[0][0] == page for frame in self.frames)
                or all(self.settled(page) for page in unit)
            )
            return
        self.dirty -= set(unit)
        self.hinted -= set(unit)
        if expected is AnswerKind.FREE:
            assert set(unit) <= self.free
            self.frames.append((tuple(unit), [None] * len(unit), again))
        else:
            self.frames.append((tuple(unit), [self.version[page] for page in unit], again))
            self.sent.update({page: self.version[page] for page in unit})

    @postcopy
    @precondition(lambda self: self.frames)
    @rule(data=st.data(), fails=st.booleans(), more=st.integers(0, 40))
    def arrive(self, data, fails, more):
        """Frames arrive, in any order between the streams; a placement may fail (S7: again)."""
        for _ in range(min(more, len(self.frames) - 1)):
            self.arrive_one(data.draw(st.integers(0, len(self.frames) - 1)), False)
        self.arrive_one(data.draw(st.integers(0, len(self.frames) - 1)), fails)

    def arrive_one(self, index, fails):
        unit, versions, again = self.frames.pop(index)
        state = self.states[unit[0][0]]
        rest = self.unreleased(unit)
        if not rest:
            return
        claimed = [state.claimed.test_and_set(number) for _, number in rest]
        assert len(set(claimed)) == 1
        if claimed[0]:
            # Filled here because it was hinted, or one that was asked for again: nothing else comes twice (W2).
            assert again or all(self.stored.get(page, 0) is None for page in rest), f"{unit} came twice"
            return
        if fails:
            for _, number in rest:
                state.claimed.clear(number)
            if not any(frame[0] == unit for frame in self.frames):
                self.request(*rest[0], again=True)
            return
        for page, version in zip(unit, versions, strict=True):
            if page in rest:
                assert page in self.free or version == self.version[page]
                state.received.set(page[1])
                state.requested.clear(page[1])
                self.stored[page] = version

    @postcopy
    @rule(where=WHERE)
    def discard_there(self, where):
        """D3: released for ever; what comes later is dropped."""
        id, first, count = place(where)
        self.states[id].released.set_range(first, count)
        self.states[id].requested.clear_range(first, count)

    # ---- recovery

    @postcopy
    @rule(give_back=st.booleans())
    def lose_the_link(self, give_back):
        """S9: nothing is under way, the settled bitmap is exact, reload, and requests are made again."""
        if give_back:
            self.do_put_back(set(self.in_flight))
        self.in_flight = set()
        self.frames = []
        self.generation += 1
        self.tracker.begin_generation(self.generation)
        reports = {id: self.states[id].settled() for id in SIZES}
        sums = {id: settled_checksum(bitmap, region=id, generation=self.generation) for id, bitmap in reports.items()}
        settled = {(id, page) for id, bitmap in reports.items() for page in bitmap.indices().tolist()}
        self.hinted = self.hinted - self.dirty - settled
        self.dirty = EVERY - settled - self.hinted
        units = {id: unit for id, unit in UNIT.items() if unit > 1}
        if units:
            self.whole_units()
        for id in SIZES:
            # What goes out again as part of its unit is placed again in whole: the destination drops what it has.
            again = of(id, self.dirty & settled)
            for page in again:
                self.states[id].claimed.clear(page)
                self.states[id].received.clear(page)
        assert self.tracker.reload(reports, generation=self.generation, checksum=sums) == len(self.dirty)
        for id in SIZES:
            for number in self.states[id].requested.indices().tolist():
                self.request(id, number, again=False)

    @postcopy
    @rule()
    def finish(self):
        """D16: nothing dirty, all arrived: each page is there, released, or still free on both sides."""
        self.do_send(set(self.in_flight))
        while True:
            batch = self.tracker.take_batch()
            if not batch:
                break
            pages = set().union(*(spread(id, runs) for id, runs in batch))
            self.dirty -= pages
            self.in_flight |= pages
            self.do_send(pages)
        assert not self.dirty
        while self.frames:
            self.arrive_one(0, False)
        for page in EVERY:
            state = self.states[page[0]]
            if state.released[page[1]]:
                continue
            if not state.received[page[1]]:
                assert page in self.hinted
                assert page in self.free
            elif page not in self.free:
                # None would be a fill, and free pages alone get one.
                assert self.stored[page] == self.version[page]

    # ---- what must hold at all times

    @invariant()
    def planes_agree(self):
        # Counts first: whether they are right must not depend on somebody's looking.
        assert self.tracker.dirty_count == len(self.dirty)
        assert self.tracker.hinted_count == len(self.hinted - self.dirty)
        assert self.tracker.counts().marked == len(self.side)
        for id in SIZES:
            assert set(self.tracker.dirty_of(id).indices().tolist()) == of(id, self.dirty)
            assert set(self.tracker.hinted_of(id).indices().tolist()) == of(id, self.hinted - self.dirty)
        assert self.session.stale == self.stale
        assert self.tracker.epoch == (self.epoch or 0)


TestMigration = Migration.TestCase
TestMigration.settings = settings(
    max_examples=SOAK or 150,
    stateful_step_count=100 if SOAK else 50,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
