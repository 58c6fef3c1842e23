"""A migration that is paused: nothing leaves but answers, nobody takes it for dead, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fault_relay import Relay
from migrate_rig import Event, Run, at
from pagecore.aio import AsyncMigration
from pagecore.errors import ProtocolError
from pagecore.migrate import Options
from pagecore.migrate.pause import Pause, SignsOfLife
from pagecore.migrate.precopy import _pause
from pagecore.migrate.progress import Cancelled, Stop
from pagecore.migrate.serving import Serving
from pagecore.wire import Capabilities, FrameType, encode_report

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

SMALL: dict[str, Any] = {
    "size": 16 << 20,
    "guest": "process",
    "dirty_rate": 32 << 20,
    "precopy_rounds": 2,
    "downtime_limit": 0.001,
    "bandwidth": 32 << 20,
    "duplicates": "strict",
    # A pause lasts longer than this.
    "stall_timeout": 0.8,
}
PAUSE = 1.0
# So that the guest does not come by all of its pages in a pause, which would be the end of it.
SLOW_GUEST = 4 << 20


class Paused:
    """Pauses a run once, when it is time, and resumes it `seconds` after that is said."""

    def __init__(self, when: Callable[[Event], bool], seconds: float = PAUSE) -> None:
        self._when = when
        self._seconds = seconds
        # The source's counters meanwhile.
        self.samples: list[Event] = []
        self._in_pause = False

    def __call__(self, run: Run, event: Event) -> None:
        if self._when(event) and run.once("pause"):
            run.migration.pause()
        if event["role"] != "source":
            return
        if event["event"] == "paused":
            self._in_pause = True
            threading.Timer(self._seconds, run.migration.resume).start()
        elif event["event"] == "resumed":
            self._in_pause = False
        elif self._in_pause and event["event"] == "progress":
            self.samples.append(event)

    def grown(self, *names: str) -> int:
        """By how much a sum of counters grew in the pause."""
        first, last = self.samples[0], self.samples[-1]
        return int(sum(last[name] - first[name] for name in names))


def judged(run: Run) -> None:
    """It was paused once, nobody gave anything up, and all of it arrived."""
    assert run.outcome.exit_code == 0, run.outcome.message
    assert run.outcome.verified
    assert not run.named("link_lost")
    for role in ("source", "destination"):
        assert [len(run.named(name, role)) for name in ("paused", "resumed")] == [1, 1], role
    ((began, ended),) = run.outcome.report["pauses"]
    assert ended - began == pytest.approx(run.source["paused_seconds"], abs=0.1)
    assert run.source["paused_seconds"] >= PAUSE


def test_before_the_switch_nothing_leaves_and_the_guest_runs_on() -> None:
    paused = Paused(at("precopy", round=1))
    run = Run(paused, **SMALL)
    judged(run)
    assert paused.grown("wire_bytes") == 0
    assert paused.grown("pages_written") > 0
    # Rounds are counted, and measured, without it.
    assert [event["round"] for event in run.named("round")] == [1, 2]
    assert all(event["seconds"] < PAUSE and event["bandwidth"] > 8 << 20 for event in run.named("round"))
    # Nothing that was written in the pause was forgotten, nor does it come twice (strict).
    assert not run.named("lost")


@pytest.mark.ci
def test_after_the_switch_the_guest_gets_what_it_waits_for_and_nothing_else() -> None:
    paused = Paused(at("postcopy", "destination"))
    run = Run(paused, **{**SMALL, "precopy_rounds": 0, "dirty_rate": SLOW_GUEST})
    judged(run)
    assert paused.grown("pages_urgent") > 0
    assert paused.grown("pages_sent") == paused.grown("pages_urgent")
    assert run.placement["twice"] == run.placement["duplicates"] == 0


@pytest.mark.ci
def test_a_pause_in_the_switch_comes_after_it() -> None:
    paused = Paused(at("switch"))
    run = Run(paused, **{**SMALL, "precopy_rounds": 1, "dirty_rate": SLOW_GUEST, "bandwidth": 8 << 20})
    judged(run)
    over = next(phase["at"] for phase in run.outcome.report["phases"] if phase["phase"] == "postcopy")
    assert run.outcome.report["pauses"][0][0] >= over
    assert run.named("running")[0]["downtime"] < PAUSE


@pytest.mark.ci
def test_without_precopy_a_pause_is_one_before_the_switch_all_the_same() -> None:
    paused = Paused(at("boot"))
    run = Run(paused, **{**SMALL, "precopy_rounds": 0})
    judged(run)
    assert all(sample["pages_sent"] == sample["pages_zero"] == 0 for sample in paused.samples)
    switched = next(phase["at"] for phase in run.outcome.report["phases"] if phase["phase"] == "switch")
    assert run.outcome.report["pauses"][0][1] <= switched


# ------------------------------------------------------------------------------------------------- what may happen


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
def test_a_paused_migration_can_be_cancelled(phase: str) -> None:
    def act(run: Run, event: Event) -> None:
        if at(phase)(event) and run.once("pause"):
            run.migration.pause()
        elif event["event"] == "paused" and event["role"] == "source":
            run.interrupt()

    run = Run(act, **{**SMALL, "precopy_rounds": 1, "dirty_rate": None})
    assert run.named("paused", "source")
    assert run.outcome.exit_code == 130
    if phase == "precopy":
        assert run.outcome.guest_at == "source"
        assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")
    else:
        # Whoever wants an end wants no pause any more: the rest is sent.
        assert run.outcome.guest_at == "destination"
        assert run.outcome.verified


@pytest.mark.ci
def test_a_pause_outlives_the_link(tmp_path: Path) -> None:
    before: list[int] = []

    with Relay(str(tmp_path)) as relay:

        def resume(run: Run) -> None:
            before.append(sum(link == 1 and kind in (FrameType.PAGES, FrameType.ZEROS) for link, *_, kind in pages()))
            run.migration.resume()

        def pages() -> list[tuple[int, str, bool, int]]:
            return [frame for frame in list(relay.frames) if frame[1].startswith("bulk")]

        def act(run: Run, event: Event) -> None:
            if at("postcopy")(event) and run.once("pause"):
                run.migration.pause()
            elif event["event"] == "paused" and event["role"] == "source":
                relay.cut()
            elif event["event"] == "reconnected" and event["role"] == "source":
                threading.Timer(PAUSE, resume, (run,)).start()

        run = Run(act, via=relay, **{**SMALL, "precopy_rounds": 0, "dirty_rate": SLOW_GUEST})
    assert run.outcome.verified, run.outcome.message
    # One pause, on two links; nobody lost patience with the second.
    assert [len(run.named(name, "source")) for name in ("paused", "resumed", "link_lost")] == [1, 1, 1]
    assert before == [0]


@pytest.mark.ci
def test_a_source_that_stops_breathing_in_a_pause_is_given_up() -> None:
    """What keeps the destination waiting is said by the thread that would send, not by the connection."""

    def act(run: Run, event: Event) -> None:
        if at("precopy", round=1)(event) and run.once("pause"):
            run.migration.pause()
        elif event["event"] == "paused" and event["role"] == "destination":
            run.signal("source", signal.SIGSTOP)
        elif event["event"] == "failed" and event["role"] == "destination":
            run.signal("source", signal.SIGCONT)

    run = Run(act, **SMALL)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert "the source was silent for 0.8 s" in run.outcome.message


class Told:
    """A link that remembers what is said on it, and whose peer may know of pauses."""

    def __init__(self, *, pause: bool) -> None:
        self.capabilities = Capabilities(pause=pause)
        self.said: list[bytes] = []

    def send(self, kind: FrameType, payload: bytes) -> None:
        assert kind is FrameType.ALIVE
        self.said.append(payload)


def pausing() -> tuple[Stop, Pause, list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    stop = Stop(60)
    reporter: Any = SimpleNamespace(event=lambda name, **values: events.append((name, values)))
    return stop, Pause(stop, reporter), events


def test_a_destination_that_does_not_know_of_pauses_is_not_left_in_silence() -> None:
    stop, pause, events = pausing()
    link: Any = Told(pause=False)
    stop.pause()
    assert not pause.wanted(link)
    assert not pause.hold(link, lambda _: pytest.fail("it waited"), lambda: True)
    assert [name for name, _ in events] == ["not_paused"]
    assert not stop.paused
    assert not link.said


def test_a_pause_that_was_over_before_it_began_is_one_all_the_same() -> None:
    """The senders have heard of it, and left pages behind: whoever asks must not take the round for complete."""
    stop, pause, events = pausing()
    link: Any = Told(pause=True)
    stop.pause()
    assert pause.wanted(link)
    stop.resume()
    assert pause.hold(link, lambda _: pytest.fail("it waited"), lambda: True)
    assert not pause.hold(link, lambda _: pytest.fail("it waited"), lambda: True)
    assert not events


def test_the_end_of_a_pause_is_said_on_both_sides_and_its_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pagecore.migrate.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    stop, pause, events = pausing()
    link: Any = Told(pause=True)
    stop.pause()
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        now[0] += 1000
        if len(looks) == 3:
            stop.resume()

    assert pause.hold(link, look, lambda: True)
    assert link.said == [encode_report({"paused": True})] * 3 + [encode_report({"paused": False})]
    assert [name for name, _ in events] == ["paused", "resumed"]
    assert pause.seconds == events[1][1]["seconds"] > 0
    assert stop.remaining() == 60

    signs = SignsOfLife(stop, pause._reporter)
    for payload in (*link.said, link.said[-1]):
        signs.hear(payload)
        now[0] += 0 if payload is link.said[-1] else 1000
    assert stop.remaining() == 60
    assert [name for name, _ in events[2:]] == ["paused", "resumed"]
    for wrong in ({}, {"paused": 1}, {"paused": None}):
        with pytest.raises(ProtocolError):
            signs.hear(encode_report(wrong))


def test_a_pause_after_the_switch_is_over_once_the_guest_has_asked_for_everything() -> None:
    stop, pause, events = pausing()
    link: Any = Told(pause=True)
    link.watch = lambda _: None
    link.urgent = SimpleNamespace(hang_up=lambda: None)
    tracker = SimpleNamespace(dirty_count=2)
    session: Any = SimpleNamespace(
        stop=stop, pause=pause, tracker=tracker, options=Options(), answers=None, running_at=1.0
    )
    outgoing: Any = SimpleNamespace(urgent=None, send_owed=lambda _limit, _watch, held: sent.append(not held()))
    serving = Serving(session, link, outgoing)
    sent: list[bool] = []

    def answer(wait: float) -> bool:
        if wait:
            assert tracker.dirty_count, "it goes on with nothing to hold back"
            tracker.dirty_count -= 1
        return False

    link.control = SimpleNamespace(readable=answer)
    stop.pause()
    try:
        serving._push()
    finally:
        serving.close()
    assert not any(sent)
    assert [name for name, _ in events] == ["paused", "resumed"]
    # Whoever loses the link now, and owes again what did not arrive, still wants a pause.
    assert pause.wanted(link)


def test_a_pause_before_the_switch_goes_on_with_nothing_owed() -> None:
    """The guest may write nothing for a while; the round must not end in the switch for that."""
    stop, pause, events = pausing()
    looks: list[float] = []

    def readable(wait: float) -> bool:
        looks.append(wait)
        if len(looks) == 3:
            stop.resume()
        return False

    link: Any = Told(pause=True)
    link.control = SimpleNamespace(readable=readable)
    session: Any = SimpleNamespace(stop=stop, pause=pause, tracker=SimpleNamespace(dirty_count=0))
    stop.pause()
    assert _pause(session, link, 0.0)
    assert len(looks) == 3
    assert [name for name, _ in events] == ["paused", "resumed"]


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_throttled_guest_is_let_go_while_there_are_no_rounds(share: float) -> None:
    stop, pause, _ = pausing()
    throttled: list[float] = []

    def readable(_: float) -> bool:
        # It is paused, and runs freely.
        assert throttled == ([0] if share else [])
        stop.resume()
        return False

    link: Any = Told(pause=True)
    link.control = SimpleNamespace(readable=readable)
    session: Any = SimpleNamespace(stop=stop, pause=pause, guest=SimpleNamespace(throttle=throttled.append))
    assert not _pause(session, link, share)
    stop.pause()
    assert _pause(session, link, share)
    assert throttled == ([0, share] if share else [])


def test_the_clock_stands_still_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pagecore.migrate.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    stop = Stop(60)
    now[0] += 50
    stop.hold_clock()
    now[0] += 1000
    stop.check()
    # Said again and again by a source that pauses.
    stop.hold_clock()
    assert stop.remaining() == 10
    stop.release_clock()
    now[0] += 9
    stop.check()
    now[0] += 1
    with pytest.raises(TimeoutError):
        stop.check()


def test_whoever_asks_for_an_end_wants_no_pause() -> None:
    stop = Stop(60)
    stop.pause()
    assert stop.paused
    stop.signalled()
    assert not stop.paused
    with pytest.raises(Cancelled):
        stop.check()


# --------------------------------------------------------------------------------------------- whoever asks for it


@pytest.mark.ci
def test_a_task_pauses_its_migration() -> None:
    async def migrate() -> list[str]:
        names = []
        async with AsyncMigration(Options(**SMALL)) as migration:
            migration.pause()
            async for event in migration:
                if event["role"] == "source" and event["event"] in ("paused", "resumed"):
                    names.append(event["event"])
                    migration.resume()
            assert (await migration.outcome()).verified
        return names

    assert asyncio.run(asyncio.wait_for(migrate(), 30)) == ["paused", "resumed"]


@pytest.mark.ci
def test_a_person_pauses_it_with_signals() -> None:
    guest = ["--guest", "process", "--size", "16M", "--bandwidth", "16M", "--precopy-rounds", "1"]
    command = [sys.executable, "-m", "pagecore", "migrate", *guest]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        try:
            for said, number in (("precopy, round 1", signal.SIGUSR1), ("paused", signal.SIGUSR2)):
                assert any(line.rstrip().endswith(said) for line in lines), said
                process.send_signal(number)
            assert any("the transfer goes on after" in line for line in lines)
            assert process.wait(20) == 0
        finally:
            process.kill()
