"""Collector: placement loops, trackers and migrations as Prometheus metrics (the extra ``metrics``).

Nothing is counted twice and nothing is done while pages move: a scrape reads what the parts count anyway.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from pagecore import Bitmap, PageTracker, PlacementLoop, PlacementStats
from pagecore.migrate import Outcome

__all__ = ["Collector", "MigrationFollower"]

# What a fault's page was to hold, and what became of it, by the class that the loop times it under.
SERVED: Final = {
    "owed": ("new", "installed"),
    "hinted": ("zero", "installed"),
    "released": ("zero", "discarded"),
    "present": ("resident", "present"),
}
# The loop's buckets are powers of two of nanoseconds; those from a microsecond to 17 seconds are told apart.
FIRST_BUCKET: Final = 10
LAST_BUCKET: Final = 33
STAGES: Final = ("ahead", "background")
# Counters of a loop that stand for themselves.
COUNTERS: Final = {
    "faults": "Fault messages read.",
    "requested": "Pages asked of the source.",
    "duplicates": "Copies of pages that had been claimed already.",
    "removed": "Pages that the guest discarded.",
    "poisoned": "Pages that fail closed.",
    "deferred": "Placements that had to be tried again.",
}


class MigrationFollower:
    """What a migration has told so far; `Collector.follow` makes it, ``Migration(options, follower)`` tells it."""

    def __init__(self, finished: Callable[[MigrationFollower, Outcome], None]) -> None:
        self._finished = finished
        self.owed = 0
        self.sent = 0
        self.downtime: float | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event in."""
        if event["role"] == "source" and event["event"] in ("progress", "result"):
            self.owed, self.sent = event["owed"], event["wire_bytes"]
        elif event["event"] == "running":
            self.downtime = event["downtime"]

    def finish(self, outcome: Outcome) -> None:
        """Say what became of the migration, once."""
        self._finished(self, outcome)


