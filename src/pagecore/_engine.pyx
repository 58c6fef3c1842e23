"""PlacementEngine: what the threads of a placement loop do, without the GIL from read to wake."""

from libc.errno cimport EPROTO
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_acquire, pagecore_load_relaxed
from pagecore._parking cimport CONTENT_CONTINUE, CONTENT_DATA, CONTENT_FILL, CONTENT_ZERO
from pagecore._move cimport BLOCK_PAGES
from pagecore._placer cimport Placer
from pagecore._reader cimport Reader
from pagecore._shared cimport (
    DEMAND_RUNS,
    FAILURE_PROTOCOL,
    FAILURE_SOURCE,
    FAILURE_STREAM,
    QueuedRun,
    note_failure,
    notify_progress,
    take_demand,
)
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_destroy,
    pagecore_monitor_enter,
    pagecore_monitor_init,
    pagecore_monitor_leave,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore.page_source._protocol cimport (
    ANSWER_CONTINUE,
    ANSWER_END,
    ANSWER_FAILED,
    ANSWER_FILL,
    ANSWER_GONE,
    ANSWER_PAGES,
    ANSWER_SENT,
    ANSWER_STOPPED,
    ANSWER_ZEROS,
    PageAnswer,
)

cdef extern from "_turns.h" nogil:
    void pagecore_give_way()
    void pagecore_let_by(uint64_t *not_before)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *delay, timespec *left)


# After so many pieces of bulk without a fault the lanes leave no more turns until the next.
cdef enum:
    QUIET_PIECES = 64


