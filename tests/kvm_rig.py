"""What the tests of KVM's dirty logs share: guests that run so many steps and stand still, and what their logs say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from pagecore import Bitmap, Region, UnsupportedError, Userfaultfd
from pagecore.testing import Guest, _machine_state, open_guest, page_checksums
from uffd_helpers import address_of, anonymous, discard

SIZE = 16 << 20
NPAGES = SIZE // 4096
DEADLINE = 20.0
# The pages that each of two vCPUs writes whatever it does, and those where it may write what stood there before.
CONTROL = {_machine_state.layout(NPAGES, 2)["vcpu_first"] + at for at in (0, 6)}
STACK = {page + 5 for page in CONTROL}


def open_kvm_guest(dirty_log: str, size: int = SIZE, **options: Any) -> Guest:
    """A guest of two vCPUs that keeps this log, booted; skips where there is no KVM."""
    try:
        guest = open_guest(size, kind="kvm", dirty_log=dirty_log, **{"vcpus": 2, "seed": 41, **options})
    except UnsupportedError as error:
        pytest.skip(str(error))
    guest.boot()
    return guest


def run_steps(guest: Guest, steps: int) -> None:
    guest.stop_after(steps)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    guest.pause()


def collect(log: Any) -> set[int]:
    found = Bitmap(log.size)
    newly = log.collect_into(found)
    assert newly == found.count()
    return set(found.indices().tolist())


def collect_all(guest: Guest) -> set[int]:
    """What all logs report, re-armed, as pages of the guest."""
    found = set()
    for (first, count), log in zip(guest.slots, guest.dirty_logs, strict=True):
        pages = collect(log)
        log.rearm(0, count)
        found |= {first + page for page in pages}
    return found


def changed_by(guest: Guest, steps: int) -> set[int]:
    """The pages that hold something else after so many steps."""
    before = page_checksums(guest.memory)
    run_steps(guest, steps)
    return set(np.flatnonzero(before != page_checksums(guest.memory)).tolist())


def run_and_check(guest: Guest, steps: int) -> set[int]:
    """Run so many steps: what the guest changed has to be reported."""
    changed = changed_by(guest, steps)
    reported = collect_all(guest)
    assert changed - reported == set()
    assert reported >= CONTROL
    return reported


def settle(guest: Guest) -> None:
    """KVM reports a page that a vCPU merely reads for the first time, since it maps it writable then and there: more
    than was written, never less. Where a test wants to know exactly, every page is read once before."""
    assert guest.dirty_logs
    run_steps(guest, 40_000)
    collect_all(guest)


def run_and_compare(guest: Guest, steps: int) -> set[int]:
    """Run so many steps of a guest that is settled: what the guest changed is reported, and nothing else."""
    changed = changed_by(guest, steps)
    reported = collect_all(guest)
    assert changed - reported == set()
    # Zeros written over zeros are a write too, and change nothing.
    unchanged = reported - changed - STACK
    assert all(not any(guest.memory[page * 4096 : (page + 1) * 4096]) for page in unchanged)
    return reported


def bits(pages: Iterable[int], size: int = NPAGES) -> Bitmap:
    bitmap = Bitmap(size)
    bitmap.set_indices(np.array(sorted(pages), dtype=np.int64))
    return bitmap


@contextlib.contextmanager
def slow_bitmap(uffd: Userfaultfd, size: int) -> Iterator[tuple[Bitmap, Region]]:
    """A bitmap whose memory is missing until it is placed: a collect into it sleeps there, without the GIL."""
    memory = anonymous(1)
    bitmap = Bitmap.from_buffer(memory, size)
    discard(address_of(memory), 4096)
    region = uffd.register(memory)
    try:
        yield bitmap, region
    finally:
        uffd.unregister(region)
