"""HintSession: the conversation with a guest that tells which of its pages are free (design rules S3 to S6).

The words are virtio-balloon's: the guest is told START with a command id, here the hint epoch, and reports
free pages under that id until STOP; DONE gives it its pages back.
"""

from __future__ import annotations

import enum
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy
import numpy.typing

from pagecore._tracker import PageTracker, _use_session_type
from pagecore.errors import BusyError, UnsupportedError
from pagecore.tracked_region import TrackedRegion

__all__ = ["Command", "HintSession", "HintState", "ResumedHintSession"]

logger = logging.getLogger(__name__)

FILL_BOUND = 1 << 32


class Command(enum.IntEnum):
    """What the guest is told."""

    STOP = 0
    DONE = 1
    START = 2


class HintState(enum.Enum):
    """Where a session stands."""

    STOP = "stop"
    REQUESTED = "requested"
    START = "start"
    DONE = "done"
    HANDED_OVER = "handed over"


OnCommand = Callable[[Command, int], object]


class _Ending:
    """Whoever owes the guest one DONE, and gives it exactly once (rule S5)."""

    def __init__(self, on_command: OnCommand | None, epoch: int) -> None:
        if on_command is not None and not callable(on_command):
            raise TypeError(f"on_command {on_command!r} is not callable")
        self._on_command = on_command
        self._epoch = epoch
        self._owes_done = True
        self._process = os.getpid()
        # Reentrant: the callback may look at the session, and a destructor may run inside it.
        self._lock = threading.RLock()

    def _tell(self, command: Command) -> None:
        logger.debug("hints: %s, epoch %d", command.name, self._epoch)
        if self._on_command is not None:
            self._on_command(command, self._epoch)

    def _before_done(self) -> None:
        """End what is under way; DONE follows."""

    def finish(self) -> bool:
        """Tell the guest DONE, unless it was told: it may have its pages back.

        Returns
        -------
        bool
            True for the one call that told it. Never in a forked child: the guest is the parent's.

        Raises
        ------
        Exception
            Whatever `on_command` raises. DONE counts as not given then, and `finish` may be called again.
        """
        if os.getpid() != self._process:
            return False  # and the lock may be held by a thread that is not here
        with self._lock:
            if not self._owes_done:
                return False
            self._before_done()
            # Cleared first: a callback that comes back here must not give a second DONE.
            self._owes_done = False
            try:
                self._tell(Command.DONE)
            except BaseException:
                self._owes_done = True
                raise
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as second:
            if error is None:
                raise
            # The first failure is the one to report.
            error.add_note(f"and the guest could not be told DONE: {second!r}")

    def __del__(self) -> None:
        # A constructor that refused has nothing to end.
        if not getattr(self, "_owes_done", False) or os.getpid() != self._process:
            return
        try:
            self.finish()
        except Exception:
            logger.exception("the guest could not be told DONE; it keeps its free pages to itself")
        warnings.warn(f"{type(self).__name__} was never finished", ResourceWarning, source=self, stacklevel=2)


