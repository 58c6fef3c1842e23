"""The benchmark's own answers: every row on small bitmaps, where ours and the peers must agree; no times are judged."""

from __future__ import annotations

import json
import pathlib

import pytest

from pagecore.bench import report
from pagecore.bench.bitmap import GROUPS, Row, Suite
from pagecore.bench.rounds import Contender, measure, ratio


@pytest.mark.parametrize("group", GROUPS)
def test_ours_and_the_peers_agree(group: str) -> None:
    # A row asserts that its contenders gave the same answer.
    rows = list(Suite(rounds=1, scale=8 if group != "drain_warm" else 2).rows(group))
    assert rows
    assert all(row.ratio > 0 or row.unit == "ns more" for row in rows)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    fast, slow = Contender(lambda: None), Contender(lambda: None)
    measure({"fast": fast, "slow": slow}, 3, None)
    assert len(fast.nanoseconds) == len(slow.nanoseconds) == 3
    fast.nanoseconds, slow.nanoseconds = [10, 20, 1000], [20, 80, 1000]
    assert ratio(fast, slow) == 2.0


def test_reports(tmp_path: pathlib.Path) -> None:
    rows = [
        Row("drain", "2^20", "loop", 2.5, 3.0, 5.0, 1000.0, 2500.0),
        Row(".set(i)", "2^16", "empty", 4.0, 5.0, 2.0, 30.0, 26.0, "ns more"),
    ]
    assert [row.passed for row in rows] == [False, True]
    assert report.cells(rows[0])[-1] == "missed"
    assert json.loads(json.dumps(report.as_json(rows, 9)))["rows"][1]["passed"]
    report.draw(rows, str(tmp_path / "rows.png"))
    assert (tmp_path / "rows.png").stat().st_size > 1000