cdef class PlacementEngine:
    def __cinit__(self, *args, **kwargs):
        memset(&self._shared, 0, sizeof(self._shared))
        self._stop_fd = self._shared.wake_fd = -1
        self._shared.resident_target = UINT64_MAX
        self._shared.monitor = malloc(sizeof(pagecore_monitor))
        if self._shared.monitor == NULL or pagecore_monitor_init(<pagecore_monitor *>self._shared.monitor) != 0:
            free(self._shared.monitor)
            self._shared.monitor = NULL
            raise MemoryError()
        self._shared.demand = <QueuedRun *>calloc(DEMAND_RUNS, sizeof(QueuedRun))
        if self._shared.demand == NULL:
            raise MemoryError()

    def __dealloc__(self):
        # The threads hold references: whoever comes here has stopped, or was never started.
        free(self._queue)
        free(self._placers)
        free(self._readers)
        free(self._shared.demand)
        if self._shared.monitor != NULL:
            pagecore_monitor_destroy(<pagecore_monitor *>self._shared.monitor)
            free(self._shared.monitor)

    cdef bint c_read_batch(self) noexcept nogil:
        cdef int index
        cdef bint alive = True
        for index in range(self._reader_count):
            alive = (<Reader>self._readers[index]).c_read_batch() and alive
        return alive

    # Placers -------------------------------------------------------------------------------------------------------

    cdef void *_placer_of_region(self, uint32_t region) noexcept nogil:
        cdef int index
        for index in range(self._count):
            if <uint32_t>(<Placer>self._placers[index]).region.id == region:
                return self._placers[index]
        return NULL

    cdef void c_run_lane(self, int lane) noexcept nogil:
        """One stream of a push source: take an answer, place it."""
        cdef PageAnswer answer
        cdef void *placer
        cdef bint bulk = lane < self.source.bulk_lanes
        cdef uint64_t faults = 0
        cdef uint64_t no_turn_before = 0
        cdef int quiet = QUIET_PIECES
        cdef bint urgent
        if bulk:
            pagecore_give_way()     # to the guest's threads, to the reader, and to the lane of who waits
        while not pagecore_load_relaxed(&self._shared.stopping):
            # Only where faults come: turns that nobody needs cost a sixth of the throughput, and blocks are moved faster.
            quiet = min(quiet + 1, <int>QUIET_PIECES)
            if faults != pagecore_load_relaxed(&self._shared.counters.faults):
                faults = pagecore_load_relaxed(&self._shared.counters.faults)
                quiet = 0
            answer.urgent = urgent = bulk and quiet < QUIET_PIECES
            answer.block = 0            # for sources that know nothing of it
            self.source.c_next(lane, self._stop_fd, &answer)
            if answer.kind == ANSWER_STOPPED:
                return
            if answer.kind == ANSWER_FAILED:
                if answer.error == EPROTO:
                    note_failure(&self._shared, FAILURE_PROTOCOL, EPROTO, answer.field, answer.first)
                elif answer.count == 0:
                    note_failure(&self._shared, FAILURE_STREAM, answer.error, NULL, 0)
                else:
                    note_failure(&self._shared, FAILURE_SOURCE, answer.error, answer.field, answer.first)
                if answer.count == 0:
                    return              # the lane itself
                answer.kind = ANSWER_GONE       # one run: it fails closed, the others go on (D12)
            if answer.kind == ANSWER_END:
                if bulk:
                    pagecore_fetch_add(&self._lanes_ended, 1)
                notify_progress(&self._shared)
                return
            placer = self._placer_of_region(answer.region)
            if placer == NULL:
                note_failure(&self._shared, FAILURE_PROTOCOL, EPROTO, b"region", answer.region)
                return
            # D14: 64-bit, and never trusted.
            if answer.count > (<Placer>placer).region.size or answer.first > (<Placer>placer).region.size - answer.count:
                note_failure(&self._shared, FAILURE_PROTOCOL, EPROTO, b"first", answer.first)
                return
            if (answer.kind == ANSWER_PAGES and answer.block and self._mover is not None
                    and answer.count == BLOCK_PAGES):
                (<Placer>placer).c_place_block(answer.first, self._mover, answer.block - 1)
            elif answer.kind == ANSWER_PAGES:
                (<Placer>placer).c_place(answer.first, answer.count, answer.data, CONTENT_DATA)
            elif answer.kind == ANSWER_ZEROS:
                (<Placer>placer).c_place(answer.first, answer.count, NULL, CONTENT_ZERO)
            elif answer.kind == ANSWER_FILL:
                (<Placer>placer).c_place(answer.first, answer.count, NULL, CONTENT_FILL)
            elif answer.kind == ANSWER_CONTINUE:
                (<Placer>placer).c_place(answer.first, answer.count, answer.data, CONTENT_CONTINUE)
            elif answer.kind == ANSWER_SENT:
                # D9: `requested` stays set; the page is on its way on another stream.
                pagecore_fetch_add(&self._shared.counters.already_sent, answer.count)
            elif answer.kind == ANSWER_GONE:
                (<Placer>placer).c_give_up(answer.first, answer.count, UINT64_MAX)
            if urgent:
                pagecore_let_by(&no_turn_before)
            if not bulk:
                notify_progress(&self._shared)

    cdef void c_run_demand(self) noexcept nogil:
        """Faults that wait for a source that may sleep: a lane of their own, which never waits behind the bulk's."""
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef QueuedRun run
        cdef uint64_t done
        cdef bint guess
        while True:
            run.count = 0
            pagecore_monitor_enter(monitor)
            while not pagecore_load_relaxed(&self._shared.stopping) and not take_demand(&self._shared, &run):
                pagecore_monitor_wait(monitor, pagecore_now_ns() + IDLE_NS)
            pagecore_monitor_leave(monitor)
            # The first chunk holds the page that is waited for; the others are a guess, and give way to who waits.
            guess = False
            while run.count and not pagecore_load_relaxed(&self._shared.stopping):
                done = (<Placer>run.placer).c_fetch_and_place(run.first, min(run.count, (<Placer>run.placer).c_chunk), guess)
                # A glance: a fault that is put right after it is seen after the next chunk.
                if (done == 0 or pagecore_load_relaxed(&self._shared.demand_first)
                        != pagecore_load_relaxed(&self._shared.demand_end)):
                    break
                guess = True
                run.first += done
                run.count -= done
            if pagecore_load_relaxed(&self._shared.stopping):
                return

    cdef void c_run_prefetch(self) noexcept nogil:
        """Place queued runs from a pull source, a chunk at a time, then what nobody has asked for."""
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef QueuedRun run
        cdef QueuedRun *last
        cdef uint64_t done, until
        cdef bint background
        while True:
            pagecore_monitor_enter(monitor)
            background = False
            while not pagecore_load_relaxed(&self._shared.stopping) and self._queue_length == 0:
                background = self._background.c_take(&self._shared, self._placers, self._count, &run, &until)
                if background:
                    break
                pagecore_monitor_wait(monitor, min(until, pagecore_now_ns() + IDLE_NS))
            if pagecore_load_relaxed(&self._shared.stopping):
                pagecore_monitor_leave(monitor)
                return
            if not background:
                last = &self._queue[self._queue_length - 1]
                run = last[0]
                run.count = min(run.count, (<Placer>run.placer).c_chunk)
                last.first += run.count
                last.count -= run.count
                if last.count == 0:
                    self._queue_length -= 1
            self._busy += 1
            pagecore_monitor_leave(monitor)
            while run.count and not pagecore_load_relaxed(&self._shared.stopping):
                done = (<Placer>run.placer).c_fetch_and_place(run.first, run.count, False)
                if done == 0:
                    break
                if background:
                    pagecore_fetch_add(&self._shared.counters.background, done)
                run.first += done
                run.count -= done
            pagecore_monitor_enter(monitor)
            self._busy -= 1
            pagecore_monitor_leave(monitor)
            if not background:
                notify_progress(&self._shared)

    cdef void c_run_retry(self) noexcept nogil:
        """What met EAGAIN is tried again on a timer (D7): never a spin, never a sleep without an end."""
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef timespec delay
        cdef int index
        cdef bint left
        while not pagecore_load_relaxed(&self._shared.stopping):
            pagecore_monitor_enter(monitor)
            while (self._shared.parked == 0 and self._shared.pending == 0
                   and not pagecore_load_relaxed(&self._shared.stopping)):
                pagecore_monitor_wait(monitor, pagecore_now_ns() + IDLE_NS)
            self._shared.pending = 0
            pagecore_monitor_leave(monitor)
            delay.tv_sec = 0
            delay.tv_nsec = RETRY_FIRST_NS
            left = True
            while left and not pagecore_load_relaxed(&self._shared.stopping):
                nanosleep(&delay, NULL)
                delay.tv_nsec = min(delay.tv_nsec * 2, <long>RETRY_LAST_NS)
                left = False
                for index in range(self._count):
                    left |= (<Placer>self._placers[index]).c_retry()
            notify_progress(&self._shared)

    # Waiting work --------------------------------------------------------------------------------------------------------

    cdef void c_request(self, void *placer, const int64_t *pairs, size_t n, bint again) noexcept nogil:
        cdef size_t run
        for run in range(n):
            if pairs[2 * run + 1]:
                (<Placer>placer).c_request(pairs[2 * run], pairs[2 * run + 1], again)

    cdef bint c_enqueue(self, void *placer, const int64_t *pairs, size_t n) noexcept nogil:
        """Put runs on the prefetch queue, which is taken from its end: the first run goes last. False: no memory."""
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef QueuedRun *grown
        cdef size_t run
        pagecore_monitor_enter(monitor)
        if self._queue_capacity - self._queue_length < n:
            grown = <QueuedRun *>realloc(self._queue, (self._queue_length + n) * sizeof(QueuedRun))
            if grown == NULL:
                pagecore_monitor_leave(monitor)
                return False
            self._queue = grown
            self._queue_capacity = self._queue_length + n
        for run in range(n):
            if pairs[2 * (n - run) - 1]:
                self._queue[self._queue_length].placer = placer
                self._queue[self._queue_length].first = pairs[2 * (n - run) - 2]
                self._queue[self._queue_length].count = pairs[2 * (n - run) - 1]
                self._queue_length += 1
        pagecore_monitor_leave(monitor)
        notify_progress(&self._shared)
        return True

    cdef bint c_bulk_done(self) noexcept nogil:
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef bint done
        cdef int index
        pagecore_monitor_enter(monitor)
        done = (self._shared.parked == 0 and self._queue_length == 0 and self._busy == 0
                and pagecore_load_acquire(&self._lanes_ended) == <uint64_t>self.source.bulk_lanes)
        pagecore_monitor_leave(monitor)
        for index in range(self._count):
            done = done and (<Placer>self._placers[index])._pending.c_count() == 0
        return done