class HintSession(_Ending):
    """The hints of one guest during precopy; made by ``PageTracker.hint_session``.

    One round is: :meth:`stop`, ``tracker.sync()``, :meth:`start`. A sync ends the epoch whether or not the
    session was stopped before it, and hints of an ended epoch change nothing (rule S4). The session ends with
    exactly one DONE to the guest, on every path (rule S5): leave the ``with`` block, call :meth:`finish`, or
    :meth:`hand_over` the duty to the destination.

    Parameters
    ----------
    tracker : PageTracker
        Whose debt the hints reduce.
    promise : {"armed", "held"}
        Why a write to a hinted page is not lost (rule S3). ``armed``: the log reports every write since the
        epoch began, so each sync has to re-arm all of it. ``held``: the guest keeps hinted pages to itself
        until DONE.
    fill : int
        The 32-bit pattern that free pages hold as far as the guest can tell, such as virtio-balloon's
        ``poison_val``; 0 for zeros, or where the guest does not look (rule S6).
    marked : iterable of str
        The writers that the tracker's dirty log misses and that do call ``tracker.mark(runs)`` after each
        write (rule S12). By naming one here the caller vouches for it.
    on_command : callable, optional
        ``on_command(command, epoch)`` tells the guest START, STOP and DONE. It runs on the thread that calls
        :meth:`start`, :meth:`stop` or :meth:`finish`, or on whichever collects an abandoned session.

    Attributes
    ----------
    tracker : PageTracker
    promise : str
    fill : int

    Raises
    ------
    UnsupportedError
        If the log is re-armed late (``rearm="lazy"``) and the promise is ``armed``, or if the log misses a writer
        that is not in `marked`.
    BusyError
        If another session of this tracker has not ended.
    ValueError, TypeError
        If an argument is none of the above.

    Notes
    -----
    :meth:`clear_runs` may be called from any threads, beside everything else.
    """

    def __init__(
        self,
        tracker: PageTracker,
        promise: str = "armed",
        fill: int = 0,
        *,
        marked: Iterable[str] = (),
        on_command: OnCommand | None = None,
    ) -> None:
        if promise not in ("armed", "held"):
            raise ValueError(f"promise {promise!r} is neither 'armed' nor 'held'")
        if isinstance(marked, str):
            raise TypeError(f"marked is a collection of names, not one name: use {{{marked!r}}}")
        self.promise = promise
        self._marked = frozenset(marked)
        for region in tracker.regions:
            self._check_region(region)
        if not isinstance(fill, int) or isinstance(fill, bool):
            raise TypeError(f"fill {fill!r} is not an integer")
        if not 0 <= fill < FILL_BOUND:
            raise ValueError(f"fill {fill} is outside [0, {FILL_BOUND})")
        super().__init__(on_command, 0)
        # Until the tracker has taken it there is nothing to end.
        self._owes_done = False
        self.tracker = tracker
        self.fill = fill
        self._announced = False
        self._answered = False
        self._handed_over = False
        self._counts = threading.Lock()
        self._stale = 0
        self._clipped = 0
        self._hinted_pages = 0
        tracker._begin_session(self)
        self._owes_done = True

    @property
    def epoch(self) -> int:
        """The id of the epoch announced last; 0 before the first."""
        return self._epoch

    @property
    def state(self) -> HintState:
        """Where the session stands; REQUESTED becomes START with the guest's first hint of the epoch."""
        if self._handed_over:
            return HintState.HANDED_OVER
        if not self._owes_done:
            return HintState.DONE
        if not self._announced or self.tracker.epoch != self._epoch:
            return HintState.STOP
        return HintState.START if self._answered else HintState.REQUESTED

    @property
    def stale(self) -> int:
        """Hints (runs) that came under another epoch than the open one, and changed nothing."""
        return self._stale

    @property
    def clipped(self) -> int:
        """Hints (runs) of which a part lay outside their region, and was left out."""
        return self._clipped

    @property
    def hinted_pages(self) -> int:
        """Pages that hints took off the debt, over the whole session; one hinted twice counts twice."""
        return self._hinted_pages

    def start(self) -> int:
        """Open the next epoch and tell the guest START; call it after a sync.

        The epoch is open before the guest hears of it, and it can only be opened with the log re-armed and
        everything that the sync found published (rule S4).

        Returns
        -------
        int
            The epoch id, which the guest's hints have to carry. Ids begin at 1 and are never used twice.

        Raises
        ------
        BusyError
            If an epoch is open, if no sync has armed the dirty log yet, or if the session has ended.
        Exception
            Whatever `on_command` raises; the epoch is closed again then.
        """
        with self._lock:
            self._check_in_charge()
            if self._announced and self.tracker.epoch == self._epoch:
                raise BusyError(f"hint epoch {self._epoch} is open: stop() and sync() come before the next")
            # A sync has ended the last epoch without a stop(): the guest hears of it before it hears of the
            # next.
            self._stop()
            self._epoch = self.tracker._open_epoch()
            self._answered = False
            self._announced = True
            try:
                self._tell(Command.START)
            except BaseException:
                self._announced = False
                self.tracker._close_epoch(self._epoch)
                raise
            return self._epoch

    def stop(self) -> bool:
        """End the epoch and tell the guest STOP; call it before a sync.

        Returns
        -------
        bool
            Whether there was an announced epoch to stop.

        Raises
        ------
        BusyError
            If the session has ended.
        Exception
            Whatever `on_command` raises; the epoch has ended nevertheless.
        """
        with self._lock:
            self._check_in_charge()
            return self._stop()

    def _stop(self) -> bool:
        if not self._announced:
            return False
        self.tracker._close_epoch(self._epoch)
        self._announced = False
        self._tell(Command.STOP)
        return True

    def clear_runs(self, runs: numpy.typing.ArrayLike, epoch: int, *, region: int | None = None) -> int:
        """Process hints: these pages are free, said the guest under this epoch (rules S3 and S4).

        They are rounded **inward** to the host's pages, and what lies outside the region is left out and counted.

        Parameters
        ----------
        runs : array_like of int, shape (n, 2)
            Runs of (first page, page count), in any order; they may overlap.
        epoch : int
            The id that the guest gave with them.
        region : int, optional
            The id of their region; not needed where there is one.

        Returns
        -------
        int
            Pages taken off the debt: those that were owed. 0 where the epoch is not the open one; the runs
            are counted as stale then, and those that are left when a sync ends it midway are, too.

        Raises
        ------
        IndexError, ValueError, TypeError
            If a run has no page in the region, or this is no list of runs, or no region; nothing is changed then.

        Notes
        -----
        Releases the GIL. Waits for a sync; a sync waits for it no longer than for some thousand words of the planes,
        senders do not. In a region whose log is re-armed late it re-arms what it touches. Needs no other kernel
        interface.
        """
        return self._clear(runs, epoch, region, 0)

    def _clear(self, runs: numpy.typing.ArrayLike, epoch: int, region: int | None, cut: int) -> int:
        """`cut` of these runs lost a part outside the region before they were runs."""
        taken, clipped, stale, current = self.tracker._hint(runs, epoch, region)
        with self._counts:
            self._stale += stale
            self._hinted_pages += taken
            if current:
                self._clipped += clipped + cut
                if epoch == self._epoch:
                    self._answered = True
        return taken

    def clear_bytes(self, ranges: numpy.typing.ArrayLike, epoch: int, *, region: int | None = None) -> int:
        """Process hints given in bytes: (offset, length) in the region, rounded **inward** to whole pages.

        A page that is free in part is not free. See :meth:`clear_runs` for the rest.
        """
        spec = self.tracker.region(region)
        array = numpy.asarray(ranges)
        if array.size == 0:
            return self.clear_runs((), epoch, region=region)
        if array.dtype.kind not in "iu":
            raise TypeError(f"ranges hold {array.dtype}, not integers")
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"ranges have the shape {array.shape}, not (n, 2)")
        size, unit = spec.nbytes, spec.page_size
        offset, length = array[:, 0], array[:, 1]
        # Compared before anything is added, and cut to where it cannot wrap: these are the guest's numbers.
        low = numpy.clip(offset, -size, size).astype(numpy.int64)
        reach = numpy.clip(length, 0, 2 * size).astype(numpy.int64)
        before, past = offset < 0, low + reach > size
        # Of an offset below -size nothing is left, whatever its length is cut to.
        outside = (length < 0) | (offset > size) | ((length > 0) & ((low >= size) | (before & (low + reach <= 0))))
        outside |= (offset < -size) | (before & (length == 0))
        if outside.any():
            where = int(numpy.flatnonzero(outside)[0])
            first, count = array[where].tolist()
            raise IndexError(f"range {where} (offset {first}, length {count}) is outside [0, {size}) bytes")
        first_page = (numpy.maximum(low, 0) + (unit - 1)) // unit
        pages = numpy.minimum(low + reach, size) // unit - first_page
        whole = pages > 0
        cut = int((before | past).sum())
        return self._clear(numpy.stack([first_page[whole], pages[whole]], axis=1), epoch, region, cut)

    def hand_over(self) -> dict[str, Any]:
        """Leave DONE to the destination, where the guest will run: the switch to postcopy (rule S5).

        From here on this session tells the guest nothing. The destination calls :meth:`resume` with what this
        returns. Where it never ran the guest, and the guest goes on here, :meth:`take_back` undoes it.

        Returns
        -------
        dict
            Plain numbers and strings: it goes through JSON.

        Raises
        ------
        BusyError
            If the session has ended.
        """
        with self._lock:
            self._check_in_charge()
            self._stop()
            self._handed_over = True
            self._owes_done = False
            return {
                "epoch": self._epoch,
                "promise": self.promise,
                "fill": self.fill,
                "stale": self._stale,
                "hinted_pages": self._hinted_pages,
            }

    def take_back(self) -> None:
        """Undo :meth:`hand_over`: the destination denies having run the guest, and DONE is due here again.

        Raises
        ------
        BusyError
            If the session was not handed over.
        """
        with self._lock:
            if not self._handed_over:
                raise BusyError("the hint session was not handed over: there is nothing to take back")
            self.tracker._begin_session(self)
            self._handed_over = False
            self._owes_done = True

    @staticmethod
    def resume(state: Mapping[str, Any], on_command: OnCommand | None) -> ResumedHintSession:
        """Take on the duty of DONE at the destination, from what :meth:`hand_over` returned at the source.

        Raises
        ------
        ValueError
            If a field is missing or is no number in its range.
        """
        return ResumedHintSession(state, on_command)

    def _before_done(self) -> None:
        self.tracker._close_epoch(self._epoch)
        self._announced = False

    def _check_region(self, region: TrackedRegion) -> None:
        """Whether hints are safe beside the log of this region."""
        log = region.dirty_log
        if log is None:
            return
        # A log that re-arms apart counts as armed where every sync re-arms all that it saw (S3).
        if self.promise == "armed" and region.rearm == "lazy":
            raise UnsupportedError(
                "the promise 'armed'",
                f"{log!r} is re-armed late; promise='held' needs a guest that keeps them until DONE",
            )
        silent = sorted(log.misses - self._marked)
        if silent:
            raise UnsupportedError(
                f"hinting beside writers that {type(log).__name__} misses ({', '.join(silent)})",
                f"have each call tracker.mark(runs) after its writes, then pass marked={set(silent)!r}",
            )

    def _check_in_charge(self) -> None:
        if not self._owes_done:
            raise BusyError(f"the hint session has ended here: it is {self.state.value}")

    def __repr__(self) -> str:
        return (
            f"<HintSession {self.state.value}, epoch {self._epoch}, {self._hinted_pages} pages hinted,"
            f" {self._stale} hints stale>"
        )


class ResumedHintSession(_Ending):
    """A session at the destination: what is left of it is to tell the guest DONE, exactly once (rule S5).

    Made by ``HintSession.resume``. A context manager; :meth:`finish` is due once the guest runs here.

    Attributes
    ----------
    epoch : int
        The last epoch at the source.
    fill : int
        The 32-bit pattern that free pages hold (rule S6); a ``PlacementLoop`` takes it as it is.
    """

    def __init__(self, state: Mapping[str, Any], on_command: OnCommand | None) -> None:
        epoch = _field(state, "epoch", 1 << 64)
        self.fill = _field(state, "fill", FILL_BOUND)
        super().__init__(on_command, epoch)

    @property
    def epoch(self) -> int:
        """The last epoch at the source."""
        return self._epoch

    @property
    def state(self) -> HintState:
        """STOP until DONE was given."""
        return HintState.STOP if self._owes_done else HintState.DONE


def _field(state: Mapping[str, Any], name: str, bound: int) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < bound:
        raise ValueError(f"hint session state: {name} {value!r} is no integer in [0, {bound})")
    return value


_use_session_type(HintSession)
