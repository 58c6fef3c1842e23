"""Signals at any moment, in either process: the guest goes on at the source, or it arrives whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pagecore
from concurrency import wait_until
from migrate_rig import Event, Run, at
from pagecore.migrate.coordinator import Child

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

# Each phase takes a tenth of a second or more, so that a signal falls into it.
SMALL: dict[str, Any] = {
    "size": 16 << 20,
    "guest": "process",
    "dirty_rate": None,
    "precopy_rounds": 2,
    "downtime_limit": 0.001,
    "bandwidth": 64 << 20,
}
# The rest takes some seconds: a guest that writes little asks for little of it.
SLOW = {**SMALL, "precopy_rounds": 0, "bandwidth": 2 << 20, "dirty_rate": 256 << 10, "settle_steps": 16}
SOON = 20.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pagecore.__file__).parent.parent)}
MOMENTS: dict[str, Callable[[Event], bool]] = {
    "boot": at("boot"),
    "connect": at("connect"),
    "round1": at("precopy", round=1),
    "round2": at("precopy", round=2),
    "switch": at("switch"),
    "arrival": at("switch", "destination"),
    "run": at("postcopy"),
    "postcopy": at("postcopy", "destination"),
    "settle": at("settle", "destination"),
    "verify": at("verify", "destination"),
}


def judged(run: Run, interrupted: int) -> None:
    """The guest is at the source and checks itself once more, or all of it is at the destination."""
    assert not run.once("acted"), "the moment never came"
    what = run.outcome.message
    handed = any(map(at("postcopy"), run.events))
    dones = [event["role"] for event in run.named("hints") if event["command"] == "DONE"]
    assert run.seconds < SOON, what
    if handed:
        assert run.outcome.guest_at == "destination", what
        assert run.outcome.exit_code == (130 if interrupted else 0), what
        assert run.named("result", "destination")[0]["exact"], what
        assert dones == ["destination"], what
        assert not run.named("self_check"), what
    else:
        assert run.outcome.guest_at in ("source", "nowhere"), what
        assert run.outcome.exit_code == (130 if interrupted else 1), what
        assert what.endswith(("passed one more self-check round", "no guest was started")), what
        assert not any(map(at("postcopy", "destination"), run.events)), what
        assert dones in ([], ["source"]), what


def when(moment: str, act: Callable[[Run], object]) -> Callable[[Run, Event], None]:
    def look(run: Run, event: Event) -> None:
        if MOMENTS[moment](event) and run.once("acted"):
            act(run)

    return look


@pytest.mark.parametrize("moment", [pytest.param(name, marks=pytest.mark.ci) for name in MOMENTS])
def test_ctrl_c_at_any_moment(moment: str) -> None:
    run = Run(when(moment, Run.interrupt), **SMALL)
    judged(run, 1)


# In turn; around the switch, where each of the two knows something else, both.
ASKED = [("source", moment) for moment in MOMENTS if moment not in ("connect", "round2", "verify")]
ASKED += [("destination", moment) for moment in MOMENTS if moment not in ("boot", "round1", "settle")]


@pytest.mark.ci
@pytest.mark.parametrize(("role", "moment"), ASKED)
def test_one_side_is_asked_to_end_at_any_moment(role: str, moment: str) -> None:
    # SIGTERM to one of the two processes: its guest is not lost by it.
    number = signal.SIGTERM if len(moment) % 2 else signal.SIGHUP
    run = Run(when(moment, lambda run: run.signal(role, number)), **SMALL)
    judged(run, 0)


@pytest.mark.ci
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_terminals_interrupt_is_the_parents(role: str) -> None:
    run = Run(when("round1", lambda run: run.signal(role, signal.SIGINT)), **SMALL)
    assert run.outcome.exit_code == 0, run.outcome.message


def test_a_signal_to_all_processes_is_the_parents() -> None:
    """Of these that pause and resume, too: from early on, while the child waits for its configuration."""
    events: list[Event] = []
    child = Child("source", events.append)
    parents = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def ready() -> bool:
        ignored = Path(f"/proc/{child.pid}/status").read_text().partition("SigIgn:")[2].split()[0]
        return all(int(ignored, 16) >> number - 1 & 1 for number in parents)

    try:
        wait_until(ready, "the child ignores them")
        for number in parents:
            os.kill(child.pid, number)
        assert child.process.stdin is not None
        child.process.stdin.close()
        wait_until(lambda: events, "the end of a child that is told nothing")
        # Not by a signal.
        assert events == [{"event": "ended", "role": "source", "status": 1}]
    finally:
        child.kill()
        child.close()


@pytest.mark.ci
@pytest.mark.parametrize("moment", ["connect", "round1", "switch", "postcopy", "verify"])
def test_a_second_ctrl_c_at_any_moment_ends_both(moment: str) -> None:
    def twice(run: Run) -> None:
        run.interrupt()
        run.interrupt()

    run = Run(when(moment, twice), **SMALL)
    assert run.outcome.exit_code == 130
    assert run.outcome.message == "interrupted twice: both sides were ended at once; the guest is gone"
    assert run.seconds < SOON


# --------------------------------------------------------------------------- a signal within what it interrupts

WITHIN = """
import contextlib, itertools, json, signal, sys, threading
from pagecore.migrate.progress import Cancelled, Stop

