"""The kernel's own log of a process's memory: every write that goes through its page tables, and no other."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import pickle
import random
import signal

import pytest

from concurrency import SEED
from memory_kinds import HUGE, KINDS, huge_pool, make
from pagecore import (
    Bitmap,
    BusyError,
    ClosedError,
    Feature,
    PagemapDirtyLog,
    PageTracker,
    RegisterMode,
    UffdError,
    UnsupportedError,
    Userfaultfd,
    probe,
)
from uffd_helpers import (
    PAGE,
    Child,
    Writer,
    address_of,
    anonymous,
    discard,
    give_up_privileges,
    leaked_mapping,
    map_afresh,
    next_events,
    protect,
    read_bytes,
    remap,
    unmap,
)

pytestmark = pytest.mark.kernel
MISSING_WP = RegisterMode.MISSING | RegisterMode.WP


@pytest.fixture(autouse=True, scope="module")
def _available():
    item = probe.probe()["pagemap-scan"]
    if not item.available:
        pytest.skip(f"{item.why}; fix: {item.remedy}")


def written(log):
    """The pages of one collect; its count must be theirs."""
    found = Bitmap(log.size)
    assert log.collect_into(found) == found.count()
    return set(found.indices().tolist())


def write(memory, *pages, size=PAGE):
    """One byte of each page."""
    address = memory if isinstance(memory, int) else address_of(memory)
    for page in pages:
        ctypes.memset(address + page * size, 1 + page % 250, 1)


@pytest.fixture
def logged():
    """Sixteen pages, of which 3 and 9 hold something, and their log."""
    memory = anonymous(16)
    write(memory, 3, 9)
    with PagemapDirtyLog(memory) as log:
        yield memory, log


# ---- what it reports


def test_reports_each_write_once(logged):
    memory, log = logged
    assert written(log) == set()
    for pages in ({0}, {3, 4, 5}, {0, 15}, set(range(16))):
        write(memory, *pages)
        assert written(log) == pages
        assert written(log) == set()


def test_what_was_there_before_is_told_apart_from_what_never_was(logged):
    """Trap 35: never-populated pages count as written until they were armed. They read as zeros."""
    memory, log = logged
    read_bytes(address_of(memory) + 5 * PAGE, 1)  # the zero page of the kernel, mapped
    assert written(log) == set()
    assert log.populated.indices().tolist() == [3, 9]
    tracker = PageTracker(16, dirty_log=log, all_dirty=False)
    tracker.mark(log.populated.runs())
    write(memory, 5)
    assert tracker.sync() == 3
    assert tracker.dirty.indices().tolist() == [3, 5, 9]


def test_a_mark_of_an_earlier_log_may_be_a_page_in_swap(logged):
    """They look the same, so it counts: sent once too often, and never too seldom."""
    memory, log = logged
    with PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 16 * PAGE) as second:
        assert second.populated.count() == 16
        write(memory, 4)
        assert written(second) == {4}
        assert written(log) == set()


def test_the_zero_page_holds_nothing():
    memory = anonymous(4)
    read_bytes(address_of(memory) + PAGE, 1)
    write(memory, 2)
    with PagemapDirtyLog(memory) as log:
        assert log.populated.indices().tolist() == [2]


def test_a_page_that_became_zero_is_reported(logged):
    """Neither the mark nor the page is there any more; a scan that asked for present pages alone would not see it."""
    memory, log = logged
    discard(address_of(memory) + 3 * PAGE, PAGE)
    assert written(log) == {3}
    assert memory[3 * PAGE] == 0
    assert written(log) == set()
    write(memory, 3)
    assert written(log) == {3}


def test_system_calls_and_other_processes_write_too(logged, tmp_path):
    memory, log = logged
    file = tmp_path / "data"
    file.write_bytes(b"x" * PAGE)
    with open(file, "rb", buffering=0) as stream:
        stream.readinto(memoryview(memory)[PAGE : 2 * PAGE])
    with open("/proc/self/mem", "r+b", buffering=0) as mem:
        os.pwrite(mem.fileno(), b"x", address_of(memory) + 6 * PAGE)
    assert written(log) == {1, 6}
    assert memory[PAGE] == memory[6 * PAGE] == ord("x")


def test_rearming_a_run_forgets_it(logged):
    memory, log = logged
    write(memory, 2, 3, 4, 5)
    log.rearm(3, 2)
    assert written(log) == {2, 5}
    write(memory, 3)
    log.rearm(0, 0)
    assert written(log) == {3}
    with pytest.raises(IndexError):
        log.rearm(15, 2)


def test_runs_of_every_shape_go_into_the_words():
    """Against a plain set: within a word, across words, to the ends; more runs than one scan's vector has room for."""
    npages = 5003
    memory = anonymous(npages)
    generator = random.Random(SEED)
    with PagemapDirtyLog(memory) as log:
        for share in (0.001, 0.05, 0.5, 0.97):
            pages = {page for page in range(npages) if generator.random() < share}
            write(memory, *pages)
            assert written(log) == pages
        write(memory, *range(0, npages, 2))  # 2502 runs: two scans
        found = Bitmap(npages)
        found.set_range(0, 64)
        assert log.collect_into(found) == (npages + 1) // 2 - 32
        assert found.count() == (npages + 1) // 2 + 32
        assert written(log) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory(kind):
    with huge_pool(8) if kind.startswith("huge") else open(os.devnull):
        memory = make(kind, 4)
        size = memory.page_size
        write(memory.mapping, 1, size=size)
        shared = kind.endswith("shared")
        marked = {"mappings"} if shared else set()
        with PagemapDirtyLog(memory.mapping, page_size=size, marked=marked) as log:
            assert log.misses == {"pins"} | marked
            assert log.populated.indices().tolist() == ([0, 1, 2, 3] if shared else [1])
            assert written(log) == set()
            for pages in ({0}, {1, 3}, {1}):
                write(memory.mapping, *pages, size=size)
                assert written(log) == pages
        memory.close()
        memory.mapping.close()
        if memory.other is not None:
            memory.other.close()
        gc.collect()


