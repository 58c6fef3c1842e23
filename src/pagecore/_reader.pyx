"""Reader: what the one reader of a descriptor does, without the GIL from read to wake."""

from libc.errno cimport EEXIST, EINTR, ESRCH, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

from pagecore._atomic cimport pagecore_fetch_add, pagecore_load_relaxed
from pagecore._discards cimport apply_remove, apply_unmap
from pagecore._placer cimport Placer
from pagecore._recorder cimport Recorder
from pagecore._shared cimport (
    FAILURE_FORKED,
    FAILURE_KERNEL,
    FAILURE_OUTSIDE,
    FAILURE_REMAPPED,
    PlacementShared,
    note_failure,
)
from pagecore._sync cimport pagecore_now_ns
from pagecore._uffd cimport (
    EVENT_FAULT,
    EVENT_FORK,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    Region,
    UffdEvent,
    Userfaultfd,
)
from pagecore._uffd_ioctl cimport OPERATION_POISON, OPERATION_UNPROTECT, REGISTER_WP, uffd_place
from pagecore._window cimport Window

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    enum: POLLIN

# A guest whose threads discard without end must not keep the reader from its faults (trap 44). The kernel hands events over
# in the order of their arrival, and each thread has one at a time: what came before a fault is among so many.
cdef enum:
    DRAIN_ROUNDS = 64
    TRY_EAGER = 16


