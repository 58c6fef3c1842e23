"""Placing into every kind of memory that can be registered: anonymous, shared, and huge pages of both."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os

import pytest

from concurrency import Worker
from memory_kinds import HUGE, KINDS, MAP_HUGETLB, huge_pool, leaked, make, write_other
from pagecore import (
    Bitmap,
    EventKind,
    FaultFlag,
    Feature,
    MemoryKind,
    OutOfMemoryError,
    RegisterMode,
    UnsupportedError,
    Userfaultfd,
)
from pagecore.probe import _written
from test_uffd_place import counts, settle
from uffd_helpers import (
    PAGE,
    Child,
    Toucher,
    Writer,
    anonymous,
    content,
    discard,
    is_protected,
    is_readable,
    leaked_mapping,
    next_events,
    page,
    protect,
    queued,
    sleeping,
    toucher,
    unmap,
    waiters,
)

pytestmark = pytest.mark.kernel
MISSING_WP = RegisterMode.MISSING | RegisterMode.WP


@pytest.fixture(scope="module")
def pool():
    with huge_pool(24):
        yield


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    if request.param.startswith("huge"):
        request.getfixturevalue("pool")
    return request.param


@pytest.fixture
def made():
    """Makes memory and closes what it keeps open."""
    memories = []

    def make_one(kind, npages=4, **options):
        memories.append(make(kind, npages, **options))
        return memories[-1]

    yield make_one
    for memory in memories:
        memory.close()


@pytest.fixture
def missing(uffd, made, kind):
    """Four missing pages, registered."""
    memory = made(kind)
    return uffd.register(memory.mapping, page_size=memory.page_size)


@pytest.fixture
def guarded(open_uffd, made, kind):
    """Four missing pages, registered for missing pages and for writes."""
    memory = made(kind)
    uffd = open_uffd(Feature.WP_UNPOPULATED)
    return uffd.register(memory.mapping, page_size=memory.page_size, mode=MISSING_WP)


def data(region, value: int, count: int = 1) -> bytes:
    return page(value, count, region.page_size)


def test_region_says_what_it_is(missing, kind):
    assert missing.kind is MemoryKind[kind.upper()]
    assert missing.modes == RegisterMode.MISSING
    assert missing.page_size == (HUGE if kind.startswith("huge") else PAGE)
    assert missing.size == 4


def test_pages_are_placed_found_present_and_woken(uffd, missing):
    with toucher(uffd, missing, 1) as waiter:
        assert counts(missing.place(0, data(missing, 10, 3))) == {"placed": 3}
        assert waiter.value() == 11
    assert counts(missing.place(0, data(missing, 50, 4))) == {"present": 3, "placed": 1}
    assert content(missing, 0, 4) == [10, 11, 12, 53]


def test_eexist_wakes(uffd, missing):
    with toucher(uffd, missing, 2) as waiter:
        missing.place(2, data(missing, 1), wake=False)
        assert waiters(uffd) == 1
        assert counts(missing.place(2, data(missing, 9))) == {"present": 1}
        assert waiter.value() == 1


def test_zeros(uffd, missing):
    """Trap 13: huge pages have no ZEROPAGE."""
    missing.place(1, data(missing, 7))
    with toucher(uffd, missing, 2) as waiter:
        assert counts(missing.place_zeros(0, 4)) == {"zeroed": 3, "present": 1}
        assert waiter.value() == 0
    assert content(missing, 0, 4) == [0, 7, 0, 0]
    last = missing.address + missing.nbytes - 1
    assert Toucher(last).value() == 0


def test_zeros_from_many_threads_share_one_source(open_uffd, made, pool):
    memory = made("huge", 8)
    region = open_uffd().register(memory.mapping, page_size=HUGE)
    workers = [Worker(region.place_zeros, 2 * index, 2) for index in range(4)]
    assert [counts(worker.value()) for worker in workers] == [{"zeroed": 2}] * 4
    assert content(region, 0, 8) == [0] * 8


def test_poison_stays_unless_copied_over(uffd, missing):
    """Trap 12: what the kernel does to poison, and what the plane is for."""
    excluded = Bitmap(4)
    assert counts(missing.poison(1, 2)) == {"placed": 2}
    assert counts(missing.poison(0, 4)) == {"placed": 2, "present": 2}
    excluded.fill()
    assert counts(missing.place(0, data(missing, 1, 4), excluded=excluded)) == {"excluded": 4}
    assert not any(is_readable(missing.address + index * missing.page_size) for index in range(4))
    assert counts(missing.place(0, data(missing, 1, 4))) == {"placed": 4}, "COPY undoes it"
    assert content(missing, 0, 4) == [1, 2, 3, 4]


def test_poison_wakes_to_a_fault(made, kind):
    """The waiter gets SIGBUS, in a child."""
    memory = made(kind)

    def dies():
        uffd = Userfaultfd()
        region = uffd.register(memory.mapping, page_size=memory.page_size)
        thread = Toucher(region.address)
        sleeping(uffd, 1)
        region.poison(0, 1)
        thread.join(10)
        os._exit(3)

    assert Child(dies).ended() == -7


def test_misaligned_huge_memory_is_refused(uffd, made, pool):
    """Trap 14: units are whole huge pages, of the size that the memory has."""
    memory = made("huge")
    with pytest.raises(ValueError, match="page size 4096 is not that of huge pages of 2097152 bytes a page"):
        uffd.register(memory.mapping)
    with pytest.raises(ValueError, match="length 2101248 is not a positive multiple"):
        uffd.register(memoryview(memory.mapping)[: HUGE + PAGE], page_size=HUGE)
    region = uffd.register(memory.mapping, page_size=HUGE)
    with pytest.raises(ValueError, match="length 4096 is not a multiple of page size 2097152"):
        region.place(0, bytes(PAGE))


def test_mixed_page_sizes_of_one_descriptor(uffd, made, pool):
    small, huge = made("anonymous", 16), made("huge", 2)
    first = uffd.register(small.mapping, region_id=0)
    second = uffd.register(huge.mapping, page_size=HUGE, region_id=1)
    with toucher(uffd, first, 3) as one, toucher(uffd, second, 1) as two:
        addresses = {event.start for event in next_events(uffd, 2)}
        assert addresses == {first.address + 3 * PAGE, second.address + HUGE}
        first.place(3, page(5))
        second.place(1, page(6, 1, HUGE))
        assert (one.value(), two.value()) == (5, 6)


def test_exact_addresses_of_huge_pages(open_uffd, made, pool):
    """Without EXACT_ADDRESS the message names the page; a wake of it works with both."""
    for features, offset in ((Feature(0), 0), (Feature.EXACT_ADDRESS, 5 * PAGE + 17)):
        uffd = open_uffd(features)
        region = uffd.register(made("huge", 1).mapping, page_size=HUGE)
        waiter = Toucher(region.address + 5 * PAGE + 17)
        (event,) = next_events(uffd)
        assert event.start == region.address + offset
        assert region.pages_at(event.start, 1) == (0, 1)
        region.place(0, page(8, 1, HUGE), wake=False)
        assert waiters(uffd) == 1
        region.wake(0, 1)
        assert waiter.value() == 8


def test_an_empty_pool_is_out_of_memory(open_uffd, made):
    """Trap 53, fact 18: the kernel says EEXIST. Mapped without a reservation, so that the pool can be empty."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
    hogs = []
    gc.collect()
    with huge_pool(1):
        memory = mmap.mmap(-1, HUGE, flags=flags | 0x4000)  # MAP_NORESERVE
        with contextlib.suppress(OSError):
            while True:
                hogs.append(mmap.mmap(-1, HUGE, flags=flags))  # reserves one
        region = open_uffd().register(memory, page_size=HUGE)
        claimed, received = Bitmap(1), Bitmap(1)
        planes = {"claimed": claimed, "received": received}
        for call in (lambda: region.place(0, page(1, 1, HUGE), **planes), lambda: region.place_zeros(0, 1, **planes)):
            with pytest.raises(OutOfMemoryError, match="Cannot allocate memory"):
                call()
        assert not claimed.any(), "it may be tried again"
        assert not received.any()
        hogs.pop().close()
        assert counts(region.place(0, page(1, 1, HUGE), claimed=claimed)) == {"placed": 1}
        assert counts(region.place(0, page(2, 1, HUGE))) == {"present": 1}
        region.uffd.unregister(region)
        memory.close()


