"""PlacementWaits: how far a placement loop is, and waiting for it to get further."""

import time

import numpy as np

from pagecore.errors import BusyError

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport UINT64_MAX, uint64_t
from posix.unistd cimport getpid

from pagecore._atomic cimport pagecore_fence, pagecore_load_acquire, pagecore_store_release
from pagecore._figures cimport error_of
from pagecore._placer cimport Placer
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_enter,
    pagecore_monitor_leave,
    pagecore_monitor_wait,
    pagecore_now_ns,
)
from pagecore._threads cimport PlacementThreads

# A wait for progress looks again at least so often; notifications make it prompt, this makes it bounded.
cdef double RECHECK_S = 0.05


cdef class PlacementWaits(PlacementThreads):
    @property
    def states(self):
        """tuple of PageState: the planes of each region."""
        cdef Placer placer
        return tuple([placer.state for placer in self._placer_objects])

    @property
    def error(self):
        """PagecoreError or None: the first thing that failed for good."""
        return error_of(&self._shared, self.name, self._placer_objects)

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
        ValueError
            The fraction is outside [0, 1].
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
            pagecore_fence()        # see count_resident
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
        self._check_process()
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
            # No byte code runs here: nobody else would call the handler of a signal that came.
            PyErr_CheckSignals()
            until = pagecore_now_ns() + <uint64_t>(min(left, RECHECK_S) * 1e9)
            with nogil:
                pagecore_monitor_enter(monitor)
                if self._shared.notifications == seen:
                    pagecore_monitor_wait(monitor, until)
                pagecore_monitor_leave(monitor)

    def wake_once(self, int descriptor):
        """Write to an eventfd, once, as soon as there may be something new: for event loops, which cannot wait here.

        News is every per cent of the pages that is received, the end of a lane, a failure, pages that the guest discarded,
        and `stop`. A wait that is over between two of these needs a look from time to time, as those of this class take.

        Parameters
        ----------
        descriptor : int
            Of an eventfd that does not block. -1: no more. After this has returned, none that was named before is written
            to.

        Raises
        ------
        ValueError
            It is no descriptor.
        BusyError
            Another one is to be written to.

        Notes
        -----
        Releases the GIL. Thread-safe. Call it again after each wake, and before looking. Needs no kernel interface.
        """
        cdef pagecore_monitor *monitor = <pagecore_monitor *>self._shared.monitor
        cdef bint busy
        if descriptor < -1:
            raise ValueError(f"{descriptor} is no descriptor")
        if descriptor < 0 and getpid() != self._process:
            self._shared.wake_fd = -1           # no thread of this process would write to it
            return
        self._check_process()
        with nogil:
            pagecore_monitor_enter(monitor)
            busy = descriptor >= 0 and self._shared.wake_fd >= 0 and self._shared.wake_fd != descriptor
            if not busy:
                self._shared.wake_fd = descriptor
            pagecore_monitor_leave(monitor)
        if busy:
            raise BusyError("another descriptor is to be written to")
