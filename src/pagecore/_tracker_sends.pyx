"""TrackerSends: what the senders of a migration call: take, put_back and resolve."""

from libc.stdint cimport SIZE_MAX, UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free, malloc

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_relaxed
from pagecore._runs cimport Pinned, check_done, count_of, joined, new_runs, pinned_runs
from pagecore._source_planes cimport SourcePlanes
from pagecore._tracker_core cimport TrackerCore

import collections
import enum
from operator import index


cdef extern from "_planes.h" nogil:
    """
    _Static_assert(PAGECORE_OWED == 0 && PAGECORE_FREE == 1 && PAGECORE_SENT == 2, "AnswerKind has these");
    """

DEFAULT_PAGES = 512
cdef enum:
    # One resolve() works in pieces of this many runs: its scratch memory stays small.
    PIECE = 4096
    # From so many on, a take of all counts the runs first: an array of one for each page may be far too large.
    MANY_RUNS = 1 << 16
    # Below this much an unused rest of an array is not worth keeping.
    SMALL_ARRAY = 1 << 16


class AnswerKind(enum.Enum):
    """What the source knows of a page that the destination asks for (rule S7)."""

    OWED = 0
    FREE = 1
    SENT = 2
    GONE = 3


Answer = collections.namedtuple("Answer", ["kind", "first", "count"])
Answer.__doc__ = "One run of pages that get the same answer: `kind`, `first` page and `count` of pages."

RegionRuns = collections.namedtuple("RegionRuns", ["region", "runs"])
RegionRuns.__doc__ = "What was taken in one region: its id, and int64 `runs` of shape (n, 2)."

_KINDS = tuple(AnswerKind)