@pytest.mark.ci
def test_pages_of_one_gibibyte(open_uffd, made):
    with huge_pool(1, 1 << 30):
        uffd = open_uffd()
        memory = made("huge", 1, size=1 << 30)
        region = uffd.register(memory.mapping, page_size=1 << 30)
        with toucher(uffd, region, 0) as waiter:
            assert counts(region.place_zeros(0, 1)) == {"zeroed": 1}
            assert waiter.value() == 0
        assert Toucher(region.address + (1 << 30) - 1).value() == 0
        uffd.unregister(region)
        memory.mapping.close()


# ---- edges of memory


def test_unmapped_pages_in_a_run_are_gone(uffd, kind):
    """Traps 20 and 21: nothing else of the run is lost."""
    address, size = leaked(kind, 8)
    region = uffd.register_address(address, 8 * size, page_size=size)
    assert region.kind is MemoryKind[kind.upper()]
    unmap(region.address + 2 * size, 2 * size)
    received = Bitmap(8)
    assert counts(region.place(0, page(10, 8, size), received=received)) == {"placed": 6, "gone": 2}
    assert received.runs().tolist() == [[0, 2], [4, 4]]
    assert counts(region.place_zeros(0, 8)) == {"present": 6, "gone": 2}
    assert counts(region.poison(0, 8)) == {"present": 6, "gone": 2}
    assert content(region, 0, 2) + content(region, 4, 4) == [10, 11, 14, 15, 16, 17]
    uffd.close()
    unmap(address, 8 * size)