class Collector:
    """Collector()

    The metrics of any number of placement loops, page trackers and migrations, summed up.

    ``registry.register(collector)`` has them scraped. What is added is held on to until it is removed; the counts of
    what was removed stay in the sums, which never go back.

    Notes
    -----
    ``pagecore_uffd_serve_seconds{page_class,result}``
        From the read of a fault to the wake.
    ``pagecore_uffd_prefetch_pages_total{stage}``
        Pages placed before anybody touched them: ``ahead`` of a fault, or in the ``background``.
    ``pagecore_uffd_dirty_divergence_pages{set}``
        Pages that only one of two records of writes has: ``tracker_only`` and ``pagemap_only``. The second must stay at
        0: what it counts is lost.
    ``pagecore_uffd_pages_total{page_class,result}``
        Pages by what they were to hold, and what became of them.
    ``pagecore_uffd_{faults,requested,duplicates,removed,poisoned,deferred}_total``, ``pagecore_uffd_resident_pages``
        Of `PlacementStats`.
    ``pagecore_tracker_pages{state}``
        What the source has not sent: ``dirty``, ``hinted``.
    ``pagecore_migration_...``
        ``running``, ``owed_pages``, ``sent_bytes_total``, ``finished_total{result}`` (``verified``, ``failed``), and
        ``downtime_seconds`` of the last one that switched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below; taken inside nothing
        self._loops: list[PlacementLoop] = []
        self._gone = _Placed()
        self._trackers: list[PageTracker] = []
        self._divergences: list[tuple[Callable[[], Bitmap], Callable[[], Bitmap]]] = []
        self._migrations: list[MigrationFollower] = []
        self._finished = {"verified": 0, "failed": 0}
        self._sent = 0
        self._downtime = 0.0

    def add(self, part: PlacementLoop | PageTracker) -> None:
        """Take a part in."""
        with self._lock:
            if isinstance(part, PlacementLoop):
                self._loops.append(part)
            else:
                self._trackers.append(part)

    def remove(self, part: PlacementLoop | PageTracker) -> None:
        """Let go of a part.

        Raises
        ------
        ValueError
            It was not added.
        """
        with self._lock:
            if isinstance(part, PlacementLoop):
                self._loops.remove(part)
                self._gone.add(part.stats())
            else:
                self._trackers.remove(part)

    def add_divergence(self, tracked: Callable[[], Bitmap], written: Callable[[], Bitmap]) -> None:
        """Compare two records of the same writes at each scrape.

        Parameters
        ----------
        tracked, written : callable
            Return bitmaps of one size: what is tracked as dirty, and what the kernel says was written.
        """
        with self._lock:
            self._divergences.append((tracked, written))

    def follow(self) -> MigrationFollower:
        """Follow a migration: its ``on_event``, which is told of its outcome with `MigrationFollower.finish`."""
        follower = MigrationFollower(self._end)
        with self._lock:
            self._migrations.append(follower)
        return follower

    def _end(self, follower: MigrationFollower, outcome: Outcome) -> None:
        with self._lock:
            self._migrations.remove(follower)
            self._finished["verified" if outcome.verified else "failed"] += 1
            self._sent += follower.sent
            if follower.downtime is not None:
                self._downtime = follower.downtime

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now; the registry calls it."""
        with self._lock:
            metrics = [*self._placement(), self._divergence(), *self._tracker(), *self._migration()]
        yield from metrics

    def _placement(self) -> Iterator[Metric]:
        stats = [loop.stats() for loop in self._loops]
        placed = self._gone.copy()
        for one in stats:
            placed.add(one)
        yield placed.serve_seconds()
        prefetch = CounterMetricFamily(
            "pagecore_uffd_prefetch_pages", "Pages placed before anybody touched them.", labels=["stage"]
        )
        for stage in STAGES:
            prefetch.add_metric([stage], placed.counts[stage])
        yield prefetch
        pages = CounterMetricFamily(
            "pagecore_uffd_pages", "Pages, and what became of them.", labels=["page_class", "result"]
        )
        for labels, count in placed.outcomes.items():
            pages.add_metric(labels, count)
        yield pages
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"pagecore_uffd_{name}", text, value=placed.counts[name])
        resident = sum(one.resident for one in stats)
        yield GaugeMetricFamily("pagecore_uffd_resident_pages", "Pages received.", value=resident)

    def _divergence(self) -> Metric:
        only = {"tracker_only": 0, "pagemap_only": 0}
        for tracked, written in self._divergences:
            ours, theirs = tracked(), written()
            both = (ours & theirs).count()
            only["tracker_only"] += ours.count() - both
            only["pagemap_only"] += theirs.count() - both
        family = GaugeMetricFamily(
            "pagecore_uffd_dirty_divergence_pages", "Pages that only one record of writes has.", labels=["set"]
        )
        for name, count in only.items():
            family.add_metric([name], count)
        return family

    def _tracker(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("pagecore_tracker_pages", "Pages not sent.", labels=["state"])
        family.add_metric(["dirty"], sum(tracker.dirty_count for tracker in self._trackers))
        family.add_metric(["hinted"], sum(tracker.hinted_count for tracker in self._trackers))
        yield family

    def _migration(self) -> Iterator[Metric]:
        running = self._migrations
        yield GaugeMetricFamily("pagecore_migration_running", "Migrations under way.", value=len(running))
        yield GaugeMetricFamily(
            "pagecore_migration_owed_pages", "Pages still to be sent.", value=sum(one.owed for one in running)
        )
        yield CounterMetricFamily(
            "pagecore_migration_sent_bytes", "Bytes sent.", value=self._sent + sum(one.sent for one in running)
        )
        yield GaugeMetricFamily(
            "pagecore_migration_downtime_seconds", "How long the last guest stood still.", value=self._downtime
        )
        finished = CounterMetricFamily("pagecore_migration_finished", "Migrations that have ended.", labels=["result"])
        for result, count in self._finished.items():
            finished.add_metric([result], count)
        yield finished


class _Placed:
    """The sums of what placement loops have counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        # By class of the loop: how many in each bucket, and the nanoseconds of all of them.
        self._buckets = {name: [0] * (LAST_BUCKET - FIRST_BUCKET + 2) for name in SERVED}
        self._total_ns = dict.fromkeys(SERVED, 0)

    def copy(self) -> _Placed:
        """Another one with the same sums."""
        copy = _Placed()
        copy.counts.update(self.counts)
        copy.outcomes.update(self.outcomes)
        copy._buckets = {name: list(counts) for name, counts in self._buckets.items()}
        copy._total_ns = dict(self._total_ns)
        return copy

    def add(self, stats: PlacementStats) -> None:
        """Add what one loop has counted."""
        for name in (*STAGES, *COUNTERS):
            self.counts[name] += getattr(stats, name)
        for page_class, results in stats.outcomes.items():
            for result, pages in results.items():
                self.outcomes[page_class, result] += pages
        for name in SERVED:
            histogram = stats.latency[name]
            self._total_ns[name] += histogram.total_ns
            for bucket, count in enumerate(histogram.buckets):
                self._buckets[name][min(max(bucket, FIRST_BUCKET), LAST_BUCKET + 1) - FIRST_BUCKET] += count

    def serve_seconds(self) -> Metric:
        """The latencies, with the labels of all classes, seen or not."""
        family = HistogramMetricFamily(
            "pagecore_uffd_serve_seconds", "From the read of a fault to the wake.", labels=["page_class", "result"]
        )
        edges = [repr((2 << bucket) / 1e9) for bucket in range(FIRST_BUCKET, LAST_BUCKET + 1)] + ["+Inf"]
        for name, labels in SERVED.items():
            below = 0
            cumulated = []
            for edge, count in zip(edges, self._buckets[name], strict=True):
                below += count
                cumulated.append((edge, float(below)))
            family.add_metric(labels, cumulated, self._total_ns[name] / 1e9)
        return family
