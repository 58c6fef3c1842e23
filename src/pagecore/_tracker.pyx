"""PageTracker: the pages that the source of a migration owes."""

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport Pinned, count_of, joined, new_runs, pinned_runs
from pagecore._source_planes cimport SourcePlanes
from pagecore.dirty_log._protocol cimport DirtyLog

import collections
import enum
import weakref
from operator import index

from pagecore.errors import BusyError, UnsupportedError


cdef extern from "_planes.h" nogil:
    """
    _Static_assert(PAGECORE_OWED == 0 && PAGECORE_FREE == 1 && PAGECORE_SENT == 2, "AnswerKind has these");
    """

PAGE_SIZE = 4096
# One take() or resolve() works in pieces of this many runs: its scratch memory stays small.
cdef enum:
    PIECE = 4096


class AnswerKind(enum.Enum):
    """What the source knows of a page that the destination asks for (rule S7)."""

    OWED = 0
    FREE = 1
    SENT = 2
    GONE = 3


Answer = collections.namedtuple("Answer", ["kind", "first", "count"])
Answer.__doc__ = "One run of pages that get the same answer: `kind`, `first` page and `count` of pages."

_KINDS = tuple(AnswerKind)
_session_type = None


def _use_session_type(session_type):
    """Tell the tracker what hint_session() makes; hints.py stands above this module and calls it once."""
    global _session_type
    _session_type = session_type


