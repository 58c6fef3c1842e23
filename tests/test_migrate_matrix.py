"""The KVM guest moved in every mode over every dirty log, hints on and off; each run has a seed, and is verified.

Verified as everywhere here: the guest's program is replayed from its seed and every page it holds compared, and what
was placed after the switch equals the frozen source's. ``make soak`` makes 20 runs of each combination
(PAGECORE_SOAK_MATRIX); a failure names the options of its run.
"""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest

from concurrency import SEED
from migrate_rig import Run
from pagecore.migrate.outcome import EXIT_UNSUPPORTED

pytestmark = [pytest.mark.kernel]

MIB = 1 << 20
RUNS = int(os.environ.get("PAGECORE_SOAK_MATRIX", "0"))
MODES: dict[str, dict[str, Any]] = {
    "precopy": {"postcopy": False},
    "postcopy": {"precopy_rounds": 0},
    "both": {},
}
LOGS = ("get", "clear", "ring", "pagemap")


def options_of(mode: str, log: str, hints: bool, number: int) -> dict[str, Any]:
    """The options of one run: everything that is not asked for follows from the seed."""
    chance = random.Random(f"{SEED} {mode} {log} {hints} {number}")
    options = {
        "size": 64 * MIB,
        "guest": "kvm",
        "dirty_log": log,
        "hints": hints,
        "seed": chance.getrandbits(62),
        # Each count as often as the others, whatever the number of runs.
        "vcpus": 1 + (number + LOGS.index(log) + hints) % 4,
        "free_share": chance.choice((0.0, 0.25, 0.5, 0.75, 0.9)),
        "dirty_rate": chance.choice((16 * MIB, 128 * MIB, 1024 * MIB, None)),
        "duplicates": chance.choice(("tolerant", "strict")),
        "link": chance.choice(("unix", "tcp")),
        **MODES[mode],
    }
    if mode == "precopy":
        # A guest that is faster than the link never converges: it is moved all the same. Without a round it stands
        # still while all of it goes.
        options["precopy_rounds"] = chance.choice((0, 1, 3, 6))
    if mode == "both":
        options["precopy_rounds"] = chance.choice((1, 1, 2, 4))
        options["bandwidth"] = chance.choice((None, None, 400 * MIB))
    return options


def check(options: dict[str, Any]) -> Run:
    """Make one run, and look at all that it says of itself."""
    run = Run(**options)
    if run.outcome.exit_code == EXIT_UNSUPPORTED:
        pytest.skip(run.outcome.message)
    assert run.outcome.verified, f"{options}: {run.outcome.message}"
    assert run.outcome.exit_code == 0, options
    assert run.outcome.guest_at == "destination", options
    source = run.source
    assert run.outcome.report["guest"]["dirty_log"] == options["dirty_log"], options
    assert source["owed"] == source["audit_wrong"] == source["self_check_errors"] == 0, options
    assert source["rounds"] <= options.get("precopy_rounds", 1), options
    # A guest that gets no processor in time hints nothing: that hints save pages is shown elsewhere.
    assert options["hints"] or source["hinted"] == source["answers"]["free"] == 0, options
    if options.get("postcopy", True):
        placed = run.placement
        # After a few rounds there may be nothing left to be placed.
        assert source["audit_pages"] > 0 or source["rounds"], options
        assert placed["foreign"] == placed["lost"] == placed["poisoned"] == 0, options
        # On a busy machine the end of the bulk may overtake an answer, whose page is then asked for again (S7).
        assert placed["duplicates"] <= source["answers"]["again"], options
    else:
        assert run.outcome.report["destination"]["placement"] is None, options
    return run


@pytest.mark.parametrize("log", ["clear", "ring"])
def test_the_logs_of_kvm(log: str) -> None:
    """What the other tests of migration leave out: they run over the first of them."""
    check({**options_of("both", log, True, 1), "size": 16 * MIB, "dirty_rate": 256 * MIB})


def test_postcopy_alone_sends_nothing_before_the_switch() -> None:
    options = {**options_of("postcopy", "get", True, 0), "size": 16 * MIB, "free_share": 0.5, "bandwidth": 64 * MIB}
    run = check(options)
    (switch,) = [event for event in run.named("phase", "destination") if event["phase"] == "switch"]
    assert switch["pages"] == switch["zeros"] == 0
    assert run.source["rounds"] == 0
    # Hinted pages were filled without a round trip, all else was asked for or pushed.
    assert run.source["hinted"] > 0
    assert run.placement["filled"] > 0
    assert run.placement["requested"] > 0


def combinations() -> list[Any]:
    """Three of each in CI, one of those over PAGEMAP_SCAN: twenty of both modes together."""
    return [
        pytest.param(mode, log, hints, RUNS or (1 if log == "pagemap" else 3), id=f"{mode}-{log}-{hints}")
        for mode, log, hints in itertools.product(MODES, LOGS, (True, False))
    ]


@pytest.mark.slow if RUNS else pytest.mark.ci
@pytest.mark.parametrize(("mode", "log", "hints", "runs"), combinations())
def test_every_mode_over_every_log(mode: str, log: str, hints: bool, runs: int) -> None:
    for number in range(runs):
        check(options_of(mode, log, hints, number))
