"""Blocks of 2 MiB that are moved in as huge pages, and everything that makes them go page by page instead."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pathlib
import resource
import struct

import pytest

from concurrency import Worker, run_together
from memory_kinds import huge_pool, make
from pagecore import Bitmap, Feature, Mover, RegisterMode, Userfaultfd
from preload import run_with
from test_uffd_place import counts, settle
from uffd_helpers import (
    PAGE,
    Child,
    address_of,
    anonymous,
    discard,
    next_events,
    page,
    protect,
    queued,
    sleeping,
    toucher,
)

pytestmark = pytest.mark.kernel
BLOCK = 512
NBYTES = BLOCK * PAGE
FULL = {"placed": BLOCK, "moved": BLOCK}


def pattern(blocks: int, seed: int = 0) -> bytes:
    """Pages that all differ."""
    return b"".join(struct.pack("<QQ", seed, index) * (PAGE // 16) for index in range(blocks * BLOCK))


def huge_kilobytes(address: int) -> int:
    """How much of the mapping that holds an address is huge pages, says the kernel."""
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(edge, 16) for edge in head.split("-"))
            inside = first <= address < last
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


class Target:
    """Four aligned blocks of missing memory, registered, with something before them."""

    def __init__(self, uffd: Userfaultfd, lead: int = 0, **options) -> None:
        self.memory = mmap.mmap(-1, 6 * NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        skip = -address_of(self.memory) % NBYTES
        start = skip + (NBYTES - lead * PAGE if lead else 0)
        self.region = uffd.register(memoryview(self.memory)[start : start + 4 * NBYTES], **options)

    def holds(self, first: int, data: bytes) -> bool:
        return ctypes.string_at(self.region.address + first * PAGE, len(data)) == data


@pytest.fixture(scope="module")
def mover():
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip(f"no transparent huge pages; fix: echo madvise > {enabled}")
    mover = Mover()
    with Userfaultfd() as uffd:
        if Target(uffd).region.ioctls >> 5 & 1 == 0:
            pytest.skip("no UFFDIO_MOVE; fix: boot Linux 6.8 or newer")
    return mover


@pytest.fixture
def target(uffd):
    return Target(uffd)


def discard_quietly(target: Target, first: int) -> None:
    """Make a block missing again, whoever has to read the event."""
    discarding = Worker(discard, target.region.address + first * PAGE, NBYTES)
    next_events(target.region.uffd)
    discarding.value()


def delta(mover: Mover, before: dict[str, int]) -> dict[str, int]:
    return {name: now - before[name] for name, now in tally(mover).items() if now != before[name]}


def tally(mover: Mover) -> dict[str, int]:
    names = ("moved", "huge", "split", "refused", "without_huge_page")
    return {name: getattr(mover, f"blocks_{name}") for name in names}


def test_a_block_becomes_a_huge_page(mover, uffd, target):
    data = pattern(2)
    before = tally(mover)
    assert counts(mover.place(target.region, 0, data)) == {"placed": 2 * BLOCK, "moved": 2 * BLOCK}
    assert target.holds(0, data)
    assert huge_kilobytes(target.region.address) == 4096, "two huge pages, in memory that asked for none"
    assert delta(mover, before) == {"moved": 2, "huge": 2}


def test_waiters_are_woken(mover, uffd, target):
    """Their fault has made a page table, so that the block arrives in small pages, all the same in one step."""
    before = tally(mover)
    data = page(0, BLOCK)
    with toucher(uffd, target.region, 7) as one, toucher(uffd, target.region, 200) as two:
        assert counts(mover.place(target.region, 0, data)) == FULL
        assert (one.value(), two.value()) == (7, 200)
    assert target.holds(0, data)
    assert delta(mover, before)["moved"] == 1


def test_dontwake_leaves_the_waiters(mover, uffd, target):
    with toucher(uffd, target.region, 5) as waiter:
        assert counts(mover.place(target.region, 0, pattern(1), wake=False)) == FULL
        assert uffd.waiting().total == 1
        target.region.wake(0, BLOCK)
        assert waiter.value() == 0


def test_heads_and_tails_are_copied(mover, uffd):
    """The region begins 100 pages before a block; the run ends 12 pages after two."""
    target = Target(uffd, lead=100)
    data = pattern(3)[: (60 + 2 * BLOCK + 12) * PAGE]
    result = mover.place(target.region, 40, data)
    assert counts(result) == {"placed": 60 + 2 * BLOCK + 12, "moved": 2 * BLOCK}
    assert target.holds(40, data)
    assert not mover.can_move(target.region, 0)
    assert mover.can_move(target.region, 100)
    assert not mover.can_move(target.region, 4 * BLOCK - 100)


@pytest.mark.parametrize("hole", [0, 1, 300, 511])
def test_present_pages_are_never_overwritten(mover, target, hole):
    """What came before the present page was moved, the rest is copied (traps 5 and 7)."""
    before = tally(mover)
    target.region.place(hole, page(99))
    received = Bitmap(4 * BLOCK)
    data = pattern(1)
    result = mover.place(target.region, 0, data, claimed=None)
    assert result.present == 1
    assert result.placed == BLOCK - 1
    assert result.moved == hole
    assert target.holds(hole, page(99))
    assert target.holds(0, data[: hole * PAGE])
    assert target.holds(hole + 1, data[(hole + 1) * PAGE :])
    assert delta(mover, before) == ({"split": 1} if hole else {"refused": 1})
    # The next block finds the stage empty, and gets a huge page again.
    assert counts(mover.place(target.region, BLOCK, data, received=received)) == FULL
    assert received.runs().tolist() == [[BLOCK, BLOCK]]


def test_a_waiter_behind_a_present_page_is_woken(mover, uffd, target):
    target.region.place(10, page(1))
    with toucher(uffd, target.region, 5) as moved, toucher(uffd, target.region, 20) as copied:
        mover.place(target.region, 0, page(0, BLOCK))
        assert (moved.value(), copied.value()) == (5, 20)


@pytest.mark.parametrize("plane", ["claimed", "received", "excluded"])
@pytest.mark.parametrize("lead", [0, 37])
def test_blocks_that_are_not_wholly_ours_are_copied(mover, uffd, plane, lead):
    target = Target(uffd, lead=lead)
    planes = {name: Bitmap(4 * BLOCK) for name in ("claimed", "received", "excluded")}
    planes[plane].set(lead + 511)
    before = tally(mover)
    result = mover.place(target.region, lead, pattern(2), **planes)
    lost = {"claimed": {"present": 1}, "received": {}, "excluded": {"excluded": 1}}[plane]
    assert counts(result) == {"placed": 2 * BLOCK - len(lost), "moved": BLOCK, **lost}
    assert delta(mover, before) == {"moved": 1, "huge": 1}
    assert planes["received"].count() == 2 * BLOCK - len(lost)
    assert planes["claimed"].count() == 2 * BLOCK - (plane == "excluded")


def test_a_block_discarded_as_a_whole_is_huge_again(mover, open_uffd):
    """D0: a discard page by page leaves the page table behind; one of the block does not."""
    target = Target(open_uffd())
    region = target.region
    mover.place(region, 0, pattern(2))
    discard(region.address, NBYTES)
    for index in range(BLOCK, 2 * BLOCK):
        discard(region.address + index * PAGE, PAGE)
    before = tally(mover)
    data = pattern(2, seed=7)
    assert counts(mover.place(region, 0, data)) == {"placed": 2 * BLOCK, "moved": 2 * BLOCK}
    assert target.holds(0, data)
    assert delta(mover, before)["moved"] == 2
    assert delta(mover, before)["huge"] >= 1


@pytest.mark.parametrize("kind", ["shared", "huge"])
def test_memory_of_other_kinds_is_copied(mover, uffd, kind):
    """Shared memory advertises MOVE and answers EINVAL: it is not even tried."""
    with huge_pool(8):
        memory = make(kind, 4 * BLOCK if kind == "shared" else 4)
        region = uffd.register(memory.mapping, page_size=memory.page_size)
        before = tally(mover)
        data = pattern(2)
        assert counts(mover.place(region, 0, data)) == {"placed": len(data) // memory.page_size}
        assert ctypes.string_at(region.address, len(data)) == data
        assert delta(mover, before) == {}
        assert not mover.can_move(region, 0)
        uffd.unregister(region)
        memory.mapping.close()
        memory.close()


def test_memory_that_the_kernel_refuses_is_tried_once(mover, target):
    """PROT_READ on one side only: EINVAL, and the whole block is copied; the next block is not even tried."""
    protect(target.region.address, 4 * NBYTES, mmap.PROT_READ)
    before = tally(mover)
    assert counts(mover.place(target.region, 0, pattern(2))) == {"placed": 2 * BLOCK}
    assert target.holds(0, pattern(2))
    assert delta(mover, before) == {"refused": 1}


def test_write_protected_memory_is_copied(mover, open_uffd):
    """MOVE cannot protect in the same step."""
    target = Target(open_uffd(Feature.WP_UNPOPULATED), mode=RegisterMode.MISSING | RegisterMode.WP)
    assert counts(mover.place(target.region, 0, pattern(1))) == {"placed": BLOCK}


def test_a_changing_address_space_defers(mover, uffd, target):
    claimed, received = Bitmap(4 * BLOCK), Bitmap(4 * BLOCK)
    planes = {"claimed": claimed, "received": received}
    discarding = Worker(discard, target.region.address + 3 * NBYTES, PAGE)
    queued(uffd)
    assert counts(mover.place(target.region, 0, pattern(1), **planes)) == {"deferred": BLOCK}
    assert not claimed.any()
    assert not received.any()
    next_events(uffd)
    assert settle(lambda: mover.place(target.region, 0, pattern(1), **planes)).placed == BLOCK
    assert received.count() == claimed.count() == BLOCK
    assert target.holds(0, pattern(1))
    discarding.value()


def test_another_process_is_copied_into(mover, uffd, target):
    """MOVE works in one's own address space alone; a child's copy of the descriptor acts on its parent's."""
    region = target.region

    def child():
        own = Mover()
        return counts(own.place(region, 0, pattern(2))), own.blocks_refused

    answer, refused = Child(child).value()
    assert answer == {"placed": 2 * BLOCK}
    assert refused == 1
    assert target.holds(0, pattern(2))


