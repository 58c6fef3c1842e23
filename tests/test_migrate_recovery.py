"""The link is lost at any byte: the guest lives on exactly one side, and nothing is lost or placed twice."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fault_relay import Fault, Relay
from migrate_rig import Event, Frame, Nth, Proxy, Run, at
from pagecore.wire import FrameType, encode_frame, encode_header

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(90)]

SMALL: dict[str, Any] = {
    "size": 16 << 20,
    "guest": "process",
    "dirty_rate": None,
    "precopy_rounds": 2,
    "downtime_limit": 0.001,
    "duplicates": "strict",
}
# Far more than any of these runs takes; it is what "nothing hangs" means.
SOON = 30.0


def moved(directory: Path, *faults: Fault, **options: Any) -> Run:
    """One migration through the relay, and what holds after every one: see `judged`."""
    with Relay(str(directory), *faults) as relay:
        run = Run(via=relay, **{**SMALL, **options})
    judged(run, " ".join(map(str, faults)))
    return run


def judged(run: Run, what: str) -> None:
    """Either it is verified, or there is one clear error and the guest goes on where it was."""
    handed = any(map(at("postcopy", "source"), run.events)) or any(map(at("finish", "source"), run.events))
    what = f"{what}: {run.outcome.message}"
    dones = [event["role"] for event in run.named("hints") if event["command"] == "DONE"]
    assert run.seconds < SOON, what
    if handed:
        # Once RUN was handed to the link it is another link that brings the migration to its end.
        assert run.outcome.exit_code == 0, what
        assert run.outcome.guest_at == "destination", what
        assert run.source["audit_pages"] > 0 or not run.outcome.report["options"]["postcopy"], what
        assert not run.named("self_check"), what
        assert dones == ["destination"], what
        if run.outcome.report["options"]["postcopy"]:
            counted = run.placement
            names = ("twice", "duplicates", "foreign", "lost", "poisoned")
            # Reload and reports say what is missing: nothing has to be asked for a second time at the end (D16).
            assert run.source["answers"]["again"] == 0, what
            assert {name: counted[name] for name in names} == dict.fromkeys(names, 0), what
    else:
        assert run.outcome.exit_code == 1, what
        assert run.outcome.guest_at == "source", what
        assert run.outcome.message.startswith("failed: "), what
        assert run.outcome.message.endswith("; the guest was at the source and passed one more self-check round"), what
        assert not run.named("running"), what
        assert not any(map(at("postcopy", "destination"), run.events)), what
        assert dones in ([], ["source"]), what


def lost(run: Run, role: str) -> int:
    """How often a side lost the link."""
    return len(run.named("link_lost", role))


# ---------------------------------------------------------------------------------------------- the cut matrix

# What passes on the control stream, in this order.
BEFORE = [
    (True, FrameType.HELLO),
    (False, FrameType.HELLO_ACK),
    (False, FrameType.ROUND_ACK),
    (True, FrameType.STATE),
    (True, FrameType.DISCARD),
    (True, FrameType.HINTED),
    (False, FrameType.LISTS_ACK),
]
AFTER = [
    (True, FrameType.RUN),
    (False, FrameType.RUNNING),
    (True, FrameType.FINISH),
    (False, FrameType.COMPLETE),
    (False, FrameType.AUDIT),
    (True, FrameType.COMPLETE),
]
AGAIN = [
    (True, FrameType.HELLO),
    (False, FrameType.HELLO_ACK),
    (False, FrameType.RETURN),
    (False, FrameType.SETTLED),
    (True, FrameType.RESUME),
]


def on_control(chance: random.Random, frames: list[tuple[bool, FrameType]], link: int) -> dict[str, Any]:
    forth, kind = chance.choice(frames)
    # Before it, in its header, or behind its header.
    return {"to_destination": forth, "kind": kind, "after": chance.choice([0, 7, 39, 40]), "link": link}


def on_pages(chance: random.Random, since: FrameType | None, link: int) -> dict[str, Any]:
    where: dict[str, Any] = {"since": since, "link": link}
    if since is not None and chance.random() < 0.3:
        forth = chance.random() < 0.5
        return {**where, "stream": "urgent", "to_destination": forth, "after": chance.randrange(9000 if forth else 90)}
    # In precopy each of the two carries about four MiB.
    most = 3_000_000 if since is None else 500_000
    return {**where, "stream": chance.choice(["bulk-0", "bulk-1"]), "after": chance.randrange(most)}


def chosen(seed: int) -> list[Fault]:
    """Before the switch one loss, anywhere; after it one to three, some while both sides recover."""
    chance = random.Random(seed)

    def fault(frames: list[tuple[bool, FrameType]], since: FrameType | None, link: int) -> Fault:
        action = chance.choices(["cut", "cut-one", "stall", "half-open"], [12, 4, 2, 1])[0]
        if link and action == "stall":
            action = "cut"
        where = on_control(chance, frames, link) if chance.random() < 0.6 else on_pages(chance, since, link)
        return Fault(action, **where)

    if seed % 3 == 0:
        return [fault(BEFORE, None, 0)]
    faults = [fault(AFTER, FrameType.RUN, 0)]
    for link in range(1, seed % 3 + chance.choice([0, 1])):
        faults.append(fault(AGAIN, FrameType.RESUME, link))
    return faults


# These few are tried every time; each hits another phase.
ALWAYS = (5, 8, 11, 12, 48, 49)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.ci) for seed in range(50)]
)
def test_the_link_is_lost_at_any_byte(seed: int, tmp_path: Path) -> None:
    faults = chosen(seed)
    # A half-open link says nothing: only silence tells.
    silent = any(fault.action == "half-open" for fault in faults)
    options = {"stall_timeout": 1.5} if silent else {}
    moved(tmp_path, *faults, seed=seed, guest="kvm" if seed % 5 == 0 else "process", postcopy=seed % 7 != 6, **options)


# ---------------------------------------------------------------------------------------------- what it is made of


def test_a_run_that_was_lost_is_denied_and_handed_over_again(tmp_path: Path) -> None:
    run = moved(tmp_path, Fault("cut", kind=FrameType.RUN))
    assert lost(run, "source") == 1
    assert len([event for event in run.events if at("postcopy", "destination")(event)]) == 1
    assert len([event for event in run.events if at("postcopy")(event)]) == 2


@pytest.mark.ci
def test_a_guest_that_was_denied_stays_where_somebody_wants_it(tmp_path: Path) -> None:
    """S9: RUN was handed to the link and never came. Ctrl-C, and the source has its guest back."""
    with Relay(str(tmp_path)) as relay:
        relay.faults = (Fault("call", kind=FrameType.RUN, call=relay.cut_for_good),)

        def act(run: Run, event: Event) -> None:
            if event["event"] == "link_lost" and event["role"] == "source":
                run.interrupt()
                # The way is barred until the source has heard of Ctrl-C: it has nothing else to listen to.
                threading.Timer(0.7, relay.let_in).start()

        run = Run(act, via=relay, **SMALL)
    assert lost(run, "source") == 1
    assert run.outcome.exit_code == 130
    assert run.outcome.guest_at == "source"
    assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")
    assert not any(map(at("postcopy", "destination"), run.events))
    assert [event["role"] for event in run.named("hints") if event["command"] == "DONE"] == ["source"]
    assert run.seconds < SOON


@pytest.mark.ci
def test_a_destination_that_ends_without_having_run_the_guest_gives_it_back(tmp_path: Path) -> None:
    # S9: RUN is on its way, and nobody will ever execute it; that is said, and so the source may go on.
    with Relay(str(tmp_path), Fault("hold", kind=FrameType.RUN)) as relay:
        # The source has enough to push, and does not wait for anybody meanwhile.
        slow = {"precopy_rounds": 1, "bandwidth": 6 << 20, "stall_timeout": 0.6}
        run = Run(via=relay, **{**SMALL, **slow}, reconnect_timeout=0)
    assert any(map(at("postcopy"), run.events))
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source"
    assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")
    assert not any(map(at("postcopy", "destination"), run.events))
    assert run.seconds < SOON


@pytest.mark.parametrize("stream", ["control", "bulk-0"])
@pytest.mark.ci
def test_what_an_older_generation_left_on_its_way_is_refused(stream: str, tmp_path: Path) -> None:
    # W6. A RUN of an older generation that was executed now would run the guest that was denied; a page of one would
    # be placed in place of what is sent for it now.
    if stream == "control":
        first = Fault("cut", kind=FrameType.RUN)
        late = Fault("inject", kind=FrameType.RESUME, link=1, data=encode_frame(FrameType.RUN, b"{}", round=3))
    else:
        first = Fault("cut", "bulk-0", since=FrameType.RUN, after=50_000)
        page = encode_header(FrameType.PAGES, round=3, first=9, count=1, length=4096) + b"old!" * 1024
        late = Fault("inject", "bulk-0", since=FrameType.RESUME, link=1, data=page)
    # The source, which is content with its link, hears of it at once, and not by silence.
    run = moved(tmp_path, first, late, stall_timeout=50.0)
    assert late.hit
    said = [event["error"] for event in run.named("link_lost", "destination")]
    assert len(said) == 2
    assert said[1].startswith("generation: ")
    assert len([event for event in run.events if at("postcopy", "destination")(event)]) == 1


@pytest.mark.ci
def test_a_link_that_is_lost_for_good_ends_both_sides(tmp_path: Path) -> None:
    with Relay(str(tmp_path)) as relay:
        relay.faults = (Fault("call", "bulk-0", since=FrameType.RUN, after=50_000, call=relay.cut_for_good),)
        run = Run(via=relay, **SMALL, reconnect_timeout=1.0)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "in 1 s" in run.outcome.message or "within 1 s" in run.outcome.message
    assert run.outcome.message.endswith("pages that nobody will send fail closed (SIGBUS or a wait), never zeros")
    assert run.named("lost", "destination")[0]["pages"] > 0
    assert not run.named("self_check")
    assert run.seconds < SOON


@pytest.mark.ci
def test_a_link_that_is_lost_when_all_is_there_harms_nobody(tmp_path: Path) -> None:
    with Relay(str(tmp_path)) as relay:
        relay.faults = (Fault("call", kind=FrameType.COMPLETE, to_destination=False, call=relay.cut_for_good),)
        run = Run(via=relay, **SMALL, reconnect_timeout=1.0)
    # The source never hears of it; the guest is where it belongs, with all of its memory.
    assert run.outcome.guest_at == "destination"
    assert run.named("result", "destination")[0]["exact"]
    assert run.seconds < SOON


@pytest.mark.ci
def test_a_link_that_is_back_when_the_destination_has_given_up_brings_its_denial(tmp_path: Path) -> None:
    """Both would look for one another for half a second, and the link is down for longer; the guest never ran."""
    with Relay(str(tmp_path)) as relay:
        relay.faults = (Fault("call", kind=FrameType.RUN, call=relay.cut_for_good),)

        def act(run: Run, event: Event) -> None:
            if event["event"] == "link_lost" and event["role"] == "destination" and run.once("let in"):
                threading.Timer(1.2, relay.let_in).start()

        run = Run(act, via=relay, **SMALL, reconnect_timeout=0.5)
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "source", run.outcome.message
    assert run.outcome.message.endswith("the guest was at the source and passed one more self-check round")
    assert not any(map(at("postcopy", "destination"), run.events))
    assert run.seconds < SOON


# ------------------------------------------------------------------------------------------------ wrong frames


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "offset", "layout", "value"),
    [
        (FrameType.PAGES, 0, "<I", 0x32434750),
        (FrameType.PAGES, 16, "<Q", 1 << 60),
        (FrameType.REQUEST, 16, "<Q", 1 << 50),
        (FrameType.FINISH, 36, "<I", 5),
        (FrameType.RUNNING, 36, "<I", 5),
        (FrameType.AUDIT, 36, "<I", 5),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_wrong_frame_after_the_switch_is_mended_by_another_link(
    kind: FrameType, offset: int, layout: str, value: int, tmp_path: Path
) -> None:
    nth = Nth(kind, 0, FrameType.RUN)

    def change(frame: Frame) -> bytearray:
        if nth(frame):
            frame.put(offset, layout, value)
        return frame.data

    proxy = Proxy(str(tmp_path), change)
    # Slow enough that the loss is noticed before all is there without it.
    run = Run(via=proxy, **SMALL, bandwidth=32 << 20)
    proxy.close()
    assert nth.hit
    judged(run, kind.name)
    assert lost(run, "source") == 1


@pytest.mark.ci
def test_a_link_that_mangles_every_frame_is_given_up(tmp_path: Path) -> None:
    seen: list[int] = []

    def change(frame: Frame) -> bytearray:
        if frame.kind == FrameType.RUN:
            seen.append(1)
        if seen and frame.kind == FrameType.PAGES:
            frame.put(0, "<I", 0)
        return frame.data

    proxy = Proxy(str(tmp_path), change)
    run = Run(via=proxy, **SMALL)
    proxy.close()
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert "failed: magic: " in run.outcome.message
    assert lost(run, "destination") == 8
    assert run.seconds < SOON


@pytest.mark.ci
@pytest.mark.parametrize(
    ("forth", "kind"),
    [*BEFORE, (True, FrameType.ROUND), *AFTER, (True, FrameType.END), (False, FrameType.REQUEST)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_frame_that_comes_twice_loses_nothing(forth: bool, kind: FrameType, tmp_path: Path) -> None:
    nth = Nth(kind)

    def change(frame: Frame) -> bytearray:
        return frame.data * 2 if frame.to_destination == forth and nth(frame) else frame.data

    proxy = Proxy(str(tmp_path), change)
    run = Run(via=proxy, **SMALL)
    proxy.close()
    assert nth.hit
    judged(run, kind.name)


@pytest.mark.ci
@pytest.mark.parametrize("kind", [FrameType.RETURN, FrameType.SETTLED, FrameType.RESUME], ids=lambda kind: kind.name)
def test_a_frame_that_comes_twice_while_both_sides_recover_loses_nothing(kind: FrameType, tmp_path: Path) -> None:
    spoiled, nth = Nth(FrameType.FINISH), Nth(kind, after=FrameType.FINISH)

    def change(frame: Frame) -> bytearray:
        if spoiled(frame):
            frame.put(36, "<I", 5)
        return frame.data * 2 if nth(frame) else frame.data

    proxy = Proxy(str(tmp_path), change)
    run = Run(via=proxy, **SMALL, bandwidth=32 << 20)
    proxy.close()
    assert nth.hit
    judged(run, kind.name)
    assert lost(run, "source") >= 1


# ------------------------------------------------------------------------------------------------------ SIGSTOP


def stopped(role: str, when: Callable[[Event], bool], seconds: float) -> Callable[[Run, Event], None]:
    def act(run: Run, event: Event) -> None:
        if when(event) and run.once("stop"):
            run.signal(role, signal.SIGSTOP)
            threading.Timer(seconds, run.signal, (role, signal.SIGCONT)).start()

    return act


@pytest.mark.ci
@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("phase", ["switch", "postcopy"])
def test_a_side_that_stands_still_for_a_moment_is_waited_for(role: str, phase: str) -> None:
    run = Run(stopped(role, at(phase), 0.5), **SMALL, bandwidth=32 << 20)
    judged(run, role)
    assert run.outcome.verified
    assert not lost(run, "source")


@pytest.mark.ci
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_side_that_stands_still_for_long_is_found_again(role: str) -> None:
    # The other one gives the link up meanwhile; nobody gives up the guest.
    run = Run(stopped(role, at("postcopy"), 2.5), **SMALL, bandwidth=16 << 20, stall_timeout=1.0)
    judged(run, role)
    assert lost(run, "source") >= 1
    assert lost(run, "destination") >= 1