def ask(stop):
    # What the handler of the two processes does.
    stop.signalled()

class Stuck(Exception):
    pass

def give_up(*_):
    raise Stuck

def step(frame, event, argument):
    # Its frame is traced operation by operation; this one is not, and nothing that it calls.
    global left
    frame.f_trace_opcodes = True
    left -= 1
    if left == 0:
        # Its handler has run when this returns: exactly here, whatever lock is held.
        signal.raise_signal(signal.SIGTERM)
    return step

def interrupted(moment, call, stop):
    # A signal of a number at its moment; False where the call has fewer.
    global left
    left = moment
    sys.settrace(step)
    try:
        with contextlib.suppress(Cancelled):
            call(stop)
    finally:
        sys.settrace(None)
    return left <= 0

flag = sys.argv[1]
signal.signal(signal.SIGALRM, give_up)
signal.setitimer(signal.ITIMER_REAL, 0.3 if flag == "event" else 20.0)
moments = 0
try:
    for call in (ask, Stop.check, Stop.remaining, lambda stop: stop.requested.is_set()):
        for moment in itertools.count(1):
            stop = Stop(60.0)
            if flag == "event":
                stop.requested = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: ask(stop))
            if not interrupted(moment, call, stop):
                break
            assert stop.requested.is_set(), moment
            moments += 1
    print(json.dumps(moments))
except Stuck:
    print(json.dumps("stuck"))
"""


@pytest.mark.parametrize("flag", ["flag", "event"])
def test_a_signal_within_any_step_of_asking_for_an_end_ends_it_too(flag: str) -> None:
    """A handler that takes a lock would wait for whom it interrupts, as the handler of an Event is shown to do."""
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, flag], capture_output=True, text=True, timeout=40, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    if flag == "event":
        assert json.loads(done.stdout) == "stuck"
    else:
        assert json.loads(done.stdout) > 20


@pytest.mark.ci
def test_once_the_guest_is_handed_over_neither_the_clock_nor_a_first_ctrl_c_takes_its_pages() -> None:
    """The rest takes longer than `timeout`, and whoever pressed Ctrl-C lets it come."""
    run = Run(when("postcopy", Run.interrupt), **SLOW, timeout=2.5)
    judged(run, 1)
    assert run.seconds > 3


@pytest.mark.ci
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_second_signal_after_the_switch_gives_the_guest_up(role: str) -> None:
    def act(run: Run, event: Event) -> None:
        # Signals that wait count once: one with each event, until it has ended.
        if any(map(MOMENTS["postcopy"], run.events)) and not run.named("ended", role):
            run.signal(role, signal.SIGTERM)

    run = Run(act, **SLOW)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "the rest was given up" in run.outcome.message
    # Fail closed (D12), and at once, not when somebody has lost patience.
    assert run.named("lost", "destination")[0]["pages"] > 0
    assert run.outcome.message.endswith("pages that nobody will send fail closed (SIGBUS or a wait), never zeros")
    assert not run.named("link_lost")
    assert run.seconds < 8


# ------------------------------------------------------------------------------------------- the parent is gone

PARENT = """
import json, sys
from pagecore.migrate import Migration, Options

def tell(event):
    print(json.dumps({**event, "pids": migration.pids}), flush=True)

migration = Migration(Options(**json.loads(sys.argv[1])), tell)
migration.run()
"""


@contextlib.contextmanager
def parent() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, json.dumps({**SMALL, "bandwidth": 8 << 20})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        yield process
        process.kill()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("moment", [pytest.param("round1", marks=pytest.mark.ci), pytest.param("postcopy")])
def test_without_their_parent_both_sides_end(moment: str) -> None:
    with parent() as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if MOMENTS[moment](event):
                break
        else:
            raise AssertionError(f"{moment} never came")
        process.kill()
        for role, pid in event["pids"].items():
            wait_until(lambda pid=pid: not alive(pid), f"the {role} ends")
