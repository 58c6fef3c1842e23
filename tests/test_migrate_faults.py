"""What becomes of a migration when something breaks: a side dies, a frame lies, somebody presses Ctrl-C."""

from __future__ import annotations

import re
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrate_rig import Event, Frame, Nth, Proxy, Run, at
from pagecore.migrate.recovery import FAREWELL_SECONDS
from pagecore.wire import FrameType, encode_frame

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

# Long enough phases to hit: some tenths of a second each.
SLOW: dict[str, Any] = {"bandwidth": 24 << 20, "dirty_rate": 64 << 20, "precopy_rounds": 1}
# Either side learns of the other's end from the link, at once; the rest is the start and one self-check round.
SOON = 12.0


def kill(role: str, when: Callable[[Event], bool]) -> Callable[[Run, Event], None]:
    def act(run: Run, event: Event) -> None:
        if when(event) and run.once("kill"):
            run.signal(role, signal.SIGKILL)

    return act


# ------------------------------------------------------------------------------------------- a side is killed


@pytest.mark.parametrize(
    "when",
    [at("connect"), at("precopy", round=1), at("precopy", round=2), at("switch")],
    ids=["connect", "round1", "round2", "switch"],
)
def test_the_destination_dies_before_the_switch_and_the_guest_goes_on_at_the_source(
    when: Callable[[Event], bool],
) -> None:
    # At the switch the guest stands still already: the last round without postcopy is long, and can be hit.
    run = Run(kill("destination", when), **{**SLOW, "precopy_rounds": 2, "postcopy": False})
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert run.outcome.message.startswith("failed: the destination process was ended by SIGKILL; ")
    assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")
    assert run.named("self_check", "source")[0]["pages"] > 0
    assert run.seconds < SOON


@pytest.mark.parametrize("when", [at("boot"), at("precopy", round=1), at("switch")], ids=["boot", "round1", "switch"])
def test_the_source_dies_before_the_switch_and_takes_the_guest_along(when: Callable[[Event], bool]) -> None:
    run = Run(kill("source", when), **{**SLOW, "postcopy": False})
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "the source process was ended by SIGKILL" in run.outcome.message
    assert run.seconds < SOON


@pytest.mark.parametrize("guest", ["kvm", "process"])
def test_the_source_dies_after_the_switch_and_missing_pages_are_never_zeros(guest: str) -> None:
    run = Run(kill("source", at("postcopy", "destination")), guest=guest, **SLOW)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "the source process was ended by SIGKILL" in run.outcome.message
    assert "fail closed (SIGBUS or a wait), never zeros" in run.outcome.message
    # Fail closed: pages were missing, and whoever touched one was ended, or found out by the guest's keeper.
    assert run.named("lost", "destination")[0]["pages"] > 0
    assert not run.named("result")
    assert run.seconds < SOON


def test_the_destination_dies_after_the_switch_and_the_guest_is_gone() -> None:
    run = Run(kill("destination", at("postcopy", "destination")), **SLOW)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "the destination process was ended by SIGKILL" in run.outcome.message
    # S9: RUN was handed to the link, so the source never ran the guest again.
    assert not run.named("self_check")
    assert run.seconds < SOON


def test_the_source_dies_when_nothing_is_missing_and_the_guest_lives_on() -> None:
    run = Run(kill("source", at("verify", "destination")), settle_steps=20000)
    assert run.outcome.guest_at == "destination"


def test_a_stopped_destination_is_waited_for() -> None:
    stopped: list[Event] = []

    def act(run: Run, event: Event) -> None:
        if at("precopy", round=1)(event):
            stopped.append(event)
            run.signal("destination", signal.SIGSTOP)
        elif stopped and event["event"] == "progress" and event["role"] == "source" and run.once("go on"):
            run.signal("destination", signal.SIGCONT)

    run = Run(act, **SLOW)
    assert run.outcome.verified, run.outcome.message


def test_a_destination_that_stays_stopped_is_given_up() -> None:
    def act(run: Run, event: Event) -> None:
        if at("precopy", round=1)(event):
            run.signal("destination", signal.SIGSTOP)
        elif event["event"] == "failed":
            run.signal("destination", signal.SIGKILL)

    run = Run(act, stall_timeout=1.0)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert run.named("failed", "source")[0]["self_check"]
    assert run.seconds < SOON


