"""The conformance suite: our handler passes every row, a naive one fails those that it should, every row can fail."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable

import pytest
from click.testing import CliRunner

from memory_kinds import huge_pool
from pagecore import conformance
from pagecore.cli import cli
from pagecore.conformance import ROWS, Verdict, discard_rows
from pagecore.conformance.snapshot import Snapshot
from test_cli import run as run_command

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

NAIVE = pathlib.Path(__file__).with_name("naive_handler.py")


@pytest.fixture
def snapshot(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "snapshot"
    conformance.make_snapshot(path)
    return path


def play(
    snapshot: pathlib.Path,
    command: list[str],
    rows: Iterable[str] | None = None,
    *,
    keep: bool = False,
    patience: float,
) -> dict[str, Verdict]:
    path = snapshot.with_name("socket")
    filled = [part.format(socket=path, snapshot=snapshot) for part in command]
    verdicts = conformance.run(path, snapshot, rows=rows, command=filled, keep=keep, patience=patience)
    return {verdict.row.name: verdict for verdict in verdicts}


def serve(*options: str) -> list[str]:
    return [sys.executable, "-m", "pagecore", "serve", "--socket", "{socket}", "--snapshot", "{snapshot}", *options]


def naive(*options: str) -> list[str]:
    return [sys.executable, str(NAIVE), "{socket}", "{snapshot}", *options]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(conformance.__file__).parents[2]))


@pytest.mark.parametrize("options", [(), pytest.param(("--prefetch", "--on-lost", "stall"), marks=pytest.mark.ci)])
def test_ours_passes_every_row(snapshot: pathlib.Path, options: tuple[str, ...]) -> None:
    verdicts = play(snapshot, serve(*options), keep=True, patience=5)
    assert list(verdicts) == list(ROWS)
    others = {name: verdict for name, verdict in verdicts.items() if verdict.result != "pass"}
    assert set(others) <= NEED_A_POOL, others
    assert {verdict.result for verdict in others.values()} <= {"not applicable"}
    Snapshot(snapshot)  # raises where the row that cuts the file has not put it right


# What the naive handler does, row by row; "" is a pass, everything else a part of what is seen of its failure.
NAIVELY = {
    "fields-1.1": "",
    "fields-1.7": "",
    "fields-new": "",
    "in-pieces": "JSONDecodeError",
    "early-close": "",
    "refuse-garbage": "",
    "refuse-no-descriptor": "",
    "refuse-overlap": "the connection is still open",
    "refuse-beyond": "the connection is still open",
    "refuse-page-size": "the connection is still open",
    "refuse-nothing": "the connection is still open",
    "first-touch": "",
    "write": "",
    "exact-address": "Invalid argument",
    "hole": "",
    "regions": "",
    "many-regions": "JSONDecodeError",
    "queued-faults": "",
    "one-page": "",
    "asleep": "File exists",
    "present": "",
    "edge": "",
    "huge-pages": "Invalid argument",
    "storm": "",
    "sweep": "",
    "discard-present": "page 10 has the content of page 10 of the snapshot, not zeros",
    "discard-missing": "page 20 has the content of page 20 of the snapshot, not zeros",
    "balloon": "page 600 is wrong in",
    "discard-queued": "Resource temporarily unavailable",
    "again": "Resource temporarily unavailable",
    # It dies of EAGAIN, or lives to place old data: whichever comes first.
    "late-data": "",
    "lazily-free": "not zeros",
    "flood": "",
    "discard-all": "not zeros",
    "guest-death": "",
    "paused": "Resource temporarily unavailable",
    "stop": "",
    "kill": "",
    "file-cut": "",
}
# Where the machine has no free huge pages they say so.
NEED_A_POOL = {"huge-pages"}
FAILS_EITHER_WAY = {"late-data", "flood", "guest-death"}


@pytest.mark.ci
@pytest.mark.timing
def test_a_naive_handler_fails_exactly_the_rows_that_it_should(snapshot: pathlib.Path) -> None:
    assert list(NAIVELY) == list(ROWS)
    rows = [name for name in ROWS if name not in NEED_A_POOL]
    verdicts = play(snapshot, naive(), rows, patience=0.5)
    expected = {name: "fail" if NAIVELY[name] or name in FAILS_EITHER_WAY else "pass" for name in rows}
    assert {name: verdict.result for name, verdict in verdicts.items()} == expected
    for name in rows:
        assert NAIVELY[name] in verdicts[name].seen, name


def test_huge_pages(snapshot: pathlib.Path) -> None:
    with huge_pool(4):
        assert play(snapshot, serve(), NEED_A_POOL, patience=5)["huge-pages"].result == "pass"
        verdict = play(snapshot, naive(), NEED_A_POOL, patience=0.5)["huge-pages"]
        assert verdict.result == "fail"
        assert NAIVELY["huge-pages"] in verdict.seen


# Each row that the naive handler passes is failed by one of these: (what is broken, the rows, what is seen).
BROKEN = [
    ("old-fields", ["fields-1.1", "fields-1.7"], "KeyError"),
    ("new-fields", ["fields-new"], "AssertionError"),
    ("hangs-up", ["early-close"], "the VMM has gone"),
    ("content", ["first-touch", "write", "sweep", "storm", "kill"], ""),
    ("offsets", ["regions"], "has the content of page"),
    ("holes", ["hole"], "is stuck"),
    ("late", ["queued-faults"], "is stuck"),
    ("batches", ["one-page"], "File exists"),
    ("around", ["present", "edge"], "the handler ended with status 1"),
    ("no-wake", ["asleep"], "is stuck (1 of 1 are), after"),
    ("unregisters", ["stop"], "page 35 reads as zeros"),
    ("unstoppable", ["stop"], "the handler is still there"),
    ("short-reads", ["file-cut"], "page 924 reads as zeros"),
    ("deaf", ["refuse-garbage", "refuse-no-descriptor"], "the connection is still open"),
]


@pytest.mark.ci
@pytest.mark.parametrize(("broken", "rows", "seen"), BROKEN)
def test_what_a_naive_handler_does_right_can_be_done_wrong(
    snapshot: pathlib.Path, broken: str, rows: list[str], seen: str
) -> None:
    for verdict in play(snapshot, naive("--break", broken), rows, patience=0.4).values():
        assert verdict.result == "fail", verdict
        assert seen in verdict.seen


def test_a_read_that_a_discard_falls_into_is_no_failure() -> None:
    content = bytes(range(1, 251)) * 17
    content = content[:4096]
    for found in (content, bytes(4096), content[:1024] + bytes(3072), bytes(4032) + content[4032:]):
        assert discard_rows._is_mixture(found, content)
    for found in (content[:-1] + b"\xff", content[16:] + content[:16], b"\x01" + bytes(4095)):
        assert not discard_rows._is_mixture(found, content)


def test_every_row_can_fail() -> None:
    passed = {name for name, said in NAIVELY.items() if not said and name not in FAILS_EITHER_WAY}
    assert passed <= {name for _, rows, _ in BROKEN for name in rows}


def test_without_a_command_a_handler_is_never_killed(snapshot: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "socket"
    command = [part.format(socket=path, snapshot=snapshot) for part in serve("--quiet")]
    with subprocess.Popen(command) as process:
        try:
            # Nobody was told to wait for it: the first row is given the time that a process needs to come up.
            verdicts = list(
                conformance.run(path, snapshot, rows=["first-touch", "stop", "kill", "paused"], patience=10)
            )
            assert [verdict.result for verdict in verdicts] == ["pass", *["not applicable"] * 3]
            assert "--command" in verdicts[1].seen
            assert process.poll() is None
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert not path.exists()


def test_a_socket_that_nobody_listens_at_fails_every_row(snapshot: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (verdict,) = conformance.run(tmp_path / "socket", snapshot, rows=["first-touch"], patience=0.05)
    assert (verdict.result, verdict.seen) == ("fail", "nobody listens at the socket: No such file or directory")


def test_a_handler_that_accepts_nobody_is_stuck_and_not_the_suite(
    snapshot: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Every row ends, and what hangs in it ends with it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(8)
        rows = ["first-touch", "discard-queued", "refuse-garbage"]
        verdicts = list(conformance.run(tmp_path / "socket", snapshot, rows=rows, patience=0.05))
    assert [verdict.result for verdict in verdicts] == ["fail"] * 3
    assert verdicts[0].seen == "the read of page 512 is stuck (1 of 1 are), after 0.05 s"
    assert verdicts[1].seen == "the read of page 30 is stuck (2 of 2 are), after 0.05 s"
    assert verdicts[2].seen == "after 0.05 s the connection is still open"


def test_a_row_ends_at_its_deadline(snapshot: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(8)
        rows = ["first-touch", "sweep"]
        verdicts = list(conformance.run(tmp_path / "socket", snapshot, rows=rows, patience=50, deadline=0.1))
    assert [(verdict.result, verdict.seen) for verdict in verdicts] == [
        ("fail", "the row did not end within 0.1 s")
    ] * 2


def test_the_snapshot_is_sparse_and_known(snapshot: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert snapshot.stat().st_blocks * 512 < snapshot.stat().st_size == 4 << 20
    inode = snapshot.stat().st_ino
    content = snapshot.read_bytes()
    os.truncate(snapshot, 1 << 20)
    assert conformance.make_snapshot(snapshot) == 4 << 20
    assert (snapshot.read_bytes(), snapshot.stat().st_ino) == (content, inode)
    with snapshot.open("r+b") as file:
        file.write(b"x")
    for path in (snapshot, NAIVE):
        with pytest.raises(ValueError, match="is not the snapshot of this suite: write it with --make-snapshot"):
            next(conformance.run(tmp_path / "socket", path))


def test_wrong_use_is_refused(snapshot: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no row is called 'nothing': fields"):
        next(conformance.run("socket", snapshot, rows=["nothing"]))
    for seconds in (0, -1, 3601, float("nan")):
        with pytest.raises(ValueError, match=f"patience {seconds} is outside"):
            next(conformance.run("socket", snapshot, patience=seconds))
        with pytest.raises(ValueError, match=f"deadline {seconds} is outside"):
            next(conformance.run("socket", snapshot, deadline=seconds))
    with pytest.raises(FileNotFoundError):
        next(conformance.run("socket", snapshot.with_name("other")))


def test_every_row_says_what_it_is() -> None:
    for row in ROWS.values():
        assert all([row.name, row.situation, row.operation, row.must])
        assert row.body.__module__.startswith("pagecore.conformance.")


def test_the_command_line(tmp_path: pathlib.Path) -> None:
    path, socket_path = tmp_path / "file", tmp_path / "socket"
    assert run_command("conformance", "--make-snapshot", str(path)).stdout == f"{path}: 4194304 bytes\n"
    assert "discard-present" in run_command("conformance", "--list").stdout
    handler = shlex.join(part.format(socket=socket_path, snapshot=path) for part in naive())
    arguments = ["conformance", "--socket", str(socket_path), "--snapshot", str(path), "--command", handler]
    rows = ["--row", "first-touch", "--row", "discard-present"]
    done = run_command(*arguments, *rows, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)["rows"]
    assert [(row["row"], row["result"]) for row in report] == [("first-touch", "pass"), ("discard-present", "fail")]
    assert set(report[0]) == {"row", "situation", "operation", "must", "result", "seen", "seconds"}
    assert done.stderr == "1 passed, 1 failed, 0 not applicable\n"
    done = run_command(*arguments, *rows[:2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 passed, 0 failed, 0 not applicable\n")
    assert "the page has the snapshot's content" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conformance"], "--socket and --snapshot are needed"),
        (["conformance", "--socket", "s", "--snapshot", "{snapshot}", "--row", "x"], "no row is called 'x'"),
        (["conformance", "--socket", "s", "--snapshot", "{snapshot}", "--patience", "0"], "patience 0.0 is outside"),
        (["conformance", "--socket", "s", "--snapshot", "{snapshot}.no"], "No such file"),
        (["serve", "--socket", "s"], "--snapshot"),
        (["serve", "--socket", "s", "--snapshot", "{snapshot}.no"], "does not exist"),
        (["serve", "--socket", "/nowhere/s", "--snapshot", "{snapshot}"], "/nowhere/s: No such file or directory"),
        (["serve", "--socket", "{snapshot}", "--snapshot", "{snapshot}"], "/snapshot: Address already in use"),
        (["serve", "--socket", "s", "--snapshot", "{snapshot}", "--threads", "0"], "threads"),
    ],
)
def test_wrong_usage_is_refused(snapshot: pathlib.Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, [part.format(snapshot=snapshot) for part in arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
