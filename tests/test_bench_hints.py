"""The benchmark of hints, small: its figures fit one another, and the command prints, writes and draws them."""

import json
import math

import pytest
from click.testing import CliRunner

from pagecore.bench import hints, tracker
from pagecore.bench.bitmap import Row
from pagecore.cli import cli

pytestmark = pytest.mark.timeout(60)


def small(**options):
    values = {"guests": [1 << 26], "densities": [0.01, 1.0], "lists": [(1, 1), (50, 64)], "rounds": 1}
    return hints.measure_hints(**{**values, **options})


def test_figures():
    cases = []
    report = small(bandwidth=1e9, report=cases.append)
    assert [(row.density, row.runs) for row in report.hints] == [(0.01, 1), (0.01, 50), (1.0, 1), (1.0, 50)]
    assert len(cases) == 6
    for row in report.hints:
        assert 0 < row.seconds < 1
        assert 0 <= row.taken <= row.named <= row.runs * row.longest
        assert row.saved_seconds == row.taken * 4096 / 1e9
        assert math.isclose(row.gain, row.break_even_bandwidth / 1e9)
        if row.density == 1:
            assert row.taken == row.named
            assert math.isclose(row.break_even_share, 1 / row.gain)
    full = report.syncs[1]
    assert (full.newly, full.guest) == (1 << 14, 1 << 26)
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guests": [4095]}, "at least a page"),
        ({"guests": []}, "at least a page"),
        ({"densities": [0.0]}, r"\(0, 1\]"),
        ({"densities": [math.nan]}, r"\(0, 1\]"),
        ({"lists": [(0, 1)]}, "at least 1"),
        ({"bandwidth": 0}, "above 0"),
        ({"rounds": 0}, "above 0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_the_command(monkeypatch):
    monkeypatch.setattr(
        hints.measure_hints, "__kwdefaults__", {**hints.measure_hints.__kwdefaults__, "lists": [(10, 64)]}
    )
    arguments = ["bench", "hints", "--guest", "64M", "--density", "0.5", "--rounds", "1", "--quiet"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "10 x 1..64" in done.output
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    rows = json.loads(done.output)["hints"]
    assert [row["runs"] for row in rows] == [10]
    assert rows[0]["gain"] > 0
    assert CliRunner().invoke(cli, [*arguments, "--density", "2"]).exit_code == 2


@pytest.mark.parametrize("case", tracker.CASES, ids=str)
def test_ours_and_the_peers_agree(case):
    # A row asserts that its contenders gave the same answer.
    rows = list(tracker.TrackerSuite(rounds=1, scale=8).rows(str(case)))
    assert {row.peer for row in rows} == {"floor", "QEMU like loop", "bare scan"}
    assert all(row.ratio > 0 and row.must is not None for row in rows)


def test_the_gate(monkeypatch):
    class Suite(tracker.TrackerSuite):
        def rows(self, only=""):
            yield Row("hint", "8 GiB", "floor", self.rounds / 10, 0.59, 1.0, 1000.0, 2500.0)

    monkeypatch.setattr(tracker, "TrackerSuite", Suite)
    for options, status in ((["--peers"], 0), (["--gate"], 1), (["--gate", "--rounds", "6"], 0)):
        done = CliRunner().invoke(cli, ["bench", "hints", *options])
        assert done.exit_code == status, done.output
    done = CliRunner().invoke(cli, ["bench", "hints", "--gate", "--json", "--quiet"])
    assert not json.loads(done.output)["rows"][0]["passed"]
    for options in (["--guest", "8G"], ["--plot", "a.png"], ["--rounds", "0"]):
        assert CliRunner().invoke(cli, ["bench", "hints", "--gate", *options]).exit_code == 2


def test_the_drawing(tmp_path):
    path = tmp_path / "hints.png"
    hints.draw(small(), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