def test_edges_between_registered_mappings(uffd, missing):
    protect(missing.address + missing.page_size, missing.page_size, mmap.PROT_READ)
    assert counts(missing.place(0, data(missing, 10, 4))) == {"placed": 4}
    assert content(missing, 0, 4) == [10, 11, 12, 13]


@pytest.mark.parametrize("kind", ["shared", "huge_shared"], indirect=True)
def test_a_file_that_was_cut_off(uffd, made, kind):
    """Trap 19: no event tells; the kernel says EFAULT, and the source is not to blame."""
    memory = made(kind, 4)
    region = uffd.register(memory.mapping, page_size=memory.page_size)
    os.ftruncate(memory.fd, 2 * memory.page_size)
    received = Bitmap(4)
    assert counts(region.place(0, data(region, 1, 4), received=received)) == {"placed": 2, "gone": 2}
    assert received.runs().tolist() == [[0, 2]]
    assert content(region, 0, 2) == [1, 2]


@pytest.mark.parametrize("kind", ["shared", "huge_shared"], indirect=True)
def test_punching_a_hole_sends_no_event(uffd, made, kind):
    """Trap 19: the page is missing again, and only whoever punched knows."""
    memory = made(kind, 2)
    size = memory.page_size
    region = uffd.register(memory.mapping, page_size=size)
    region.place(0, data(region, 1, 2))
    # Through the other mapping: madvise of the registered one would wait for its event.
    discarding = Worker(lambda: memory.other.madvise(mmap.MADV_REMOVE, 0, size))
    discarding.value()
    assert uffd.read_events() == []
    with toucher(uffd, region, 0) as waiter:
        assert counts(region.place(0, data(region, 5))) == {"placed": 1}
        assert waiter.value() == 5


# ---- write protection


def test_placing_arms_the_page_in_the_same_step(guarded):
    """D11, traps 11 and 35: a write after the placement is always seen."""
    uffd = guarded.uffd
    assert counts(guarded.place(0, data(guarded, 10))) == {"placed": 1}
    assert counts(guarded.place_zeros(1, 1)) == {"zeroed": 1}
    assert counts(guarded.place(2, data(guarded, 12), protect=False)) == {"placed": 1}
    for index in (0, 1):
        writer = Writer(guarded.address + index * guarded.page_size, 99)
        (event,) = next_events(uffd)
        assert event.kind is EventKind.FAULT
        assert event.flags == FaultFlag.WP | FaultFlag.WRITE
        assert writer.is_alive()
        assert counts(guarded.unprotect(index, 1)) == {"placed": 1}
        writer.value()
    Writer(guarded.address + 2 * guarded.page_size, 99).value()
    assert content(guarded, 0, 3) == [99, 99, 99]


