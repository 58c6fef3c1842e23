"""PlacementEngine: what the threads of a placement loop do, without the GIL from read to wake."""

from libc.errno cimport EINTR, EPROTO, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_acquire, pagecore_load_relaxed
from pagecore._placer cimport (
    CHUNK_PAGES,
    CONTENT_DATA,
    CONTENT_FILL,
    CONTENT_ZERO,
    FAILURE_KERNEL,
    FAILURE_OUTSIDE,
    FAILURE_PROTOCOL,
    FAILURE_REMAPPED,
    FAILURE_SOURCE,
    Placer,
    note_failure,
    notify_progress,
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
from pagecore._uffd cimport EVENT_FAULT, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, UffdEvent
from pagecore.page_source._protocol cimport (
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

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    enum: POLLIN

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *delay, timespec *left)


cdef class PlacementEngine:
    def __cinit__(self, *args, **kwargs):
        memset(&self._shared, 0, sizeof(self._shared))
        self._stop_fd = self._poll_fd = -1
        self._shared.resident_target = UINT64_MAX
        self._shared.monitor = malloc(sizeof(pagecore_monitor))
        if self._shared.monitor == NULL or pagecore_monitor_init(<pagecore_monitor *>self._shared.monitor) != 0:
            free(self._shared.monitor)
            self._shared.monitor = NULL
            raise MemoryError()

    def __dealloc__(self):
        # The threads hold references: whoever comes here has stopped, or was never started.
        free(self._queue)
        free(self._placers)
        if self._shared.monitor != NULL:
            pagecore_monitor_destroy(<pagecore_monitor *>self._shared.monitor)
            free(self._shared.monitor)

    # The reader ----------------------------------------------------------------------------------------------------

    cdef void c_read_events(self) noexcept nogil:
        cdef pollfd waits[2]
        while not pagecore_load_relaxed(&self._shared.stopping):
            waits[0].fd = self._poll_fd
            waits[0].events = POLLIN
            waits[0].revents = 0
            waits[1].fd = self._stop_fd
            waits[1].events = POLLIN
            waits[1].revents = 0
            if poll(waits, 2, -1) < 0 and errno != EINTR:
                note_failure(&self._shared, FAILURE_KERNEL, errno, b"poll", 0)
                return
            if waits[1].revents:
                return
            if waits[0].revents and not self.c_read_batch():
                return

    cdef bint c_read_batch(self) noexcept nogil:
        """Drain the descriptor, apply its events, then serve its faults (D4). False when reading is over."""
        cdef UffdEvent events[EVENT_BATCH]
        cdef uint64_t addresses[FAULT_BATCH]
        cdef size_t faults = 0
        cdef size_t fault
        cdef int index, got
        cdef uint64_t now
        # D5: exclusive over read() and the marking. Otherwise a placer that had checked before could place old data
        # after the guest's discard was let go on by our read().
        for index in range(self._count):
            (<Placer>self._placers[index]).state.c_lock_exclusive()
        while True:
            got = self.uffd.c_read(events, EVENT_BATCH)
            if got <= 0:
                break
            now = pagecore_now_ns()
            for fault in range(<size_t>got):
                if events[fault].kind == EVENT_FAULT:
                    self._note_fault(events[fault].start, now, addresses, &faults)
                else:
                    self._apply_event(&events[fault])
        for index in range(self._count):
            (<Placer>self._placers[index]).state.c_unlock()
        if got < 0:
            note_failure(&self._shared, FAILURE_KERNEL, -got, b"read", 0)
            return False
        for index in range(self._count):
            (<Placer>self._placers[index]).c_serve_removed()
        for fault in range(faults):
            for index in range(self._count):
                if (<Placer>self._placers[index]).c_owns(addresses[fault]):
                    (<Placer>self._placers[index]).c_serve((<Placer>self._placers[index]).c_page_of(addresses[fault]))
        return True

    cdef void _note_fault(self, uint64_t address, uint64_t now, uint64_t *addresses, size_t *faults) noexcept nogil:
        cdef int index
        for index in range(self._count):
            if (<Placer>self._placers[index]).c_owns(address):
                (<Placer>self._placers[index]).c_note_fault((<Placer>self._placers[index]).c_page_of(address), now)
                if faults[0] < FAULT_BATCH:
                    addresses[faults[0]] = address
                    faults[0] += 1
                else:
                    (<Placer>self._placers[index])._serve_later((<Placer>self._placers[index]).c_page_of(address))
                return
        note_failure(&self._shared, FAILURE_OUTSIDE, 0, b"fault", address)     # D14: fail, and name the regions

    cdef void _apply_event(self, const UffdEvent *event) noexcept nogil:
        cdef int index
        if event.kind == EVENT_REMAP:
            note_failure(&self._shared, FAILURE_REMAPPED, 0, b"mremap", event.start)
            return
        for index in range(self._count):
            if event.kind == EVENT_REMOVE:
                (<Placer>self._placers[index]).c_apply_remove(event.start, event.end)
            elif event.kind == EVENT_UNMAP:
                (<Placer>self._placers[index]).c_apply_unmap(event.start, event.end)

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
        while not pagecore_load_relaxed(&self._shared.stopping):
            self.source.c_next(lane, self._stop_fd, &answer)
            if answer.kind == ANSWER_STOPPED:
                return
            if answer.kind == ANSWER_FAILED:
                note_failure(&self._shared, FAILURE_PROTOCOL if answer.error == EPROTO else FAILURE_SOURCE,
                             answer.error, answer.field, answer.first)
                if answer.count == 0:
                    return              # the lane itself
                answer.kind = ANSWER_GONE       # one run: it fails closed, the others go on (D12)
            if answer.kind == ANSWER_END:
                if lane < self.source.bulk_lanes:
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
            if answer.kind == ANSWER_PAGES:
                (<Placer>placer).c_place(answer.first, answer.count, answer.data, CONTENT_DATA)
            elif answer.kind == ANSWER_ZEROS:
                (<Placer>placer).c_place(answer.first, answer.count, NULL, CONTENT_ZERO)
            elif answer.kind == ANSWER_FILL:
                (<Placer>placer).c_place(answer.first, answer.count, NULL, CONTENT_FILL)
            elif answer.kind == ANSWER_SENT:
                # D9: `requested` stays set; the page is on its way on another stream.
                pagecore_fetch_add(&self._shared.counters.already_sent, answer.count)
            elif answer.kind == ANSWER_GONE:
                (<Placer>placer).c_give_up(answer.first, answer.count)
            if lane >= self.source.bulk_lanes:
                notify_progress(&self._shared)

    cdef void c_run_prefetch(self) noexcept nogil:
        """Place queued runs from a pull source, a chunk at a time, beside the other prefetching threads."""
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef QueuedRun run
        cdef QueuedRun *last
        while True:
            pagecore_monitor_enter(monitor)
            while self._queue_length == 0 and not pagecore_load_relaxed(&self._shared.stopping):
                pagecore_monitor_wait(monitor, pagecore_now_ns() + IDLE_NS)
            if pagecore_load_relaxed(&self._shared.stopping):
                pagecore_monitor_leave(monitor)
                return
            last = &self._queue[self._queue_length - 1]
            run = last[0]
            run.count = min(run.count, <uint64_t>CHUNK_PAGES)
            last.first += run.count
            last.count -= run.count
            if last.count == 0:
                self._queue_length -= 1
            self._busy += 1
            pagecore_monitor_leave(monitor)
            self._fetch_and_place(&run)
            pagecore_monitor_enter(monitor)
            self._busy -= 1
            pagecore_monitor_leave(monitor)
            notify_progress(&self._shared)

    cdef void _fetch_and_place(self, QueuedRun *run) noexcept nogil:
        cdef PageAnswer answer
        cdef uint64_t done
        while run.count and not pagecore_load_relaxed(&self._shared.stopping):
            answer.data = NULL
            answer.field = NULL
            answer.first = run.first
            answer.count = run.count
            self.source.c_fetch((<Placer>run.placer).region.id, run.first, run.count, &answer)
            # A source may answer for a part: up to the next hole, or as much as it reads at once.
            done = min(answer.count, run.count)
            if answer.kind == ANSWER_PAGES and done:
                (<Placer>run.placer).c_place(run.first, done, answer.data, CONTENT_DATA)
            elif answer.kind == ANSWER_ZEROS and done:
                (<Placer>run.placer).c_place(run.first, done, NULL, CONTENT_ZERO)
            else:
                if answer.field == NULL:
                    answer.field = b"fetch"
                note_failure(&self._shared, FAILURE_SOURCE, answer.error, answer.field, answer.first)
                return
            run.first += done
            run.count -= done

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