cdef class Reader:
    def __cinit__(self, Userfaultfd uffd, placers, uint64_t window, Recorder recorder):
        cdef int index
        self.c_poll_fd = self.c_stop_fd = -1
        self._eager = True
        self.uffd = uffd
        self._recorder = recorder
        self._objects = tuple([placer for placer in placers if (<Placer>placer).region.c_served_by(uffd)])
        self.windows = tuple([Window(window * 4096 // (<Placer>placer).region.page_size) for placer in self._objects])
        self._count = len(self._objects)
        self._placers = <void **>calloc(self._count, sizeof(void *))
        self._windows = <void **>calloc(self._count, sizeof(void *))
        self._removed = <AheadRun *>calloc(self._count, sizeof(AheadRun))
        if self._placers == NULL or self._windows == NULL or self._removed == NULL:
            raise MemoryError()
        for index in range(self._count):
            self._placers[index] = <void *>self._objects[index]
            self._windows[index] = <void *>self.windows[index]

    def __dealloc__(self):
        free(self._placers)
        free(self._windows)
        free(self._removed)

    cdef void c_join(self, PlacementShared *shared) noexcept nogil:
        self._shared = shared

    cdef void c_run(self) noexcept nogil:
        cdef pollfd waits[2]
        waits[0].fd = self.c_poll_fd
        waits[0].events = POLLIN
        waits[1].fd = self.c_stop_fd
        waits[1].events = POLLIN
        while not pagecore_load_relaxed(&self._shared.stopping):
            if self._eager:
                if not self.c_read_batch():
                    return
                self._eager = self._came > 0
                continue
            waits[0].revents = waits[1].revents = 0
            # A fault goes before what nobody waits for, which goes on a chunk at a time.
            if poll(waits, 2, 0 if self._ahead_count else -1) < 0 and errno != EINTR:
                note_failure(self._shared, FAILURE_KERNEL, errno, b"poll", 0)
                return
            if waits[1].revents:
                return
            if waits[0].revents:
                if not self.c_read_batch():
                    return
                # Where a guest thread that was woken has faulted again by now, poll() is for nothing: that is tried as long
                # as it is so, and every now and then when it is not.
                self._polled += 1
                self._eager = self._polled % TRY_EAGER == 0
            else:
                self.c_place_ahead()

    cdef bint c_read_batch(self) noexcept nogil:
        cdef UffdEvent events[EVENT_BATCH]
        cdef ServedFault faults[FAULT_BATCH]
        cdef size_t count = 0
        cdef size_t fault
        cdef int index, event
        cdef int got = EVENT_BATCH
        cdef int rounds = 0
        cdef bint events_came = False
        self._came = 0
        cdef uint64_t now, done, around
        # D5: exclusive over read() and the marking. Otherwise a placer that had checked before could place old data
        # after the guest's discard was let go on by our read().
        for index in range(self._count):
            (<Placer>self._placers[index]).state.c_lock_exclusive()
        # Fewer than asked for: the kernel met EAGAIN itself, and the descriptor is drained (D4).
        while got == EVENT_BATCH and rounds < DRAIN_ROUNDS:
            rounds += 1
            got = self.uffd.c_read_forks(events, EVENT_BATCH)
            now = pagecore_now_ns() if got > 0 else 0
            self._came += max(got, 0)
            for event in range(got):
                if events[event].kind == EVENT_FAULT:
                    self._note_fault(events[event].start, now, faults, &count)
                else:
                    events_came = True
                    self._apply_event(&events[event])
        if events_came:
            # The other readers of these planes have hulls of their own: taken before they can change this one.
            for index in range(self._count):
                self._removed[index].first = (<Placer>self._placers[index])._removed_first
                self._removed[index].end = (<Placer>self._placers[index])._removed_end
                (<Placer>self._placers[index])._removed_first = UINT64_MAX
                (<Placer>self._placers[index])._removed_end = 0
        for index in range(self._count):
            (<Placer>self._placers[index]).state.c_unlock()
        if got < 0:
            note_failure(self._shared, FAILURE_KERNEL, -got, b"read", 0)
            return False
        if events_came:
            for index in range(self._count):
                if self._removed[index].end:
                    (<Placer>self._placers[index]).c_serve_removed(self._removed[index].first, self._removed[index].end)
        for fault in range(count):
            index = faults[fault].index
            if self._recorder.c_active:
                self._recorder.c_touched((<Placer>self._placers[index]).c_index, faults[fault].page)
                (<Placer>self._placers[index]).c_serve(faults[fault].page, None, 1, &done)
                continue
            around = (<Placer>self._placers[index]).c_serve(faults[fault].page, <Window>self._windows[index], 1, &done)
            if done < around:
                self._remember_ahead(index, faults[fault].page + (<Placer>self._placers[index]).c_chunk, faults[fault].page + around)
                if done == 0:
                    # Woken first, the guest would be at the end of the first chunk before the second is there. But nobody
                    # else waits for what nobody has touched.
                    while fault + 1 == count and self._is_newest(index, faults[fault].page + around):
                        if self._is_readable():
                            break
                        self.c_place_ahead()
                    (<Placer>self._placers[index]).c_serve(faults[fault].page, None, (<Placer>self._placers[index]).c_chunk, &done)
        return True

    cdef bint _is_newest(self, int index, uint64_t end) noexcept nogil:
        """Whether the guess that ends there has not been placed whole."""
        if self._ahead_count == 0:
            return False
        return self._ahead[self._ahead_count - 1].index == index and self._ahead[self._ahead_count - 1].end == end

    cdef bint _is_readable(self) noexcept nogil:
        cdef pollfd wait
        wait.fd = self.c_poll_fd
        wait.events = POLLIN
        wait.revents = 0
        return self.c_poll_fd >= 0 and poll(&wait, 1, 0) > 0

    cdef void _note_fault(self, uint64_t address, uint64_t now, ServedFault *faults, size_t *count) noexcept nogil:
        cdef uint64_t page
        cdef int index
        for index in range(self._count):
            if (<Placer>self._placers[index]).region.c_find(self.uffd, address, &page):
                (<Placer>self._placers[index]).c_note_fault(page, now)
                if count[0] < FAULT_BATCH:
                    faults[count[0]].index = index
                    faults[count[0]].page = page
                    count[0] += 1
                else:
                    (<Placer>self._placers[index])._serve_later(page)
                return
        note_failure(self._shared, FAILURE_OUTSIDE, 0, b"fault", address)      # D14: fail, and name the regions

    cdef void _apply_event(self, const UffdEvent *event) noexcept nogil:
        cdef int index
        if event.kind == EVENT_REMAP:
            note_failure(self._shared, FAILURE_REMAPPED, 0, b"mremap", event.start)
            return
        if event.kind == EVENT_FORK:
            self._refuse_child(<int>event.thread)
            return
        for index in range(self._count):
            if event.kind == EVENT_REMOVE:
                apply_remove(<Placer>self._placers[index], self.uffd, event.start, event.end)
            elif event.kind == EVENT_UNMAP:
                apply_unmap(<Placer>self._placers[index], self.uffd, event.start, event.end)

    cdef void _refuse_child(self, int child) noexcept nogil:
        """The process forked. Its child is not served, and must not read zeros for pages that never came: they fail
        closed (D12), then the descriptor is closed, which lets its waiters run into that. Where they cannot (before
        Linux 6.6) it stays open, and the child waits."""
        cdef int index
        cdef bint closed = True
        for index in range(self._count):
            closed = _poison_child(<Placer>self._placers[index], self.uffd, child) and closed
        if closed:
            close(child)
        pagecore_fetch_add(&self._shared.counters.forks, 1)
        note_failure(self._shared, FAILURE_FORKED, 0, b"fork", 0)

    cdef void _remember_ahead(self, int index, uint64_t first, uint64_t end) noexcept nogil:
        cdef int slot
        if self._ahead_count == AHEAD_RUNS:
            # The oldest guess goes: nobody waits for it.
            for slot in range(AHEAD_RUNS - 1):
                self._ahead[slot] = self._ahead[slot + 1]
            self._ahead_count -= 1
        self._ahead[self._ahead_count].index = index
        self._ahead[self._ahead_count].first = first
        self._ahead[self._ahead_count].end = end
        self._ahead_count += 1

    cdef bint c_place_ahead(self) noexcept nogil:
        cdef AheadRun *run
        cdef uint64_t count
        if self._ahead_count == 0:
            return False
        run = &self._ahead[self._ahead_count - 1]       # the newest is the likeliest to be touched next
        count = min(run.end - run.first, (<Placer>self._placers[run.index]).c_chunk)
        (<Placer>self._placers[run.index]).c_place_ahead(run.first, count)
        run.first += count
        if run.first >= run.end:
            self._ahead_count -= 1
        return True


cdef bint _poison_child(Placer placer, Userfaultfd uffd, int child) noexcept nogil:
    """Whether nothing is left that would read as zeros.

    Under the exclusive side: nothing is between an ioctl and its mark, so the planes are what the child has."""
    cdef uint64_t page, start, end, address
    cdef int64_t moved
    cdef int piece, rc
    for piece in range(placer.region.c_count):
        start = placer.region._starts[piece]
        end = placer.region._starts[piece + 1]
        if (<Region>placer.region._pieces[piece]).uffd is not uffd:
            continue
        page = start
        while page < end:
            page = placer.state.received.c_find_clear(page)
            if page >= end:
                break
            if not placer.state.released.c_test(page):      # those read as zeros, in the child too
                address = (<Region>placer.region._pieces[piece]).c_address + (page - start) * placer.region.page_size
                rc = uffd_place(child, OPERATION_POISON, address, 0, placer.region.page_size, 0, &moved)
                if rc == -EEXIST and (<Region>placer.region._pieces[piece]).c_modes & REGISTER_WP:
                    # Fact 7: it may be a marker of protection. Of what the child has, nobody keeps a record.
                    uffd_place(child, OPERATION_UNPROTECT, address, 0, placer.region.page_size, 0, &moved)
                    rc = uffd_place(child, OPERATION_POISON, address, 0, placer.region.page_size, 0, &moved)
                if rc != 0 and rc != -EEXIST:
                    return rc == -ESRCH         # it has ended; else it cannot be poisoned at all
            page += 1
    return True