def test_protecting_what_is_present(guarded):
    guarded.place(0, data(guarded, 10, 4), protect=False)
    assert counts(guarded.protect(0, 4)) == {"placed": 4}
    writer = Writer(guarded.address + guarded.page_size, 77)
    next_events(guarded.uffd)
    assert counts(guarded.unprotect(0, 4, wake=False)) == {"placed": 4}
    assert waiters(guarded.uffd) == 1
    guarded.wake(0, 4)
    writer.value()
    assert content(guarded, 0, 4) == [10, 77, 12, 13]


def test_zeros_over_a_marker_of_protection(guarded):
    """Trap 10: ZEROPAGE says EEXIST there, for ever; D11."""
    guarded.protect(0, 4)  # none is populated: markers
    with toucher(guarded.uffd, guarded, 1) as waiter:
        assert counts(guarded.place_zeros(0, 2)) == {"zeroed": 2}
        assert waiter.value() == 0
    assert content(guarded, 0, 2) == [0, 0]
    writer = Writer(guarded.address, 1)
    assert next_events(guarded.uffd)[-1].flags & FaultFlag.WP, "placed with its protection"
    guarded.unprotect(0, 1)
    writer.value()


def test_poison_over_a_marker_of_protection(guarded):
    """POISON says EEXIST there, though nobody would ever fill the page."""
    guarded.place(1, data(guarded, 5))
    guarded.protect(0, 4)
    assert counts(guarded.poison(0, 4)) == {"placed": 3, "present": 1}
    readable = [is_readable(guarded.address + index * guarded.page_size) for index in range(4)]
    assert readable == [False, True, False, False]
    writer = Writer(guarded.address + guarded.page_size, 6)
    assert next_events(guarded.uffd)[-1].flags & FaultFlag.WP, "the present page is still protected"
    guarded.unprotect(1, 1)
    writer.value()


def test_poison_leaves_the_record_of_writes_alone(open_uffd, made, kind):
    """Where writes are noted, a written page is not protected again, and a clean one stays clean."""
    memory = made(kind)
    uffd = open_uffd(Feature.WP_UNPOPULATED | Feature.WP_ASYNC)
    region = uffd.register(memory.mapping, page_size=memory.page_size, mode=MISSING_WP)
    region.place(0, data(region, 5, 2))
    Writer(region.address, 6).value()
    region.protect(2, 2)  # markers
    assert counts(region.poison(0, 4)) == {"placed": 2, "present": 2}
    assert [is_protected(region.address + index * region.page_size) for index in (0, 1)] == [False, True]
    assert not is_readable(region.address + 3 * region.page_size)
    assert counts(region.poison(0, 4)) == {"present": 4}, "poison is present, and stays"
    assert content(region, 0, 2) == [6, 6]


def test_protection_needs_its_mode(missing):
    with pytest.raises(UnsupportedError, match=r"register it with RegisterMode\.WP"):
        missing.protect(0, 1)
    with pytest.raises(UnsupportedError, match=r"register it with RegisterMode\.WP"):
        missing.unprotect(0, 1)
    with pytest.raises(ValueError, match="was not registered for write-protection"):
        missing.place(0, data(missing, 1), protect=True)
    assert counts(missing.place_zeros(0, 4)) == {"zeroed": 4}


def test_protection_is_deferred_while_an_event_waits(open_uffd):
    """Trap 36: the writer sleeps on until it is tried again."""
    uffd = open_uffd(Feature.EVENT_REMOVE)
    region = uffd.register(anonymous(8), mode=MISSING_WP)
    region.place(0, page(1, 2))
    writer = Writer(region.address, 9)
    next_events(uffd)
    discarding = Worker(discard, region.address + 4 * PAGE, PAGE)
    queued(uffd)
    assert counts(region.unprotect(0, 2)) == {"deferred": 2}
    assert counts(region.protect(0, 2)) == {"deferred": 2}
    assert writer.is_alive()
    next_events(uffd)
    assert counts(settle(lambda: region.unprotect(0, 2))) == {"placed": 2}
    writer.value()
    discarding.value()


