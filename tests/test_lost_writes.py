"""No write is lost, at whatever moment around collect, re-arm, take and read it comes; wrong orders are found out.

The plans, and what a moment is: lost_write_rig.py, which runs in a process of its own, between whose kernel calls the
writes are put in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest

import kvm_poker
from kvm_raw_logs import RESET_DIRTY_RINGS, RawRing
from pagecore import Bitmap, UnsupportedError
from preload import compiled, environment

HERE = pathlib.Path(__file__).parent
SECONDS = 100.0
SOAK = "PAGECORE_SOAK_MATRIX" in os.environ


class Rig:
    """The process that makes the runs."""

    def __init__(self, directory: pathlib.Path) -> None:
        shim = compiled("ioctl_moments.c", directory)
        self._complaints = directory / "stderr"
        with self._complaints.open("wb") as complaints:
            self.process = self._start(shim, complaints)

    @staticmethod
    def _start(shim: str, complaints: BinaryIO) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / "lost_write_rig.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment(shim),
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Run the plans; where the moments are, and what was lost."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.poll() is None, self._complaints.read_text()
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        if not ready:
            self.process.kill()
        line = self.process.stdout.readline()
        assert line, f"{question}: {self._complaints.read_text() or 'no answer in time'}"
        answer: dict[str, Any] = json.loads(line)
        if "unsupported" in answer:
            pytest.skip(answer["unsupported"])
        assert "failure" not in answer, f"{question}: {answer['failure']}"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("rig"))
    yield rig
    rig.close()


# A call that each of them makes when it fetches or re-arms.
KERNEL = {
    "kvm-get": "KVM_GET_DIRTY_LOG",
    "kvm-clear": "KVM_CLEAR_DIRTY_LOG",
    "kvm-raw-clear": "KVM_CLEAR_DIRTY_LOG",
    "kvm-ring": "KVM_RESET_DIRTY_RINGS",
    "kvm-raw-ring": "KVM_RESET_DIRTY_RINGS",
    "kvm-pagemap": "PAGEMAP_SCAN",
    "pagemap": "PAGEMAP_SCAN",
    "pagemap-process": "PAGEMAP_SCAN",
    "write-protect": "UFFDIO_WRITEPROTECT",
}
CASES = [
    ("memory", "bare"),
    ("memory", "sync"),
    ("vhost", "bare"),
    ("vhost", "sync"),
    ("vhost", "marks"),
    ("step-model", "sync"),
    ("strict-manual-model", "sync"),
    ("strict-manual-model", "lazy"),
    ("kvm-get", "bare"),
    ("kvm-get", "sync"),
    ("kvm-clear", "bare"),
    ("kvm-clear", "sync"),
    ("kvm-clear", "lazy"),
    ("kvm-ring", "bare"),
    ("kvm-ring", "sync"),
    ("kvm-pagemap", "sync"),
    ("pagemap", "bare"),
    ("pagemap", "sync"),
    ("pagemap-process", "bare"),
    ("pagemap-process", "sync"),
    ("write-protect", "bare"),
    ("write-protect", "sync"),
]
EARLY = "write 9 after the early reading"
AFTER_THE_SYNC = [f"{what} between the sync and what follows" for what in ("send 0", "write 9")]
# Where a write goes lost when the order is wrong; each is the shortest plan of those that do it.
WRONG = [
    ("memory", "bare", "read-first", [EARLY]),
    ("memory", "sync", "read-first", [EARLY, "sync 0 after the early reading"]),
    ("memory", "sync", "collect-twice", ["write 9 after the collect"]),
    ("vhost", "marks", "sync-first", ["write 9 after the reading of 200"]),
    ("step-model", "bare", "read-before-rearm", [EARLY]),
    ("step-model", "sync", "late-rearm", AFTER_THE_SYNC),
    ("step-model", "sync", "late-epoch", ["write 12 between the start of the epoch and the hint"]),
    ("manual-model", "lazy", "late-chunks", ["write 9 after the reading of 1"]),
    ("manual-model", "lazy", "seen-twice", ["write 9 after the reading of 1"]),
    ("kvm-get", "bare", "read-first", ["write 9 before KVM_GET_DIRTY_LOG"]),
    ("kvm-get", "sync", "collect-twice", ["write 9 after KVM_GET_DIRTY_LOG"]),
    ("kvm-clear", "bare", "read-before-rearm", [EARLY]),
    ("kvm-clear", "sync", "late-rearm", AFTER_THE_SYNC),
    ("kvm-clear", "sync", "late-epoch", ["write 12 between the start of the epoch and the hint"]),
    ("kvm-clear", "lazy", "late-chunks", ["write 9 after the reading of 1"]),
    ("kvm-raw-clear", "sync", "clears-unseen", ["write 13 after KVM_GET_DIRTY_LOG"]),
    ("kvm-raw-clear", "lazy", "clears-unseen", ["write 13 before KVM_CLEAR_DIRTY_LOG"]),
    ("kvm-raw-clear", "lazy", "seen-twice", ["write 9 after the reading of 1"]),
    ("kvm-raw-ring", "bare", "read-before-rearm", [EARLY]),
    ("kvm-raw-ring", "sync", "late-rearm", AFTER_THE_SYNC),
    ("kvm-raw-ring", "sync", "late-epoch", ["write 12 between the start of the epoch and the hint"]),
    ("kvm-ring", "sync", "collect-twice", ["write 9 after the collect"]),
    ("kvm-pagemap", "sync", "collect-twice", ["write 9 after PAGEMAP_SCAN"]),
    ("pagemap", "bare", "read-first", ["write 9 before PAGEMAP_SCAN"]),
    ("write-protect", "bare", "read-first", [EARLY]),
    ("write-protect", "sync", "collect-twice", ["write 9 after the collect"]),
]
# What a log takes care of by itself, whoever calls it.
HARMLESS = [
    ("kvm-clear", "lazy", "seen-twice"),
    ("kvm-clear", "lazy", "clears-unseen"),
    ("kvm-clear", "sync", "clears-unseen"),
]


def of_the_kernel(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, marks=[pytest.mark.kernel] if case[0] in KERNEL else []) for case in cases]


def slow(log: str) -> bool:
    """Whether a run takes the time of several exits of a vCPU, or of wake-ups of another thread."""
    return log.startswith("kvm") or log in ("write-protect", "pagemap-process")


def check_nothing_lost(rig: Rig, log: str, loop: str, depth: int) -> None:
    answer = rig.ask(log=log, loop=loop, depth=depth)
    assert answer["lost"] == []
    # A log that reports everything loses nothing, either.
    assert answer["idle"] == []
    assert answer["runs"] > len(answer["moments"]) * 6
    # The gaps inside a native collect or re-arm are there only if its kernel calls call back.
    if log in KERNEL:
        assert {f"before {KERNEL[log]}", f"after {KERNEL[log]}"} <= set(answer["moments"])


@pytest.mark.parametrize(("log", "loop"), of_the_kernel(CASES))
def test_no_write_is_lost(rig: Rig, log: str, loop: str) -> None:
    check_nothing_lost(rig, log, loop, 1 if slow(log) else 2)


@pytest.mark.slow if SOAK else pytest.mark.ci
@pytest.mark.parametrize(("log", "loop"), of_the_kernel(CASES))
def test_no_two_writes_or_turns_of_threads_lose_one(rig: Rig, log: str, loop: str) -> None:
    """All pairs where a write or a collect costs much are for ``make soak``."""
    check_nothing_lost(rig, log, loop, 2 if slow(log) and not SOAK else 3)


@pytest.mark.parametrize(("log", "loop", "mutant", "plan"), of_the_kernel(WRONG))
def test_a_wrong_order_is_found_out(rig: Rig, log: str, loop: str, mutant: str, plan: list[str]) -> None:
    lost = rig.ask(log=log, loop=loop, mutant=mutant, until=plan)["lost"]
    plans = [each["plan"] for each in lost]
    assert plan in plans
    # It takes a write at a bad moment: a guest that stands still loses nothing.
    assert all(any(what.startswith("write") for what in each) for each in plans)
    assert len(plan) == min(map(len, plans))


@pytest.mark.parametrize(("log", "loop", "mutant"), of_the_kernel(HARMLESS))
def test_a_log_that_knows_what_was_seen_forgives(rig: Rig, log: str, loop: str, mutant: str) -> None:
    assert rig.ask(log=log, loop=loop, mutant=mutant, depth=1)["lost"] == []


@pytest.mark.kernel
def test_no_signal_cuts_a_bare_reset_of_the_rings_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a write could be lost by the kernel, and the order of the calls be blamed for it."""
    masks = []
    ioctl = fcntl.ioctl

    def looking(descriptor: int, request: int, *arguments: Any) -> Any:
        if request == RESET_DIRTY_RINGS:
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return ioctl(descriptor, request, *arguments)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        opened = kvm_poker.Poker(kvm_poker.PAGE)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with contextlib.closing(opened) as machine:
        log = RawRing(machine)
        monkeypatch.setattr(fcntl, "ioctl", looking)
        for page in (9, 10, 9):
            machine.poke(page, 7)
            seen = Bitmap(kvm_poker.NPAGES)
            log.collect_into(seen)
            assert page in seen
            log.rearm(0, kvm_poker.NPAGES)
        monkeypatch.undo()
    assert masks == [signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}] * 3
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
