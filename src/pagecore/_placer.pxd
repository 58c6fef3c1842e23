from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore._page_state cimport PageState
from pagecore._uffd cimport PlaceOutcome, PlaceStep, Region
from pagecore._waiters cimport Latency, Waiters
from pagecore.page_source._protocol cimport PageSource

cdef enum:
    CHUNK_PAGES = 16            # D5: a hold of the shared side is one ioctl of at most 64 KiB

cdef enum Content:
    CONTENT_DATA = 0            # bytes that came from the source
    CONTENT_ZERO = 1            # the page is zeros
    CONTENT_FILL = 2            # a hinted page: the session's fill

cdef enum FaultClass:
    FAULT_OWED = 0              # placed with content of the source
    FAULT_HINTED = 1            # filled here, no round trip
    FAULT_RELEASED = 2          # zeros after a discard by the guest
    FAULT_PRESENT = 3           # was there already and only had to be woken
    FAULT_CLASSES = 4

cdef struct PlacementCounters:
    uint64_t placed             # pages whose content came from the source
    uint64_t zeroed             # zero pages of the source
    uint64_t filled             # hinted pages
    uint64_t refilled           # zero fills of released pages; may repeat (D3)
    uint64_t duplicates         # copies of pages that were claimed already (D1)
    uint64_t dropped            # copies of released or excluded pages (D3)
    uint64_t foreign            # EEXIST on a page that we had claimed and never placed (D2)
    uint64_t deferred           # EAGAIN or ENOMEM: parked and tried again (D7)
    uint64_t gone               # pages whose memory is no longer mapped or registered
    uint64_t lost               # received pages that were found missing (D15)
    uint64_t poisoned           # pages that fail closed (D12)
    uint64_t faults             # fault messages read
    uint64_t requested          # pages asked of the source (D9)
    uint64_t already_sent       # "already sent" answers, pages
    uint64_t removed            # pages that a discard of the guest released
    uint64_t unsampled          # faults whose latency was not kept: the table was full

cdef enum FailureKind:
    FAILURE_NONE = 0
    FAILURE_KERNEL = 1          # a placement or a read failed for good: errno
    FAILURE_PEER_GONE = 2       # the process whose memory this is has ended
    FAILURE_SOURCE = 3          # the source failed: errno
    FAILURE_PROTOCOL = 4        # a frame was wrong: field
    FAILURE_DUPLICATE = 5       # a strict peer sent a page twice
    FAILURE_FOREIGN = 6         # a strict session met a page that nobody placed
    FAILURE_OUTSIDE = 7         # a fault outside every region: address
    FAILURE_REMAPPED = 8        # the guest memory was moved, which this loop does not follow
    FAILURE_LOST = 9            # a received page was missing (D15)

cdef struct Failure:
    uint64_t kind               # written once, by the first that fails
    int error
    const char *what
    uint64_t page

cdef struct PlacementShared:
    void *monitor               # guards parking, the prefetch queue, latencies and the waits for progress
    uint64_t stopping
    uint64_t notifications      # inside the monitor: how often it was notified
    uint64_t parked             # pages of content that wait for a retry
    uint64_t pending            # a page somewhere wants to be served again
    uint64_t resident           # pages received since the start
    uint64_t resident_target    # notify the monitor when `resident` reaches it
    bint strict
    bint poison_lost
    PlacementCounters counters
    Latency latency[FAULT_CLASSES]
    Failure failure

cdef void notify_progress(PlacementShared *shared) noexcept nogil
cdef void note_failure(PlacementShared *shared, int kind, int error, const char *what, uint64_t page) noexcept nogil

cdef struct Parked:
    uint64_t page
    int content
    bint used


cdef class PlacementObserver:
    """Told of every page at the moment the kernel has accepted it, on the placing thread, under the shared side."""

    cdef void c_placed(self, uint32_t region, uint64_t first, uint64_t count, const uint8_t *data) noexcept nogil


cdef class Placer:
    """One region: rules D1 to D15 for one run, one fault, one event at a time. All methods are nogil."""

    cdef readonly Region region
    cdef readonly PageState state
    cdef PageSource _source
    cdef PlacementObserver _observer
    cdef PlacementShared *_shared
    cdef Waiters _waiters
    cdef Bitmap _rewoken            # D15: a fault came for a received page, which was woken
    cdef Bitmap _again              # asked for `again`: a second copy is no fault of the peer's (S7)
    cdef Bitmap _pending            # serve the page again, by the retry thread (D7)
    cdef uint8_t *_fill             # CHUNK_PAGES of the fill; NULL where the fill is zeros
    cdef Parked *_parking
    cdef uint8_t *_parked_data
    cdef uint64_t _removed_first    # hull of what the events of the current batch released
    cdef uint64_t _removed_end

    cdef void c_place(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    # Before anything else: what all placers of a loop share.
    cdef void c_join(self, PlacementShared *shared) noexcept nogil
    cdef bint c_owns(self, uint64_t address) noexcept nogil
    cdef uint64_t c_page_of(self, uint64_t address) noexcept nogil
    # The reader, under the exclusive side.
    cdef void c_note_fault(self, uint64_t page, uint64_t now) noexcept nogil
    cdef void c_apply_remove(self, uint64_t start, uint64_t end) noexcept nogil
    cdef void c_apply_unmap(self, uint64_t start, uint64_t end) noexcept nogil
    # Anyone, holding neither side.
    cdef void c_serve(self, uint64_t page) noexcept nogil
    cdef void c_serve_removed(self) noexcept nogil
    cdef void c_ask_anew(self) noexcept nogil
    cdef void c_give_up(self, uint64_t first, uint64_t count) noexcept nogil
    cdef void c_request(self, uint64_t first, uint64_t count, bint again) noexcept nogil
    cdef void c_forget(self, uint64_t first, uint64_t count) noexcept nogil
    cdef bint c_retry(self) noexcept nogil          # true while something is left
    cdef void c_abandon(self) noexcept nogil

    cdef void _place_chunk(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef uint64_t _place_won(self, uint64_t first, uint64_t won, const uint8_t *data, int content) noexcept nogil
    cdef int _issue(self, uint64_t first, uint64_t count, const uint8_t *data, int content,
                    PlaceStep *step) noexcept nogil
    cdef void _accept(self, uint64_t first, uint64_t count, const uint8_t *data, int content) noexcept nogil
    cdef void _accept_foreign(self, uint64_t page) noexcept nogil
    cdef void _finish_waiting(self, uint64_t first, uint64_t count, int fault_class) noexcept nogil
    cdef void _park(self, uint64_t first, uint64_t mask, const uint8_t *data, int content) noexcept nogil
    cdef bint _retry_parked(self, Parked *entry, const uint8_t *data) noexcept nogil
    cdef void _serve_waiting(self, uint64_t page, uint64_t end) noexcept nogil
    cdef void _serve_later(self, uint64_t page) noexcept nogil
    cdef void _serve_released(self, uint64_t page) noexcept nogil
    cdef void _serve_excluded(self, uint64_t page) noexcept nogil
    cdef bint _serve_received(self, uint64_t page) noexcept nogil
    cdef void _serve_claimable(self, uint64_t page, bint hinted) noexcept nogil
    cdef void _ask(self, uint64_t page) noexcept nogil
    cdef void _probe_lost(self, uint64_t page) noexcept nogil
    cdef void _count_resident(self, uint64_t pages) noexcept nogil
