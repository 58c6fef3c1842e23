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
