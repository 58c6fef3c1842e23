"""What a migration's counters did over time: the samples of both sides, on one clock."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

from pagecore import LatencyHistogram
from pagecore.migrate.options import PAGE_SIZE

__all__ = ["MARKS", "MAX_SAMPLES", "Series", "latency_between", "timeline"]

Event = dict[str, Any]

# Of one side; when there are more, every second one is dropped. Samples are sums: nothing is lost but resolution.
MAX_SAMPLES: Final = 2048
# A guest has rounds without end only where somebody asked for them.
MAX_MARKS: Final = 2048
# Events of which every one is kept, not the newest alone.
MARKS: Final = ("phase", "round", "running", "link_lost", "reconnected", "paused", "resumed")
_ROUND: Final = ("round", "seconds", "newly_dirty", "sent", "remaining", "dirty_rate", "bandwidth", "expected_downtime")


class Series:
    """The samples of one side, and what happened between them."""

    def __init__(self) -> None:
        self.samples: list[Event] = []
        self.marks: list[Event] = []

    def take(self, event: Event) -> None:
        """Keep an event that is a part of the course of things."""
        if event["event"] == "progress":
            self.samples.append(event)
            if len(self.samples) > MAX_SAMPLES:
                del self.samples[1:-1:2]
        elif event["event"] in MARKS and len(self.marks) < MAX_MARKS:
            self.marks.append(event)

    def named(self, name: str) -> list[Event]:
        """The marks of a name."""
        return [event for event in self.marks if event["event"] == name]


def latency_between(before: Iterable[int], after: Iterable[int]) -> LatencyHistogram:
    """The latencies that were counted between two samples of a histogram's buckets.

    Returns
    -------
    LatencyHistogram
        Its maximum is the end of the last bucket that has any.
    """
    low, high = list(before), list(after)
    low += [0] * (len(high) - len(low))
    counts = tuple(max(0, new - old) for new, old in zip(high, low, strict=False))
    last = max((bucket for bucket, count in enumerate(counts) if count), default=0)
    return LatencyHistogram(counts, 0, 2 << last)


def timeline(source: Series, destination: Series) -> dict[str, Any]:
    """The course of a migration as plain values. Times are seconds; 0 is the beginning of precopy.

    Returns
    -------
    dict
        ``phases``: objects of phase, round and ``at``. ``rounds``: the figures of each round of precopy and ``at`` of
        its end. ``switch``: when the guest stood still, ``[from, to]``, or null. ``outages``: when the link was lost
        and when it was back, or null. ``pauses``: when the transfer stood still and when it went on, or null.
        ``series``: for ``source`` and ``destination`` lists of the same length, one entry a sample; rates are those
        since the sample before, null where there is none.
    """
    phases = [event for event in source.named("phase") if event["phase"] not in ("settle", "verify")]
    phases += [event for event in destination.named("phase") if event["phase"] in ("settle", "verify")]
    if not source.marks:
        # One side of two machines.
        phases = destination.named("phase")
    start = next((event["at"] for event in phases if event["phase"] == "precopy"), None)
    if start is None:
        start = min((series.samples[0]["at"] for series in (source, destination) if series.samples), default=0.0)
    return {
        "phases": [
            {"phase": event["phase"], "round": event.get("round", 0), "at": _time(event, start)} for event in phases
        ],
        "rounds": [
            {**{name: event[name] for name in _ROUND}, "at": _time(event, start)} for event in source.named("round")
        ],
        "switch": _switch(source, phases, start),
        "outages": _spans(source if source.marks else destination, "link_lost", "reconnected", start),
        "pauses": _spans(source if source.marks else destination, "paused", "resumed", start),
        "series": {
            "source": _source_columns(source.samples, start),
            "destination": _destination_columns(destination.samples, start),
        },
    }


def _switch(source: Series, phases: list[Event], start: float) -> list[float] | None:
    for event in source.named("running"):
        running = event["first_instruction"] - start
        return [round(running - event["downtime"], 6), round(running, 6)]
    # As the destination saw it.
    for before, after in pairwise(phases):
        if before["phase"] == "switch" and not source.marks:
            return [_time(before, start), _time(after, start)]
    return None


def _spans(side: Series, begin: str, end: str, start: float) -> list[list[float | None]]:
    spans: list[list[float | None]] = []
    for event in side.marks:
        if event["event"] == begin and (not spans or spans[-1][1] is not None):
            spans.append([_time(event, start), None])
        elif event["event"] == end and spans:
            spans[-1][1] = _time(event, start)
    return spans


def _time(event: Event, start: float) -> float:
    return round(float(event["at"]) - start, 6)


def _rate(samples: list[Event], names: tuple[str, ...], unit: int) -> list[float | None]:
    """The growth of a sum of counters, a second."""
    rates: list[float | None] = [None] * min(1, len(samples))
    for before, after in pairwise(samples):
        seconds = after["at"] - before["at"]
        grown = sum(after.get(name, 0) - before.get(name, 0) for name in names)
        rates.append(round(max(0, grown) * unit / seconds, 1) if seconds > 0 else None)
    return rates


def _writes(samples: list[Event]) -> list[float | None]:
    rates = _rate(samples, ("pages_written",), PAGE_SIZE)
    for number, before in enumerate(samples[:-1], 1):
        # A guest that came from elsewhere brings its count along, and shows it once it has run.
        if not before["pages_written"]:
            rates[number] = None
    return rates


def _source_columns(samples: list[Event], start: float) -> dict[str, list[Any]]:
    return {
        "at": [_time(one, start) for one in samples],
        "owed": [one["owed"] for one in samples],
        "hinted": [one["hinted"] for one in samples],
        "bandwidth": _rate(samples, ("wire_bytes",), 1),
        "guest_writes": _writes(samples),
    }


def _destination_columns(samples: list[Event], start: float) -> dict[str, list[Any]]:
    buckets = [one.get("latency_buckets", []) for one in samples]
    latencies = [LatencyHistogram()] * min(1, len(samples)) + [latency_between(*pair) for pair in pairwise(buckets)]
    return {
        "at": [_time(one, start) for one in samples],
        "arrived": _rate(samples, ("received", "received_zeros", "placed", "zeroed"), 1),
        "guest_writes": _writes(samples),
        "faults": _rate(samples, ("faults",), 1),
        "fault_p50_us": [_microseconds(one, 50) for one in latencies],
        "fault_p99_us": [_microseconds(one, 99) for one in latencies],
    }


def _microseconds(latency: LatencyHistogram, percent: float) -> float | None:
    return round(latency.percentile(percent) / 1e3, 1) if latency.count else None