def test_transparent_huge_pages_are_split_by_the_first_write():
    """Fine-grained all the same: what is written is one page and not the 512 of it."""
    length = 2 * HUGE
    area = mmap.mmap(-1, length + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    address = -(-address_of(area) // HUGE) * HUGE
    ctypes.memset(address, 7, length)
    with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
        log = PagemapDirtyLog.of_process(os.getpid(), address, length, uffd=uffd)
        assert written(log) == set()
        write(address, 5, 600)
        assert written(log) == {5, 600}
        log.close()


def test_memory_in_many_mappings():
    """mprotect and madvise split a mapping; writes to each part are seen."""
    memory = anonymous(64)
    with PagemapDirtyLog(memory) as log:
        for page in range(0, 64, 4):
            protect(address_of(memory) + page * PAGE, PAGE, mmap.PROT_READ)
        write(memory, *range(1, 64, 4))
        assert written(log) == set(range(1, 64, 4))


# ---- other descriptors of the same memory


def test_memory_of_another_descriptor_is_refused_with_the_way_out():
    memory = anonymous(8)
    with Userfaultfd(user_mode_only=True) as uffd:
        uffd.register(memory)
        with pytest.raises(BusyError, match=r"another userfaultfd.*of_process"):
            PagemapDirtyLog(memory)
        with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as second, pytest.raises(BusyError):
            PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 8 * PAGE, uffd=second)


def test_missing_pages_are_served_beside_the_log():
    """The way out: one descriptor for both. Placing is no write of the guest's."""
    memory = anonymous(8)
    with Userfaultfd(Feature.WP_ASYNC | Feature.EVENT_REMOVE, user_mode_only=True) as uffd:
        region = uffd.register(memory, mode=MISSING_WP)
        with PagemapDirtyLog.of_process(os.getpid(), region.address, 8 * PAGE) as log:
            waiter = Writer(region.address + 2 * PAGE, 9)
            (event,) = next_events(uffd)
            assert event.start == region.address + 2 * PAGE
            region.place(0, bytes(4 * PAGE))
            waiter.value()
            assert written(log) == {2}
        # The log registered nothing, so it unregisters nothing.
        waiter = Writer(region.address + 5 * PAGE, 9)
        assert next_events(uffd)[0].start == region.address + 5 * PAGE
        region.place_zeros(5, 1)
        waiter.value()


def test_a_descriptor_without_the_feature_is_refused():
    memory = anonymous(4)
    with Userfaultfd(user_mode_only=True) as uffd:
        with pytest.raises(UnsupportedError, match="WP_ASYNC"):
            PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 4 * PAGE, uffd=uffd)
        region = uffd.register(memory, mode=RegisterMode.WP)
        with pytest.raises(UnsupportedError, match="WP_ASYNC"):
            PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 4 * PAGE)
        uffd.unregister(region)