def test_a_fork_does_not_share_the_stage(mover, target):
    """A child with a share of the prepared page would make it stay where it is (EBUSY)."""
    reader, writer = os.pipe()
    mover = Mover()
    assert mover.prepare() == 1
    child = Child(lambda: os.read(reader, 1) and None)
    before = tally(mover)
    assert counts(mover.place(target.region, 0, pattern(1))) == FULL
    assert delta(mover, before) == {"moved": 1, "huge": 1}
    os.write(writer, b"x")
    child.value()
    os.close(reader)
    os.close(writer)


def test_the_child_of_a_fork_has_the_room_of_the_stages_too(mover, target):
    """What its copy of the mover fills, and unmaps in the end, must not be anybody else's there, or nothing."""
    mover = Mover()
    assert mover.prepare() == 1
    assert Child(lambda: counts(mover.place(target.region, 0, pattern(1)))).value() == {"placed": BLOCK}
    assert target.holds(0, pattern(1))


def test_a_stage_in_use_leaves_the_block_to_copies(mover, open_uffd, uffd, target):
    """The first thread sleeps on a source page while it fills the one stage; the second copies."""
    other = open_uffd()
    source = anonymous(BLOCK)
    slow = other.register(source)
    placing = Worker(lambda: mover.place(target.region, 0, source))
    sleeping(other, 1)
    before = tally(mover)
    assert counts(mover.place(target.region, BLOCK, pattern(1))) == {"placed": BLOCK}
    assert delta(mover, before) == {"without_huge_page": 1}
    slow.place(0, pattern(1))
    assert placing.value().moved == BLOCK
    assert counts(mover.place(target.region, 2 * BLOCK, pattern(1))) == FULL


