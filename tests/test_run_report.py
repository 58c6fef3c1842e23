"""The report of a run: the course over time, the map, the file that keeps both, and what is refused of one."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concurrency import Worker, wait_until
from pagecore import PageState, ProtocolError
from pagecore.migrate.progress import MAX_UNREAD, Reporter
from pagecore.migrate.report import MAX_BYTES, load_report, parse_report, save_report
from pagecore.migrate.series import MAX_SAMPLES, Series, latency_between, timeline
from pagecore.migrate.travel import CLASSES, MAX_CELLS, PIECE, decode_map, encode_map, page_classes
from pagecore.testing import PlacementAudit
from placement_rig import ZEROS, header, pages_frame, pushed, served
from report_rig import LETTERS, PAGES, PAUSED, RUNNING, SETTLED, STEP, classes, outcome

NAMES = [name for name, _ in CLASSES.values()]


# ---------------------------------------------------------------------------------------------------- the course


def test_both_sides_stand_on_one_clock() -> None:
    report = outcome().report
    assert [(one["phase"], one["at"]) for one in report["phases"]] == [
        ("boot", -0.2),
        ("precopy", 0.0),
        ("switch", PAUSED),
        ("postcopy", RUNNING),
        ("settle", SETTLED),
    ]
    assert report["switch"] == pytest.approx([PAUSED, RUNNING])
    assert report["rounds"][0]["at"] == 0.99
    source, destination = report["series"]["source"], report["series"]["destination"]
    assert source["at"] == destination["at"] == pytest.approx(np.arange(len(source["at"])) * STEP)
    for columns in (source, destination):
        assert {len(column) for column in columns.values()} == {len(source["at"])}


def test_rates_are_those_since_the_sample_before() -> None:
    columns = outcome().report["series"]
    assert columns["source"]["bandwidth"][0] is None
    assert columns["source"]["bandwidth"][1:20] == pytest.approx([4000 * 4096] * 19, rel=0.01)
    assert columns["destination"]["faults"][-10:] == pytest.approx([200] * 10, rel=0.2)
    # Bucket 16 is 65 to 131 microseconds; nothing is said of a time without a fault.
    assert columns["destination"]["fault_p50_us"][5] is None
    assert 65 <= columns["destination"]["fault_p50_us"][-3] <= 131


def test_a_guest_that_brings_its_count_along_has_not_written_all_that_at_once() -> None:
    written = outcome().report["series"]["destination"]["guest_writes"]
    assert max(rate for rate in written if rate is not None) < 2 * 300 * 4096


def test_a_run_without_end_is_thinned_out_and_keeps_its_sums() -> None:
    series = Series()
    for number in range(5 * MAX_SAMPLES):
        series.take({"event": "progress", "role": "source", "at": float(number), "wire_bytes": 10 * number})
    assert MAX_SAMPLES / 2 < len(series.samples) <= MAX_SAMPLES
    assert series.samples[0]["at"] == 0
    assert series.samples[-1]["at"] == 5 * MAX_SAMPLES - 1
    steps = np.diff([one["at"] for one in series.samples])
    assert set(steps[-4:]) <= {1.0, 2.0, 4.0, 8.0}
    for event in ({"event": "round", "role": "source", "at": 0.0}, {"event": "phase", "role": "source", "at": 0.0}):
        for _ in range(3000):
            series.take(event)
    assert len(series.marks) == 2048


def test_a_side_is_sampled_from_the_first_moment_to_the_last() -> None:
    out, counter = io.StringIO(), itertools.count()
    with Reporter(out, "source").sampling(lambda: {"counted": next(counter)}):
        wait_until(lambda: out.getvalue().count("\n") >= 3, "three samples")
        before = out.getvalue().count("\n")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    # One more when it is over: what happened since the one before is not lost.
    assert len(events) > before
    assert [event["counted"] for event in events] == list(range(len(events)))
    assert {(event["event"], event["role"]) for event in events} == {("progress", "source")}
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    assert "samples" not in [thread.name for thread in threading.enumerate()]


def test_a_parent_that_stands_still_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z: what happens is still written, and nobody sleeps in a pipe that is full of samples."""
    monkeypatch.setattr("pagecore.migrate.progress.FIRST_INTERVAL", 0)
    ours, theirs = os.pipe()
    with open(theirs, "w") as pipe, open(ours, "rb", buffering=0) as unread:
        reporter = Reporter(pipe, "source")

        def tell() -> None:
            for _ in range(30):
                reporter.event("phase", text="x" * 1000)

        with reporter.sampling(lambda: {"text": "x" * 4000}):
            wait_until(lambda: reporter._unread() > MAX_UNREAD, "samples to pile up")
            telling = Worker(tell)
            told = telling.done(5.0)
            text = unread.read(1 << 16)
        assert told
        assert text.count(b'"event": "phase"') == 30


