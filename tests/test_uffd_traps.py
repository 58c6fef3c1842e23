"""Traps of the kernel interface that no other file provokes; docs/traps.md says which test shows which."""

from __future__ import annotations

import mmap
import os
import pathlib
import re
import signal

import pytest

from concurrency import Worker, wait_until
from pagecore import Bitmap, EventKind, FaultFlag, Feature, MemoryKind, UnreadableError
from test_uffd_place import counts, settle
from uffd_helpers import (
    PAGE,
    Toucher,
    Writer,
    _checked,
    _libc,
    address_of,
    anonymous,
    content,
    next_events,
    page,
    queued,
    sleeping,
    toucher,
    waiters,
)

pytestmark = pytest.mark.kernel
HERE = pathlib.Path(__file__).parent


def test_a_copy_through_another_descriptor_wakes_nobody(open_uffd):
    """Trap 9: it succeeds, in memory that is registered with another one, whose waiters sleep on."""
    owner, other = open_uffd(), open_uffd()
    region = owner.register(anonymous(4))
    elsewhere = other.region_at(region.address, region.nbytes, kind=MemoryKind.ANONYMOUS)
    with toucher(owner, region, 1) as waiter:
        assert counts(elsewhere.place(1, page(5))) == {"placed": 1}
        elsewhere.wake(0, 4)
        assert waiters(owner) == 1
        region.wake(1, 1)
        assert waiter.value() == 5


def test_huge_pages_from_before_registration(uffd):
    """Trap 15: one touch has populated 512 pages; whoever wants them missing discards them first."""
    memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -address_of(memory) % (2 << 20)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[start + 7 * PAGE] = 1
    region = uffd.register(memoryview(memory)[start : start + (2 << 20)])
    if region.place(100, page(9)).placed:
        pytest.skip("no huge page was made; fix: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    assert counts(region.place(0, page(1, 512))) == {"present": 512}
    assert content(region, 7) == [1]
    uffd.unregister(region)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.madvise(mmap.MADV_DONTNEED)
    region = uffd.register(memoryview(memory)[start : start + (2 << 20)])
    assert counts(region.place(0, page(1, 512))) == {"placed": 512}


def test_a_page_that_was_freed_lazily_may_still_be_there(uffd, region):
    """Trap 18: MADV_FREE sends REMOVE and leaves the page until memory is short."""
    region.place(3, page(0x5A))
    freeing = Worker(lambda: _checked(_libc.madvise(region.address + 3 * PAGE, PAGE, 8)))
    (event,) = next_events(uffd)
    assert event.kind is EventKind.REMOVE
    freeing.value()
    result = settle(lambda: region.place_zeros(3, 1))
    assert counts(result) in ({"present": 1}, {"zeroed": 1})
    assert content(region, 3) == ([0x5A] if result.present else [0])


def test_a_message_may_be_gone_when_it_is_read(uffd, region):
    """Trap 26: poll() says readable, the page is placed, and read() finds nothing; that is no error."""
    with toucher(uffd, region, 0) as waiter:
        queued(uffd)
        region.place(0, page(1))
        assert uffd.read_events() == []
        assert waiter.value() == 1


def test_two_threads_on_one_page_are_two_messages(uffd, region):
    """Traps 27 and 48: each carries its own flags, and one placement wakes both."""
    reader, writer = Toucher(region.address + PAGE), Writer(region.address + PAGE + 1, 7)
    sleeping(uffd, 2)
    events = next_events(uffd, 2)
    assert {event.start for event in events} == {region.address + PAGE}
    assert sorted(event.flags for event in events) == [FaultFlag(0), FaultFlag.WRITE]
    assert counts(region.place(1, page(3))) == {"placed": 1}
    assert reader.value() == 3
    writer.value()


def test_a_signal_makes_a_second_message(uffd, region):
    """Trap 27: the handler runs, and the fault is reported again."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        with toucher(uffd, region, 2) as waiter:
            assert len(next_events(uffd)) == 1
            signal.pthread_kill(waiter.ident or 0, signal.SIGUSR1)
            (again,) = next_events(uffd)
            assert again.start == region.address + 2 * PAGE
            region.place(2, page(4))
            assert waiter.value() == 4
        wait_until(lambda: received, "the signal's handler")
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_source_file_that_was_cut_off(region, tmp_path):
    """Trap 31: an error that names the page, never zeros."""
    path = tmp_path / "pages"
    path.write_bytes(page(1, 4))
    received = Bitmap(16)
    with open(path, "r+b") as file:
        source = mmap.mmap(file.fileno(), 4 * PAGE)
        os.ftruncate(file.fileno(), 2 * PAGE)
        with pytest.raises(UnreadableError) as caught:
            region.place(0, source, received=received)
    assert caught.value.address == region.address + 2 * PAGE
    assert received.runs().tolist() == [[0, 2]]


def test_lengths_beyond_32_bits(uffd):
    """Trap 39: pages, runs and single calls of more than 2 and 4 GiB."""
    npages = (5 << 30) // PAGE
    memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    region = uffd.register(memory)
    last = npages - 1
    with toucher(uffd, region, last) as waiter:
        (event,) = next_events(uffd)
        assert region.pages_at(event.start, 1) == (last, 1)
        region.place(last, page(6))
        assert waiter.value() == 6
    many = (4 << 30) // PAGE + 5
    claimed = Bitmap(npages)
    assert counts(region.place_zeros(3, many, claimed=claimed)) == {"zeroed": many}
    assert counts(region.place_zeros(0, many + 8)) == {"zeroed": 8, "present": many}
    assert content(region, many) == [0]
    uffd.close()


def test_discards_wait_for_their_event(uffd, region):
    """Trap 55: whoever discards sleeps until the event is read, so the reader itself must never discard."""
    region.place(0, page(1, 2))
    discarding = Worker(lambda: _checked(_libc.madvise(region.address, PAGE, mmap.MADV_DONTNEED)))
    queued(uffd)
    assert discarding.is_alive()
    assert content(region, 0) == [1], "it reads as before meanwhile"
    next_events(uffd)
    discarding.value()


def test_the_descriptor_can_be_waited_for(open_uffd, region):
    """Trap 25: a blocking descriptor would be POLLERR for ever."""
    import select

    uffd = open_uffd(Feature.EVENT_REMOVE)
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    assert poll.poll(0) == []
    os.set_blocking(uffd.fileno(), True)
    assert poll.poll(0) == [(uffd.fileno(), select.POLLERR)], "what pagecore prevents"


TABLE = HERE.parent / "docs" / "traps.md"
ROW = re.compile(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)


def test_the_table_of_traps_is_true():
    """Each of the 55 traps has a row, and each row of each table a test that exists, or a reason."""
    if not TABLE.exists():
        pytest.skip("no docs beside the tests; fix: run them from a checkout")
    tables = [ROW.findall(section) for section in TABLE.read_text().split("\n## ")]
    for rows in tables:
        assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(tables[0]) >= 55
    missing = []
    for number, answer in (row for rows in tables for row in rows):
        named = re.findall(r"`(test_\w+)::(test_\w+)`", answer)
        if not named:
            assert answer.startswith("none: "), f"row {number} names no test and no reason"
        for module, name in named:
            path = HERE / f"{module}.py"
            if not path.exists() or f"def {name}(" not in path.read_text():
                missing.append(f"{number}: {module}::{name}")
    assert not missing
