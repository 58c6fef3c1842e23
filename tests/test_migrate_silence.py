"""A link, or a side, that says nothing any more, or not for a while, in every phase: only time tells which."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fault_relay import Fault
from migrate_rig import Event, Run, at
from pagecore.wire import FrameType
from test_migrate_recovery import SMALL, lost, moved

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60), pytest.mark.ci]


def stall(kind: FrameType, *, back: bool = False) -> Fault:
    return Fault("stall", kind=kind, to_destination=not back, seconds=0.1)


def test_a_link_that_stalls_for_a_moment_in_every_phase_is_waited_for(tmp_path: Path) -> None:
    faults = [
        stall(FrameType.HELLO),
        stall(FrameType.HELLO_ACK, back=True),
        Fault("stall", "bulk-0", after=200_000, seconds=0.1),
        stall(FrameType.ROUND_ACK, back=True),
        stall(FrameType.STATE),
        stall(FrameType.HINTED),
        stall(FrameType.LISTS_ACK, back=True),
        stall(FrameType.RUN),
        stall(FrameType.RUNNING, back=True),
        Fault("stall", "bulk-1", since=FrameType.RUN, after=50_000, seconds=0.1),
        stall(FrameType.FINISH),
        stall(FrameType.COMPLETE, back=True),
        stall(FrameType.AUDIT, back=True),
        stall(FrameType.COMPLETE),
    ]
    run = moved(tmp_path, *faults)
    assert all(fault.hit for fault in faults)
    assert run.outcome.verified
    assert lost(run, "source") == lost(run, "destination") == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("half-open", kind=FrameType.HELLO_ACK, to_destination=False),
        Fault("half-open", "bulk-0", after=200_000),
        Fault("half-open", kind=FrameType.LISTS_ACK, to_destination=False),
    ],
    ids=["connect", "precopy", "switch"],
)
def test_a_half_open_link_before_the_switch_leaves_the_guest_at_the_source(fault: Fault, tmp_path: Path) -> None:
    run = moved(tmp_path, fault, stall_timeout=0.5)
    assert fault.hit
    assert run.outcome.guest_at == "source"
    assert " for 0.5 s; " in run.outcome.message


def test_half_open_links_after_the_switch_are_left_one_after_the_other(tmp_path: Path) -> None:
    faults = [
        Fault("half-open", kind=FrameType.RUN, after=40),
        Fault("half-open", kind=FrameType.SETTLED, to_destination=False, after=50, link=1),
        Fault("half-open", "bulk-1", since=FrameType.RESUME, after=50_000, link=2),
        Fault("half-open", kind=FrameType.AUDIT, to_destination=False, after=100, link=3),
    ]
    run = moved(tmp_path, *faults, stall_timeout=0.5)
    assert all(fault.hit for fault in faults)
    assert run.outcome.verified
    assert lost(run, "destination") >= 3


def test_a_source_that_stays_stopped_before_the_switch_keeps_its_guest() -> None:
    def act(run: Run, event: Event) -> None:
        if at("precopy", round=1)(event) and run.once("stop"):
            run.signal("source", signal.SIGSTOP)
        elif event["event"] == "failed" and event["role"] == "destination":
            run.signal("source", signal.SIGCONT)

    run = Run(act, **{**SMALL, "bandwidth": 16 << 20}, stall_timeout=0.5)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert run.named("failed", "destination")[0]["error"] == "the source was silent for 0.5 s"
    assert run.named("self_check", "source")[0]["pages"] > 0
    assert run.seconds < 15