def test_prepared_stages(target):
    mover = Mover(stages=3)
    assert mover.stages == 3
    assert mover.prepare() == 3
    assert mover.prepare() == 0
    assert counts(mover.place(target.region, 0, pattern(2))) == {"placed": 2 * BLOCK, "moved": 2 * BLOCK}
    assert target.holds(0, pattern(2)), "filled whole: nothing of what was in the stage before shows"
    assert mover.prepare() == 2
    for wrong in (-1, 1e9):
        with pytest.raises(ValueError, match="is outside"):
            mover.prepare(wrong)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="is outside"):
            Mover(stages=wrong)


def test_stages_are_prepared_while_others_are_moved(target):
    mover = Mover(stages=2)
    preparing = Worker(mover.prepare, 0.3)
    blocks = 0
    while preparing.is_alive():
        first = blocks % 4 * BLOCK
        discard_quietly(target, first)
        assert counts(mover.place(target.region, first, page(blocks, BLOCK))) == FULL
        assert target.holds(first, page(blocks, BLOCK))
        blocks += 1
    assert preparing.value() > 0
    assert mover.blocks_moved == blocks


LOST_STAGES = """
import ctypes, gc
from pagecore import Mover, Userfaultfd
from test_uffd_move import BLOCK, FULL, NBYTES, Target, counts, page, pattern
library = ctypes.CDLL(None)
whole = lambda: (address := ctypes.c_void_p.in_dll(library, "theirs").value) and (
    ctypes.string_at(address, NBYTES) == b"x" * NBYTES)
with Userfaultfd() as uffd:
    target, mover = Target(uffd), Mover(stages=2)
    region = target.region
    assert whole() is None
    for block in 0, 1:
        first = block * BLOCK
        region.place(first + 300, page(99))
        result = mover.place(region, first, pattern(1))
        assert (result.placed, result.moved) == (BLOCK - 1, 300)
        assert target.holds(first + 301, pattern(1)[-211 * 4096 :])
        assert whole()
    # The other one was as good as ever; now there is none, and everything is copied.
    assert mover.prepare() == 0
    assert counts(mover.place(region, 2 * BLOCK, pattern(2))) == {"placed": 2 * BLOCK}
    assert target.holds(2 * BLOCK, pattern(2))
    assert mover.blocks_without_huge_page == 2
    assert whole()
    del mover
    gc.collect()
    assert whole()
"""