def test_protection_of_what_went_away(open_uffd):
    uffd = open_uffd()
    address = leaked_mapping(8)
    region = uffd.register_address(address, 8 * PAGE, mode=MISSING_WP)
    region.place(0, page(1, 8))
    unmap(address + 3 * PAGE, PAGE)
    assert counts(region.protect(0, 3)) == {"placed": 3}
    unmap(address, 3 * PAGE)
    unmap(address + 4 * PAGE, 4 * PAGE)
    assert counts(region.unprotect(0, 8)) == {"gone": 8}


def test_anonymous_pages_that_were_never_populated_are_not_protected(open_uffd):
    """Trap 37: without WP_UNPOPULATED the kernel keeps no note, and the first write goes unseen."""
    for features, seen in ((Feature(0), 0), (Feature.WP_UNPOPULATED, 1)):
        uffd = open_uffd(features)
        memory = anonymous(2)
        region = uffd.register(memory, mode=RegisterMode.WP)
        assert counts(region.protect(0, 2)) == {"placed": 2}
        writer = Writer(region.address, 1)
        if seen:
            assert next_events(uffd)[0].flags & FaultFlag.WP
            region.unprotect(0, 1)
        writer.value()
        assert uffd.read_events() == []


def test_asynchronous_protection_notes_writes(open_uffd):
    """Trap 35: nobody waits, and PAGEMAP_SCAN reports what was written since; armed by the placement itself."""
    uffd = open_uffd(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
    memory = anonymous(8)
    region = uffd.register(memory, mode=MISSING_WP)
    region.place(0, page(1, 4))
    region.place_zeros(4, 4)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        assert _written(pagemap.fileno(), memory) == set()
        for index in (2, 5):
            Writer(region.address + index * PAGE, 9).value()
        assert uffd.read_events() == []
        assert _written(pagemap.fileno(), memory) == {2, 5}
        assert _written(pagemap.fileno(), memory) == set()


# ---- minor faults


@pytest.fixture(params=["shared", "huge_shared"])
def cached(request, open_uffd, made):
    """A region of four pages for missing and minor faults, and the memory behind it."""
    if request.param == "huge_shared":
        request.getfixturevalue("pool")
    memory = made(request.param)
    mode = RegisterMode.MISSING | RegisterMode.MINOR
    return open_uffd().register(memory.mapping, page_size=memory.page_size, mode=mode), memory


def test_minor_faults_are_continued(cached):
    region, memory = cached
    write_other(memory, 1, data(region, 41))
    waiter = Toucher(region.address + region.page_size)
    (event,) = next_events(region.uffd)
    assert event.flags & FaultFlag.MINOR
    received = Bitmap(4)
    assert counts(region.place_continue(1, 1, received=received)) == {"placed": 1}
    assert waiter.value() == 41
    assert received.runs().tolist() == [[1, 1]]
    assert counts(region.place_continue(1, 1)) == {"present": 1}


def test_a_copy_does_not_serve_a_page_of_the_cache(cached):
    """Trap 38, D2: EEXIST, though this mapping does not have it. CONTINUE does, and its content wins."""
    region, memory = cached
    write_other(memory, 2, data(region, 42))
    waiter = Toucher(region.address + 2 * region.page_size)
    next_events(region.uffd)
    received = Bitmap(4)
    assert counts(region.place(2, data(region, 7), received=received)) == {"present": 1}
    assert waiter.value() == 42
    write_other(memory, 3, data(region, 43))
    assert counts(region.place_zeros(3, 1, received=received)) == {"present": 1}
    assert content(region, 3) == [43], "received means present (D15)"
    assert received.count() == 2


def test_pages_that_the_cache_does_not_have_are_absent(cached):
    """Found at once, behind good pages, and before good ones; their waiters fault again, as missing."""
    region, memory = cached
    write_other(memory, 0, data(region, 1))
    write_other(memory, 2, data(region, 3))
    claimed, received = Bitmap(4), Bitmap(4)
    result = region.place_continue(0, 4, claimed=claimed, received=received)
    assert counts(result) == {"placed": 2, "absent": 2}
    assert claimed.runs().tolist() == received.runs().tolist() == [[0, 1], [2, 1]]
    with toucher(region.uffd, region, 1) as waiter:
        assert next_events(region.uffd)[0].flags == FaultFlag(0)
        assert counts(region.place_continue(1, 1)) == {"absent": 1}
        next_events(region.uffd)
        assert counts(region.place(1, data(region, 2))) == {"placed": 1}
        assert waiter.value() == 2


def test_continuing_protects_too(open_uffd, made):
    memory = made("shared")
    mode = MISSING_WP | RegisterMode.MINOR
    region = open_uffd().register(memory.mapping, mode=mode)
    write_other(memory, 0, page(1))
    assert counts(region.place_continue(0, 1)) == {"placed": 1}
    writer = Writer(region.address, 9)
    assert next_events(region.uffd)[0].flags & FaultFlag.WP
    region.unprotect(0, 1)
    writer.value()


def test_minor_faults_need_shared_memory(uffd, missing):
    with pytest.raises(UnsupportedError, match=r"register shared memory with RegisterMode\.MINOR"):
        missing.place_continue(0, 1)
    if missing.kind is MemoryKind.ANONYMOUS:
        with pytest.raises(UnsupportedError, match="they exist for shared memory alone"):
            uffd.register(anonymous(1), mode=RegisterMode.MINOR)


# ---- planes


def test_excluded_pages_are_left_out_of_the_middle_of_a_run(uffd, region):
    """D12, at word edges too, with claims and without; the claims that were won for them are given back."""
    wide = uffd.register(anonymous(200))
    excluded = Bitmap(200)
    for first, count in ((0, 1), (5, 3), (63, 2), (128, 64), (199, 1)):
        excluded.set_range(first, count)
    claimed, received = Bitmap(200), Bitmap(200)
    claimed.set_range(4, 2)
    result = wide.place(0, page(0, 200), claimed=claimed, received=received, excluded=excluded)
    assert counts(result) == {"placed": 200 - 71 - 1, "present": 1, "excluded": 71}
    assert received.count_range(128, 64) == received.count_range(63, 2) == 0
    assert claimed.count() == received.count() + 2, "one lost, and one claimed and excluded by others"
    assert counts(wide.place_zeros(0, 200, excluded=excluded)) == {"present": 128, "zeroed": 1, "excluded": 71}


def test_poison_excludes_what_it_poisons(region):
    excluded, claimed = Bitmap(16), Bitmap(16)
    claimed.set(3)  # under way: left to whoever places it
    region.place(1, page(5))
    assert counts(region.poison(0, 5, claimed=claimed, excluded=excluded)) == {"placed": 3, "present": 2}
    assert not excluded.test(3)
    assert excluded.test(0)
    assert counts(region.place(0, page(10, 8), claimed=claimed, excluded=excluded))["placed"] == 3


def test_guard_pages_are_excluded_by_the_caller(region):
    """Trap 12: COPY destroys a guard marker as it does poison."""
    memory = region.address
    try:
        os_madvise(memory + 2 * PAGE, PAGE, 102)  # MADV_GUARD_INSTALL, Linux 6.13
    except OSError:
        pytest.skip("no guard pages; fix: boot Linux 6.13 or newer")
    excluded = Bitmap(16)
    excluded.set(2)
    assert counts(region.place(0, page(1, 4), excluded=excluded)) == {"placed": 3, "excluded": 1}
    assert not is_readable(memory + 2 * PAGE)
    assert counts(region.place_zeros(2, 1)) == {"present": 1}
    assert counts(region.place(2, page(3))) == {"placed": 1}, "without the plane it is gone"
    assert is_readable(memory + 2 * PAGE)


def os_madvise(address: int, length: int, advice: int) -> None:
    from uffd_helpers import _checked, _libc

    _checked(_libc.madvise(address, length, advice))


def test_clipping_of_addresses(uffd, region):
    assert region.pages_at(region.address - PAGE, 2 * PAGE) == (0, 1)
    assert region.pages_at(region.address + 1, PAGE) == (0, 2)
    assert region.pages_at(region.address + 15 * PAGE + 5, 1 << 40) == (15, 1)
    assert region.pages_at(region.address + 16 * PAGE, PAGE) == (0, 0)
    assert region.pages_at(region.address, 0) == (0, 0)
