"""PageTracker: the pages that the source of a migration owes."""

from libc.stdint cimport int64_t, uint64_t

from pagecore._atomic cimport pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport Pinned, pinned_pairs
from pagecore._source_planes cimport SourcePlanes
from pagecore._tracker_sends cimport TrackerSends

import weakref
from collections.abc import Mapping
from operator import index

from pagecore._tracker_core import PageCounts
from pagecore._tracker_sends import Answer, AnswerKind, RegionRuns
from pagecore.errors import BusyError
from pagecore.settled import settled_checksum


cdef extern from "_planes.h" nogil:
    size_t pagecore_check_hints(const int64_t *runs, size_t n, size_t npages, size_t *clipped)
    void pagecore_clip_hint(int64_t first, int64_t count, size_t npages, size_t unit, size_t *low, size_t *high)

cdef enum:
    # How much of a list of hints goes under the lock at once, in words and runs: tens of microseconds. A sync, a
    # resolve and the next piece take turns.
    HINT_PIECE = 4096

__all__ = ["Answer", "AnswerKind", "PageCounts", "PageTracker", "RegionRuns"]

_session_type = None


def _use_session_type(session_type):
    """Tell the tracker what hint_session() makes; hints.py stands above this module and calls it once."""
    global _session_type
    _session_type = session_type


