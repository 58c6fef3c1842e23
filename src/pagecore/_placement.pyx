"""PlacementLoop: serve the faults of registered memory, and place what a source pushes or what is prefetched."""

import os
import threading
import time

import numpy as np

from pagecore._page_state import PageState
from pagecore._uffd_types import Feature
from pagecore.errors import (
    BusyError,
    ClosedError,
    PagecoreError,
    PeerGoneError,
    ProtocolError,
    SourceError,
    UffdError,
    UnsupportedError,
)
from pagecore.placement_stats import LatencyHistogram, PlacementStats

from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc

from pagecore._atomic cimport (
    pagecore_fence,
    pagecore_load_acquire,
    pagecore_load_relaxed,
    pagecore_store_release,
)
from pagecore._engine cimport PlacementEngine
from pagecore._placer cimport (
    FAILURE_DUPLICATE,
    FAILURE_FOREIGN,
    FAILURE_KERNEL,
    FAILURE_LOST,
    FAILURE_NONE,
    FAILURE_OUTSIDE,
    FAILURE_PEER_GONE,
    FAILURE_PROTOCOL,
    FAILURE_REMAPPED,
    FAILURE_SOURCE,
    Placer,
    PlacementObserver,
    notify_progress,
)
from pagecore._runs cimport Pinned, pinned_runs
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_enter,
    pagecore_monitor_leave,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore._uffd cimport Region
from pagecore.page_source._protocol cimport PageSource

_CLASSES = ("owed", "hinted", "released", "present")

_REMOVE = int(Feature.EVENT_REMOVE)
# A wait for progress looks again at least so often; notifications make it prompt, this makes it bounded.
cdef double RECHECK_S = 0.05


