"""PlacementThreads: the life of a placement loop, from its threads' start to the last wake."""

import os
import threading
import time

from pagecore._watchdog import Watchdog
from pagecore.errors import BusyError, ClosedError, UnsupportedError

from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

from pagecore._atomic cimport pagecore_load_relaxed, pagecore_store_release
from pagecore._engine cimport PlacementEngine
from pagecore._placer cimport Placer
from pagecore._reader cimport Reader
from pagecore._shared cimport notify_progress, start_clock

# How long a stop tries to poison what is left while discards keep coming.
cdef double POISON_S = 2.0


cdef class PlacementThreads(PlacementEngine):
    def __cinit__(self, *args, **kwargs):
        self._threads = []
        self._life = threading.RLock()
        self._process = getpid()

    def start(self):
        """Start the threads.

        Returns
        -------
        PlacementLoop
            The loop itself.

        Raises
        ------
        BusyError
            It is running, or another one reads this descriptor.
        ClosedError
            It has been stopped, or a start has failed; make a new one.
        UnsupportedError
            It was made before a fork, by the parent of this process.

        Notes
        -----
        What an earlier loop over the same `states` asked for, and did not get, is asked for again (D9).
        """
        self._check_process()       # a lock of the parent's may be held here for ever
        with self._life:
            if self._threads:
                raise BusyError("the placement loop is running")
            self._check_not_stopped()
            self._begin_reading()
            try:
                self._start()
            except BaseException:
                self._end()
                raise
        return self

    def _begin_reading(self):
        cdef Reader reader
        for reader in self._reader_objects:
            if reader.uffd.c_begin_reading() < 0:
                self._end_reading()
                raise BusyError("another reader has this descriptor: there can be only one (D4)")
            reader.c_reading = True

    def _end_reading(self):
        cdef Reader reader
        for reader in self._reader_objects:
            if reader.c_reading:
                reader.c_reading = False
                reader.uffd.c_end_reading()

    def _start(self):
        cdef Placer placer
        cdef Reader reader
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for reader in self._reader_objects:
            # The reader polls a duplicate: a close() of the descriptor under it neither hands its number to somebody else
            # (D13) nor turns the missing pages into zeros while the loop still serves them (D12).
            reader.c_poll_fd = os.dup(reader.uffd.fileno())
            reader.c_stop_fd = self._stop_fd
        # Not before this: a loop that runs yet may have the same source. In any case: it may have the mover of one that ran,
        # whose stages nobody here would give back.
        self.source.gather(self._mover, self._movable)
        for placer in self._placer_objects:
            placer.c_ask_anew()
            # A handler that was killed may have read faults and not served them: whoever sleeps faults again (D10).
            with nogil:
                placer.c_wake_all()
        states = [(<Placer>each).state for each in self._placer_objects]
        start_clock(&self._shared, sum([state.size for state in states]), sum([state.received.count() for state in states]))
        bodies = [("reader", self._reader_body, (reader,)) for reader in self._reader_objects]
        bodies.append(("retry", self._retry_body, ()))
        if self.source.lanes:
            bodies += [(f"lane-{lane}", self._lane_body, (lane,)) for lane in range(self.source.lanes)]
        else:
            bodies += [(f"prefetch-{index}", self._prefetch_body, ()) for index in range(self._placer_threads)]
            if self.source.slow:
                bodies += [(f"demand-{index}", self._demand_body, ()) for index in range(self._placer_threads)]
        for role, body, arguments in bodies:
            thread = threading.Thread(target=body, args=arguments, name=f"pagecore-{role}-{self.name}", daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._patience is not None:
            self._watchdog = Watchdog(self, self._patience)

    def stop(self):
        """Stop and join the threads, and wake every waiter (D10). Idempotent; a second call waits for the first.

        By the policy ``on_stop="poison"`` every page that is not settled fails closed first (D12). What is still parked gives its claim back: afterwards `PageState.settled` is exact. The descriptor stays open:
        closing it, or unregistering, would turn missing pages into zeros.

        In a forked child it closes the child's copies alone: the threads, and the pages that they serve, are the parent's.
        """
        if getpid() != self._process:
            self._let_go()
            return
        with self._life:
            # The roles are given back last: what a signal interrupted is done again.
            if (any([(<Reader>reader).c_reading for reader in self._reader_objects])
                    or not pagecore_load_relaxed(&self._shared.stopping)):
                self._end()

    def _end(self):
        cdef Placer placer
        cdef Reader reader
        pagecore_store_release(&self._shared.stopping, 1)
        with nogil:
            notify_progress(&self._shared)
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        for thread in self._threads:
            thread.join()
        self._threads = []
        for placer in self._placer_objects:
            with nogil:
                placer.c_give_parked_back()
        if self._poison_rest and all([(<Reader>reader).c_reading for reader in self._reader_objects]):
            self._poison_unsettled()
        for placer in self._placer_objects:
            with nogil:
                placer.c_wake_all()
        self._close_descriptors()
        self._end_reading()

    def _close_descriptors(self):
        cdef Reader reader
        for reader in self._reader_objects:
            if reader.c_poll_fd >= 0:
                os.close(reader.c_poll_fd)
            reader.c_poll_fd = reader.c_stop_fd = -1
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
        self._stop_fd = -1

    def _let_go(self):
        """The end in a forked child. Locks may be held by threads that it has not, what the eventfd says the parent hears
        too, and the reader's role is the parent's still (D4)."""
        pagecore_store_release(&self._shared.stopping, 1)
        self._threads = []
        self._watchdog = None
        self._close_descriptors()

    def _poison_unsettled(self):
        cdef Placer placer
        cdef uint64_t first, count
        cdef bint able = True
        self._shared.poison_lost = True
        deadline = time.monotonic() + POISON_S
        # Whatever the loop has failed of before: the pages are as missing (D12).
        while able and time.monotonic() < deadline:
            left = False
            for placer in self._placer_objects:
                for first, count in placer.state.unsettled(fill_is_zero=self._fill_is_zero).tolist():
                    left = True
                    with nogil:
                        able = placer.c_give_up(first, count, 0) and able
            if not left:
                return
            # A discard is pending, which makes the kernel say "again" until it is read: that is still our role.
            with nogil:
                self.c_read_batch()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()

    @property
    def running(self):
        """bool: the threads have been started and not stopped."""
        return bool(self._threads) and getpid() == self._process

    def _reader_body(self, Reader reader):
        with nogil:
            reader.c_run()

    def _demand_body(self):
        with nogil:
            self.c_run_demand()

    def _retry_body(self):
        with nogil:
            self.c_run_retry()

    def _lane_body(self, int lane):
        with nogil:
            self.c_run_lane(lane)

    def _prefetch_body(self):
        with nogil:
            self.c_run_prefetch()

    cdef int _check_process(self) except -1:
        if getpid() != self._process:
            raise UnsupportedError(f"the placement loop of process {self._process} in its child",
                                   "it serves the parent's memory, where its threads are: make one here")
        return 0

    cdef int _check_not_stopped(self) except -1:
        self._check_process()
        if pagecore_load_relaxed(&self._shared.stopping):
            raise ClosedError("the placement loop has been stopped")
        return 0
