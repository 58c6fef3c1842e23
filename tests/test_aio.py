"""The asyncio face: waits that end, wake and are cancelled, beside an event loop that goes on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from pagecore import BusyError, ClosedError, PlacementLoop, ProtocolError
from pagecore.aio import LONGEST, AsyncMigration, AsyncPlacement, migrate
from pagecore.migrate import Migration, Options, Outcome
from pagecore.page_source import BufferSource
from placement_rig import END, ZEROS, header, pages_frame, pushed, served

DEADLINE = 20.0
SMALL = {"size": 16 << 20, "seed": 7, "timeout": 60.0}
# So slow that whoever wants to be quicker is.
SLOW = {**SMALL, "size": 64 << 20, "bandwidth": 4 << 20}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await main

    return asyncio.run(bounded())


async def started(*coroutines: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    """Tasks that have come to their first wait."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


# ----------------------------------------------------------------------------------------------------- placement


@pytest.mark.kernel
def test_waits_end_when_it_is_so() -> None:
    async def main() -> None:
        with served(8) as rig, pushed(rig, start=False) as (loop, peer):
            async with AsyncPlacement(loop) as placement:
                assert loop.running
                half, ended, settled = tasks = await started(
                    placement.wait_resident(0.5), placement.wait_ended(), placement.wait_settled()
                )
                peer.bulk[0].sendall(pages_frame(0, rig.page(0, 4)))
                await asyncio.wait_for(half, DEADLINE)
                assert not ended.done()
                assert not settled.done()
                peer.bulk[0].sendall(header(END))
                await asyncio.wait_for(ended, DEADLINE)
                assert not settled.done()
                peer.urgent.sendall(header(ZEROS, 4, 4))
                await asyncio.wait_for(settled, DEADLINE)
                # What is so already costs no wait.
                await placement.wait_resident(1.0)
            assert not loop.running
            assert all(task.result() is None for task in tasks)

    run(main())


@pytest.mark.kernel
def test_many_tasks_wait_without_a_thread_or_a_descriptor_each() -> None:
    async def main() -> None:
        with served(100) as rig, pushed(rig) as (loop, peer):
            placement = AsyncPlacement(loop)
            threads, files = threading.active_count(), descriptors()
            tasks = await started(*(placement.wait_resident(percent / 100) for percent in range(1, 101)))
            assert threading.active_count() == threads
            assert len(descriptors() - files) == 1
            for page in range(100):
                peer.bulk[0].sendall(pages_frame(page, rig.page(page)))
                await asyncio.wait_for(tasks[page], DEADLINE)
                assert not any(task.done() for task in tasks[page + 1 :])
                if page == 4:
                    break
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert descriptors() == files

    run(main())


@pytest.mark.kernel
def test_the_word_of_the_loop_comes_before_the_next_look() -> None:
    """Not by the clock: the timer is taken away, so that only the eventfd is left."""

    async def main() -> None:
        with served(100) as rig, pushed(rig) as (loop, peer):
            placement = AsyncPlacement(loop)
            (wait,) = await started(placement.wait_resident(0.5))
            assert placement._timer is not None
            placement._timer.cancel()
            peer.bulk[0].sendall(pages_frame(0, rig.page(0, 50)))
            await asyncio.wait_for(wait, DEADLINE)
            (wait,) = await started(placement.wait_settled())
            placement._timer.cancel()
            peer.bulk[0].sendall(header(77))
            with pytest.raises(ProtocolError):
                await asyncio.wait_for(wait, DEADLINE)

    run(main())


@pytest.mark.kernel
def test_a_wait_that_no_word_ends_is_ended_by_time() -> None:
    async def main() -> None:
        with served(1000) as rig, pushed(rig) as (loop, peer):
            placement = AsyncPlacement(loop)
            # Not one per cent: nothing is said of it.
            (wait,) = await started(placement.wait_resident(0.003))
            peer.bulk[0].sendall(pages_frame(0, rig.page(0, 3)))
            await asyncio.wait_for(wait, DEADLINE)

    run(main())


@pytest.mark.kernel
def test_a_failure_reaches_every_task() -> None:
    async def main() -> None:
        with served(4) as rig, pushed(rig) as (loop, peer):
            placement = AsyncPlacement(loop)
            tasks = await started(*(placement.wait_resident(1.0) for _ in range(5)), placement.wait_ended())
            progress = await started(_collect(placement))
            peer.bulk[0].sendall(header(77))
            for task in (*tasks, *progress):
                with pytest.raises(ProtocolError):
                    await asyncio.wait_for(task, DEADLINE)

    run(main())


async def _collect(placement: AsyncPlacement) -> list[int]:
    return [stats.resident async for stats in placement.progress()]


