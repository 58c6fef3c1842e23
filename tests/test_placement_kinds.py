"""The loop on memory of every kind: pages of 2 MiB, parts of them discarded, and shared memory."""

import mmap

import pytest

from concurrency import DEADLINE, Worker, wait_until
from memory_kinds import HUGE, huge_pool, make
from pagecore import Feature, PlacementLoop, Userfaultfd
from pagecore.page_source import BufferSource
from uffd_helpers import PAGE, _libc, address_of, discard, is_readable, read_bytes

pytestmark = pytest.mark.kernel
NPAGES = 4
MADV_REMOVE = mmap.MADV_REMOVE


def content(size):
    """Every 4 KiB of it differ, and none is zeros."""
    return b"".join((index + 1).to_bytes(4, "little") * 1024 for index in range(NPAGES * size // PAGE))


def punch(address, length):
    assert _libc.madvise(address, length, MADV_REMOVE) == 0


class Kind:
    def __init__(self, kind):
        self.memory = make(kind, NPAGES)
        self.size = self.memory.page_size
        self.content = content(self.size)
        self.uffd = Userfaultfd(Feature.EVENT_REMOVE)
        self.region = self.uffd.register(self.memory.mapping, page_size=self.size)
        self.address = self.region.address

    def source(self):
        return BufferSource(self.content, page_size=self.size)

    def read(self, offset, length=PAGE):
        return Worker(read_bytes, self.address + offset, length)

    def close(self):
        self.uffd.close()
        self.memory.close()


@pytest.fixture(params=["shared", "huge", "huge_shared"])
def kind(request):
    with huge_pool(NPAGES if "huge" in request.param else 0):
        kind = Kind(request.param)
        yield kind
        kind.close()


@pytest.fixture
def huge_shared():
    with huge_pool(NPAGES):
        kind = Kind("huge_shared")
        yield kind
        kind.close()


def test_faults_and_prefetch_in_pages_of_that_kind(kind):
    with PlacementLoop([kind.region], kind.source()) as loop:
        assert (
            kind.read(kind.size + 5 * PAGE % kind.size).value()
            == kind.content[kind.size + 5 * PAGE % kind.size :][:PAGE]
        )
        loop.prefetch([(2, 2)])
        assert loop.wait_ended(DEADLINE)
        wait_until(lambda: loop.states[0].received.runs().tolist() == [[1, 3]], "three pages")
        wait_until(lambda: loop.stats().bytes["new"]["installed"] == 3 * kind.size, "the count")
        assert loop.error is None
    assert read_bytes(kind.address + kind.size, 3 * kind.size) == kind.content[kind.size :]


def test_poison_stays_poison_in_every_kind(kind, door):
    """D12: where zeros are made by COPY, a late fault would undo it."""
    loop = PlacementLoop([kind.region], kind.source())
    loop.give_up([(1, 1)])
    assert loop.stats().poisoned == 1
    door.serve(loop, 1)
    assert not is_readable(kind.address + kind.size)
    loop.stop()


def test_the_background_fills_every_kind(kind):
    with PlacementLoop([kind.region], kind.source(), background=True, threads=2) as loop:
        assert loop.wait_settled(DEADLINE)
    assert read_bytes(kind.address, NPAGES * kind.size) == kind.content


def test_a_page_that_is_discarded_before_it_came_is_zeros(kind):
    """D3, D11: also where the kernel has no ZEROPAGE."""
    with PlacementLoop([kind.region], kind.source()) as loop:
        discarding = Worker(discard if kind.memory.fd < 0 else punch, kind.address, kind.size)
        discarding.value()
        wait_until(lambda: loop.states[0].released.runs().tolist() == [[0, 1]], "the mark")
        assert kind.read(0, kind.size).value() == bytes(kind.size)
        wait_until(lambda: loop.stats().refilled == 1, "the count, which comes after the wake")
        loop.prefetch([(0, 2)])
        assert loop.wait_ended(DEADLINE)
        assert read_bytes(kind.address, kind.size) == bytes(kind.size)


def test_part_of_a_huge_page_that_was_discarded_before_it_came_is_zeros_in_it(huge_shared):
    """D3: kept as zero ranges, applied to what arrives; the page itself is not released."""
    with PlacementLoop([huge_shared.region], huge_shared.source()) as loop:
        Worker(punch, huge_shared.address + 3 * PAGE, 2 * PAGE).value()
        Worker(punch, huge_shared.address + HUGE - PAGE, 3 * PAGE).value()
        assert not loop.states[0].released.any()
        seen = huge_shared.read(0, 2 * HUGE).value()
        expected = bytearray(huge_shared.content[: 2 * HUGE])
        expected[3 * PAGE : 5 * PAGE] = bytes(2 * PAGE)
        expected[HUGE - PAGE : HUGE + 2 * PAGE] = bytes(3 * PAGE)
        assert seen == bytes(expected)
        assert loop.error is None


def test_part_of_a_huge_page_that_is_there_is_the_kernels_business(huge_shared):
    with PlacementLoop([huge_shared.region], huge_shared.source()) as loop:
        assert huge_shared.read(0).value() == huge_shared.content[:PAGE]
        wait_until(lambda: loop.states[0].received.test(0), "the mark")
        Worker(punch, huge_shared.address + PAGE, PAGE).value()
        seen = huge_shared.read(0, 3 * PAGE).value()
        assert seen == huge_shared.content[:PAGE] + bytes(PAGE) + huge_shared.content[2 * PAGE : 3 * PAGE]
        assert not loop.states[0].released.any()


def test_a_discard_over_whole_pages_and_parts_of_them(huge_shared):
    with PlacementLoop([huge_shared.region], huge_shared.source()) as loop:
        Worker(punch, huge_shared.address + HUGE - PAGE, HUGE + 2 * PAGE).value()
        wait_until(lambda: loop.states[0].released.runs().tolist() == [[1, 1]], "the mark")
        seen = huge_shared.read(0, 3 * HUGE).value()
        expected = bytearray(huge_shared.content[: 3 * HUGE])
        expected[HUGE - PAGE : 2 * HUGE + PAGE] = bytes(HUGE + 2 * PAGE)
        assert seen == bytes(expected)


def test_shared_memory_may_keep_what_is_discarded():
    """MADV_DONTNEED takes the page tables alone, and the kernel reports it like MADV_REMOVE."""
    kind = Kind("shared")
    with PlacementLoop([kind.region], kind.source(), on_remove="keep") as loop:
        Worker(discard, kind.address, 2 * PAGE).value()
        assert not loop.states[0].released.any()
        assert kind.read(0).value() == kind.content[:PAGE]
        Worker(discard, kind.address, PAGE).value()
        assert kind.read(0).value() == kind.content[:PAGE], "from the page cache"
        assert loop.error is None
    kind.close()


def test_an_empty_entry_over_shared_content_is_no_loss(door):
    """D15: a marker there would be the loss itself."""
    kind = Kind("shared")
    loop = PlacementLoop([kind.region], kind.source(), on_remove="keep")
    door.place(loop, 0, kind.content[:PAGE])
    thread = Worker(discard, kind.address, PAGE)
    wait_until(loop.uffd.read_events, "the event")
    thread.value()
    for _ in range(3):
        door.serve(loop, 0)
    assert loop.error is None
    assert loop.stats().lost == 0
    assert kind.read(0).value() == kind.content[:PAGE]
    loop.stop()
    kind.close()


def test_what_a_discard_means_is_said_of_shared_memory_alone(tmp_path):
    kind = Kind("anonymous")
    with pytest.raises(ValueError, match="private memory"):
        PlacementLoop([kind.region], kind.source(), on_remove="keep")
    with pytest.raises(ValueError, match="neither 'release' nor 'keep'"):
        PlacementLoop([kind.region], kind.source(), on_remove="zeros")
    assert address_of(kind.memory.mapping) == kind.address
    kind.close()