cdef class PageTracker(SourcePlanes):
    """PageTracker(npages, *, dirty_log=None, all_dirty=True, page_size=4096)\n--\n
    What the source of a migration owes for one region: the planes and rules of design section 3.

    A page is *owed* (its content is newer than what was sent), *free* (the guest hinted it, and nothing was
    sent for it since) or *sent*. Writes come in from the dirty log and from :meth:`mark` with each
    :meth:`sync`, hints through a :meth:`hint_session`; senders :meth:`take` pages, and :meth:`resolve`
    answers the destination.

    Parameters
    ----------
    npages : int
        Pages of the region.
    dirty_log : DirtyLog, optional
        What records writes, as many pages as the region. Without one, every writer calls :meth:`mark`.
    all_dirty : bool
        Whether every page is owed at the start.
    page_size : int
        Bytes in a page. 4096; a region of huge pages is not tracked yet.

    Attributes
    ----------
    size, page_size : int
        Pages of the region; bytes in a page.
    dirty_log : DirtyLog or None
    epoch : int
        The open hint epoch; 0 where none is open.

    Raises
    ------
    ValueError
        If `npages` is negative or not the size of the log.
    UnsupportedError
        If `page_size` is another than 4096.

    Notes
    -----
    What may run beside what: everything, from any thread. :meth:`take`, :meth:`put_back`, :meth:`mark` and
    the counts are lock-free and wait for nobody. Hints, :meth:`sync`, :meth:`resolve`, :meth:`reload` and the
    lists exclude one another by one lock, which a waiter waits for with the GIL released. The lists and
    :meth:`reload` mean something only while senders are quiet (rules S8 and S9).
    """

    def __cinit__(self, npages, *, DirtyLog dirty_log=None, all_dirty=True, page_size=PAGE_SIZE):
        if page_size != PAGE_SIZE:
            raise UnsupportedError(
                f"tracking in pages of {page_size} bytes",
                f"this version tracks pages of {PAGE_SIZE} bytes; number the region in those",
            )
        if dirty_log is not None and dirty_log.size != self.size:
            raise ValueError(f"a dirty log of {dirty_log.size} pages does not fit a region of {self.size} pages")
        self.page_size = page_size
        self.dirty_log = dirty_log
        # Without a log every writer marks, and marks never need arming.
        self._armed = dirty_log is None

    cdef int _check_not_in_log(self) except -1:
        """A dirty log in Python runs under the lock: what it calls back must not wait for that lock."""
        # Relaxed: only this thread could have stored its own number here.
        if pagecore_load_relaxed(&self._sync_thread) == <uint64_t>PyThread_get_thread_ident():
            raise BusyError("the tracker is syncing: its dirty log may take(), put_back() and mark()")
        return 0

    cdef int _enter_log(self) except -1:
        """Acquire the lock for a stretch in which a dirty log may run Python code; the others wait without the GIL."""
        self._check_not_in_log()
        with nogil:
            self.c_acquire()
        pagecore_store_relaxed(&self._sync_thread, <uint64_t>PyThread_get_thread_ident())
        return 0

    cdef int _leave_log(self) except -1:
        pagecore_store_relaxed(&self._sync_thread, 0)
        self.c_release()
        return 0

    cdef int _collect(self) except -1:
        """Fetch into private words and re-arm; under the lock. What was fetched stays there if that fails."""
        self.c_begin_sync()
        if self.dirty_log is not None:
            self.dirty_log.collect_into(self._fetched)
            self.c_mask_fetched()
            if not self.dirty_log.rearms_at_collect:
                self.dirty_log.rearm(0, self.size)
        with nogil:
            self.c_drain_side()
        return 0

    def sync(self):
        """Move the dirty log and the marked pages into the dirty plane (S2, S12); ends the hint epoch.

        The log is fetched into private words and re-armed, and only then do its pages become owed: a page
        that senders can see is one whose next write is logged again.

        Returns
        -------
        int
            Pages newly owed: those that were already are not counted again.

        Raises
        ------
        UffdError
            If the log failed. What it had handed over is kept and published by the next sync; the epoch has
            ended.
        BusyError
            If a dirty log calls it from its own method.

        Notes
        -----
        Releases the GIL while it waits and around its loops. Thread-safe; hints, resolves and other syncs
        wait for it, senders do not. Kernel: as the dirty log.
        """
        cdef size_t newly
        self._enter_log()
        try:
            self._collect()
            with nogil:
                newly = self.c_publish()
        finally:
            self._leave_log()
        return newly

    def take(self, max_pages=512, max_runs=None):
        """Take owed pages: they are the caller's to read and send now, in that order (rule S1).

        Starts where the last take ended and wraps. The pages are cleared before this returns, so a write that
        the caller's reading misses comes with the next sync. What could not be sent goes to :meth:`put_back`.

        Parameters
        ----------
        max_pages : int
            At most this many pages, at least 1.
        max_runs : int, optional
            At most this many runs, at least 1.

        Returns
        -------
        ndarray of int64, shape (n, 2)
            Runs of (first page, page count); empty where nothing is owed.

        Raises
        ------
        ValueError
            If a limit is below 1.

        Notes
        -----
        Releases the GIL. Lock-free: takers share the pages out, and no page is handed out twice unless it was
        owed again between. Needs no kernel interface.
        """
        cdef uint64_t pages = count_of(max_pages, "max_pages", 1)
        cdef uint64_t runs = self.size if max_runs is None else count_of(max_runs, "max_runs", 1)
        cdef size_t i
        cdef Pinned part
        cdef list parts = []
        pages = min(pages, self.size)
        try:
            while True:
                part = new_runs(min(pages, runs, <uint64_t>PIECE))
                parts.append(part)
                with nogil:
                    part.used = self.c_take(part.numbers(), part.n, pages)
                    for i in range(part.used):
                        pages -= <uint64_t>part.numbers()[2 * i + 1]
                runs -= part.used
                if part.used < part.n or pages == 0 or runs == 0:
                    # A copy: what is left of the scratch memory goes with it.
                    return joined(parts).copy() if len(parts) == 1 else joined(parts)
        except BaseException:
            # Nobody will send these.
            for part in parts:
                self._dirty.c_set_runs(part.numbers(), part.used)
            raise

    def put_back(self, runs):
        """Give back pages that were taken, or resolved, and not sent: they are owed again (rule S1).

        Parameters
        ----------
        runs : array_like of int, shape (n, 2)
            Runs of (first page, page count), in any order; they may overlap.

        Raises
        ------
        IndexError, ValueError, TypeError
            If a run is not inside the region, or this is no list of runs; nothing is changed then.

        Notes
        -----
        Releases the GIL. Lock-free. It never makes a free page less free: a hint that came meanwhile stays
        known (rule S12). Needs no kernel interface.
        """
        self._dirty.set_runs(runs)

    def mark(self, runs):
        """Report pages written by a writer that the dirty log misses, **after** the write (rule S12).

        They are kept in a plane that hints never touch, and every sync publishes it with the log.

        Parameters
        ----------
        runs : array_like of int, shape (n, 2)
            Runs of (first page, page count), in any order; they may overlap.

        Raises
        ------
        IndexError, ValueError, TypeError
            If a run is not inside the region, or this is no list of runs; nothing is changed then.

        Notes
        -----
        Releases the GIL. Lock-free. Needs no kernel interface.
        """
        self._side.set_runs(runs)

    def resolve(self, page, count=1, again=False):
        """Answer a request of the destination, run by run (rule S7): every page asked for gets an answer.

        Pages answered OWED and FREE are sent from here on: the caller sends them (their content, or for FREE
        ones the fill), or puts them back.

        Parameters
        ----------
        page, count : int
            The run asked for. It comes from a peer, so any numbers are legal: what is outside the region is
            GONE.
        again : bool
            The page arrived and could not be placed: the answer is the content whatever the planes say.

        Returns
        -------
        list of Answer
            Runs in order that cover the request without a gap; neighbours differ in kind.

        Raises
        ------
        ValueError
            If `count` is below 1.
        BusyError
            If a dirty log calls it from its own method.

        Notes
        -----
        Releases the GIL. Thread-safe: against takers each page goes to one side. Waits for a hint or a sync.
        Needs no kernel interface.
        """
        cdef size_t n, i, piece
        cdef size_t low, high
        cdef int64_t *found
        cdef bint repeat = again
        first, total = index(page), index(count)
        if total < 1:
            raise ValueError(f"count {total} is below 1")
        self._check_not_in_log()
        end = first + total
        inside, outside = max(first, 0), min(end, self.size)
        if inside >= outside:
            return [Answer(AnswerKind.GONE, first, total)]
        low, high = inside, outside
        answers = []
        last = None
        if first < 0:
            answers.append(Answer(AnswerKind.GONE, first, -first))
        found = <int64_t *>malloc(3 * sizeof(int64_t) * min(high - low, <size_t>PIECE))
        if found == NULL:
            raise MemoryError("no room for the answers")
        try:
            while low < high:
                piece = min(high - low, <size_t>PIECE)
                with nogil:
                    n = self.c_resolve(low, piece, repeat, found)
                for i in range(n):
                    kind = _KINDS[found[3 * i]]
                    if last is not None and last.kind is kind:
                        # The pieces meet here.
                        answers.pop()
                        last = Answer(kind, last.first, last.count + found[3 * i + 2])
                    else:
                        last = Answer(kind, found[3 * i + 1], found[3 * i + 2])
                    answers.append(last)
                low += piece
        finally:
            free(found)
        if end > outside:
            answers.append(Answer(AnswerKind.GONE, outside, end - outside))
        return answers

    def hint_session(self, promise="armed", fill=0, *, marked=(), on_command=None):
        """Open the session through which the guest's free-page hints come in (rules S3 to S6).

        Parameters
        ----------
        promise : {"armed", "held"}
            Why a write to a hinted page is not lost: ``armed``, the log reports every write since the epoch
            began; ``held``, the guest keeps hinted pages to itself until it is told DONE.
        fill : int
            The 32-bit pattern that free pages hold as far as the guest can tell: its poison pattern, if it
            poisons; else 0.
        marked : iterable of str
            The writers that the log misses and that do call :meth:`mark` after each write (rule S12).
        on_command : callable, optional
            Called as ``on_command(command, epoch)`` to tell the guest START, STOP and, exactly once, DONE.

        Returns
        -------
        HintSession
            A context manager that spans precopy.

        Raises
        ------
        UnsupportedError
            If the log does not re-arm at collect and the promise is ``armed``, or if the log misses a writer
            that is not in `marked`.
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
        """Open the next hint epoch and return its id; for HintSession. Refused where the log is not armed."""
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
        with nogil:
            was_open = self.c_close_epoch(mine)
        return was_open

    def _hint(self, runs, epoch):
        """Process hints of this epoch; for HintSession. Returns (runs, pages taken or -1 if stale)."""
        cdef Pinned pinned = pinned_runs(runs, self.size)
        cdef int64_t taken
        cdef uint64_t given
        number = index(epoch)
        # What is no epoch id at all is as stale as one that has passed.
        given = number if 0 < number < 1 << 64 else 0
        self._check_not_in_log()
        with nogil:
            taken = self.c_hint_runs(pinned.numbers(), pinned.n, given)
        return pinned.n, taken

    def discard_runs(self):
        """The pages to discard at the destination at the switch: all that are not both sent and clean (S8).

        Returns
        -------
        ndarray of int64, shape (n, 2)
            Runs of owed and of free pages.

        Raises
        ------
        BusyError
            If pages were marked since the last sync: the list would miss them.

        Notes
        -----
        Releases the GIL. Call it with the guest stopped, senders quiet (all taken pages sent or put back) and
        the last sync done. Needs no kernel interface.
        """
        cdef Bitmap copy = Bitmap(self.size)
        cdef size_t marked
        self._check_not_in_log()
        with nogil:
            marked = self.c_copy_unsent(copy)
        if marked:
            raise BusyError(f"{marked} marked pages wait for a sync: the last comes before the lists (S8)")
        return copy.runs()

    def hinted_runs(self):
        """The pages that are free: hinted, and not owed (rule S8).

        Returns
        -------
        ndarray of int64, shape (n, 2)

        Notes
        -----
        Releases the GIL. Call it together with :meth:`discard_runs`, under the same conditions. Needs no
        kernel interface.
        """
        cdef Bitmap copy = Bitmap(self.size)
        self._check_not_in_log()
        with nogil:
            self.c_copy_free(copy)
        return copy.runs()

    def owe_hinted(self):
        """Make free pages owed, for a peer that cannot fill them by itself (rule S8).

        Returns
        -------
        int
            Pages newly owed.

        Notes
        -----
        Releases the GIL. Thread-safe. Needs no kernel interface.
        """
        cdef size_t owed
        self._check_not_in_log()
        with nogil:
            owed = self.c_owe_hinted()
        return owed

    def owe_all(self):
        """Start over after the link broke before a discard list was applied: every page is owed (rule S9).

        Nothing is known then about what the destination holds, so free pages are owed too. The dirty log is
        collected and re-armed, and the hint epoch ends.

        Returns
        -------
        int
            Pages owed: all.

        Raises
        ------
        UffdError
            If the log failed; all pages are owed nevertheless.

        Notes
        -----
        Releases the GIL. Call it with senders quiet; the guest may run. Kernel: as the dirty log.
        """
        self._enter_log()
        try:
            self._collect()
            # All of it is about to be owed anyway.
            memset(self._fetched.c_words, 0, self._fetched.c_nwords * sizeof(uint64_t))
        finally:
            with nogil:
                self.c_owe_all()
            self._leave_log()
        return self.size

    def reload(self, Bitmap settled not None):
        """Take the destination's word after the link broke with the discard list applied (rule S9).

        Pages that are not settled there are owed, except those that were free here: they stay free.

        Parameters
        ----------
        settled : Bitmap
            The pages that the destination has received or whose guest released them; as many as the region.

        Returns
        -------
        int
            Pages owed.

        Raises
        ------
        ValueError
            If the sizes differ; nothing is changed then.

        Notes
        -----
        Releases the GIL. Call it with senders quiet: every taken page has been sent or put back. Needs no
        kernel interface.
        """
        cdef size_t owed
        if settled.size != self.size:
            raise ValueError(f"settled bitmap of {settled.size} pages does not fit a region of {self.size}")
        self._check_not_in_log()
        with nogil:
            owed = self.c_reload(settled)
        return owed

    def __repr__(self):
        return f"<PageTracker of {self.size} pages, {self.dirty_count} owed, {self.hinted_count} free>"