# -------------------------------------------------------------------------------------------- a frame lies


def spoil(nth: Nth, offset: int, layout: str, value: int) -> Callable[[Frame], bytes | bytearray]:
    def change(frame: Frame) -> bytearray:
        if nth(frame):
            frame.put(offset, layout, value)
        return frame.data

    return change


def cut(nth: Nth) -> Callable[[Frame], bytes | bytearray | None]:
    return lambda frame: None if nth(frame) else frame.data


def some_now(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Every fourth case by default, and all of them in CI: each is a migration."""
    return [case if at % 4 == 0 else pytest.param(*case, marks=pytest.mark.ci) for at, case in enumerate(cases)]


BEFORE = [
    (Nth(FrameType.PAGES, 3), (0, "<I", 0x32434750), "magic"),
    (Nth(FrameType.PAGES, 3), (4, "<B", 99), "type"),
    (Nth(FrameType.PAGES, 3), (6, "<H", 7), "region"),
    (Nth(FrameType.PAGES, 3), (8, "<I", 9), "generation"),
    (Nth(FrameType.PAGES, 3), (12, "<I", 0), "round"),
    (Nth(FrameType.PAGES, 3), (16, "<Q", 1 << 60), "first"),
    (Nth(FrameType.PAGES, 3), (24, "<Q", 1 << 40), "count"),
    (Nth(FrameType.PAGES, 3), (32, "<I", 4095), "length"),
    (Nth(FrameType.ROUND), (12, "<I", 0), "round"),
    (Nth(FrameType.DISCARD), (36, "<I", 5), "crc"),
    (Nth(FrameType.HINTED), (4, "<B", FrameType.DISCARD), "type"),
    (Nth(FrameType.STATE), (32, "<I", 0xFFFFFFF0), "length"),
    (Nth(FrameType.ROUND_ACK), (8, "<I", 1), "generation"),
    (Nth(FrameType.LISTS_ACK), (16, "<Q", 77), "first"),
]


@pytest.mark.parametrize(
    ("nth", "field", "named"), some_now(BEFORE), ids=[f"{nth.kind.name}-{named}" for nth, _, named in BEFORE]
)
def test_a_bad_frame_before_the_switch_ends_the_session_and_the_guest_goes_on(
    nth: Nth, field: tuple[int, str, int], named: str, tmp_path: Path
) -> None:
    proxy = Proxy(str(tmp_path), spoil(nth, *field))
    run = Run(via=proxy, guest="process", size=16 << 20)
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert f"failed: {named}: " in run.outcome.message
    assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")


AFTER = [
    (Nth(FrameType.PAGES, 2, FrameType.RUN), (8, "<I", 9), "generation"),
    (Nth(FrameType.PAGES, 2, FrameType.RUN), (12, "<I", 0), "round"),
    (Nth(FrameType.PAGES, 2, FrameType.RUN), (16, "<Q", 1 << 60), "first"),
    (Nth(FrameType.PAGES, 2, FrameType.RUN), (32, "<I", 5), "length"),
    (Nth(FrameType.FINISH), (36, "<I", 5), "crc"),
]


@pytest.mark.parametrize(("nth", "field", "named"), AFTER, ids=[f"{nth.kind.name}-{named}" for nth, _, named in AFTER])
def test_a_bad_frame_after_the_switch_fails_closed(
    nth: Nth, field: tuple[int, str, int], named: str, tmp_path: Path
) -> None:
    proxy = Proxy(str(tmp_path), spoil(nth, *field))
    run = Run(via=proxy, guest="process", size=16 << 20, dirty_rate=None, precopy_rounds=1, reconnect_timeout=0)
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert f"failed: {named}: " in run.outcome.message
    assert run.named("lost", "destination")
    assert not run.named("self_check")


@pytest.mark.parametrize(
    ("nth", "where"),
    [
        (Nth(FrameType.HELLO, 1), "source"),
        (Nth(FrameType.PAGES, 20), "source"),
        (Nth(FrameType.HINTED), "source"),
        (Nth(FrameType.PAGES, 1, FrameType.RUN), "gone"),
        (Nth(FrameType.COMPLETE), "destination"),
    ],
    ids=["hello", "round1", "lists", "postcopy", "complete"],
)
def test_the_link_breaks(nth: Nth, where: str, tmp_path: Path) -> None:
    proxy = Proxy(str(tmp_path), cut(nth))
    run = Run(via=proxy, guest="process", size=16 << 20, dirty_rate=None, precopy_rounds=1, reconnect_timeout=0)
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == where
    assert run.seconds < SOON


def test_a_request_that_lies_ends_the_session(tmp_path: Path) -> None:
    nth = Nth(FrameType.REQUEST)
    proxy = Proxy(str(tmp_path), spoil(nth, 16, "<Q", 1 << 50))
    # Slow, so that the page does not come unasked before the lie is read.
    run = Run(via=proxy, reconnect_timeout=0, **{**SLOW, "dirty_rate": None})
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    assert "failed: first: " in run.outcome.message


def test_a_report_that_is_no_time_ends_the_session(tmp_path: Path) -> None:
    nth = Nth(FrameType.RUNNING)

    def change(frame: Frame) -> bytes | bytearray:
        return encode_frame(FrameType.RUNNING, b'{"first_instruction":"now"}', round=2) if nth(frame) else frame.data

    proxy = Proxy(str(tmp_path), change)
    run = Run(via=proxy, size=16 << 20, reconnect_timeout=0)
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    # The guest runs over there: whatever is wrong with the report, it never runs here again.
    assert run.outcome.guest_at != "source"
    assert "first_instruction: 'now' is no time" in run.outcome.message


def doubled(streams: tuple[str, ...], after: FrameType | None) -> Callable[[Frame], bytes | bytearray]:
    """Every frame of these streams comes twice, after the frame `after`; but for HELLO and barriers, which may not."""
    begun = after is None

    def change(frame: Frame) -> bytearray:
        nonlocal begun
        begun = begun or frame.kind == after
        twice = begun and frame.stream in streams and frame.kind not in NEVER_TWICE
        return frame.data * 2 if twice else frame.data

    return change


NEVER_TWICE = (FrameType.HELLO, FrameType.HELLO_ACK, FrameType.ROUND)


@pytest.mark.parametrize("guest", ["process", pytest.param("kvm", marks=pytest.mark.ci)])
def test_a_tolerant_peer_drops_the_second_of_every_frame(guest: str, tmp_path: Path) -> None:
    # Requests come twice at the source, too: the second is answered "already sent".
    proxy = Proxy(str(tmp_path), doubled(("bulk-0", "bulk-1", "urgent"), None))
    run = Run(via=proxy, guest=guest, duplicates="tolerant", dirty_rate=None, precopy_rounds=1, size=16 << 20)
    proxy.close()
    assert run.outcome.verified, run.outcome.message
    counted = run.placement
    assert counted["twice"] == 0
    # What came on a bulk stream came twice before its END; the second answer to the last requests may be left unread.
    arrived = counted["placed"] + counted["zeroed"] - counted["requested"]
    assert counted["duplicates"] + counted["dropped"] >= arrived > 0
    assert run.source["answers"]["already_sent"] > 0
    assert not run.named("link_lost")


@pytest.mark.parametrize("stream", ["bulk-0", pytest.param("urgent", marks=pytest.mark.ci)])
def test_a_strict_peer_names_the_page_that_came_twice(stream: str, tmp_path: Path) -> None:
    proxy = Proxy(str(tmp_path), doubled((stream,), FrameType.RUN))
    run = Run(via=proxy, duplicates="strict", **{**SLOW, "dirty_rate": None, "size": 16 << 20})
    proxy.close()
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert re.match(r"failed: duplicate: page \d+ came twice in session '\w+'; ", run.outcome.message)
    # It is a fault of the peer, not of the link.
    assert not run.named("link_lost", "destination")


def test_an_audit_that_differs_is_not_verified(tmp_path: Path) -> None:
    # A page whose content changed on the way, behind every check of the frame: the audit is there for that.
    nth = Nth(FrameType.PAGES, 1, FrameType.RUN)

    def change(frame: Frame) -> bytearray:
        if nth(frame):
            struct.pack_into("<Q", frame.data, 40 + 128, 0x1234567)
        return frame.data

    proxy = Proxy(str(tmp_path), change)
    run = Run(via=proxy, dirty_rate=None, precopy_rounds=1)
    proxy.close()
    assert nth.hit
    assert run.outcome.exit_code == 1
    assert not run.outcome.verified


# ------------------------------------------------------------------------------------------------- Ctrl-C


def press(when: Callable[[Event], bool], times: int = 1) -> Callable[[Run, Event], None]:
    def act(run: Run, event: Event) -> None:
        if when(event) and run.once("press"):
            for _ in range(times):
                run.interrupt()

    return act


@pytest.mark.parametrize("when", [at("boot"), at("precopy", round=1), at("switch")], ids=["boot", "round1", "switch"])
def test_ctrl_c_before_the_switch_leaves_the_guest_at_the_source(when: Callable[[Event], bool]) -> None:
    run = Run(press(when), **{**SLOW, "postcopy": False})
    assert run.outcome.exit_code == 130
    assert run.outcome.guest_at == "source"
    assert run.outcome.message == (
        "interrupted before the switch: the guest was at the source and passed one more self-check round"
    )
    assert run.named("self_check", "source")[0]["pages"] > 0
    assert not run.named("running")
    assert run.seconds < SOON


def test_ctrl_c_after_the_switch_serves_until_all_is_there() -> None:
    run = Run(press(at("postcopy")), **SLOW)
    assert run.outcome.exit_code == 130
    assert run.outcome.guest_at == "destination"
    assert run.outcome.message == (
        "interrupted after the switch: the guest was at the destination, and its memory is complete"
    )
    assert run.source["owed"] == 0
    assert run.outcome.verified
    assert run.seconds < SOON


@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
def test_a_second_ctrl_c_ends_both_at_once(phase: str) -> None:
    run = Run(press(at(phase), times=2), **SLOW)
    assert run.outcome.exit_code == 130
    assert run.outcome.guest_at == "gone"
    assert run.outcome.message == "interrupted twice: both sides were ended at once; the guest is gone"
    assert [event["status"] for event in run.named("ended")] == [-9, -9]
    assert run.seconds < SOON


def dones(run: Run) -> list[str]:
    return [event["role"] for event in run.named("hints") if event["command"] == "DONE"]


@pytest.mark.ci
def test_the_guest_gets_its_pages_back_exactly_once_on_every_path() -> None:
    # S5: one DONE, on the side where the guest runs then.
    assert dones(Run(size=16 << 20)) == ["destination"]
    assert dones(Run(size=16 << 20, postcopy=False)) == ["destination"]
    assert dones(Run(press(at("precopy", round=1)), **SLOW)) == ["source"]
    assert dones(Run(kill("destination", at("precopy", round=1)), **SLOW)) == ["source"]
    # At the switch the session is handed over already; the guest stays, and so the source takes it back.
    assert dones(Run(kill("destination", at("switch")), **{**SLOW, "postcopy": False})) == ["source"]
    assert dones(Run(press(at("postcopy")), **SLOW)) == ["destination"]


# Who waits for which time is asked of the two sides themselves in test_migrate_postcopy.py.
@pytest.mark.ci
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_side_that_stays_stopped_after_the_switch_is_given_up(role: str) -> None:
    def act(run: Run, event: Event) -> None:
        if at("postcopy", "destination")(event):
            run.signal(role, signal.SIGSTOP)
        elif event["event"] in ("failed", "lost"):
            run.signal(role, signal.SIGKILL)

    run = Run(act, stall_timeout=1.0, reconnect_timeout=1.0, **{**SLOW, "bandwidth": 4 << 20})
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    # A source that never heard of RUNNING looks for as long as a destination could be heard that has not run the guest.
    assert run.seconds < SOON + FAREWELL_SECONDS


def test_the_time_for_all_of_it_is_bounded() -> None:
    run = Run(timeout=1.0, **{**SLOW, "bandwidth": 2 << 20})
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert "time" in run.outcome.message
    assert run.seconds < SOON
