"""Metrics, as Prometheus scrapes them: the names, the sums, and that they never go back."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from concurrency import wait_until
from pagecore import Bitmap, MemoryDirtyLog, PageTracker, PlacementLoop
from pagecore.metrics import Collector
from pagecore.migrate import Options
from pagecore.page_source import BufferSource
from placement_rig import ZEROS, header, pages_frame, pushed, served
from report_rig import events, outcome

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    return registry


def scrape(registry: CollectorRegistry) -> Samples:
    return parse(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: Any) -> float:
    return samples[name, frozenset((key, str(label)) for key, label in labels.items())]


def test_the_names_and_labels_are_there_before_anything_happens(registry: CollectorRegistry) -> None:
    samples = scrape(registry)
    for page_class, result in (
        ("new", "installed"), ("zero", "installed"), ("zero", "discarded"), ("resident", "present"),
    ):  # fmt: skip
        assert value(samples, "pagecore_uffd_serve_seconds_count", page_class=page_class, result=result) == 0
    for stage in ("ahead", "background"):
        assert value(samples, "pagecore_uffd_prefetch_pages_total", stage=stage) == 0
    for name in ("tracker_only", "pagemap_only"):
        assert value(samples, "pagecore_uffd_dirty_divergence_pages", set=name) == 0
    for name in ("faults", "requested", "duplicates", "removed", "poisoned", "deferred"):
        assert value(samples, f"pagecore_uffd_{name}_total") == 0
    assert value(samples, "pagecore_migration_running") == 0


@pytest.mark.kernel
def test_a_loop_is_counted_while_it_runs_and_after(collector: Collector, registry: CollectorRegistry) -> None:
    labels = {"page_class": "new", "result": "installed"}
    with served(8) as rig:
        with pushed(rig) as (loop, peer):
            collector.add(loop)
            touch = rig.touch(3)
            peer.next_request()
            peer.urgent.sendall(pages_frame(3, rig.page(3)) + header(ZEROS, 4, 2))
            touch.value()
            # Who waits is woken, and a request is sent, before it is written down.
            wait_until(lambda: loop.stats().requested == loop.stats().latency["owed"].count == 1, "the fault")
            wait_until(lambda: loop.stats().zeroed == loop.stats().outcomes["zero"]["installed"] == 2, "the zeros")
            running = scrape(registry)
            assert value(running, "pagecore_uffd_serve_seconds_count", **labels) == 1
            # The buckets are those of the loop: their upper ends in seconds.
            seconds = loop.stats().latency["owed"].max_ns / 1e9
            assert value(running, "pagecore_uffd_serve_seconds_sum", **labels) == pytest.approx(seconds)
            buckets = sorted(
                (float(dict(key)["le"]), count)
                for (name, key), count in running.items()
                if name == "pagecore_uffd_serve_seconds_bucket" and {*labels.items()} <= key
            )
            assert [count for edge, count in buckets] == [float(edge >= seconds) for edge, _ in buckets]
            assert len(buckets) == 25
            assert value(running, "pagecore_uffd_pages_total", **labels) == 1
            assert value(running, "pagecore_uffd_pages_total", page_class="zero", result="installed") == 2
            assert value(running, "pagecore_uffd_resident_pages") == 3
            assert value(running, "pagecore_uffd_faults_total") == loop.stats().faults
        collector.remove(loop)
    gone = scrape(registry)
    counts = {key: count for key, count in running.items() if key[0] != "pagecore_uffd_resident_pages"}
    assert counts == {key: count for key, count in gone.items() if key in counts}
    assert value(gone, "pagecore_uffd_resident_pages") == 0
    with pytest.raises(ValueError, match="not in list"):
        collector.remove(loop)


@pytest.mark.kernel
def test_several_loops_are_one_sum(collector: Collector, registry: CollectorRegistry) -> None:
    with served(8) as one, served(16) as other:
        loops = [PlacementLoop([rig.region], BufferSource(rig.content), background=True) for rig in (one, other)]
        for loop in loops:
            collector.add(loop)
            with loop:
                assert loop.wait_settled(20)
        samples = scrape(registry)
    assert value(samples, "pagecore_uffd_resident_pages") == 24
    assert value(samples, "pagecore_uffd_prefetch_pages_total", stage="background") == 24


def test_a_tracker_says_what_is_not_sent(collector: Collector, registry: CollectorRegistry) -> None:
    tracker = PageTracker(100, dirty_log=MemoryDirtyLog(100))
    collector.add(tracker)
    tracker.take(30)
    session = tracker.hint_session()
    tracker.sync()
    session.clear_runs([(90, 10)], session.start())
    samples = scrape(registry)
    assert value(samples, "pagecore_tracker_pages", state="dirty") == 60
    assert value(samples, "pagecore_tracker_pages", state="hinted") == 10
    session.finish()
    collector.remove(tracker)
    assert value(scrape(registry), "pagecore_tracker_pages", state="dirty") == 0


def test_what_only_one_record_of_writes_has_is_shown(collector: Collector, registry: CollectorRegistry) -> None:
    ours, theirs = Bitmap(100), Bitmap(100)
    ours.set_range(0, 10)
    theirs.set_range(7, 5)
    collector.add_divergence(lambda: ours, lambda: theirs)
    samples = scrape(registry)
    assert value(samples, "pagecore_uffd_dirty_divergence_pages", set="tracker_only") == 7
    assert value(samples, "pagecore_uffd_dirty_divergence_pages", set="pagemap_only") == 2


def test_migrations_are_followed_by_their_events(collector: Collector, registry: CollectorRegistry) -> None:
    followers = [collector.follow() for _ in range(2)]
    for event in events(Options(size=32 << 20)):
        if event["event"] == "result":
            break
        followers[0](event)
    samples = scrape(registry)
    assert value(samples, "pagecore_migration_running") == 2
    assert value(samples, "pagecore_migration_downtime_seconds") == 0
    sent = value(samples, "pagecore_migration_sent_bytes_total")
    assert sent == pytest.approx(4000 * 4096 * 2.1, rel=0.01)
    followers[0].finish(outcome())
    followers[1].finish(outcome(drop=("result",)))
    samples = scrape(registry)
    assert value(samples, "pagecore_migration_running") == 0
    assert value(samples, "pagecore_migration_downtime_seconds") == pytest.approx(0.02)
    assert value(samples, "pagecore_migration_finished_total", result="verified") == 1
    assert value(samples, "pagecore_migration_finished_total", result="failed") == 1
    assert value(samples, "pagecore_migration_sent_bytes_total") == sent


@pytest.fixture
def address(registry: CollectorRegistry) -> Iterator[str]:
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_hands_them_out(address: str) -> None:
    with urllib.request.urlopen(address, timeout=20) as reply:
        assert reply.status == 200
        samples = parse(reply.read().decode())
    assert value(samples, "pagecore_uffd_dirty_divergence_pages", set="pagemap_only") == 0
