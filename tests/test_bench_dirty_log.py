"""The benchmark of dirty logs, small: each contender finds what was written, and the command prints and gates."""

import json

import pytest
from click.testing import CliRunner

from pagecore.bench import dirty_log
from pagecore.bench.bitmap import Row
from pagecore.cli import cli

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

SIZE = 16 << 20
SHARES = ["0 %", "1 %", "100 %"]
PEERS = {
    "memory": 1,
    "kvm_get": 1,
    "kvm_clear": 1,
    "kvm_ring": 1,
    "pagemap": 3,
    "write_protect": 1,
    "trap": 1,
}


SLOWER = ("kvm_clear", "kvm_ring")


@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=pytest.mark.ci if name in SLOWER else ()) for name in dirty_log.GROUPS]
)
def test_every_contender_finds_what_was_written(group):
    # A collect or a peer that reports anything but the pages of its list fails in there.
    suite = dirty_log.DirtyLogSuite(rounds=1, size=SIZE)
    rows = list(suite.rows(group))
    if group in suite.skipped:
        pytest.skip(suite.skipped[group])
    collects = [row for row in rows if row.unit == "x" and row.case.endswith("%")]
    assert [row.case for row in collects] == [f"16 MiB, {share}" for share in SHARES for _ in range(PEERS[group])]
    writes = [row for row in rows if row.unit == "ns more"]
    assert writes
    assert all(row.nanoseconds > 0 and row.peer_nanoseconds > 0 for row in rows)
    assert all(row.must is None or row.case.endswith(("1 %", "entries")) for row in rows)


@pytest.mark.parametrize("size", [0, 8 << 20, (16 << 20) + 4096, 2 << 30])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="is not a multiple of 2 MiB in"):
        dirty_log.DirtyLogSuite(size=size)


def test_the_command(tmp_path):
    arguments = ["bench", "logs", "--size", "16M", "--rounds", "1", "--only", "memory"]
    done = CliRunner().invoke(cli, [*arguments, "--plot", str(tmp_path / "logs.png")])
    assert done.exit_code == 0, done.output
    assert "each write, memory" in done.output
    assert (tmp_path / "logs.png").read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(cli, [*arguments, "--json", "--plot", str(tmp_path / "nowhere" / "logs.png")])
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["rows"]) == 4
    assert "the picture could not be written" in done.stderr
    assert CliRunner().invoke(cli, ["bench", "logs", "--size", "1M"]).exit_code == 2


def test_the_gate(monkeypatch):
    class Suite(dirty_log.DirtyLogSuite):
        def rows(self, only=""):
            self.skipped["kvm_get"] = "KVM is not available: switch it on"
            yield Row("pagemap", "1 GiB, 1 %", "PAGEMAP_SCAN", self.rounds / 10, 0.91, 0.91, 1000.0, 900.0)

    monkeypatch.setattr(dirty_log, "DirtyLogSuite", Suite)
    for options, status in (([], 0), (["--gate"], 1), (["--gate", "--rounds", "10"], 0)):
        done = CliRunner().invoke(cli, ["bench", "logs", *options])
        assert done.exit_code == status, done.output
        assert "kvm_get: KVM is not available" in done.output