@pytest.mark.kernel
def test_progress_comes_and_ends() -> None:
    async def main() -> None:
        with served(64) as rig:
            loop = PlacementLoop([rig.region], BufferSource(rig.content))
            async with AsyncPlacement(loop) as placement:
                (seen,) = await started(_collect(placement))
                for first in range(0, 64, 16):
                    loop.prefetch([(first, 16)])
                    await placement.wait_resident((first + 16) / 64)
                resident = await asyncio.wait_for(seen, DEADLINE)
                assert resident == sorted(set(resident))
                assert (resident[0], resident[-1]) == (0, 64)

    run(main())


@pytest.mark.kernel
def test_progress_ends_with_the_loop() -> None:
    async def main() -> None:
        with served(4) as rig, pushed(rig) as (loop, _):
            (seen,) = await started(_collect(AsyncPlacement(loop)))
            await asyncio.to_thread(loop.stop)
            assert await asyncio.wait_for(seen, DEADLINE) == [0]

    run(main())


@pytest.mark.kernel
def test_a_loop_that_is_stopped_lets_its_tasks_go() -> None:
    async def main() -> None:
        with served(4) as rig, pushed(rig) as (loop, _):
            placement = AsyncPlacement(loop)
            (wait,) = await started(placement.wait_settled())
            await asyncio.to_thread(loop.stop)
            with pytest.raises(ClosedError, match="not running"):
                await asyncio.wait_for(wait, DEADLINE)
            with pytest.raises(ClosedError, match="not running"):
                await placement.wait_settled()

    run(main())


@pytest.mark.kernel
def test_a_time_out_and_a_cancellation_leave_nothing_behind() -> None:
    async def main() -> None:
        with served(4) as rig, pushed(rig) as (loop, peer):
            placement = AsyncPlacement(loop)
            files = descriptors()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(LONGEST):
                    await placement.wait_settled()
            assert descriptors() == files
            stays, goes = await started(placement.wait_settled(), placement.wait_settled())
            goes.cancel()
            with pytest.raises(asyncio.CancelledError):
                await goes
            # The other one still waits, and is still woken.
            peer.bulk[0].sendall(pages_frame(0, rig.page(0, 4)))
            await asyncio.wait_for(stays, DEADLINE)
            assert descriptors() == files
            # And nobody writes to the next file of that number.
            (goes,) = await started(placement.wait_ended())
            goes.cancel()
            with pytest.raises(asyncio.CancelledError):
                await goes
            another = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                await asyncio.to_thread(loop.stop)
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(another)
            finally:
                os.close(another)

    run(main())


@pytest.mark.kernel
def test_two_faces_of_one_loop_do_not_hinder_each_other() -> None:
    async def main() -> None:
        with served(100) as rig, pushed(rig) as (loop, peer):
            one, other = AsyncPlacement(loop), AsyncPlacement(loop)
            tasks = await started(one.wait_resident(0.5), other.wait_resident(0.5), other.wait_resident(1.0))
            peer.bulk[0].sendall(pages_frame(0, rig.page(0, 50)))
            await asyncio.wait_for(tasks[0], DEADLINE)
            await asyncio.wait_for(tasks[1], DEADLINE)
            peer.bulk[0].sendall(pages_frame(50, rig.page(50, 50)))
            await asyncio.wait_for(tasks[2], DEADLINE)

    run(main())


@pytest.mark.kernel
def test_only_one_descriptor_is_written_to_and_only_once() -> None:
    first, second = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    try:
        with served(4) as rig, pushed(rig) as (loop, peer):
            loop.wake_once(first)
            loop.wake_once(first)
            with pytest.raises(BusyError, match="another descriptor"):
                loop.wake_once(second)
            with pytest.raises(ValueError, match="-2"):
                loop.wake_once(-2)
            for page in range(4):
                peer.bulk[0].sendall(pages_frame(page, rig.page(page)))
            assert loop.wait_settled(DEADLINE)
            assert os.eventfd_read(first) == 1
            loop.wake_once(second)
            loop.wake_once(-1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(second)
    finally:
        os.close(first)
        os.close(second)


@pytest.mark.kernel
def test_a_start_that_is_cancelled_leaves_no_thread_running() -> None:
    async def main() -> None:
        with served(4) as rig, pushed(rig, start=False) as (loop, _):

            async def enter() -> None:
                async with AsyncPlacement(loop):
                    raise AssertionError("it was cancelled")

            (task,) = await started(enter())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not loop.running

    run(main())


@pytest.mark.kernel
def test_tasks_of_two_event_loops_are_refused() -> None:
    with served(4) as rig, pushed(rig) as (loop, _):
        placement = AsyncPlacement(loop)

        async def main() -> None:
            await started(placement.wait_settled())
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, placement.wait_settled())

        run(main())
        # When nobody waits any more, another one may.
        with pytest.raises(TimeoutError):
            run(asyncio.wait_for(placement.wait_settled(), LONGEST))


# ----------------------------------------------------------------------------------------------------- migrations