cdef class TrackerSends(TrackerCore):
    def take(self, max_pages=None, max_runs=None, *, max_bytes=None, region=None):
        """Take owed pages of one region: they are the caller's to read and send now, in that order (rule S1).

        Starts where the last take ended, or behind the last page that was asked for, and wraps. The pages are
        cleared before this returns, so a write that the caller's reading misses comes with the next sync. What
        could not be sent goes to :meth:`put_back`.

        Parameters
        ----------
        max_pages : int, optional
            At most this many pages, at least 1; 512 where `max_bytes` is not given either.
        max_runs : int, optional
            At most this many runs, at least 1.
        max_bytes : int, optional
            At most this many bytes, at least 1; but one page, or placing unit, goes out however large it is.
        region : int, optional
            Its id; not needed where there is one region. :meth:`take_batch` goes over all of them.

        Returns
        -------
        ndarray of int64, shape (n, 2)
            Runs of (first page, page count); empty where nothing is owed.

        Raises
        ------
        ValueError, IndexError
            If a limit is below 1, or there is no such region.
        UffdError
            If a lazy dirty log could not be re-armed; nothing is taken then.

        Notes
        -----
        Releases the GIL. Lock-free: takers share the pages out, and no page is handed out twice unless it was
        owed again between. In a lazy region, and of larger placing units once the lists are made, it holds the
        tracker's lock instead, for one chunk at a time. Needs no kernel interface but that of a lazy log.
        """
        cdef Limits left = limits_of(max_pages, max_runs, max_bytes)
        cdef SourcePlanes planes = self._planes_of(region)
        cdef size_t start = start_of(planes)
        cdef list parts = []
        try:
            if self._take_segment(planes, start, planes.size, &left, parts):
                self._take_segment(planes, 0, start, &left, parts)
            return runs_of_parts(parts)
        except BaseException:
            self._put_back_parts(planes, parts)
            raise

    def take_batch(self, max_pages=None, max_runs=None, *, max_bytes=None):
        """Take owed pages of all regions in turn: the caller's to read and send now, as with :meth:`take`.

        Starts in the region and at the page where the last batch ended, or behind the last page that was asked for,
        goes on to the end of the last region, and wraps.

        Parameters
        ----------
        max_pages, max_runs, max_bytes : int, optional
            As in :meth:`take`, over all regions together; a page counts as one whatever its size.

        Returns
        -------
        list of RegionRuns
            The region's id and its runs, int64 of shape (n, 2), never empty. A region comes twice if the batch wraps
            in it. The list is empty where nothing is owed.

        Raises
        ------
        ValueError
            If a limit is below 1.
        UffdError
            If a lazy dirty log could not be re-armed; nothing is taken then.

        Notes
        -----
        As :meth:`take`.
        """
        cdef Limits left = limits_of(max_pages, max_runs, max_bytes)
        cdef tuple table = self._regions()
        cdef size_t n = len(table), i, start, begin, stop
        cdef SourcePlanes planes
        cdef list done = [], parts
        cdef bint ended
        if n == 0:
            return []
        begin = pagecore_load_relaxed(&self._at) % n
        planes = table[begin]
        start = start_of(planes)
        try:
            # Once around: the first region from its cursor on, the others, and what was left out of the first.
            for i in range(n + 1):
                planes = table[(begin + i) % n]
                stop = start if i == n else planes.size
                parts = []
                done.append((planes, parts))
                pagecore_store_relaxed(&self._at, (begin + i) % n)
                ended = self._take_segment(planes, start if i == 0 else 0, stop, &left, parts)
                if not ended:
                    break
            return [RegionRuns(p.spec.id, runs_of_parts(taken)) for p, taken in done if taken]
        except BaseException:
            for p, taken in done:
                self._put_back_parts(p, taken)
            raise

    cdef bint _take_segment(self, SourcePlanes planes, size_t start, size_t stop, Limits *left, list parts) except -1:
        cdef size_t next_page = start, taken
        cdef uint64_t pages, room
        cdef Pinned part
        while next_page < stop:
            pages = min(left.pages, left.nbytes // planes.page_size)
            if planes.c_whole_units():
                pages -= pages % planes.unit
            if pages == 0 and not left.began:
                pages = planes.unit if planes.c_whole_units() else 1
            if pages == 0 or left.runs == 0:
                break
            # As many runs as can be; more if pages are put back meanwhile.
            room = min(min(pages, left.runs), max(planes.c_dirty_count(), <size_t>64))
            if room > MANY_RUNS and pages >= planes.c_dirty_count():
                with nogil:
                    room = min(room, planes.c_count_runs(next_page, stop) + 64)
            part = new_runs(room)
            self._take_some(planes, next_page, stop, pages, part, &next_page, &taken)
            if part.used:
                parts.append(part)
                left.began = True
                left.runs -= part.used
                left.pages -= min(left.pages, taken)
                left.nbytes -= min(left.nbytes, taken * planes.page_size)
        # Relaxed: two takers may start at one cursor, and share the words out between them.
        pagecore_store_relaxed(&planes._cursor, next_page)
        return next_page >= stop

    cdef int _take_some(self, SourcePlanes planes, size_t start, size_t stop, uint64_t max_pages, object part,
                        size_t *next, size_t *taken) except -1:
        cdef Pinned array = part
        taken[0] = 0
        if planes.c_rearms_late():
            self._enter_log()
            try:
                # S1: re-arm, then clear, then the caller reads. S11: under the lock, chunk by chunk.
                start = planes._dirty.c_find_set(start)
                if start >= stop:
                    next[0] = stop
                    return 0
                stop = min(planes.c_end_of_chunk(start), stop)
                self._rearm_pages(planes, start, stop)
                with nogil:
                    array.used = planes.c_take(start, stop, array.numbers(), array.n, max_pages, next, taken)
            finally:
                self._leave_log()
        elif planes.c_whole_units():
            self._check_not_in_log()
            with nogil:
                self.c_acquire()
                array.used = planes.c_take(start, stop, array.numbers(), array.n, max_pages, next, taken)
                self.c_release()
        else:
            with nogil:
                array.used = planes.c_take(start, stop, array.numbers(), array.n, max_pages, next, taken)
        return 0

    cdef int _put_back_parts(self, SourcePlanes planes, list parts) except -1:
        """Nobody will send these."""
        cdef Pinned part
        for part in parts:
            planes.c_put_back(part.numbers(), part.used)
        return 0

    def put_back(self, runs, *, region=None):
        """Give back pages that were taken, or resolved, and not sent: they are owed again (rule S1).

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
        Releases the GIL. Lock-free, but for larger placing units once the lists are made. A page that was hinted
        meanwhile is owed nevertheless. Needs no kernel interface.
        """
        cdef SourcePlanes planes = self._planes_of(region)
        cdef Pinned pinned = pinned_runs(runs, planes.size)
        cdef size_t done
        # A dirty log that calls this holds the lock already.
        cdef bint locked = planes.c_whole_units() and not self._in_log()
        with nogil:
            if locked:
                self.c_acquire()
            done = planes.c_put_back(pinned.numbers(), pinned.n)
            if locked:
                self.c_release()
        check_done(done, pinned.n)

    def resolve(self, page, count=1, again=False, *, region=None):
        """Answer a request of the destination, run by run (rule S7): every page asked for gets an answer.

        Pages answered OWED and FREE are sent from here on: the caller sends them (their content, or for FREE
        ones the fill), or puts them back. The next take starts behind the pages asked for: what a guest wants next is
        often there.

        Parameters
        ----------
        page, count : int
            The run asked for. It comes from a peer, so any numbers are legal: what is outside the region is
            GONE. Once the lists are made it is widened to whole placing units (S10).
        again : bool
            The page arrived and could not be placed: the answer is the content whatever the planes say.
        region : int, optional
            Its id; not needed where there is one region. All pages of a region that is not tracked (any more) are
            GONE.

        Returns
        -------
        list of Answer
            Runs in order that cover the request without a gap; neighbours differ in kind.

        Raises
        ------
        ValueError
            If `count` is below 1, or no region is given and there are several.
        BusyError
            If a dirty log calls it from its own method.
        UffdError
            If a lazy dirty log could not be re-armed; nothing is changed then.

        Notes
        -----
        Releases the GIL. Thread-safe: against takers each page goes to one side. Waits for a sync, or for a piece of a
        hint. Needs no kernel interface.
        """
        cdef SourcePlanes planes = None
        first, total = index(page), index(count)
        if total < 1:
            raise ValueError(f"count {total} is below 1")
        self._check_not_in_log()
        try:
            planes = self._planes_of(region)
        except IndexError:
            return [Answer(AnswerKind.GONE, first, total)]
        end = first + total
        inside, outside = max(first, 0), min(end, planes.size)
        if inside >= outside:
            return [Answer(AnswerKind.GONE, first, total)]
        if planes.c_whole_units():
            inside, outside = inside // planes.unit * planes.unit, -(-outside // planes.unit) * planes.unit
        answers = self._resolve_inside(planes, inside, outside, again)
        self._take_next(planes, outside)
        if first < 0:
            answers.insert(0, Answer(AnswerKind.GONE, first, -first))
        if end > outside:
            answers.append(Answer(AnswerKind.GONE, outside, end - outside))
        return answers

    def _resolve_inside(self, SourcePlanes planes, size_t low, size_t high, bint again):
        """The answers for pages [low, high) of a region."""
        cdef size_t n, i, piece
        cdef list answers = []
        cdef bint lazy = planes.c_rearms_late()
        cdef int64_t *found = <int64_t *>malloc(3 * sizeof(int64_t) * min(high - low, <size_t>PIECE))
        if found == NULL:
            raise MemoryError("no room for the answers")
        last = None
        try:
            while low < high:
                piece = min(high - low, <size_t>PIECE)
                if lazy:
                    self._enter_log()
                    try:
                        self._rearm_pages(planes, low, low + piece)
                        n = planes.c_resolve(low, piece, again, found)
                    finally:
                        self._leave_log()
                else:
                    with nogil:
                        self.c_acquire()
                        n = planes.c_resolve(low, piece, again, found)
                        self.c_release()
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
        return answers

    def _take_next(self, SourcePlanes planes, size_t page):
        """The next take begins here."""
        cdef size_t i
        cdef tuple table = self._regions()
        pagecore_store_relaxed(&planes._cursor, page)
        for i in range(<size_t>len(table)):
            if table[i] is planes:
                pagecore_store_relaxed(&self._at, i)


cdef size_t start_of(SourcePlanes planes) noexcept:
    cdef size_t start = pagecore_load_relaxed(&planes._cursor)
    if planes.c_whole_units():
        start -= start % planes.unit
    return start if start < planes.size else 0


cdef Limits limits_of(object max_pages, object max_runs, object max_bytes):
    cdef Limits limits
    if max_pages is None and max_bytes is None:
        max_pages = DEFAULT_PAGES
    limits.pages = <uint64_t>SIZE_MAX if max_pages is None else count_of(max_pages, "max_pages", 1)
    limits.runs = UINT64_MAX if max_runs is None else count_of(max_runs, "max_runs", 1)
    limits.nbytes = UINT64_MAX if max_bytes is None else count_of(max_bytes, "max_bytes", 1)
    limits.began = False
    return limits


cdef object runs_of_parts(list parts):
    if not parts:
        return new_runs(0).array
    runs = joined(parts)
    # What is left of the scratch memory goes with the copy.
    return runs.copy() if len(parts) == 1 and runs.base is not None and runs.base.size < SMALL_ARRAY else runs