def test_one_side_of_two_machines_has_a_course_of_its_own() -> None:
    destination = Series()
    for at, phase in ((7.0, "precopy"), (7.1, "switch"), (7.2, "postcopy")):
        destination.take({"event": "phase", "role": "destination", "at": at, "phase": phase})
    destination.take({"event": "link_lost", "role": "destination", "at": 7.3})
    destination.take({"event": "link_lost", "role": "destination", "at": 7.35})
    destination.take({"event": "reconnected", "role": "destination", "at": 7.4})
    destination.take({"event": "link_lost", "role": "destination", "at": 7.5})
    destination.take({"event": "paused", "role": "destination", "at": 7.05})
    destination.take({"event": "resumed", "role": "destination", "at": 7.08})
    destination.take({"event": "paused", "role": "destination", "at": 7.45})
    destination.take(
        {"event": "progress", "role": "destination", "at": 7.5, "received": 1, "received_zeros": 0, "pages_written": 0}
    )
    course = timeline(Series(), destination)
    assert [(one["phase"], one["at"]) for one in course["phases"]] == [
        ("precopy", 0.0),
        ("switch", 0.1),
        ("postcopy", 0.2),
    ]
    assert course["switch"] == [0.1, 0.2]
    # Lost again while it was being looked for is one loss.
    assert course["outages"] == [[0.3, 0.4], [0.5, None]]
    assert course["pauses"] == [[0.05, 0.08], [0.45, None]]
    assert course["series"]["destination"]["at"] == [0.5]
    assert course["series"]["source"]["at"] == []


def test_a_latency_between_two_samples_is_that_of_the_faults_between_them() -> None:
    latency = latency_between([0, 5], [0, 5, 0, 2])
    assert latency.count == 2
    assert 8 <= latency.percentile(50) <= 16
    assert latency_between([], []).count == 0


# ------------------------------------------------------------------------------------------------------- the map


def test_classes_of_precopy_alone() -> None:
    state = PageState(8)
    state.store(0, 3)
    state.store_zeros(3, 2)
    state.hinted.set(5)
    assert "".join(LETTERS[kind] for kind in np.concatenate([*page_classes(state)])) == "pppzzhmm"
    state.switch([(5, 3)], [(5, 3)])
    assert "".join(LETTERS[kind] for kind in np.concatenate([*page_classes(state)])) == "pppzzhhh"


@pytest.mark.kernel
def test_every_class_is_told_apart_after_the_switch() -> None:
    state = PageState(10)
    state.store(0, 1)
    state.store_zeros(1, 1)
    state.switch([(2, 8)], [(6, 2)])
    zero = state.released.copy()
    audit = PlacementAudit(10, state=state)
    with served(10) as rig, pushed(rig, states=[state], observer=audit) as (_, peer):
        touch = rig.touch(4)
        assert peer.next_request() == (4, 1, 0)
        peer.bulk[0].sendall(pages_frame(2, rig.page(2)) + header(ZEROS, 3, 1))
        peer.urgent.sendall(pages_frame(4, rig.page(4)))
        assert touch.value() == rig.page(4)
        assert rig.touch(6).value() == bytes(4096)
        rig.discard(5).value()
        wait_until(lambda: state.settled().count() == 7, "what was sent and what was discarded")
    found = "".join(LETTERS[kind] for kind in np.concatenate([*page_classes(state, zero, audit)]))
    assert found == "pzbzdrhhmm"
    assert audit.requested.indices().tolist() == [4]


def test_an_audit_takes_planes_of_its_own_size_alone() -> None:
    with pytest.raises(ValueError, match="planes of 4 pages do not fit an audit of 5 pages"):
        PlacementAudit(5, state=PageState(4))
    assert not PlacementAudit(5).requested.any()


@pytest.mark.parametrize("pages", [0, 1, 2, 1000])
def test_a_map_comes_back(pages: int) -> None:
    given = np.random.default_rng(pages).integers(0, len(CLASSES), pages).astype(np.uint8)
    encoded = json.loads(json.dumps(encode_map([given])))
    assert np.array_equal(decode_map(encoded), given)
    assert encoded["unit"] == 1
    assert sum(encoded["counts"].values()) == encoded["pages"] == pages