cdef class PlacementLoop(PlacementEngine):
    """PlacementLoop(regions, source, *, states=None, threads=1, fill=0, duplicates="tolerant", on_lost="poison",
                     observer=None, name="")
    --

    Serve the faults of registered memory, and place what a source pushes or what is prefetched.

    Parameters
    ----------
    regions : sequence of Region
        Regions of one `Userfaultfd`; anonymous memory.
    source : PageSource
        Where content comes from.
    states : sequence of PageState, optional
        The planes of each region; new ones by default. Pages that are already received, released or hinted are honoured.
    threads : int
        Threads that prefetch from a pull source. A push source has one thread a lane instead.
    fill : int
        32-bit pattern of hinted pages (S6); 0 fills with zeros.
    duplicates : {"tolerant", "strict"}
        Strict: a page that comes twice, or that is present although nobody placed it, is an error (W2).
    on_lost : {"poison", "stall"}
        What becomes of pages that nobody has: SIGBUS for whoever touches them, or an endless wait (D12). Never zeros.
    observer : PlacementObserver, optional
        Told of every placed page.
    name : str
        Names the session in errors and threads.

    Raises
    ------
    ValueError, TypeError
        No region, planes of another size, an unknown policy, a descriptor that reports no discards.
    ClosedError
        A region is not registered any more.
    UnsupportedError
        Regions of several descriptors: start a loop for each.

    Notes
    -----
    No thread of the loop takes the GIL between the read of a fault and the wake, so a Python thread may touch the memory
    that is served here: it sleeps with the GIL held, and is woken all the same. Methods may be called from any thread.
    The memory must not be discarded by a thread of this process that holds the GIL while another waits for it.
    Since Linux 4.11 (discards are read as events); poisoning since 6.6.
    """

    def __cinit__(self, regions, PageSource source not None, *, states=None, int threads=1, uint32_t fill=0,
                  str duplicates="tolerant", str on_lost="poison", PlacementObserver observer=None, str name=""):
        cdef Placer placer
        cdef Region region
        cdef int index
        regions = tuple(regions)
        if not regions:
            raise ValueError("a placement loop needs at least one region")
        if states is None:
            states = [PageState(region.size) for region in regions]
        states = tuple(states)
        for region in regions:
            if region is None:
                raise TypeError("a region is None, not a Region")
            region._check_live()
        if not all([isinstance(state, PageState) for state in states]):
            raise TypeError("each of the states must be a PageState")
        if len(states) != len(regions):
            raise ValueError(f"{len(states)} states for {len(regions)} regions")
        if threads < 1:
            raise ValueError(f"threads {threads} is less than 1")
        if duplicates not in ("tolerant", "strict"):
            raise ValueError(f"duplicates {duplicates!r} is neither 'tolerant' nor 'strict'")
        if on_lost not in ("poison", "stall"):
            raise ValueError(f"on_lost {on_lost!r} is neither 'poison' nor 'stall'")
        self.uffd = regions[0].uffd
        self.source = source
        self.name = name
        self._threads = []
        self._life = threading.RLock()
        self._placer_threads = threads
        self._shared.strict = duplicates == "strict"
        self._shared.poison_lost = on_lost == "poison"
        if not self.uffd.features & _REMOVE:
            raise ValueError("the descriptor was opened without EVENT_REMOVE: a discard by the guest would go unseen, "
                             "and old data would be placed over its zeros (D3)")
        source.accept(regions)
        placers = []
        ids = set()
        for region, state in zip(regions, states):
            if region.uffd is not self.uffd:
                raise UnsupportedError("several descriptors in one placement loop", "start one loop for each")
            if region.id in ids:
                raise ValueError(f"two regions have the id {region.id}")
            ids.add(region.id)
            if any([(<Placer>other).state is state for other in placers]):
                raise ValueError("two regions have the same planes: each page has a bit of its own")
            placer = Placer(region, state, source, observer, fill)
            placer.c_join(&self._shared)
            placers.append(placer)
        self._placer_objects = tuple(placers)
        self._placers = <void **>calloc(len(placers), sizeof(void *))
        if self._placers == NULL:
            raise MemoryError()
        self._count = len(placers)
        for index in range(self._count):
            self._placers[index] = <void *>placers[index]

    # Life ----------------------------------------------------------------------------------------------------------

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

        Notes
        -----
        What an earlier loop over the same `states` asked for, and did not get, is asked for again (D9).
        """
        with self._life:
            if self._threads:
                raise BusyError("the placement loop is running")
            self._check_not_stopped()
            if self.uffd.c_begin_reading() < 0:
                raise BusyError("another reader has this descriptor: there can be only one (D4)")
            self._reading = True
            try:
                self._start()
            except BaseException:
                self._end()
                raise
        return self

    def _start(self):
        cdef Placer placer
        # The reader polls a duplicate: a close() of the descriptor under it neither hands its number to somebody else (D13)
        # nor turns the missing pages into zeros while the loop still serves them (D12).
        self._poll_fd = os.dup(self.uffd.fileno())
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for placer in self._placer_objects:
            placer.c_ask_anew()
        bodies = [("reader", self._reader_body, ()), ("retry", self._retry_body, ())]
        if self.source.lanes:
            bodies += [(f"lane-{lane}", self._lane_body, (lane,)) for lane in range(self.source.lanes)]
        else:
            bodies += [(f"prefetch-{index}", self._prefetch_body, ()) for index in range(self._placer_threads)]
        for role, body, arguments in bodies:
            thread = threading.Thread(target=body, args=arguments, name=f"pagecore-{role}-{self.name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self):
        """Stop and join the threads, and wake every waiter (D10). Idempotent; a second call waits for the first.

        What is still parked gives its claim back: afterwards `PageState.settled` is exact. The descriptor stays open:
        closing it, or unregistering, would turn missing pages into zeros.
        """
        with self._life:
            # The role is given back last: what a signal interrupted is done again.
            if self._reading or not pagecore_load_relaxed(&self._shared.stopping):
                self._end()

    def _end(self):
        cdef Placer placer
        pagecore_store_release(&self._shared.stopping, 1)
        with nogil:
            notify_progress(&self._shared)
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for placer in self._placer_objects:
            with nogil:
                placer.c_abandon()
        if self._poll_fd >= 0:
            os.close(self._poll_fd)
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
        self._poll_fd = self._stop_fd = -1
        if self._reading:
            self._reading = False
            self.uffd.c_end_reading()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()

    @property
    def running(self):
        """bool: the threads have been started and not stopped."""
        return bool(self._threads)

    @property
    def states(self):
        """tuple of PageState: the planes of each region."""
        cdef Placer placer
        return tuple([placer.state for placer in self._placer_objects])

    def _reader_body(self):
        with nogil:
            self.c_read_events()

    def _retry_body(self):
        with nogil:
            self.c_run_retry()

    def _lane_body(self, int lane):
        with nogil:
            self.c_run_lane(lane)

    def _prefetch_body(self):
        with nogil:
            self.c_run_prefetch()

    cdef int _check_not_stopped(self) except -1:
        if pagecore_load_relaxed(&self._shared.stopping):
            raise ClosedError("the placement loop has been stopped")
        return 0

    # Requests ------------------------------------------------------------------------------------------------------

    def _placer(self, int region_id):
        cdef Placer placer
        for placer in self._placer_objects:
            if placer.region.id == region_id:
                return placer
        raise ValueError(f"no region has the id {region_id}")

    def prefetch(self, runs, *, int region_id=0):
        """Have runs placed in the background; from a push source, ask for them.

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2): first page and page count.
        region_id : int
            The region.

        Raises
        ------
        ClosedError
            The loop has been stopped.

        Notes
        -----
        Releases the GIL while it asks. Thread-safe. Pages that are claimed already are skipped when their turn comes.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = pinned_runs(runs, placer.region.size)
        cdef bint queued = True
        self._check_not_stopped()
        with nogil:
            if self.source.lanes:
                self.c_request(<void *>placer, pinned.numbers(), pinned.n, False)
            else:
                queued = self.c_enqueue(<void *>placer, pinned.numbers(), pinned.n)
        if not queued:
            raise MemoryError(f"no memory to queue {pinned.n} runs")

    def request_again(self, runs, *, int region_id=0):
        """Ask the source for pages whatever it believes to have sent (``again``, S7).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). Pages that are settled meanwhile count as duplicates when they come, also
            in a strict session, which does not fail of them.
        region_id : int
            The region.

        Raises
        ------
        ValueError
            The source is pulled: there is nobody to ask.
        ClosedError
            The loop has been stopped.

        Notes
        -----
        Releases the GIL. Thread-safe.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = pinned_runs(runs, placer.region.size)
        if not self.source.lanes:
            raise ValueError("a pull source is not asked again: prefetch the runs")
        self._check_not_stopped()
        with nogil:
            self.c_request(<void *>placer, pinned.numbers(), pinned.n, True)

    def forget(self, runs, *, int region_id=0):
        """The owner of shared memory is about to punch a hole, which sends no event: call this before (D3).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). From now on these pages read as zeros whenever they are missing.
        region_id : int
            The region.

        Notes
        -----
        Releases the GIL. Returns when the pages are marked: no copy that arrives later is placed.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = pinned_runs(runs, placer.region.size)
        cdef size_t run
        with nogil:
            for run in range(pinned.n):
                placer.c_forget(pinned.numbers()[2 * run], pinned.numbers()[2 * run + 1])

    def give_up(self, runs, *, int region_id=0):
        """Nobody will send these pages any more: by policy they fail closed (SIGBUS) or stall (D12).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). Pages that are settled or under way are left alone.
        region_id : int
            The region.

        Notes
        -----
        Releases the GIL. Poisoning needs Linux 6.6.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = pinned_runs(runs, placer.region.size)
        cdef size_t run
        with nogil:
            for run in range(pinned.n):
                placer.c_give_up(pinned.numbers()[2 * run], pinned.numbers()[2 * run + 1])

    # Progress ------------------------------------------------------------------------------------------------------

    def unsettled(self, *, int region_id=0, bint fill_is_zero=True):
        """Return the runs that an unregister would turn into wrong zeros (D16).

        Parameters
        ----------
        region_id : int
            The region.
        fill_is_zero : bool
            Hinted pages with a fill of zeros may stay missing.

        Returns
        -------
        numpy.ndarray
            int64, shape (n, 2).
        """
        cdef Placer placer = self._placer(region_id)
        return placer.state.unsettled(fill_is_zero=fill_is_zero)

    def wait_resident(self, double fraction, double timeout):
        """Wait until a share of all pages is received or released.

        Parameters
        ----------
        fraction : float
            In [0, 1].
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False at the time-out.

        Raises
        ------
        PagecoreError
            The loop failed; see `error`.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction {fraction} is outside [0, 1]")
        states = self.states
        needed = int(np.ceil(fraction * sum([state.size for state in states])))

        def resident():
            missing = needed - sum([state.settled().count() for state in states])
            pagecore_store_release(&self._shared.resident_target,
                                   pagecore_load_acquire(&self._shared.resident) + <uint64_t>max(missing, 1))
            pagecore_fence()        # see Placer._count_resident
            return missing <= 0

        try:
            return self._wait(resident, timeout)
        finally:
            pagecore_store_release(&self._shared.resident_target, UINT64_MAX)

    def wait_ended(self, double timeout):
        """Wait until every bulk lane is at its end, the prefetch queue is empty and nothing is parked.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False at the time-out.

        Raises
        ------
        PagecoreError
            The loop failed; see `error`.
        """
        return self._wait(lambda: self.c_bulk_done(), timeout)

    def wait_settled(self, double timeout, *, bint fill_is_zero=True):
        """Wait until no region has unsettled pages (D16).

        Parameters
        ----------
        timeout : float
            Seconds.
        fill_is_zero : bool
            As in `unsettled`.

        Returns
        -------
        bool
            False at the time-out.

        Raises
        ------
        PagecoreError
            The loop failed; see `error`.
        """
        states = self.states
        return self._wait(lambda: all([len(state.unsettled(fill_is_zero=fill_is_zero)) == 0 for state in states]),
                          timeout)

    def _wait(self, condition, double timeout):
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef uint64_t seen, until
        deadline = time.monotonic() + timeout
        while True:
            with nogil:
                pagecore_monitor_enter(monitor)
                seen = self._shared.notifications
                pagecore_monitor_leave(monitor)
            error = self.error
            if error is not None:
                raise error
            if condition():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            until = pagecore_now_ns() + <uint64_t>(min(left, RECHECK_S) * 1e9)
            with nogil:
                pagecore_monitor_enter(monitor)
                if self._shared.notifications == seen:
                    pagecore_monitor_wait(monitor, until)
                pagecore_monitor_leave(monitor)

    @property
    def error(self):
        """PagecoreError or None: the first thing that failed for good."""
        cdef uint64_t kind = pagecore_load_acquire(&self._shared.failure.kind)
        if kind == FAILURE_NONE:
            return None
        number = self._shared.failure.error
        page = self._shared.failure.page
        what = "" if self._shared.failure.what == NULL else self._shared.failure.what.decode()
        if kind == FAILURE_KERNEL:
            return UffdError(number, what)
        if kind == FAILURE_PEER_GONE:
            return PeerGoneError("the process whose memory this is has ended")
        if kind == FAILURE_SOURCE:
            return SourceError(f"page {page}: {what or 'receive'}: {os.strerror(number)}", page, 1)
        if kind == FAILURE_PROTOCOL:
            return ProtocolError(what, f"a page frame has a value that cannot be right (page {page})")
        if kind == FAILURE_DUPLICATE:
            return ProtocolError("duplicate", f"page {page} came twice in session {self.name!r}")
        if kind == FAILURE_FOREIGN:
            return PagecoreError(f"page {page} was present although nobody placed it in session {self.name!r}")
        if kind == FAILURE_OUTSIDE:
            table = ", ".join([f"{region!r}" for region in [(<Placer>p).region for p in self._placer_objects]])
            return PagecoreError(f"a fault at {page:#x} is outside every region: {table}")
        if kind == FAILURE_REMAPPED:
            return UnsupportedError("following memory that mremap() moved", "keep guest memory where it is registered")
        assert kind == FAILURE_LOST
        return PagecoreError(f"page {page} was received and is missing: its memory was lost")

    def stats(self):
        """Return the counters.

        Returns
        -------
        PlacementStats
            A relaxed snapshot.
        """
        counters = self._shared.counters
        resident = sum([state.received.count() for state in self.states])
        histograms = {
            name: LatencyHistogram(
                tuple(self._shared.latency[index].buckets),
                self._shared.latency[index].total_ns,
                self._shared.latency[index].max_ns,
            )
            for index, name in enumerate(_CLASSES)
        }
        return PlacementStats(**counters, resident=resident, latency=histograms)
