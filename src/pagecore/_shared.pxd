from libc.stdint cimport uint64_t

from pagecore._waiters cimport Latency

cdef enum FaultClass:
    FAULT_OWED = 0              # placed with content of the source
    FAULT_HINTED = 1            # filled here, no round trip
    FAULT_RELEASED = 2          # zeros after a discard by the guest
    FAULT_PRESENT = 3           # was there already and only had to be woken
    FAULT_CLASSES = 4

cdef struct PlacementCounters:
    uint64_t placed             # pages whose content came from the source
    uint64_t moved              # of those placed, the ones that went by MOVE, out of whole blocks
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
    uint64_t ahead              # pages placed around a fault, before anybody touched them
    uint64_t background         # pages placed by the background fill
    uint64_t fetches            # calls of a source that may sleep
    uint64_t fetch_ns           # the time that they took, in all
    uint64_t forks              # children of the process, never served
    uint64_t shortages          # calls that the kernel had no memory for (ENOMEM); all are tried again

# What became of a page, by what it was to hold.
cdef enum:
    CLASS_NEW = 0               # content of the source
    CLASS_ZERO = 1              # zeros, or the fill of a hinted page
    CLASS_RESIDENT = 2          # received before: a fault came for it all the same
    PAGE_CLASSES = 3

cdef enum:
    RESULT_INSTALLED = 0
    RESULT_PRESENT = 1          # it was there, or somebody else is placing it
    RESULT_DEFERRED = 2         # the kernel said "again"; the same page counts under its final result later
    RESULT_DISCARDED = 3        # released or excluded meanwhile, or its memory is gone
    RESULT_ERROR = 4
    PAGE_RESULTS = 5

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
    FAILURE_FORKED = 10         # the process forked, and its child cannot be served
    FAILURE_STREAM = 11         # a stream of a push source ended or failed: errno

cdef struct Failure:
    uint64_t kind               # written once, by the first that fails
    int error
    const char *what
    uint64_t page

cdef enum:
    PERCENTS = 101
    DEMAND_RUNS = 4096          # faults that wait for a source that may sleep; allocated once (trap 44)

cdef struct QueuedRun:
    void *placer                # borrowed
    uint64_t first
    uint64_t count

cdef struct PlacementShared:
    void *monitor               # guards parking, the queues, latencies and the waits for progress
    uint64_t stopping
    uint64_t notifications      # inside the monitor: how often it was notified
    int wake_fd                 # inside the monitor: an eventfd of somebody else's that is written to once; -1: none
    uint64_t parked             # pages of content that wait for a retry; written inside the monitor
    uint64_t pending            # a page somewhere wants to be served again
    uint64_t resident           # pages received since the start
    uint64_t resident_target    # notify the monitor when `resident` reaches it
    uint64_t resident_before    # pages received before the start
    uint64_t total              # pages of all regions
    uint64_t started_ns
    uint64_t milestone          # `resident` at which the next entry of `reached_ns` is written
    uint64_t reached_ns[PERCENTS]   # after the start; 0: not yet, or before it
    uint64_t percent            # inside the monitor: the next entry of `reached_ns`
    QueuedRun *demand           # a ring
    uint64_t demand_first       # how many were taken, and how many were put: written inside the monitor
    uint64_t demand_end
    bint strict
    bint poison_lost
    PlacementCounters counters
    uint64_t outcomes[PAGE_CLASSES][PAGE_RESULTS]
    Latency latency[FAULT_CLASSES]
    Failure failure

cdef void notify_progress(PlacementShared *shared) noexcept nogil
cdef void note_failure(PlacementShared *shared, int kind, int error, const char *what, uint64_t page) noexcept nogil
cdef void notify_inside(PlacementShared *shared) noexcept nogil
cdef void count_resident(PlacementShared *shared, uint64_t pages) noexcept nogil
# Before the threads run: when 1 %, 2 %, ... of the pages are resident is measured from now on.
cdef void start_clock(PlacementShared *shared, uint64_t total, uint64_t resident) noexcept nogil
# False: the ring is full.
cdef bint put_demand(PlacementShared *shared, void *placer, uint64_t first, uint64_t count) noexcept nogil
# Inside the monitor. False: it is empty.
cdef bint take_demand(PlacementShared *shared, QueuedRun *run) noexcept nogil
