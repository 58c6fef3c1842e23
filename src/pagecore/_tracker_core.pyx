"""TrackerCore: the regions of a tracker under one lock, its hint epoch, and the sync."""

cimport cython
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport SIZE_MAX, uint64_t
from libc.stdlib cimport free, malloc

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._runs cimport Pinned, check_done, pinned_runs
from pagecore._source_planes cimport SourcePlanes
from pagecore._sync cimport (
    pagecore_fair_acquire,
    pagecore_fair_lock,
    pagecore_fair_lock_destroy,
    pagecore_fair_lock_init,
    pagecore_fair_release,
)

import collections

from pagecore.errors import BusyError
from pagecore.tracked_region import TrackedRegion


PageCounts = collections.namedtuple("PageCounts", ["dirty", "hinted", "marked", "dirty_bytes", "remaining_bytes"])
PageCounts.__doc__ = """Pages owed, free, and marked since the last sync; bytes owed, and bytes neither sent nor settled."""


cdef class TrackerCore:
    def __cinit__(self, npages=None, *, regions=None, **options):
        self._lock = malloc(sizeof(pagecore_fair_lock))
        if self._lock == NULL or pagecore_fair_lock_init(<pagecore_fair_lock *>self._lock) != 0:
            free(self._lock)
            self._lock = NULL
            raise MemoryError("there is no lock to be had")
        if regions is None:
            if npages is None:
                raise TypeError("a tracker needs npages, or regions")
            specs = [TrackedRegion(npages=npages, **options)]
        elif npages is not None or options:
            given = ", ".join(["npages"] * (npages is not None) + sorted(options))
            raise TypeError(f"regions say all by themselves: {given} cannot stand beside them")
        else:
            specs = list(regions)
        for spec in specs:
            check_spec(spec)
        ids = [spec.id for spec in specs]
        for id in ids:
            if ids.count(id) > 1:
                raise ValueError(f"region {id} is there twice")
        self._table = tuple([SourcePlanes(spec) for spec in specs])
        # Without a log every writer marks, and marks never need arming.
        self._armed = all([spec.dirty_log is None for spec in specs])

    def __dealloc__(self):
        if self._lock != NULL:
            pagecore_fair_lock_destroy(<pagecore_fair_lock *>self._lock)
            free(self._lock)

    # ---- regions

    @property
    def regions(self):
        """The regions as they were described, a tuple of TrackedRegion."""
        return tuple([(<SourcePlanes>planes).spec for planes in self._regions()])

    def region(self, region=None):
        """The description of one region; without an id, of the only one.

        Raises
        ------
        IndexError
            If there is none with this id.
        ValueError
            If no id is given, and there are several regions.
        """
        return self._planes_of(region).spec

    @property
    def size(self):
        """Pages, over all regions."""
        return sum([(<SourcePlanes>planes).size for planes in self._regions()])

    def __len__(self):
        return self.size

    @property
    def page_size(self):
        """Bytes in a page of the only region; ValueError where there are several."""
        return self._planes_of(None).page_size

    @property
    def dirty_log(self):
        """The dirty log of the only region, or None; ValueError where there are several."""
        return self._planes_of(None).dirty_log

    def add_region(self, spec):
        """Track one more region, between two rounds.

        Parameters
        ----------
        spec : TrackedRegion

        Raises
        ------
        BusyError
            If a hint epoch is open: its guest was told of it before this region was armed.
        ValueError
            If there is a region with this id.
        UnsupportedError
            If the hint session in charge cannot take hints beside the log of this region.

        Notes
        -----
        Releases the GIL while it waits. Thread-safe. Needs no kernel interface.
        """
        check_spec(spec)
        session = self._session() if self._session is not None else None
        if session is not None and session._owes_done:
            session._check_region(spec)
        planes = SourcePlanes(spec)
        self._enter()
        try:
            self._check_between_rounds("added")
            if spec.id in [old.id for old in self.regions]:
                raise ValueError(f"region {spec.id} is tracked already")
            if spec.dirty_log is not None:
                self._armed = False
            with cython.critical_section(self):
                self._table += (planes,)
        finally:
            self._leave()

    def remove_region(self, region):
        """Track a region no more, between two rounds: requests for its pages are GONE from here on.

        Its memory may go once every sender has sent or dropped what it took there.

        Parameters
        ----------
        region : int
            Its id.

        Raises
        ------
        BusyError
            If a hint epoch is open.
        IndexError
            If there is no such region.

        Notes
        -----
        Releases the GIL while it waits. Thread-safe. Needs no kernel interface.
        """
        self._enter()
        try:
            self._check_between_rounds("removed")
            gone = self._planes_of(region)
            with cython.critical_section(self):
                self._table = tuple([planes for planes in self._table if planes is not gone])
        finally:
            self._leave()

    def _check_between_rounds(self, what):
        if self._epoch:
            raise BusyError(f"hint epoch {self._epoch} is open: a region is {what} between stop() and start()")

    cdef tuple _regions(self):
        # Without the GIL of other builds two words are not read at once: a reference needs the section.
        with cython.critical_section(self):
            return self._table

    cdef SourcePlanes _planes_of(self, object region):
        cdef tuple table = self._regions()
        cdef SourcePlanes planes
        if region is None:
            if len(table) == 1:
                return table[0]
            raise ValueError(f"this tracker has {len(table)} regions: name one with region=")
        for planes in table:
            if planes.spec.id == region:
                return planes
        ids = ", ".join([str((<SourcePlanes>planes).spec.id) for planes in table])
        raise IndexError(f"region {region} is not tracked; there are: {ids or 'none'}")

    # ---- counts and snapshots

    @property
    def epoch(self):
        """The open hint epoch; 0 where none is open."""
        return pagecore_load_relaxed(&self._epoch)

    @property
    def dirty(self):
        """The pages owed in the only region: a new Bitmap, a snapshot."""
        return self._planes_of(None).dirty

    @property
    def hinted(self):
        """The pages that are free in the only region: a new Bitmap, a snapshot."""
        return self._planes_of(None).hinted

    def dirty_of(self, region):
        """The pages owed in this region: a new Bitmap, a snapshot."""
        return self._planes_of(region).dirty

    def hinted_of(self, region):
        """The pages that are free in this region: a new Bitmap, a snapshot."""
        return self._planes_of(region).hinted

    @property
    def dirty_count(self):
        """Pages owed, over all regions; O(1), exact while no call is under way."""
        cdef size_t count = 0
        cdef SourcePlanes planes
        for planes in self._regions():
            count += planes.c_dirty_count()
        return count

    @property
    def hinted_count(self):
        """Pages that are free, over all regions; O(1), exact while no call is under way."""
        cdef size_t count = 0
        cdef SourcePlanes planes
        for planes in self._regions():
            self._settle(planes)
            count += planes.c_hinted_count()
        return count

    @property
    def remaining_count(self):
        """Pages that are not sent: owed or free. What a discard list would name; O(1) like the others."""
        return self.dirty_count + self.hinted_count

    def counts(self, region=None):
        """All counts at once.

        Parameters
        ----------
        region : int, optional
            Of this region; by default of all together.

        Returns
        -------
        PageCounts
            `dirty`, `hinted` and `marked` pages; `dirty_bytes`, and `remaining_bytes` of owed and free pages.

        Raises
        ------
        IndexError
            If there is no such region.

        Notes
        -----
        Releases no GIL: it is O(1), but where a page was put back after a hint of it; then it looks once at all pages.
        Thread-safe; exact while no call is under way. Needs no kernel interface.
        """
        cdef size_t dirty = 0, hinted = 0, marked = 0
        cdef uint64_t owed = 0, remaining = 0
        cdef SourcePlanes planes
        for planes in self._regions() if region is None else (self._planes_of(region),):
            self._settle(planes)
            dirty += planes.c_dirty_count()
            hinted += planes.c_hinted_count()
            marked += planes.c_marked_count()
            owed += planes.c_dirty_count() * planes.page_size
            remaining += (planes.c_dirty_count() + planes.c_hinted_count()) * planes.page_size
        return PageCounts(dirty, hinted, marked, owed, remaining)

    cdef int _settle(self, SourcePlanes planes) except -1:
        if not pagecore_load_relaxed(&planes._mixed):
            return 0
        if self._in_log():
            # This thread holds the lock.
            planes.c_settle()
            return 0
        with nogil:
            self.c_acquire()
            planes.c_settle()
            self.c_release()
        return 0

    # ---- the lock, and dirty logs that run under it

    cdef void c_acquire(self) noexcept nogil:
        pagecore_fair_acquire(<pagecore_fair_lock *>self._lock)

    cdef void c_release(self) noexcept nogil:
        pagecore_fair_release(<pagecore_fair_lock *>self._lock)

    cdef bint _in_log(self) noexcept:
        # Relaxed: only this thread could have stored its own number here.
        return pagecore_load_relaxed(&self._log_thread) == <uint64_t>PyThread_get_thread_ident()

    cdef int _check_not_in_log(self) except -1:
        """A dirty log in Python runs under the lock: what it calls back must not wait for that lock."""
        if self._in_log():
            raise BusyError("the tracker is syncing: its dirty log may take(), put_back() and mark()")
        return 0

    cdef int _enter(self) except -1:
        """Acquire the lock; the others wait without the GIL."""
        self._check_not_in_log()
        with nogil:
            self.c_acquire()
        return 0

    cdef int _leave(self) except -1:
        self.c_release()
        return 0

    cdef int _enter_log(self) except -1:
        """Acquire the lock for a stretch in which a dirty log may run Python code."""
        self._enter()
        pagecore_store_relaxed(&self._log_thread, <uint64_t>PyThread_get_thread_ident())
        return 0

    cdef int _leave_log(self) except -1:
        pagecore_store_relaxed(&self._log_thread, 0)
        self.c_release()
        return 0

    cdef uint64_t c_open_epoch(self) noexcept nogil:
        cdef uint64_t epoch = 0
        self.c_acquire()
        # S4: under the lock, so never between a sync's fetch and its publishing; and not after one that failed.
        if self._armed:
            self._last_epoch += 1
            epoch = self._last_epoch
            pagecore_store_relaxed(&self._epoch, epoch)
        self.c_release()
        return epoch

    cdef bint c_close_epoch(self, uint64_t epoch) noexcept nogil:
        cdef bint was_open
        # Ids are never used twice, so one that is not open now stays ended: a look is enough, and a destructor that
        # runs inside a sync does not wait for that sync.
        if epoch == 0 or pagecore_load_relaxed(&self._epoch) != epoch:
            return False
        self.c_acquire()
        was_open = self._epoch == epoch
        if was_open:
            pagecore_store_relaxed(&self._epoch, 0)
        self.c_release()
        return was_open

    cdef int _collect(self, tuple table, bint last) except -1:
        """Fetch into private words and re-arm, under the lock. What was fetched stays there if that fails."""
        cdef SourcePlanes planes
        # S4: a sync ends the epoch, before anything is fetched.
        pagecore_store_relaxed(&self._epoch, 0)
        self._armed = False
        for planes in table:
            if planes.dirty_log is None:
                continue
            planes.dirty_log.collect_into(planes._log_fetched)
            with nogil:
                planes.c_receive(last)
            # S2: before anything is published. A lazy one is re-armed by whoever takes its pages.
            if not (planes.dirty_log.rearms_at_collect or planes.lazy or last):
                planes.dirty_log.rearm(0, planes.dirty_log.size)
        self._armed = not last
        return 0

    cdef int _rearm_pages(self, SourcePlanes planes, size_t low, size_t high) except -1:
        """Re-arm the chunks of pages [low, high) that wait for it; under the lock of _enter_log, before any of their
        pages is cleared (S1). Drains, hints and takes of them wait for the lock (S11)."""
        cdef size_t chunk, first, count, wanted
        while True:
            with nogil:
                chunk = planes.c_pending_chunk(low, high)
                wanted = planes.c_want(chunk, &first, &count) if chunk != SIZE_MAX else 0
            if chunk == SIZE_MAX:
                return 0
            if wanted:
                planes.dirty_log.rearm_seen(first, count, planes._wanted)
            with nogil:
                planes.c_armed(chunk)

    # ---- what writers did

    def sync(self, *, last=False):
        """Move the dirty logs and the marked pages into the dirty planes (S2, S12); ends the hint epoch.

        A log is fetched into private words and re-armed, and only then do its pages become owed: a page that
        senders can see is one whose next write is logged again. A lazy log is re-armed later, but before a
        page of it is handed out. All regions are fetched and re-armed before any is published.

        Parameters
        ----------
        last : bool
            The guest is stopped and this is the last sync: nothing is re-armed that is a step of its own. No
            hint epoch can be opened after it. Should the guest run on here after all, a sync that is not the last,
            or :meth:`owe_all`, comes before it does.

        Returns
        -------
        int
            Pages newly owed: those that were already are not counted again. `newly_dirty_bytes` has them in
            bytes.

        Raises
        ------
        UffdError
            If a log failed. What it and those before it had handed over is kept and published by the next sync;
            the epoch has ended.
        BusyError
            If a dirty log calls it from its own method.

        Notes
        -----
        Releases the GIL while it waits and around its loops. Thread-safe; hints, resolves and other syncs
        wait for it, senders do not but those of lazy regions. Kernel: as the dirty logs.
        """
        cdef size_t newly = 0, part
        cdef uint64_t nbytes = 0
        cdef tuple table
        cdef SourcePlanes planes
        self._enter_log()
        try:
            table = self._regions()
            self._collect(table, bool(last))
            for planes in table:
                with nogil:
                    part = planes.c_publish()
                newly += part
                nbytes += part * planes.page_size
            self.newly_dirty_bytes = nbytes
        finally:
            self._leave_log()
        return newly

    def mark(self, runs, *, region=None):
        """Report pages written by a writer that the dirty log misses, **after** the write (rule S12).

        They are kept in a plane that hints never touch, and every sync publishes it with the log.

        Parameters
        ----------
        runs : array_like of int, shape (n, 2)
            Runs of (first page, page count), in any order; they may overlap.
        region : int, optional
            Its id; not needed where there is one region.

        Raises
        ------
        IndexError, ValueError, TypeError
            If a run is not inside the region, or this is no list of runs, or no region; nothing is changed then.

        Notes
        -----
        Releases the GIL. Lock-free. Needs no kernel interface.
        """
        cdef SourcePlanes planes = self._planes_of(region)
        cdef Pinned pinned = pinned_runs(runs, planes.size)
        cdef size_t done
        with nogil:
            done = planes.c_mark(pinned.numbers(), pinned.n)
        check_done(done, pinned.n)

    def owe_all(self):
        """Start over after the link broke before a discard list was applied: every page is owed (rule S9).

        Nothing is known then about what the destination holds, so free pages are owed too. The dirty logs are
        collected and re-armed, and the hint epoch ends.

        Returns
        -------
        int
            Pages owed: all, over all regions.

        Raises
        ------
        UffdError
            If a log failed; all pages are owed nevertheless.

        Notes
        -----
        Releases the GIL. Call it with senders quiet; the guest may run. Kernel: as the dirty logs.
        """
        cdef tuple table
        cdef SourcePlanes planes
        self._enter_log()
        try:
            table = self._regions()
            try:
                self._collect(table, False)
                for planes in table:
                    with nogil:
                        planes.c_publish()
            finally:
                for planes in table:
                    with nogil:
                        planes.c_owe_all()
        finally:
            self._leave_log()
        return self.size


cdef int check_spec(object spec) except -1:
    if not isinstance(spec, TrackedRegion):
        raise TypeError(f"a region is a TrackedRegion, not {type(spec).__name__}")
    return 0