# ---- memory that goes away


@pytest.fixture
def loose():
    """A log of sixteen pages that a test may unmap, by a descriptor of the test's."""
    address = leaked_mapping(16)
    with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
        log = PagemapDirtyLog.of_process(os.getpid(), address, 16 * PAGE, uffd=uffd)
        yield address, log, uffd
        log.close()


def test_a_hole_is_an_error_with_its_address(loose):
    """To the scan alone, memory that is not there has not been written."""
    address, log, _ = loose
    write(address, 1, 12)
    unmap(address + 6 * PAGE, 2 * PAGE)
    found = Bitmap(16)
    with pytest.raises(UffdError, match="no longer mapped") as caught:
        log.collect_into(found)
    assert (caught.value.errno, caught.value.address) == (errno.EFAULT, address + 6 * PAGE)
    assert caught.value.length == 2 * PAGE
    assert found.indices().tolist() == [1, 12]


def test_a_hole_at_the_end_is_one_too(loose):
    address, log, _ = loose
    unmap(address + 15 * PAGE, PAGE)
    with pytest.raises(UffdError) as caught:
        written(log)
    assert (caught.value.address, caught.value.length) == (address + 15 * PAGE, PAGE)


def test_memory_mapped_afresh_is_an_error_and_no_write_is_lost(loose):
    """The scan re-arms what comes before it and then says nothing of it: all that it may have re-armed is written."""
    address, log, _ = loose
    write(address, 1, 12)
    map_afresh(address + 6 * PAGE, 2 * PAGE)
    found = Bitmap(16)
    with pytest.raises(UffdError, match="not registered") as caught:
        log.collect_into(found)
    assert (caught.value.errno, caught.value.address) == (errno.EPERM, address + 6 * PAGE)
    assert caught.value.length == 2 * PAGE
    assert {1, 12} <= set(found.indices().tolist())
    with pytest.raises(UffdError):
        log.rearm(0, 16)
    log.rearm(0, 6)


def test_memory_that_mremap_moved_away_is_a_hole(loose):
    address, log, _ = loose
    moved = remap(address, 16 * PAGE)
    write(moved, 2)
    with pytest.raises(UffdError, match="no longer mapped"):
        written(log)
    with pytest.raises(UnsupportedError, match="not registered"):
        PagemapDirtyLog.of_process(os.getpid(), moved, 16 * PAGE)


def test_a_closed_descriptor_ends_the_tracking_with_an_error(loose):
    address, log, uffd = loose
    write(address, 1)
    uffd.close()
    with pytest.raises(UffdError, match="not registered"):
        written(log)


# ---- life


def test_close_ends_the_registration():
    memory = anonymous(4)
    log = PagemapDirtyLog(memory)
    assert not log.closed
    with pytest.raises(BufferError):
        memory.close()
    log.close()
    log.close()
    assert log.closed
    with pytest.raises(ClosedError):
        written(log)
    with pytest.raises(ClosedError):
        log.rearm(0, 1)
    with pytest.raises(ClosedError):
        assert log.populated
    with pytest.raises(ClosedError), log:
        pass
    with pytest.raises(BusyError):
        log.__init__(memory)
    with PagemapDirtyLog(memory) as again:  # not EBUSY
        assert again.populated.count() == 0
    memory.close()


