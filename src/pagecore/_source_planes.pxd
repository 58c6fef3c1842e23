from libc.stdint cimport int64_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._protocol cimport DirtyLog


cdef class SourcePlanes:
    """The planes of one region of a PageTracker. The c_ methods are nogil and trust their arguments.

    Lock-free: c_take, c_put_back, c_mark and the counts. All else under the lock of the tracker; so are c_take and
    c_put_back where c_whole_units() says so, and c_take where c_rearms_late() does, after the re-arm.
    """

    cdef readonly object spec               # the TrackedRegion
    cdef readonly size_t size               # pages
    cdef readonly size_t page_size          # bytes
    cdef readonly DirtyLog dirty_log        # or None
    cdef size_t unit                        # pages of one placing unit (S10); a power of two
    cdef bint lazy                          # re-armed late, by chunks
    cdef uint64_t _whole_units              # the lists were made: units are owed, free or sent as a whole
    cdef Bitmap _dirty
    cdef Bitmap _hinted                     # written under the lock alone; see _planes.h
    cdef Bitmap _side                       # S12: what mark() reported since the last sync
    cdef Bitmap _fetched                    # what a sync has collected and not published yet
    cdef Bitmap _log_fetched                # the same in pages of the log; _fetched itself where those are the same
    cdef Bitmap _seen                       # lazy: in pages of the log, what was fetched and is not re-armed
    cdef Bitmap _wanted                     # lazy: what the re-arm under way is for, in its chunk
    cdef Bitmap _pending                    # lazy: chunks that wait for their re-arm
    cdef uint64_t _rearm_over               # lazy: the last sync was made
    cdef unsigned int _log_shift            # 2^this pages of the log are one page
    cdef unsigned int _chunk_shift          # 2^this pages of the log are one chunk
    cdef uint64_t _cursor                   # where the next take starts
    # Counts of the planes, added to once a call: exact when nobody is in a call.
    cdef uint64_t _dirty_pages
    cdef uint64_t _hinted_pages             # both bits set counts, too; c_settle makes that none
    cdef uint64_t _mixed                    # a page may have both bits: it was put back after a hint

    # Both change while senders are quiet, or at a sync.
    cdef bint c_whole_units(self) noexcept nogil
    cdef bint c_rearms_late(self) noexcept nogil
    # Takes from [start, stop); runs are (first, count) pairs. Returns how many were written; each page of them is the
    # caller's to send. *next is where to go on, *taken the pages.
    cdef size_t c_take(self, size_t start, size_t stop, int64_t *runs, size_t max_runs, uint64_t max_pages,
                       size_t *next, size_t *taken) noexcept nogil
    # How many runs of owed pages begin in [start, stop): a snapshot.
    cdef size_t c_count_runs(self, size_t start, size_t stop) noexcept nogil
    # Both return how many runs they did: all of them, or up to one that does not fit.
    cdef size_t c_put_back(self, const int64_t *runs, size_t n) noexcept nogil
    cdef size_t c_mark(self, const int64_t *runs, size_t n) noexcept nogil
    # About `budget` words of a list of hints, from *run and *page on; returns the pages taken off the debt.
    cdef size_t c_hint(self, const int64_t *runs, size_t n, size_t *run, size_t *page, size_t budget) noexcept nogil
    # (AnswerKind, first, count) triples, at most `count` of them; returns how many.
    cdef size_t c_resolve(self, size_t first, size_t count, bint again, int64_t *answers) noexcept nogil

    # A sync: fetch into _log_fetched, then receive; re-arm; that done, publish, which returns the newly owed pages.
    cdef void c_receive(self, bint last) noexcept nogil
    cdef size_t c_publish(self) noexcept nogil
    # The first chunk with pages of [low, high) that waits for its re-arm, or SIZE_MAX; what to re-arm of it, as a range
    # of log pages and bits in _wanted; and what follows when that is done.
    cdef size_t c_pending_chunk(self, size_t low, size_t high) noexcept nogil
    cdef size_t c_want(self, size_t chunk, size_t *first, size_t *count) noexcept nogil
    cdef void c_armed(self, size_t chunk) noexcept nogil
    # The end of the pages whose re-arm is that of `page`.
    cdef size_t c_end_of_chunk(self, size_t page) noexcept nogil

    # The switch and recovery.
    cdef void c_settle(self) noexcept nogil
    cdef void c_prepare_lists(self) noexcept nogil
    cdef void c_copy_unsent(self, Bitmap copy) noexcept nogil
    cdef void c_copy_free(self, Bitmap copy) noexcept nogil
    cdef size_t c_owe_hinted(self) noexcept nogil
    cdef void c_owe_all(self) noexcept nogil
    cdef void c_reload(self, Bitmap settled) noexcept nogil
    cdef size_t c_dirty_count(self) noexcept nogil
    cdef size_t c_hinted_count(self) noexcept nogil
    cdef size_t c_marked_count(self) noexcept nogil