cdef class PageTracker(TrackerSends):
    """PageTracker(npages=None, *, regions=None, dirty_log=None, all_dirty=True, page_size=4096, host_page_size=None, rearm="sync", chunk_shift=None)\n--\n
    What the source of a migration owes: the planes and rules of design section 3.

    A page is *owed* (its content is newer than what was sent), *free* (the guest hinted it, and nothing was
    sent for it since) or *sent*. Writes come in from the dirty logs and from :meth:`mark` with each
    :meth:`sync`, hints through a :meth:`hint_session`; senders :meth:`take` pages, and :meth:`resolve`
    answers the destination.

    A tracker has one region, described by the arguments, or those of `regions`. Methods of one region take its
    id as `region`, which may be left out where there is only one.

    Parameters
    ----------
    npages : int, optional
        Pages of the only region, whose id is 0. The other arguments but `regions` are as in TrackedRegion, too.
    regions : iterable of TrackedRegion, optional
        All regions, each with an id of its own; more may come and go between rounds (:meth:`add_region`).
    dirty_log : DirtyLog, optional
        What records writes, as many pages as the region. Without one, every writer calls :meth:`mark`.
    all_dirty : bool
        Whether every page is owed at the start.
    page_size, host_page_size : int
        Bytes in a page, and in the unit in which the destination places pages.
    rearm : {"sync", "lazy"}
        When a log that does not re-arm at collect is re-armed.
    chunk_shift : int, optional
        How much of a lazy log is re-armed at once.

    Attributes
    ----------
    regions : tuple of TrackedRegion
    size : int
        Pages, over all regions.
    page_size, dirty_log
        Of the only region.
    epoch : int
        The open hint epoch; 0 where none is open.
    newly_dirty_bytes : int
        What the last sync found, in bytes.
    generation : int
        Of the connection that serves this tracker; 0 for the first.

    Raises
    ------
    ValueError
        If a number is out of its bounds, sizes do not fit one another, or two regions have one id.
    TypeError
        If there is neither `npages` nor `regions`, or other arguments stand beside `regions`.

    Notes
    -----
    What may run beside what: everything, from any thread. :meth:`take`, :meth:`put_back` and :meth:`mark` are
    lock-free and wait for nobody, except in a region whose log is re-armed late, and, once the lists are made, in
    one of larger placing units. Counts are O(1). Hints, :meth:`sync`, :meth:`resolve`, :meth:`reload` and the lists
    exclude one another by one lock, which is handed over in the order of arrival, waited for with the GIL released,
    and held by a list of hints for a piece at a time. The lists, :meth:`reload` and :meth:`owe_all` mean something
    only while senders are quiet (rules S8 and S9); regions come and go while no epoch is open.
    """

    # ---- hints

    def hint_session(self, promise="armed", fill=0, *, marked=(), on_command=None):
        """Open the session through which the guest's free-page hints come in (rules S3 to S6).

        Parameters
        ----------
        promise : {"armed", "held"}
            Why a write to a hinted page is not lost: ``armed``, the logs report every write since the epoch
            began; ``held``, the guest keeps hinted pages to itself until it is told DONE.
        fill : int
            The 32-bit pattern that free pages hold as far as the guest can tell: its poison pattern, if it
            poisons; else 0.
        marked : iterable of str
            The writers that the logs miss and that do call :meth:`mark` after each write (rule S12).
        on_command : callable, optional
            Called as ``on_command(command, epoch)`` to tell the guest START, STOP and, exactly once, DONE.

        Returns
        -------
        HintSession
            A context manager that spans precopy.

        Raises
        ------
        UnsupportedError
            If a log is re-armed late (``rearm="lazy"``) and the promise is ``armed``, or if a log misses a
            writer that is not in `marked`.
        BusyError
            If another session of this tracker has not ended.
        ValueError
            If the promise or the fill is none of the above.
        """
        return _session_type(self, promise, fill, marked=marked, on_command=on_command)

    def _begin_session(self, session):
        """Put this session in charge; for HintSession. One at a time: two would end each other's epochs."""
        current = self._session() if self._session is not None else None
        if current is not None and current is not session and current._owes_done:
            raise BusyError(f"another hint session of this tracker has not ended: {current!r}")
        self._session = weakref.ref(session)

    def _open_epoch(self):
        """Open the next hint epoch and return its id; for HintSession. Refused where a log is not armed."""
        cdef uint64_t epoch = 0
        self._check_not_in_log()
        with nogil:
            epoch = self.c_open_epoch()
        if epoch == 0:
            raise BusyError("no sync has armed the dirty log yet: sync() comes before the first hint epoch")
        return epoch

    def _close_epoch(self, epoch):
        """End this hint epoch; for HintSession. Returns whether it was still open."""
        cdef uint64_t mine = epoch
        cdef bint was_open
        if self._in_log():
            # A destructor that runs in a dirty log, which runs under the lock.
            was_open = mine != 0 and self._epoch == mine
            if was_open:
                pagecore_store_relaxed(&self._epoch, 0)
            return was_open
        with nogil:
            was_open = self.c_close_epoch(mine)
        return was_open

    def _hint(self, runs, epoch, region):
        """Process hints of this epoch; for HintSession.

        Returns (pages taken off the debt, runs that were clipped, runs that were stale, whether any was not).
        """
        cdef SourcePlanes planes = self._planes_of(region)
        cdef Pinned pinned = pinned_pairs(runs, planes.size)
        cdef size_t n = pinned.n, run = 0, page = 0, clipped = 0, bad, taken = 0
        cdef uint64_t given
        cdef bint current = False, ended = False
        number = index(epoch)
        # What is no epoch id at all is as stale as one that has passed.
        given = number if 0 < number < 1 << 64 else 0
        self._check_not_in_log()
        with nogil:
            bad = pagecore_check_hints(pinned.numbers(), n, planes.size, &clipped)
        if bad < n:
            first, count = pinned.numbers()[2 * bad], pinned.numbers()[2 * bad + 1]
            if count < 0:
                raise ValueError(f"count {count} of run {bad} is negative")
            raise IndexError(f"pages [{first}, {first + count}) are outside [0, {planes.size})")
        if planes.lazy:
            return self._hint_lazily(planes, pinned, given, clipped)
        with nogil:
            while True:
                self.c_acquire()
                # S4: the look at the epoch and the clearing are one step against a sync, which ends it under this
                # lock; for each piece anew.
                ended = given == 0 or given != self._epoch
                if not ended:
                    current = True
                    taken += planes.c_hint(pinned.numbers(), n, &run, &page, HINT_PIECE)
                self.c_release()
                if ended or run >= n:
                    break
        return taken, clipped, n - run, current

    def _hint_lazily(self, SourcePlanes planes, Pinned pinned, uint64_t given, size_t clipped):
        """S3: where the guest keeps hinted pages, the log is re-armed at the hint, before dirty is cleared."""
        cdef size_t n = pinned.n, run = 0, page = 0, taken = 0, low, high, end
        cdef bint current = False
        while True:
            self._enter_log()
            try:
                if given == 0 or given != self._epoch:
                    break
                current = True
                if run == n:
                    break
                # One run at a time: each may have a chunk of its own.
                pagecore_clip_hint(pinned.numbers()[2 * run], pinned.numbers()[2 * run + 1], planes.size, planes.unit,
                                   &low, &high)
                if page == 0 and low < high:
                    self._rearm_pages(planes, low, high)
                end = run + 1
                # The log ran Python code, in which the session may have ended.
                if given == self._epoch:
                    with nogil:
                        taken += planes.c_hint(pinned.numbers(), end, &run, &page, HINT_PIECE)
            finally:
                self._leave_log()
        return taken, clipped, n - run, current

    # ---- the switch

    def discard_pages(self, region=None):
        """The pages to discard at the destination at the switch: all that are not both sent and clean (S8).

        From here on a region of larger placing units goes by whole units: a unit that is owed, free or sent in parts
        only is owed (S10).

        Parameters
        ----------
        region : int, optional
            Its id; not needed where there is one region.

        Returns
        -------
        Bitmap
            Owed and free pages, a new one. ``wire.encode_page_set`` makes the smaller of runs and bitmap of it.

        Raises
        ------
        BusyError
            If pages were marked since the last sync: the list would miss them.
        IndexError, ValueError
            If there is no such region.

        Notes
        -----
        Releases the GIL. Call it with the guest stopped, senders quiet (all taken pages sent or put back) and
        the last sync done. Needs no kernel interface.
        """
        cdef SourcePlanes planes = self._planes_of(region)
        cdef Bitmap copy = Bitmap(planes.size)
        cdef size_t marked
        self._check_not_in_log()
        with nogil:
            self.c_acquire()
            marked = planes.c_marked_count()
            if marked == 0:
                planes.c_prepare_lists()
                planes.c_copy_unsent(copy)
            self.c_release()
        if marked:
            raise BusyError(f"{marked} marked pages wait for a sync: the last comes before the lists (S8)")
        return copy

    def hinted_pages(self, region=None):
        """The pages that are free: hinted, and not owed (rule S8); as :meth:`discard_pages` has them.

        Parameters
        ----------
        region : int, optional
            Its id; not needed where there is one region.

        Returns
        -------
        Bitmap
            A new one.

        Raises
        ------
        IndexError, ValueError
            If there is no such region.

        Notes
        -----
        Releases the GIL. Call it together with :meth:`discard_pages`, under the same conditions. Needs no
        kernel interface.
        """
        cdef SourcePlanes planes = self._planes_of(region)
        cdef Bitmap copy = Bitmap(planes.size)
        self._check_not_in_log()
        with nogil:
            self.c_acquire()
            planes.c_prepare_lists()
            planes.c_copy_free(copy)
            self.c_release()
        return copy

    def discard_runs(self, region=None):
        """:meth:`discard_pages` as runs: int64, shape (n, 2)."""
        return self.discard_pages(region).runs()

    def hinted_runs(self, region=None):
        """:meth:`hinted_pages` as runs: int64, shape (n, 2)."""
        return self.hinted_pages(region).runs()

    def owe_hinted(self):
        """Make free pages owed, in all regions, for a peer that cannot fill them by itself (rule S8).

        Returns
        -------
        int
            Pages newly owed.

        Notes
        -----
        Releases the GIL. Thread-safe. Needs no kernel interface.
        """
        cdef size_t owed = 0
        cdef SourcePlanes planes
        self._check_not_in_log()
        for planes in self._regions():
            with nogil:
                self.c_acquire()
                owed += planes.c_owe_hinted()
                self.c_release()
        return owed

    # ---- recovery

    @property
    def generation(self):
        """Of the connection that serves this tracker (rule W6); 0 for the first."""
        return self._generation

    def begin_generation(self, generation):
        """A reconnect has begun this generation (rule W6): reports of settled pages have to be of it.

        Parameters
        ----------
        generation : int
            Above the last one, and below 2^64.

        Raises
        ------
        ValueError
            If it is not.
        """
        number = index(generation)
        if not self._generation < number < 1 << 64:
            raise ValueError(f"generation {number} is outside [{self._generation + 1}, {1 << 64})")
        self._generation = number
        self._reloaded = False

    def reload(self, settled, *, generation=None, checksum=None):
        """Take the destination's word after the link broke with the discard list applied (rule S9).

        Pages that are not settled there are owed, except those that were free here: they stay free. The hint epoch
        ends.

        Parameters
        ----------
        settled : Bitmap, or mapping of int to Bitmap
            The pages that the destination has received or whose guest released them, as many as the region; with
            several regions one bitmap for each id.
        generation : int, optional
            The generation that the report is of: the one of :meth:`begin_generation`, and the only report of it.
            What an older connection, or the same one earlier, reported would owe pages that have arrived since.
        checksum : int, or mapping of int to int, optional
            What :func:`pagecore.settled_checksum` gave at the destination.

        Returns
        -------
        int
            Pages owed, over all regions.

        Raises
        ------
        ValueError
            If regions, sizes, generation or checksum do not fit.
        TypeError
            If it is no bitmap.

        In all cases nothing is changed.

        Notes
        -----
        Releases the GIL. Call it with senders quiet: every taken page has been sent or put back. Needs no
        kernel interface.
        """
        cdef SourcePlanes planes
        cdef tuple table
        cdef Bitmap bitmap
        self._enter()
        try:
            table = self._regions()
            reports = self._checked_reports(table, settled, generation, checksum)
            pagecore_store_relaxed(&self._epoch, 0)
            for planes, report in zip(table, reports):
                bitmap = report
                with nogil:
                    planes.c_reload(bitmap)
            self._reloaded = generation is not None or self._reloaded
        finally:
            self._leave()
        return self.dirty_count

    def _checked_reports(self, tuple table, settled, generation, checksum):
        """The bitmaps in the order of the table."""
        if generation is not None:
            if index(generation) != self._generation:
                raise ValueError(f"settled bitmap of generation {generation}; this connection's is {self._generation}")
            if self._reloaded:
                raise ValueError(f"generation {generation} has reported its settled pages before")
        ids = [(<SourcePlanes>planes).spec.id for planes in table]
        if isinstance(settled, Mapping):
            if sorted(settled) != sorted(ids):
                raise ValueError(f"settled bitmaps of regions {sorted(settled)}; those tracked are {sorted(ids)}")
            reports = [settled[id] for id in ids]
        elif len(ids) != 1:
            raise ValueError(f"one settled bitmap for {len(ids)} regions: a mapping has one for each id")
        else:
            reports = [settled]
        for spec, report in zip([(<SourcePlanes>planes).spec for planes in table], reports):
            if not isinstance(report, Bitmap):
                raise TypeError(f"settled pages are a Bitmap, not {type(report).__name__}")
            if report.size != spec.npages:
                raise ValueError(f"settled bitmap of {report.size} pages does not fit a region of {spec.npages}")
            if checksum is not None:
                theirs = checksum[spec.id] if isinstance(checksum, Mapping) else checksum
                ours = settled_checksum(report, region=spec.id, generation=generation or 0)
                if theirs != ours:
                    raise ValueError(
                        f"settled bitmap of region {spec.id}: checksum {ours:#010x} is not {index(theirs):#010x};"
                        " it was damaged, or it is of another region or generation"
                    )
        return reports

    def __repr__(self):
        several = "" if len(self._regions()) == 1 else f" in {len(self._regions())} regions"
        return f"<PageTracker of {self.size} pages{several}, {self.dirty_count} owed, {self.hinted_count} free>"