def test_an_open_log_is_reported_when_it_is_collected():
    with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
        memory = anonymous(4)
        log = PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 4 * PAGE, uffd=uffd)
        with pytest.warns(ResourceWarning, match="unclosed <PagemapDirtyLog"):
            del log


def test_nothing_stays_behind_when_it_fails():
    before = len(os.listdir("/proc/self/fd"))
    memory = mmap.mmap(-1, 4 * PAGE)
    for _ in range(3):
        with pytest.raises(UnsupportedError, match=r"marked=\{'mappings'\}"):
            PagemapDirtyLog(memory)
        with pytest.raises(UnsupportedError, match="not registered"):
            PagemapDirtyLog.of_process(os.getpid(), address_of(memory), 4 * PAGE, marked={"mappings"})
    with PagemapDirtyLog(memory, marked={"mappings"}):
        pass
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_arguments_are_checked():
    memory = anonymous(4)
    with pytest.raises(ValueError, match="rubbish"):
        PagemapDirtyLog(memory, marked=["rubbish"])
    with pytest.raises(TypeError, match="not one name"):
        PagemapDirtyLog(memory, marked="pins")
    with pytest.raises(TypeError, match="cannot be pickled"), PagemapDirtyLog(memory) as log:
        pickle.dumps(log)
    with pytest.raises(ValueError, match="multiple of page size"):
        PagemapDirtyLog.of_process(os.getpid(), address_of(memory) + 1, PAGE)
    with pytest.raises(ValueError, match="not wholly mapped"):
        PagemapDirtyLog.of_process(os.getpid(), 0x10000, PAGE)
    with pytest.raises(ValueError, match="writable"):
        PagemapDirtyLog(bytes(PAGE))
    with PagemapDirtyLog(memory) as log, pytest.raises(ValueError, match="does not fit"):
        log.collect_into(Bitmap(5))


def test_a_forked_child_cannot_take_the_pages_of_its_parent(logged):
    """Its copy of the descriptor is of the parent's memory: a collect there would re-arm what nobody has seen here."""
    memory, log = logged
    write(memory, 4)

    def child():
        refused = []
        for call in (lambda: written(log), lambda: log.rearm(0, 16)):
            try:
                call()
            except UnsupportedError as error:
                refused.append("parent's memory" in str(error))
        log.close()
        with PagemapDirtyLog(anonymous(4)) as own:
            return refused, written(own)

    assert Child(child).value() == ([True, True], set())
    write(memory, 11)
    assert written(log) == {4, 11}


def test_a_forked_child_that_closes_the_log_leaves_the_registration(loose):
    """It is the parent's: its descriptor, inherited, acts on the parent's memory."""
    address, log, _ = loose

    def child():
        log.close()
        return log.closed

    assert Child(child).value()
    write(address, 3)
    assert written(log) == {3}


def test_writes_after_a_fork_are_seen(logged):
    """Each page is shared with the child then: a write makes a copy, and the log sees it all the same."""
    memory, log = logged
    child = Child(signal.pause)
    write(memory, 3, 7)
    os.kill(child.pid, signal.SIGKILL)
    child.ended()
    write(memory, 9)
    assert written(log) == {3, 7, 9}


def test_an_unprivileged_user_tracks_its_own_memory():
    """Nothing of it needs a privilege. A program that changed its user id may not look at itself, until it says so."""

    def child():
        give_up_privileges()
        memory = anonymous(16)
        refusal = ""
        try:
            PagemapDirtyLog(memory).close()
        except UnsupportedError as error:
            refusal = str(error)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
        with PagemapDirtyLog(memory) as log:
            write(memory, 3)
            return os.geteuid(), refusal, written(log)

    user, refusal, pages = Child(child).value()
    assert user != 0
    assert pages == {3}
    if os.geteuid() == 0:
        assert "/pagemap as user 65534 is not available: start the program as this user" in refusal
