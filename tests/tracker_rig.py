"""What the tests of the tracker share: a log of two steps, and a tracker that has been synced once."""

import numpy as np

from pagecore import DirtyLog, MemoryDirtyLog, PageTracker


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


class ManualLog(DirtyLog):
    """A log as KVM's bitmap is one with manual protect, and as strict as it can be.

    A written page stays reported until it is cleared; while it is, its further writes log nothing. A clear comes
    for multiples of 64 pages, and only for bits that a collect has handed over, each once.
    """

    def __init__(self, size, *, misses=()):
        super().__init__(size, rearms_at_collect=False, misses=misses)
        self.bits = set()
        self.sighted = set()
        self.cleared = []
        self.at_clear = lambda first, count: None

    def write(self, page):
        self.bits.add(page)

    def collect_into(self, bitmap):
        self.sighted |= self.bits
        return bitmap.set_indices(np.array(sorted(self.bits), dtype=np.int64))

    def rearm(self, first, count):
        """Used by a sync that re-arms all that it saw."""
        for page in [page for page in self.sighted if first <= page < first + count]:
            self.sighted.discard(page)
            self.bits.discard(page)

    def rearm_seen(self, first, count, seen):
        self.at_clear(first, count)
        assert first % 64 == 0
        assert count % 64 == 0 or first + count == self.size
        wanted = {page for page in seen.indices().tolist() if first <= page < first + count}
        assert wanted, "an ioctl for nothing"
        assert wanted <= self.sighted, f"never seen: {wanted - self.sighted}"
        self.sighted -= wanted
        self.bits -= wanted
        self.cleared.append((first, count, sorted(wanted)))