def test_a_map_is_short_where_neighbours_are_alike() -> None:
    assert encode_map([classes()])["runs"] == "1024p1024b1024d1024z1024h1024r2048m"
    assert encode_map([np.array([0, 1, 1], np.uint8)])["runs"] == "p2b"


@pytest.mark.parametrize("size", [1, 7, 1000, MAX_CELLS])
def test_a_map_is_the_same_in_pieces(size: int) -> None:
    given = np.random.default_rng(size).integers(0, len(CLASSES), 2 * MAX_CELLS if size > 99 else 999).astype(np.uint8)
    pieces = [given[at : at + size] for at in range(0, len(given), size)]
    assert encode_map(pieces) == encode_map([given])


def test_classes_come_in_pieces() -> None:
    state = PageState(PIECE + 3)
    state.store(0, PIECE + 1)
    state.hinted.set(PIECE + 1)
    pieces = [*page_classes(state)]
    assert [len(piece) for piece in pieces] == [PIECE, 3]
    assert encode_map(pieces)["runs"] == f"{PIECE + 1}phm"


def test_a_large_guest_is_sampled_and_still_counted_exactly() -> None:
    given = np.zeros(5 * MAX_CELLS, np.uint8)
    given[::8] = 2
    encoded = encode_map([given])
    assert encoded["unit"] == 8
    assert len(decode_map(encoded)) == -(-len(given) // 8)
    assert encoded["counts"]["demanded"] == len(given) // 8
    # A line of a child's report holds it, whatever the classes.
    worst = np.arange(4 * MAX_CELLS, dtype=np.uint32) // 4 % 2
    assert len(json.dumps(encode_map([worst.astype(np.uint8)]))) < 1 << 19


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pages": -1}, "map pages"),
        ({"pages": True}, "map pages"),
        ({"pages": 1 << 41}, "map pages"),
        ({"unit": 3}, "map unit"),
        ({"unit": 0}, "map unit"),
        ({"pages": 1 << 40}, "map unit"),
        ({"counts": {}}, "map counts"),
        ({"counts": {**dict.fromkeys(NAMES, 0), "bulk": 1}}, "map counts"),
        ({"counts": {**dict.fromkeys(NAMES, 0), "bulk": -1, "zero": PAGES + 1}}, "map counts"),
        ({"runs": 5}, "map runs"),
        ({"runs": "1024p"}, "map runs"),
        ({"runs": "9000p"}, "map runs"),
        ({"runs": "8192q"}, "map runs"),
        ({"runs": "08192p"}, "map runs"),
        ({"runs": "9999999999p"}, "map runs"),
        ({"runs": "8192"}, "map runs"),
        ({"runs": "8192p "}, "map runs"),
        ({"runs": "p" * (MAX_CELLS + 1)}, "map runs"),
    ],
)
def test_a_map_that_cannot_be_right_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode_map({**encode_map([classes()]), **change})
    assert refused.value.field == field


# ------------------------------------------------------------------------------------------------------ the file


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    for given in (outcome(), outcome(postcopy=False), outcome(drop=("result", "map", "running", "progress"))):
        save_report(given, tmp_path / "run.json")
        assert load_report(tmp_path / "run.json") == given
    assert not given.verified


def test_a_side_that_never_spoke_leaves_a_report_all_the_same(tmp_path: Path) -> None:
    names = ("guest", "phase", "progress", "round", "running", "map", "result")
    save_report(outcome(drop=names), tmp_path / "run.json")
    assert load_report(tmp_path / "run.json").guest_at == "nowhere"


