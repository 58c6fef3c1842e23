"""Whole migrations of guests of several sizes: time a page, and memory of each process beside the guest's own.

``pytest benchmarks/bench_migrate.py`` runs each mode once, small, and checks that it arrived. A program that measures::

    python benchmarks/bench_migrate.py [--rounds 3] [--sizes 256 1024 4096] [--mode postcopy] [--gate]

Cost that is linear is the same time a page for every size. The sizes take turns; the first round measures memory, and
no times: looking at a process holds it up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pagecore.migrate import Migration, Options

PAGE = 4096
MIB = 1 << 20
# Looks of the watch, in seconds: what is taken and given back between two of them is not seen.
LOOK = 0.01
# Memory that is given back this far ahead of the pages that arrive.
LEAD = 512 * MIB
# Migrations of a small guest for one of a large one, at the most.
SMALL_RUNS = 4
MADV_POPULATE_WRITE = 23
# What each process may take beside the guest's own, and how far sizes may be apart in time a page.
MOST_MEMORY = 64 * MIB
MOST_SPREAD = 1.15

# The guest writes slowly, so that the work is that of its size: what it writes in a second is the same for all sizes.
COMMON: dict[str, Any] = {"guest": "process", "dirty_rate": 16 * MIB, "settle_steps": 1000, "timeout": 90.0}
MODES: dict[str, dict[str, Any]] = {
    "hybrid": {"hints": False, "free_share": 0.0},
    "postcopy": {"hints": False, "free_share": 0.0, "precopy_rounds": 0},
    # As `make run`: half of the guest is free, and hinted.
    "hinted": {"free_share": 0.5},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one migration, and the most memory of each process beside the guest's, in bytes."""

    npages: int
    precopy: float
    stands_still: float
    postcopy: float
    whole: float
    memory: dict[str, int]


# ---------------------------------------------------------------------------------------------------- memory


def beside_guest(pid: int, guest: int) -> int:
    """Bytes of memory that a process has beside a mapping of so many: its own pages and those that it shares.

    The kernel joins neighbouring mappings: what the guest's has more than the guest counts as resident.
    """
    resident = size = 0
    with open(f"/proc/{pid}/smaps") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name == "Size":
                size = int(rest.split()[0]) << 10
            elif name == "Rss":
                resident += size - guest if size >= guest else int(rest.split()[0]) << 10
    return resident


class MemoryWatch:
    """The most memory that processes have beside a guest's, looked up all the time.

    Parameters
    ----------
    guest : int
        Bytes of the guest.
    pids : callable
        Returns the process ids by name; whoever is gone is left out.
    """

    def __init__(self, guest: int, pids: Callable[[], dict[str, int]]) -> None:
        self._guest = guest
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.most: dict[str, int] = {}
        self.looks = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            for name, pid in self._pids().items():
                # One that ends meanwhile has no mappings, or is not there.
                with contextlib.suppress(OSError):
                    self.most[name] = max(self.most.get(name, 0), beside_guest(pid, self._guest))
            self.looks += 1