@pytest.mark.kernel
def test_a_migration_tells_its_events_and_its_end() -> None:
    async def main() -> None:
        seen = []
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        async with AsyncMigration(Options(**SMALL)) as migration:
            with pytest.raises(BusyError, match="has been started"):
                await migration.__aenter__()
            async for event in migration:
                seen.append((event["event"], event["role"], event.get("phase")))
            assert (await migration.outcome()).verified
        ticking.cancel()
        # The event loop was free all the time.
        assert ticks > 20
        for name in (("phase", "source", "precopy"), ("running", "source", None), ("map", "destination", None)):
            assert name in seen
        assert {("ended", "source", None), ("ended", "destination", None)} <= set(seen)

    run(main())


@pytest.mark.kernel
@pytest.mark.ci
def test_events_that_nobody_took_are_kept_but_for_old_progress() -> None:
    async def main() -> None:
        async with AsyncMigration(Options(**SMALL)) as migration:
            outcome = await migration.outcome()
            events = [event async for event in migration]
        names = [(event["event"], event["role"]) for event in events]
        assert names.count(("progress", "source")) == names.count(("progress", "destination")) == 1
        assert [event["phase"] for event in events if event["event"] == "phase" and event["role"] == "source"] == [
            phase["phase"] for phase in outcome.report["phases"] if phase["phase"] not in ("settle", "verify")
        ]

    run(main())


async def _until(migration: AsyncMigration, matches: Callable[[dict[str, Any]], bool]) -> None:
    async for event in migration:
        if matches(event):
            return
    raise AssertionError("the migration ended before that")


def in_precopy(event: dict[str, Any]) -> bool:
    return event["event"] == "phase" and event["phase"] == "precopy" and event["role"] == "source"


@pytest.mark.kernel
def test_whoever_leaves_cancels_it_and_waits_for_its_end() -> None:
    async def main() -> None:
        async with AsyncMigration(Options(**SLOW)) as migration:
            await _until(migration, in_precopy)
        outcome = await migration.outcome()
        assert (outcome.exit_code, outcome.guest_at) == (130, "source")
        assert not [pid for pid in migration.migration.pids.values() if os.path.exists(f"/proc/{pid}")]

    run(main())


@pytest.mark.kernel
def test_a_task_that_is_cancelled_cancels_its_migration() -> None:
    async def main() -> None:
        events = []
        running = asyncio.Event()

        def follow(event: dict[str, Any]) -> None:
            events.append(event)
            if in_precopy(event):
                running.set()

        task = asyncio.ensure_future(migrate(Options(**SLOW), follow))
        await asyncio.wait_for(running.wait(), DEADLINE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert not [thread for thread in threading.enumerate() if "migration" in thread.name]


@pytest.mark.kernel
def test_a_second_cancellation_ends_both_sides_at_once() -> None:
    async def main() -> None:
        migrations: list[AsyncMigration] = []

        async def move() -> None:
            async with AsyncMigration(Options(**SLOW)) as migration:
                migrations.append(migration)
                await _until(migration, lambda event: event["event"] == "running")

        task = asyncio.ensure_future(move())
        while not migrations or set(migrations[0].migration.pids) != {"source", "destination"}:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcome = await migrations[0].outcome()
        assert outcome.guest_at == "gone"
        assert "interrupted twice" in outcome.message

    run(main())


@pytest.mark.parametrize("interrupts", [0, 1])
def test_leaving_after_an_interrupt_is_no_second_one(interrupts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """S9: a second one would end a source that still serves a guest at the destination."""
    outcome, ended = Outcome(True, 130, "destination", "", {}), threading.Event()

    def until_ended(migration: Migration) -> Outcome:
        assert ended.wait(DEADLINE)
        return outcome

    async def main() -> None:
        async with AsyncMigration(Options(**SMALL)) as migration:
            for _ in range(interrupts):
                migration.interrupt()
            # Nothing else gets a turn before the context is being left.
            asyncio.get_running_loop().call_soon(ended.set)
        assert await migration.outcome() is outcome
        assert migration.migration._interrupts == 1

    monkeypatch.setattr(Migration, "run", until_ended)
    run(main())


@pytest.mark.kernel
@pytest.mark.ci
def test_an_awaited_outcome_that_is_cancelled_harms_nobody() -> None:
    async def main() -> None:
        async with AsyncMigration(Options(**SMALL)) as migration:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await migration.outcome()
            assert (await migration.outcome()).verified

    run(main())


def test_a_migration_is_started_by_its_context() -> None:
    async def main() -> None:
        migration = AsyncMigration(Options(**SMALL))
        for wait in (migration.outcome(), migration.__anext__()):
            with pytest.raises(ClosedError, match="has not been started"):
                await wait

    run(main())


def test_what_run_raises_is_raised_where_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    # No directory for the link: as on a machine whose disk is full.
    def fail(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", fail)
    with pytest.raises(OSError, match="No space left"):
        run(migrate(Options(**SMALL)))
