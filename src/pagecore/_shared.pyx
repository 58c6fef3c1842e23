"""What the parts of a placement loop share: counters, the first failure, and who waits for progress."""

from libc.stdint cimport UINT64_MAX, uint64_t

from pagecore._atomic cimport (
    pagecore_fence_after_rmw,
    pagecore_fetch_add,
    pagecore_load_relaxed,
    pagecore_store_relaxed,
    pagecore_store_release,
)
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_enter,
    pagecore_monitor_leave,
    pagecore_monitor_notify,
    pagecore_now_ns,
)


cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int descriptor, uint64_t value)


cdef void notify_inside(PlacementShared *shared) noexcept nogil:
    cdef int descriptor = shared.wake_fd
    shared.notifications += 1
    pagecore_monitor_notify(<pagecore_monitor *>shared.monitor)
    if descriptor >= 0:
        # Once: a page a time would be a call of the kernel for each, and whoever looks asks again.
        shared.wake_fd = -1
        eventfd_write(descriptor, 1)


cdef void notify_progress(PlacementShared *shared) noexcept nogil:
    pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
    notify_inside(shared)
    pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)


cdef void note_failure(PlacementShared *shared, int kind, int error, const char *what, uint64_t page) noexcept nogil:
    """Keep the first failure and wake whoever waits for progress."""
    pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
    if shared.failure.kind == FAILURE_NONE:
        shared.failure.error = error
        shared.failure.what = what
        shared.failure.page = page
        pagecore_store_release(&shared.failure.kind, kind)
    notify_inside(shared)
    pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)


cdef void count_resident(PlacementShared *shared, uint64_t pages) noexcept nogil:
    cdef uint64_t resident = pagecore_fetch_add(&shared.resident, pages) + pages
    # A waiter stores its target and then reads `resident`, inside the monitor; here it is the other way round.
    pagecore_fence_after_rmw()
    if resident >= pagecore_load_relaxed(&shared.milestone):
        _note_milestones(shared, resident)
    if resident >= pagecore_load_relaxed(&shared.resident_target):
        notify_progress(shared)


cdef void _note_milestones(PlacementShared *shared, uint64_t resident) noexcept nogil:
    cdef uint64_t now = pagecore_now_ns()
    pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
    while shared.percent < PERCENTS and resident >= shared.milestone:
        pagecore_store_relaxed(&shared.reached_ns[shared.percent], now - shared.started_ns)
        shared.percent += 1
        pagecore_store_release(&shared.milestone, _milestone(shared))
    notify_inside(shared)
    pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)


cdef uint64_t _milestone(PlacementShared *shared) noexcept nogil:
    """How many pages have to come after the start until `percent` of all are resident."""
    cdef uint64_t needed
    if shared.percent >= PERCENTS:
        return UINT64_MAX
    needed = (shared.total * shared.percent + 99) // 100
    return needed - shared.resident_before if needed > shared.resident_before else 0


cdef void start_clock(PlacementShared *shared, uint64_t total, uint64_t resident) noexcept nogil:
    shared.total = total
    shared.resident_before = resident
    shared.started_ns = pagecore_now_ns()
    shared.percent = 0
    while shared.percent < PERCENTS and _milestone(shared) == 0:
        shared.percent += 1
    shared.milestone = _milestone(shared)


cdef bint put_demand(PlacementShared *shared, void *placer, uint64_t first, uint64_t count) noexcept nogil:
    cdef QueuedRun *run
    cdef bint put = False
    pagecore_monitor_enter(<pagecore_monitor *>shared.monitor)
    if shared.demand_end - shared.demand_first < DEMAND_RUNS:
        run = &shared.demand[shared.demand_end % DEMAND_RUNS]
        run.placer = placer
        run.first = first
        run.count = count
        pagecore_store_relaxed(&shared.demand_end, shared.demand_end + 1)     # c_run_demand looks without the monitor
        notify_inside(shared)
        put = True
    pagecore_monitor_leave(<pagecore_monitor *>shared.monitor)
    return put


cdef bint take_demand(PlacementShared *shared, QueuedRun *run) noexcept nogil:
    if shared.demand_first == shared.demand_end:
        return False
    run[0] = shared.demand[shared.demand_first % DEMAND_RUNS]
    pagecore_store_relaxed(&shared.demand_first, shared.demand_first + 1)
    return True