class Ballast:
    """Memory that the host has backed, given back to the kernel piece by piece right before the destination takes it.

    A virtual machine may lose free memory to its host at any time, and getting it back costs several times more than
    what is measured: without this a large guest would seem to cost more a page than a small one.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory.madvise(MADV_POPULATE_WRITE)
        self._size, self._given = nbytes, 0

    def give(self, nbytes: int) -> None:
        """Give back the first so many bytes."""
        nbytes = min(nbytes, self._size)
        if nbytes > self._given:
            self._memory.madvise(mmap.MADV_DONTNEED, self._given, nbytes - self._given)
            self._given = nbytes

    def close(self) -> None:
        self._memory.close()


# ------------------------------------------------------------------------------------------------- one migration


def migrate(size: int, mode: str, *, watch: bool = False, ballast: bool = False, **options: Any) -> Figures:
    """Migrate a guest of so many bytes, in processes of their own."""
    given = Options(size=size, **{**COMMON, **MODES[mode], **options})
    phases: dict[str, float] = {}
    held = Ballast(size) if ballast else None

    def look(event: dict[str, Any]) -> None:
        kind, role = event["event"], event["role"]
        if kind == "phase":
            phases.setdefault(f"{role} {event['phase']}", event["at"])
        if held is not None and ((kind == "phase" and event["phase"] == "connect") or kind == "progress"):
            arrived = sum(event.get(name, 0) for name in ("received", "received_zeros", "placed", "zeroed"))
            if role == "destination" or kind == "phase":
                held.give(arrived * PAGE + LEAD)

    migration = Migration(given, look)
    memory: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        if held is not None:
            stack.callback(held.close)
        if watch:
            memory = stack.enter_context(MemoryWatch(size, lambda: migration.pids)).most
        outcome = migration.run()
    assert outcome.verified, outcome.message
    source = outcome.report["source"]
    return Figures(
        npages=size // PAGE,
        precopy=phases["source switch"] - phases.get("source precopy", phases["source switch"]),
        stands_still=source["downtime"],
        postcopy=phases["destination settle"] - phases["destination postcopy"],
        whole=source["total_time"],
        memory=memory,
    )


@pytest.mark.parametrize("mode", MODES)
def test_migrate(benchmark: Any, mode: str) -> None:
    found = migrate(16 * MIB, mode, watch=True)
    assert 0 < found.whole < 60
    assert found.memory.keys() == {"source", "destination"}
    benchmark.pedantic(migrate, (16 * MIB, mode), rounds=1)


# ------------------------------------------------------------------------------------------------------ the table


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def rows(mode: str, figures: dict[int, list[Figures]], memory: dict[int, Figures]) -> Iterator[tuple[str, bool]]:
    """Lines of Markdown, and whether a bound was missed in each."""
    medians = []
    for size, runs in figures.items():
        each = {
            name: [getattr(one, name) / one.npages * 1e6 for one in runs]
            for name in ("precopy", "stands_still", "postcopy", "whole")
        }
        medians.append(statistics.median(each["whole"]))
        taken = memory[size].memory
        bound = MOST_MEMORY + size // PAGE
        missed = max(taken.values()) > bound
        cells = [f"{size // MIB} MiB", *(spread(values) for values in each.values())]
        cells += [f"{taken[role] / MIB:.1f}" for role in ("source", "destination")]
        yield f"| {mode} | {' | '.join(cells)} | {bound / MIB:.2f}{' **missed**' if missed else ''} |", missed
    apart = max(medians) / min(medians)
    missed = apart > MOST_SPREAD
    text = f"{apart:.2f}, at most {MOST_SPREAD}{' **missed**' if missed else ''}"
    yield f"| {mode} | slowest of fastest | | | | {text} | | | |", missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="MiB of guest memory")
    parser.add_argument("--mode", choices=MODES, action="append", help="by default all")
    parser.add_argument("--link", choices=["unix", "tcp"], default="unix")
    parser.add_argument("--gate", action="store_true", help="exit with 1 where a bound is missed")
    options = parser.parse_args()
    sizes = [size * MIB for size in options.sizes]
    most = 2 * max(sizes) + 512 * MIB
    if most > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        parser.error(f"{most // MIB} MiB of free memory are needed")
    print("µs a page, median (from to); MiB beside the guest, and the bound\n")
    print("| mode | guest | precopy | stands still | postcopy | whole | source | destination | bound |")
    print("| --- " * 9 + "|", flush=True)
    missed = 0
    for mode in options.mode or MODES:
        memory = {size: migrate(size, mode, watch=True, link=options.link) for size in sizes}
        figures: dict[int, list[Figures]] = {size: [] for size in sizes}
        for number in range(options.rounds):
            for size in sizes if number % 2 else sizes[::-1]:
                # Of a small guest several: a moment of other work is a large part of its time.
                for _ in range(min(SMALL_RUNS, max(sizes) // size)):
                    figures[size].append(migrate(size, mode, ballast=True, link=options.link))
        for line, bad in rows(mode, figures, memory):
            print(line, flush=True)
            missed += bad
    return 1 if options.gate and missed else 0


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(status)
