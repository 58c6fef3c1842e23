"""What a person sees of a migration while it runs, and of a file with ``pagecore inspect``."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from pagecore import Bitmap, SavedBitmap, WorkingSet
from pagecore._progress_view import GOES_ON, INTERRUPTED, Standing, progress_view, shown
from pagecore.cli import cli
from pagecore.migrate import Options
from pagecore.migrate.report import save_report
from report_rig import PAGES, START, events, outcome

OPTIONS = Options(size=PAGES * 4096)


def standing_at(seconds: float) -> Standing:
    standing = Standing()
    for event in events(OPTIONS):
        if event["at"] <= START + seconds:
            standing.take(event)
    return standing


def test_rates_are_those_of_the_last_second() -> None:
    standing = standing_at(0.9)
    assert standing.rate("source", "wire_bytes") == pytest.approx(4000 * 4096, rel=0.01)
    assert standing.rates().startswith("link 15.6M/s   guest writes 2M/s   round ends in 0.1 s")
    # One tenth of 4000 pages, at 4100 pages a second.
    assert standing.seconds_left() == pytest.approx(0.1, rel=0.1)
    assert standing.amounts() == "owed 1.6M   hinted 4M   sent 14.1M (3600 pages, 90 zero)"
    assert standing.faults() == ""
    assert standing.phase_text() == "precopy, round 1"


def test_after_the_switch_it_tells_what_the_guest_waits_for() -> None:
    standing = standing_at(1.9)
    assert standing.phase_text() == "postcopy: the guest runs at the destination"
    found = re.fullmatch(r"faults 17\d \((\d+)/s\)   requested 9   p50 (\d+) us, p99 (\d+) us", standing.faults())
    assert found
    assert 190 <= int(found[1]) <= 210
    # What the guest had written before it came is not what it writes in this second.
    assert "guest writes 1.2M/s" in standing.rates()
    assert "all sent in" in standing.rates()


def test_one_side_of_two_machines_claims_nothing_of_the_other() -> None:
    standing = Standing()
    for event in events(OPTIONS):
        if event["role"] == "source" and event["at"] <= START + 1.9:
            standing.take(event)
    assert standing.rates().startswith("link 15.6M/s   all sent in")
    assert standing.faults() == ""


def test_before_anything_is_known_nothing_is_claimed() -> None:
    standing = Standing()
    assert (standing.owed, standing.seconds_left()) == (None, None)
    assert standing.amounts() == standing.rates() == standing.faults() == ""


def test_plain_lines_tell_each_thing_once() -> None:
    out = io.StringIO()
    with progress_view(OPTIONS, Console(file=out, width=80), quiet=False) as view:
        for event in events(OPTIONS):
            view.event(event)
        lost = {"event": "link_lost", "error": "\x1b[31mgone"}
        for role in ("source", "destination"):
            # Both tell of it.
            view.event({**lost, "role": role})
            view.event({"event": "reconnected", "role": role, "seconds": 1.25})
        view.event({"event": "interrupted", "role": "parent", "times": 1})
        view.event({"event": "failed", "role": "source", "error": "it broke"})
    lines = [re.sub(r"^ +\d+\.\d\d s  ", "", line) for line in out.getvalue().splitlines()]
    assert lines == [
        "guest: process (it was asked for)",
        "the guest fills its memory",
        "precopy, round 1",
        "round 1: 16M sent in 1.00 s, 8M dirty since (7.6M/s)",
        "switch: the guest stands still",
        "the guest runs at the destination after 20.0 ms",
        "postcopy: the guest runs at the destination",
        "the last pages settle",
        "the link is lost: ?[31mgone; trying to meet again",
        "the link is back after 1.25 s",
        GOES_ON,
        "source: it broke",
    ]


def test_ctrl_c_around_the_switch_says_what_it_means_on_each_side_of_it() -> None:
    standing = standing_at(0.9)
    assert standing.take({"event": "interrupted", "role": "parent", "times": 1}) == INTERRUPTED
    # It came too late to keep the guest here: that is said as soon as it is known, and once.
    handed_over = {"event": "phase", "role": "source", "phase": "postcopy", "round": 1}
    assert standing.take(handed_over) == GOES_ON
    assert standing.take(handed_over) is None


def test_a_pause_is_told_and_shown_for_as_long_as_it_lasts() -> None:
    standing = standing_at(0.9)
    assert standing.take({"event": "paused", "role": "destination"}) is None
    assert standing.phase_text() == "precopy, round 1"
    assert standing.take({"event": "paused", "role": "source"}) == "paused"
    assert standing.phase_text() == "precopy, round 1, paused"
    assert standing.take({"event": "resumed", "role": "source", "seconds": 2.5}) == "the transfer goes on after 2.50 s"
    assert standing.phase_text() == "precopy, round 1"
    told = standing.take({"event": "not_paused", "role": "source", "reason": "it is old"})
    assert told == "not paused: it is old"
    after = standing_at(1.9)
    told = after.take({"event": "paused", "role": "source"})
    assert told == "paused: the guest gets what it waits for, and nothing else"


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with progress_view(OPTIONS, console, quiet=False) as view:
        for event in events(OPTIONS):
            if event["event"] == "progress" and event["role"] == "source":
                # What a guest of petabytes would have in its lines.
                event.update({name: event[name] * 10**12 for name in ("pages_sent", "pages_zero", "wire_bytes")})
            if event["at"] < START + 1.9:
                view.event(event)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    lines = text.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    assert any("postcopy" in line for line in lines)
    assert any(line.startswith("  link ") for line in lines)
    assert ("…" in text) == (width == 80)


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    assert shown("a\x1b[2Jb\x07\u202ec") == "a?[2Jb??c"


# -------------------------------------------------------------------------------------------------------- inspect


def inspect(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def test_a_bitmap_is_shown(tmp_path: Path) -> None:
    bitmap = Bitmap(6400)
    bitmap.set_runs([(0, 100), (200, 1), (6390, 10)])
    SavedBitmap(bitmap, generation=3).save(tmp_path / "file")
    text = inspect(tmp_path / "file").output
    assert re.search(r"^bitmap +6400 pages of 4K \(25M\)", text, re.MULTILINE)
    assert re.search(r"^set +111 pages \(444K, 1\.73%\)", text, re.MULTILINE)
    assert re.search(r"^runs +3, of 37\.0 pages on average, the longest of 100 pages", text, re.MULTILINE)
    assert re.search(r"^from, to +page 0 to page 6399", text, re.MULTILINE)
    assert re.search(r"^where +\|@ \. {60}\.\|", text, re.MULTILINE)
    values = json.loads(inspect("--json", tmp_path / "file").output)
    assert (values["kind"], values["set"], values["generation"], values["longest_run"]) == ("bitmap", 111, 3, 100)
    assert len(values["density"]) == 64
    assert values["density"][0] == 1.0


@pytest.mark.parametrize("pages", [0, 1, 5])
def test_a_small_bitmap_is_shown_too(pages: int, tmp_path: Path) -> None:
    SavedBitmap(Bitmap(pages)).save(tmp_path / "file")
    assert f"{pages} {'page' if pages == 1 else 'pages'} of 4K" in inspect(tmp_path / "file").output
    assert json.loads(inspect("--json", tmp_path / "file").output)["first"] is None


def test_a_working_set_is_shown(tmp_path: Path) -> None:
    WorkingSet([(0, 5, 10), (1, 7, 3), (0, 100, 2)], page_size=1 << 21).save(tmp_path / "file")
    text = inspect(tmp_path / "file").output
    assert re.search(r"^working set +15 pages of 2M \(30M\)", text, re.MULTILINE)
    assert re.search(r"^region 0 +12 pages", text, re.MULTILINE)
    assert re.search(r"^touched first +region 0: page 5, 10 pages", text, re.MULTILINE)
    values = json.loads(inspect("--json", tmp_path / "file").output)
    assert values["regions"] == {"0": 12, "1": 3}


def test_a_report_is_shown_and_drawn(tmp_path: Path) -> None:
    save_report(outcome(), tmp_path / "file")
    text = inspect(tmp_path / "file").output
    assert text.rstrip().splitlines()[-1] == outcome().message
    assert re.search(r"^how pages travelled +precopied 4M, bulk 4M", text, re.MULTILINE)
    assert json.loads(inspect("--json", tmp_path / "file").output) == {"kind": "run report", **outcome().to_json()}


def test_a_text_of_a_report_gives_no_orders(tmp_path: Path) -> None:
    given = outcome()
    given.report["guest"]["reason"] = "[bold]\x1b[2J[/nonsense]"
    save_report(given, tmp_path / "file")
    assert "[bold]?[2J[/nonsense]" in inspect(tmp_path / "file").output


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "magic"),
        (b"\x7fELF", "magic"),
        (b"PGBM", "length"),
        (SavedBitmap(Bitmap(100)).to_bytes()[:-1] + b"\1", "checksum"),
        (WorkingSet([(0, 1, 1)]).to_bytes()[:-1], "runs"),
        (b"{}", "format"),
    ],
)
def test_a_damaged_file_is_refused_with_the_field(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    result = inspect(tmp_path / "file")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file'}: {said}: " in result.output
    assert not result.stdout


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    SavedBitmap(Bitmap(1)).save(tmp_path / "file")
    for arguments, said in (
        (("/nowhere",), "does not exist"),
        ((tmp_path,), "is a directory"),
        ((tmp_path / "file", "--plot", "x.docx"), "ends in none of .png, .svg, .pdf"),
        ((tmp_path / "file", "--plot", "x.png"), "this is none"),
    ):
        result = inspect(*arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


def test_a_missing_library_is_named_before_anything_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["migrate", "--plot", "run.png"])
    assert result.exit_code == 2
    # The interpreter that runs this: another one on the path would have no pagecore.
    assert f"{sys.executable} -m pip install 'pagecore[plot]'" in result.output


def test_a_report_that_cannot_be_written_is_said_and_fails(tmp_path: Path) -> None:
    save_report(outcome(drop=("progress", "map")), tmp_path / "file")
    result = inspect(tmp_path / "file", "--plot", tmp_path / "nowhere" / "run.svg")
    assert result.exit_code == 1
    assert "the picture could not be written to " in result.output