def test_a_stage_that_cannot_be_mapped_anew_is_nobodys(mover, ioctl_shim):
    """What was there may be unmapped all the same, and the room another's by the time that is known."""
    run_with(ioctl_shim, LOST_STAGES, REFUSE=f"map:{errno.ENOMEM}:2:0")


def test_a_mover_gives_all_of_its_room_back():
    """More often than there is room for, were it not so."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * PAGE
    # Room for one and a half, and for what else may be mapped meanwhile.
    resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), before[1]))
    try:
        for _ in range(64):
            Mover(stages=64)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_bad_arguments(mover, uffd, target):
    with pytest.raises(ValueError, match="length 100 is not a multiple"):
        mover.place(target.region, 0, bytes(100))
    with pytest.raises(IndexError, match="are outside"):
        mover.place(target.region, 3 * BLOCK + 1, pattern(1))
    with pytest.raises(ValueError, match="does not fit"):
        mover.place(target.region, 0, pattern(1), claimed=Bitmap(5))
    with pytest.raises(TypeError, match="cannot be pickled"):
        mover.__reduce__()
    assert counts(mover.place(target.region, 0, b"")) == {}
    assert counts(mover.place(target.region, 0, pattern(1))) == FULL


@pytest.mark.stress
def test_movers_and_copies_place_each_page_once(uffd):
    """Three threads place everything, two of them by blocks; each page is somebody's, whole, and counted once."""
    target = Target(uffd, lead=11)
    region = target.region
    claimed, received = Bitmap(region.size), Bitmap(region.size)
    planes = {"claimed": claimed, "received": received}

    def move(value):
        own = Mover()
        data = bytes([value]) * (region.size * PAGE)
        results = [own.place(region, 0, data[: region.size * PAGE], **planes)]
        return sum(r.placed for r in results)

    def copy():
        return sum(region.place(first, bytes([3]) * (48 * PAGE), **planes).placed for first in range(0, 2016, 48))

    placed = run_together(lambda: move(1), lambda: move(2), copy)
    assert sum(placed) == received.count() == claimed.count() == region.size
    content = ctypes.string_at(region.address, region.nbytes)
    for index in range(region.size):
        one = content[index * PAGE : (index + 1) * PAGE]
        assert one in (b"\1" * PAGE, b"\2" * PAGE, b"\3" * PAGE), index
