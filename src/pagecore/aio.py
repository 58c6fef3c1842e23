"""The asyncio face: waits, progress and completion as coroutines over the same engine. No page touches the event loop.

Guest memory that this process serves must not be touched on the event loop's thread: it would sleep there until the
page is placed, and every task with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from types import TracebackType
from typing import Any, Final, Self

from pagecore import BusyError, ClosedError, PlacementLoop, PlacementStats
from pagecore.migrate import Migration, Options, Outcome

__all__ = ["AsyncMigration", "AsyncPlacement", "migrate"]

Event = dict[str, Any]

# Waits look when the placement loop says that there is something new, but not more often than this, ...
SHORTEST: Final = 0.005
# ... and without such a word as often as those of PlacementLoop itself.
LONGEST: Final = 0.05
# Looking takes the event loop this share of its time at the most: with terabytes, counting bits is not free.
SHARE: Final = 0.05


class AsyncPlacement:
    """AsyncPlacement(placement)

    The waits of a `PlacementLoop` as coroutines, for any number of tasks of one event loop.

    As an asynchronous context manager it starts the placement loop, and stops it at the end. Otherwise that is up to
    whoever made it. Time-outs are asyncio's own (``asyncio.timeout``).

    Parameters
    ----------
    placement : PlacementLoop

    Notes
    -----
    Waits take no thread: the placement loop's threads write to an eventfd that the event loop watches while somebody
    waits. A task that is cancelled leaves nothing behind. `start` and `stop`, which may sleep, run on a thread.
    """

    def __init__(self, placement: PlacementLoop) -> None:
        self.placement = placement
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[asyncio.Future[None], tuple[Hashable, Callable[[], bool]]] = {}
        self._eventfd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._looked = 0.0

    async def __aenter__(self) -> Self:
        try:
            await _finish_thread(self.placement.start)
        except asyncio.CancelledError:
            await _finish_thread(self.placement.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _finish_thread(self.placement.stop)

    async def wait_resident(self, fraction: float) -> None:
        """Wait until a share of all pages is received or released.

        Parameters
        ----------
        fraction : float
            In [0, 1].

        Raises
        ------
        PagecoreError
            The placement loop failed.
        ClosedError
            It was stopped before, or is not running.
        """
        await self._wait(("resident", fraction), lambda: self.placement.wait_resident(fraction, 0))

    async def wait_ended(self) -> None:
        """Wait until every bulk lane is at its end, the prefetch queue is empty and nothing is parked.

        Raises
        ------
        PagecoreError
            As `wait_resident`.
        """
        await self._wait("ended", lambda: self.placement.wait_ended(0))

    async def wait_settled(self, *, fill_is_zero: bool = True) -> None:
        """Wait until no region has unsettled pages (D16).

        Parameters
        ----------
        fill_is_zero : bool
            Hinted pages with a fill of zeros may stay missing.

        Raises
        ------
        PagecoreError
            As `wait_resident`.
        """
        await self._wait(("settled", fill_is_zero), lambda: self.placement.wait_settled(0, fill_is_zero=fill_is_zero))

    async def progress(self) -> AsyncIterator[PlacementStats]:
        """Yield the counters whenever more pages are resident, until nothing is missing or the loop is stopped.

        Raises
        ------
        PagecoreError
            The placement loop failed.
        """
        last = -1

        def changed() -> bool:
            if self.placement.error is not None:
                raise self.placement.error
            return self.placement.stats().resident != last or not self.placement.running

        while True:
            # Before the counters: what they say then holds for the last of them, too.
            over = not self.placement.running or self.placement.wait_settled(0)
            stats = self.placement.stats()
            if stats.resident != last:
                last = stats.resident
                yield stats
            if over:
                return
            await self._wait(object(), changed)

    async def _wait(self, key: Hashable, condition: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._waiting:
                raise RuntimeError("tasks of another event loop wait for this placement loop")
            self._loop = loop
        if self._is_over(condition):
            return
        future = loop.create_future()
        self._waiting[future] = (key, condition)
        try:
            if len(self._waiting) == 1:
                self._begin(loop)
            await future
        finally:
            del self._waiting[future]
            if not self._waiting:
                self._end(loop)

    def _is_over(self, condition: Callable[[], bool]) -> bool:
        # Asked first: a loop that is stopped in between has done all that it will.
        running = self.placement.running
        if condition():
            return True
        if not running:
            raise ClosedError("the placement loop is not running")
        return False

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add_reader(self._eventfd, self._woken)
        self._look()

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._eventfd >= 0:
            # When this has returned nobody writes to it any more, and its number may be another file's.
            self.placement.wake_once(-1)
            loop.remove_reader(self._eventfd)
            os.close(self._eventfd)
            self._eventfd = -1

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        self._look_after(self._looked + SHORTEST - time.monotonic())

    def _look_after(self, seconds: float) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, seconds), self._look)

    def _look(self) -> None:
        """Ask every condition once, and let those go whose is met."""
        # Before looking: what happens from here on wakes. Where another one is woken, time does.
        with contextlib.suppress(BusyError):
            self.placement.wake_once(self._eventfd)
        began = time.monotonic()
        answers: dict[Hashable, bool | Exception] = {}
        for future, (key, condition) in list(self._waiting.items()):
            if future.done():
                continue
            if key not in answers:
                try:
                    answers[key] = self._is_over(condition)
                except Exception as error:
                    answers[key] = error
            answer = answers[key]
            if isinstance(answer, Exception):
                future.set_exception(answer)
            elif answer:
                future.set_result(None)
        self._looked = time.monotonic()
        self._look_after(max(LONGEST, (self._looked - began) / SHARE))


async def _finish_thread(function: Callable[[], object]) -> None:
    """Run a function on a thread until it is done, cancelled or not."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    cancelled = await _finish_waiting(task)
    task.result()
    if cancelled is not None:
        raise cancelled


