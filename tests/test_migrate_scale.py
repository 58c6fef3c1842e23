"""What a migration takes beside the guest's own memory: bits of each page, whatever the pages are like."""

from __future__ import annotations

import mmap
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from bench_migrate import MIB, MOST_MEMORY, MemoryWatch, migrate
from concurrency import Worker, wait_until
from link_rig import Authority
from pagecore import Bitmap, PageState
from pagecore.migrate import Options, Receive, Send
from pagecore.migrate.lists import Lists, apply_lists
from pagecore.migrate.travel import encode_map, page_classes
from pagecore.testing import PlacementAudit
from pagecore.wire import decode_audit, decode_page_set, encode_audit, encode_page_set

NPAGES = 1 << 19


def every_other() -> Bitmap:
    """The worst set of pages: as runs, or as Python's numbers, it takes more than the bitmap by far."""
    pages = Bitmap(NPAGES)
    pages.set_indices(np.arange(0, NPAGES, 2))
    return pages


def lists(pages: Bitmap) -> None:
    decoded = decode_page_set(encode_page_set(pages), NPAGES).pages
    state = PageState(NPAGES)
    state.store(0, NPAGES)
    with mmap.mmap(-1, NPAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        apply_lists(memory, state, Lists(decoded, decoded, 1))
    assert state.hinted == pages


def audit(pages: Bitmap) -> None:
    sums = PlacementAudit(NPAGES).sums()
    assert decode_audit(encode_audit(pages, pages, sums), NPAGES).content == pages


def travel_map(pages: Bitmap) -> None:
    state = PageState(NPAGES)
    state.received.merge(pages)
    assert encode_map(page_classes(state, Bitmap(NPAGES), PlacementAudit(NPAGES)))["counts"]["missing"] == NPAGES // 2


@pytest.mark.parametrize("work", [lists, audit, travel_map])
def test_the_worst_set_of_pages_is_a_matter_of_bits(work: Callable[[Bitmap], None]) -> None:
    pages = every_other()
    # A dozen planes are one byte and a half of a page, what is worked on in pieces is as much here: a list of the
    # pages, or of their runs, is 8, and a number of Python for each 32.
    tracemalloc.start()
    try:
        work(pages)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * NPAGES


@pytest.mark.ci
@pytest.mark.kernel
def test_each_process_takes_little_beside_the_guest() -> None:
    small, large = 64 * MIB, 1024 * MIB
    found = {size: migrate(size, "postcopy", watch=True).memory for size in (small, large)}
    for role in ("source", "destination"):
        assert MIB < found[large][role] <= MOST_MEMORY + large // 4096
        # Planes and sums are bits of a page; the destination's verification takes four bytes of each for a moment. Each
        # of its bulk lanes has a huge page, which a run as short as the small one need not show.
        assert found[large][role] - found[small][role] < 16 * (large - small) // 4096 + 2 * 2 * MIB, role


@pytest.mark.ci
@pytest.mark.kernel
def test_the_helper_of_tls_takes_little_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    authority, options = Authority(tmp_path_factory.mktemp("ca")), Options(size=64 * MIB, guest="process", timeout=40.0)
    listening: list[str] = []

    def heard(event: dict[str, object]) -> None:
        if event["event"] == "listening":
            listening.append(str(event["address"]))

    receive = Receive(Options(timeout=40.0), "127.0.0.1:0", authority.terms("d"), heard)
    receiver = Worker(receive.run)
    wait_until(lambda: listening or receiver.done(), "the receiver")
    send = Send(options, listening[0], authority.terms("s", compress="zstd"))

    def pids() -> dict[str, int]:
        sides = {"source": send.pid, "destination": receive.pid}
        found = {role: pid for role, pid in sides.items() if pid}
        for role, pid in sides.items():
            try:
                with open(f"/proc/{pid}/task/{pid}/children") as children:
                    found |= {f"{role}'s helper": int(child) for child in children.read().split()}
            except OSError:
                continue
        return found

    with MemoryWatch(options.size, pids) as watch:
        for outcome in (send.run(), receiver.value(45)):
            assert outcome.verified, outcome.message
    assert watch.most.keys() == {"source", "source's helper", "destination", "destination's helper"}
    assert all(MIB < taken < MOST_MEMORY for taken in watch.most.values()), watch.most
