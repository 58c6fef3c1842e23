"""The link is lost at any byte: the guest lives on exactly one side, and nothing is lost or placed twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fault_relay import Fault, Relay
from migrate_rig import Run, at
from pagecore.wire import FrameType

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(90)]

SMALL: dict[str, Any] = {
    "size": 16 << 20,
    "guest": "process",
    "dirty_rate": None,
    "precopy_rounds": 2,
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
    # Before it, in its header, between that and its payload, in its payload.
    return {"to_destination": forth, "kind": kind, "after": chance.choice([0, 7, 40, 41]), "link": link}


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
ALWAYS = (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.ci) for seed in range(50)]
)
def test_the_link_is_lost_at_any_byte(seed: int, tmp_path: Path) -> None:
    faults = chosen(seed)
    # A half-open link says nothing: only silence tells.
    silent = any(fault.action == "half-open" for fault in faults)
    options = {"stall_timeout": 1.5} if silent else {}
    moved(tmp_path, *faults, seed=seed, guest="kvm" if seed % 5 == 0 else "process", postcopy=seed % 7 != 6, **options)