async def _finish_waiting(
    future: asyncio.Future[Any], on_cancel: Callable[[], object] = lambda: None
) -> asyncio.CancelledError | None:
    """Wait for it whoever cancels; the last cancellation, to be raised when all is in order."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    return cancelled


class AsyncMigration:
    """AsyncMigration(options)

    A migration on this machine: an asynchronous context manager that starts it, and an iterator over its events.

    Leaving the context before it is over is Ctrl-C (`interrupt`): before the switch the guest stays at the source,
    after it the source serves until all is there; the context is left when both processes have ended. A task that is
    cancelled meanwhile is the second Ctrl-C, which ends both at once, and the guest with them.

    Parameters
    ----------
    options : Options

    Notes
    -----
    The migration's two processes are followed by a thread, one for each migration. Of "progress" events that nobody has
    taken in time only the newest of each side is kept; of all others, every one.
    """

    def __init__(self, options: Options) -> None:
        self.migration = Migration(options, self._event)
        self._lock = threading.Lock()  # guards _events; taken inside nothing
        self._events: deque[Event] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()
        self._outcome: asyncio.Future[Outcome] | None = None
        self._interrupted = False

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise BusyError("this migration has been started")
        self._loop = asyncio.get_running_loop()
        self._outcome = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="pagecore-migration", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = self._started()
        # A second one would give up a guest that runs at the destination.
        if not outcome.done() and not self._interrupted:
            self.interrupt()
        cancelled = await _finish_waiting(outcome, self.interrupt)
        # It has said its last word.
        self._thread.join()
        failure = outcome.exception()
        if cancelled is not None:
            raise cancelled
        if failure is not None and error is None:
            raise failure

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event of either side; the iteration ends with the migration."""
        outcome = self._started()
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                # Set by whatever comes from here on.
                self._ready.clear()
            if outcome.done():
                raise StopAsyncIteration
            await self._ready.wait()

    async def outcome(self) -> Outcome:
        """Wait for the end.

        Returns
        -------
        Outcome
            What became of it. A task that is cancelled here cancels nothing else: leaving the context does.
        """
        return await asyncio.shield(self._started())

    def interrupt(self) -> None:
        """Ctrl-C; see `Migration.interrupt`."""
        self._interrupted = True
        self.migration.interrupt()

    def pause(self) -> None:
        """Hold the guest's pages back; see `Migration.pause`. The events "paused" and "resumed" tell when it is so."""
        self.migration.pause()

    def resume(self) -> None:
        """End a pause."""
        self.migration.resume()

    def _started(self) -> asyncio.Future[Outcome]:
        if self._outcome is None:
            raise ClosedError("this migration has not been started: use it as a context manager")
        return self._outcome

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            result: Outcome | Exception = self.migration.run()
        except Exception as error:
            result = error
        # The event loop is closed: nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._end, result)

    def _end(self, result: Outcome | Exception) -> None:
        outcome = self._started()
        if isinstance(result, Exception):
            outcome.set_exception(result)
        else:
            outcome.set_result(result)
        self._ready.set()

    def _event(self, event: Event) -> None:
        with self._lock:
            waits_already = bool(self._events)
            if event["event"] == "progress":
                for older in self._events:
                    if older["event"] == "progress" and older["role"] == event["role"]:
                        self._events.remove(older)
                        break
            self._events.append(event)
        if not waits_already:
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ready.set)


async def migrate(options: Options, on_event: Callable[[Event], object] | None = None) -> Outcome:
    """Migrate, and say what became of it.

    Parameters
    ----------
    options : Options
    on_event : callable, optional
        Called with each event, on the event loop.

    Returns
    -------
    Outcome

    Notes
    -----
    A task that is cancelled cancels the migration, as leaving an `AsyncMigration` does, and ends when that has.
    """
    async with AsyncMigration(options) as migration:
        async for event in migration:
            if on_event is not None:
                on_event(event)
        return await migration.outcome()