def envelope(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A report that was changed by somebody who knows how to make the checksum."""
    report = copy.deepcopy(outcome().to_json())
    change(report)
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    checksum = f"{zlib.crc32(text.encode()):08x}"
    return json.dumps({"format": "pagecore run report", "version": 1, "checksum": checksum, "report": report}).encode()


def test_the_checksum_is_as_the_documentation_has_it() -> None:
    assert parse_report(envelope(lambda report: None)) == outcome()


def put(path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(report: dict[str, Any]) -> None:
        target: Any = report
        *way, last = path.split(".")
        for name in way:
            target = target[int(name) if isinstance(target, list) else name]
        if value is KeyError:
            del target[last]
        else:
            target[int(last) if isinstance(target, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("verified", 1, "verified"),
        ("verified", KeyError, "verified"),
        ("exit_code", -1, "exit_code"),
        ("exit_code", True, "exit_code"),
        ("guest_at", "moon", "guest_at"),
        ("guest_at", ["source"], "guest_at"),
        ("message", 5, "message"),
        ("message", "x" * 5000, "message"),
        ("pages", -1, "pages"),
        ("pages", 5, "map pages"),
        ("options", [], "options"),
        ("options.size", "big", "options.size"),
        ("guest", {"kind": "kvm"}, "guest"),
        ("guest.kind", 3, "guest.kind"),
        ("source", None, "source"),
        ("source.pages_sent", "all", "source.pages_sent"),
        ("source.pages_sent", KeyError, "source.pages_sent"),
        ("source.total_time", KeyError, "source.total_time"),
        ("source.downtime", -1, "source.downtime"),
        ("throughput", "fast", "throughput"),
        ("destination.placement", [], "destination.placement"),
        ("destination.placement.requested", None, "destination.placement.requested"),
        ("destination.placement.latency.owed", KeyError, "destination.placement.latency.owed"),
        ("destination.placement.latency.owed.p99_us", "x", "destination.placement.latency.owed.p99_us"),
        ("phases", {}, "phases"),
        ("phases", [{"phase": "x", "round": 0, "at": 0}] * 3000, "phases"),
        ("phases.1", 5, "phases.1"),
        ("phases.1.phase", "x" * 41, "phases.1.phase"),
        ("phases.1.at", 1e12, "phases.1.at"),
        ("rounds.0", None, "rounds.0"),
        ("rounds.0.dirty_rate", KeyError, "rounds.0.dirty_rate"),
        ("rounds.0.expected_downtime", "never", "rounds.0.expected_downtime"),
        ("switch", [1.0], "switch"),
        ("switch", [2.0, 1.0], "switch"),
        ("outages", None, "outages"),
        ("outages", [[1.0]], "outages.0"),
        ("outages", [[1.0, 0.5]], "outages.0"),
        ("outages", [[None, 0.5]], "outages.0"),
        ("pauses", None, "pauses"),
        ("pauses", [[0.1, 0.2], [1.0, 0.5]], "pauses.1"),
        ("series", KeyError, "series"),
        ("series.source", [], "series.source"),
        ("series.source.more", [], "series.source"),
        ("series.source.owed", KeyError, "series.source"),
        ("series.source.owed", [1], "series.source.owed"),
        ("series.source.owed.3", "many", "series.source.owed"),
        ("series.source.owed.3", -1, "series.source.owed"),
        ("series.source.at.3", 100.0, "series.source.at"),
        ("series.source.at.3", None, "series.source.at"),
        ("series.destination.at", [0.0] * 5000, "series.destination.at"),
        ("map.runs", "3q", "map runs"),
        ("map", [], "map"),
        ("map", KeyError, "map"),
        ("switch", KeyError, "switch"),
        ("surplus", [[[[[[[[[1]]]]]]]]], "report.surplus.0.0.0.0.0.0.0"),
        ("surplus", 1 << 64, "report.surplus"),
    ],
)
def test_a_report_that_cannot_be_right_is_refused_and_the_field_named(path: str, value: Any, field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        parse_report(envelope(put(path, value)))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "json"),
        (b"{", "json"),
        (b"\xff\xfe", "json"),
        (b"[1]", "format"),
        (b'{"format": "another"}', "format"),
        (b'{"format": "pagecore run report"}', "version"),
        (b'{"format": "pagecore run report", "version": 2}', "version"),
        (b'{"format": "pagecore run report", "version": 1}', "report"),
        (b'{"format": "pagecore run report", "version": 1, "report": {}}', "checksum"),
        (b'{"format": "pagecore run report", "version": 1, "report": {"x": NaN}}', "json"),
        (b'{"format": "pagecore run report", "version": 1, "report": {"x": 1e999}}', "report.x"),
        (b"[" * 100000, "json"),
        (b"1" * 5000, "json"),
    ],
)
def test_what_is_no_report_is_refused(data: bytes, field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        parse_report(data)
    assert refused.value.field == field


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    save_report(outcome(drop=("progress", "map")), tmp_path / "run.json")
    data = (tmp_path / "run.json").read_bytes()
    good = parse_report(data)
    generator = np.random.default_rng(3)
    for at in generator.choice(len(data), 300, replace=False).tolist():
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << int(generator.integers(8))
        try:
            # White space is the one thing that may change.
            assert parse_report(bytes(spoiled)) == good
        except ProtocolError:
            continue
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(ProtocolError):
            parse_report(data[:length])


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "long", "wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ProtocolError, match="more than"):
        load_report(tmp_path / "long")
