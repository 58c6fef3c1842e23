"""A migration made of events alone, as both sides would report it: what the views are tested with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pagecore.migrate import Options, Outcome
from pagecore.migrate.outcome import Side, judge
from pagecore.migrate.travel import encode_map

Event = dict[str, Any]
PAGES = 8192
START = 1000.0
# Seconds after the beginning of precopy.
PAUSED, RUNNING, SETTLED, END = 1.0, 1.02, 2.0, 2.1
STEP = 0.05
# One class after the other, each on an eighth of the memory; two for the last of them.
LETTERS = "pbdzhrm"


def classes() -> np.ndarray:
    """A class for each page."""
    return np.minimum(np.arange(PAGES) * 8 // PAGES, 6).astype(np.uint8)


def events(options: Options, *, postcopy: bool = True) -> Iterator[Event]:
    """Those of a migration that went well, in the order of time."""

    def event(name: str, role: str, at: float, **values: Any) -> Event:
        return {"event": name, "role": role, "at": START + at, **values}

    yield event("guest", "source", -0.2, kind="process", reason="it was asked for", npages=PAGES)
    yield event("phase", "source", -0.2, phase="boot", round=0)
    yield event("phase", "source", 0.0, phase="precopy", round=1)
    for number in range(int(END / STEP) + 1):
        at = number * STEP
        done = min(1.0, at / PAUSED) if at < PAUSED else min(1.0, (at - RUNNING) / (SETTLED - RUNNING))
        yield event(
            "progress",
            "source",
            at,
            rounds=1,
            pages_sent=int(4000 * at),
            pages_urgent=0,
            pages_zero=int(100 * at),
            wire_bytes=int(4000 * 4096 * at),
            owed=int(4000 * (1 - done)),
            hinted=1024,
            pages_written=1000 + int(500 * min(at, PAUSED)),
        )
        after = max(0.0, at - RUNNING)
        placed = {"placed": int(3000 * after), "zeroed": 0, "filled": 0, "resident": int(3000 * after), "removed": 0}
        yield event(
            "progress",
            "destination",
            at,
            received=int(3000 * min(at, PAUSED)),
            received_zeros=0,
            pages_written=0 if at <= RUNNING else 1500 + int(300 * after),
            **(
                {**placed, "faults": int(200 * after), "requested": 9, "latency_buckets": [0] * 16 + [int(200 * after)]}
                if postcopy and at >= PAUSED
                else {}
            ),
        )
    figures = {"seconds": 1.0, "newly_dirty": 8 << 20, "sent": 16 << 20, "remaining": 8 << 20, "dirty_rate": 8e6}
    yield event("round", "source", 0.99, round=1, bandwidth=16e6, expected_downtime=None, advice="go on", **figures)
    yield event("phase", "source", PAUSED, phase="switch", round=1)
    running = START + RUNNING
    yield event("running", "source", 1.1, downtime=RUNNING - PAUSED, first_instruction=running)
    yield event("phase", "source", RUNNING, phase="postcopy" if postcopy else "finish", round=1)
    yield event("phase", "destination", SETTLED, phase="settle")
    yield event("map", "destination", END, **encode_map([classes()]))
    latency = {"count": 200, "p50_us": 98.0, "p99_us": 130.0, "max_us": 131.0, "buckets": [0] * 16 + [200]}
    yield event(
        "result",
        "source",
        END,
        rounds=1,
        pages_sent=8000,
        pages_urgent=9,
        pages_zero=200,
        wire_bytes=32 << 20,
        owed=0,
        hinted=1024,
        downtime=RUNNING - PAUSED,
        total_time=SETTLED,
        audit_pages=3000,
        audit_wrong=0,
        self_checks=10,
        self_check_errors=0,
    )
    placement = {"requested": 9, "already_sent": 1, "duplicates": 0, "latency": {"owed": latency, "hinted": latency}}
    yield event(
        "result",
        "destination",
        END,
        right=7168,
        wrong=0,
        free=1024,
        exact=True,
        verification="7168 pages right, 0 wrong, 1024 free",
        placement=placement if postcopy else None,
    )


def outcome(*, postcopy: bool = True, drop: tuple[str, ...] = (), of: str | None = None) -> Outcome:
    """What is made of these events, but for those of some names; `of`: only one side's."""
    options = Options(size=PAGES * 4096, postcopy=postcopy)
    sides = {role: Side(role) for role in ("source", "destination")}
    for event in events(options, postcopy=postcopy):
        if event["event"] not in drop and of in (None, event["role"]):
            sides[event["role"]].take(event)
    for side in sides.values():
        side.take({"event": "ended", "role": side.role, "status": 0 if side.result else 1})
    return judge(options, sides["source"], sides["destination"], 0)
