"""The dirty log by synchronous write-protection: what it reports, and what it must never lose."""

from __future__ import annotations

import ctypes
import mmap
import os
import random

import numpy as np
import pytest

import pagecore
from concurrency import SEED, Worker, run_together, wait_until
from injection import run
from memory_kinds import make
from pagecore import Bitmap, ClosedError, PageTracker, UffdError, UnsupportedError, WriteProtectDirtyLog
from test_dirty_log_pagemap_misses import Ring, pinned
from trap_rig import Hammer, sweep
from uffd_helpers import (
    PAGE,
    Child,
    Writer,
    _checked,
    _libc,
    address_of,
    anonymous,
    discard,
    give_up_privileges,
    leaked_mapping,
    read_bytes,
    remap,
    unmap,
)

pytestmark = pytest.mark.kernel
NPAGES = 200


def filled(npages=NPAGES):
    """Anonymous memory in which every page holds something."""
    memory = anonymous(npages)
    sweep(memory, 1)
    return memory


def collect(log):
    """The pages of one collect."""
    bitmap = Bitmap(log.size)
    newly = log.collect_into(bitmap)
    assert newly == bitmap.count()
    return bitmap.indices().tolist()


def write(memory, page, value=7):
    """Write one byte without the GIL; returns when the write went through."""
    Writer(address_of(memory) + page * PAGE, value).value()


@pytest.fixture
def memory():
    return filled()


@pytest.fixture
def log(memory):
    with WriteProtectDirtyLog(memory) as opened:
        yield opened


def test_each_first_write_is_reported_once(log, memory):
    assert collect(log) == []
    for page in (0, 63, 64, 199, 64):
        write(memory, page)
    assert memory[64 * PAGE] == 7
    assert log.faults == 4
    assert collect(log) == [0, 63, 64, 199]
    assert collect(log) == []
    write(memory, 64, 9)
    assert log.faults == 5
    assert collect(log) == [64]


def test_declares_what_it_is(log):
    assert (log.size, log.rearms_at_collect, log.misses, log.closed) == (NPAGES, True, {"pins"}, False)
    assert "re-arms at collect" in repr(log)
    log.rearm(0, NPAGES)
    with pytest.raises(TypeError, match="cannot be pickled"):
        log.__reduce__()
    with pytest.raises(pagecore.BusyError, match="opened before"):
        log.__init__(filled(1))


def test_a_tracker_uses_it(log, memory):
    tracker = PageTracker(NPAGES, dirty_log=log, all_dirty=False)
    write(memory, 5)
    assert tracker.sync() == 1
    with tracker.hint_session(marked={"pins"}) as session:
        session.start()
    assert tracker.take().tolist() == [[5, 1]]


def test_every_pattern_is_armed_again(log, memory):
    """Runs with gaps, at both ends and across words: whatever was reported traps again, and nothing else was."""
    generator = random.Random(SEED)
    for share in (0.02, 0.3, 0.9, 1.0):
        pages = sorted(page for page in range(NPAGES) if generator.random() < share)
        for page in pages:
            ctypes.memset(address_of(memory) + page * PAGE, 3, 1)
        assert collect(log) == pages
        before = log.faults
        sweep(memory, 4)
        assert log.faults == before + NPAGES
        assert collect(log) == list(range(NPAGES))


def test_bits_that_were_there_are_kept(log, memory):
    write(memory, 5)
    write(memory, 70)
    bitmap = Bitmap(NPAGES)
    bitmap.set_range(4, 2)
    assert log.collect_into(bitmap) == 1
    assert bitmap.runs().tolist() == [[4, 2], [70, 1]]


def test_pages_that_were_never_populated_are_not_missed():
    """Protection leaves no mark on them: they are found missing instead, by a read too."""
    memory = anonymous(40)
    with WriteProtectDirtyLog(memory) as log:
        write(memory, 3)
        assert collect(log) == [3]
        assert read_bytes(address_of(memory) + 9 * PAGE, 1) == b"\0"
        assert collect(log) == [9]
        write(memory, 9)
        write(memory, 3)
        assert collect(log) == [3, 9]


def test_the_kernel_writes_too(log, memory):
    reader, writer = os.pipe()
    os.write(writer, b"x")
    target = (ctypes.c_char * 1).from_address(address_of(memory) + 11 * PAGE)
    assert Worker(os.readv, reader, [target]).value() == 1
    os.close(reader)
    os.close(writer)
    assert collect(log) == [11]


def test_a_discard_is_reported_and_the_page_traps_again(log, memory):
    Worker(discard, address_of(memory) + 10 * PAGE, 3 * PAGE).value()
    assert collect(log) == [10, 11, 12]
    assert collect(log) == []
    write(memory, 11)
    assert read_bytes(address_of(memory) + 12 * PAGE, 1) == b"\0"
    assert collect(log) == [11, 12]
    write(memory, 12)
    assert collect(log) == [12]


def test_what_is_freed_lazily_is_reported_until_it_is_used(log, memory):
    """The event of MADV_FREE looks like that of a discard whose zap is still to come."""
    Worker(lambda: _checked(_libc.madvise(address_of(memory) + 20 * PAGE, PAGE, 8))).value()
    assert collect(log) == [20]
    assert collect(log) == [20]
    write(memory, 20)
    assert collect(log) == [20]
    assert collect(log) == []


def test_discards_while_it_collects():
    """A collect meets EAGAIN, and the page that it could not protect stays pending; in the end all agree."""
    npages, rounds = 512, 60
    memory = filled(npages)
    shadow = mmap.mmap(-1, npages * PAGE)
    generator = random.Random(SEED)
    with WriteProtectDirtyLog(memory) as log, Hammer(memory) as hammer:

        def discards():
            for _ in range(rounds):
                discard(address_of(memory) + generator.randrange(npages - 8) * PAGE, 8 * PAGE)

        discarding = Worker(discards)
        copy(memory, shadow, np.array([[0, npages]]))
        while not discarding.done():
            copy_dirty(log, memory, shadow)
        discarding.value()
        hammer.stop()
        copy_dirty(log, memory, shadow)
        assert differing(memory, shadow) == []


def copy(memory, shadow, runs):
    for first, count in runs.tolist():
        ctypes.memmove(address_of(shadow) + first * PAGE, address_of(memory) + first * PAGE, count * PAGE)


def copy_dirty(log, memory, shadow):
    """What a sender does: collect, and only then read."""
    bitmap = Bitmap(log.size)
    log.collect_into(bitmap)
    copy(memory, shadow, bitmap.runs())


def collected(log, memory, shadow):
    """The same, and how many writes have been stopped by then."""
    copy_dirty(log, memory, shadow)
    return log.faults


def differing(memory, shadow):
    """Pages in which the two differ, read without the GIL."""
    size = len(memory)
    left, right = (np.frombuffer(read_bytes(address_of(each), size), np.uint8) for each in (memory, shadow))
    return np.flatnonzero((left != right).reshape(-1, PAGE).any(axis=1)).tolist()


@pytest.mark.stress
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("npages", "faults"), [(3, 150), (2000, 2500)])
def test_no_write_is_lost_around_collects(npages, faults):
    """Few pages: the same ones are written, taken and protected at the same moments again and again."""
    for seed in range(6):
        memory = filled(npages)
        shadow = mmap.mmap(-1, npages * PAGE)
        with WriteProtectDirtyLog(memory) as log:
            copy(memory, shadow, np.array([[0, npages]]))
            with Hammer(memory, seed=SEED + seed) as hammer:
                # Until the writers have been caught in many rounds, however seldom they run.
                while collected(log, memory, shadow) < faults:
                    pass
                hammer.stop()
            copy_dirty(log, memory, shadow)
            assert differing(memory, shadow) == []


HELD_UP = """
import ctypes, json, sys
from concurrency import Worker, wait_until
from pagecore import Bitmap, WriteProtectDirtyLog
from trap_rig import Gate, sweep
from uffd_helpers import PAGE, Writer, address_of, anonymous
memory, gate = anonymous(8), Gate()
sweep(memory, 1)
log = WriteProtectDirtyLog(memory)
def collect():
    bitmap = Bitmap(8)
    log.collect_into(bitmap)
    return bitmap.indices().tolist(), ctypes.string_at(address_of(memory) + 5 * PAGE, 1)[0]
def write(value):
    return Writer(address_of(memory) + 5 * PAGE, value)
"""


def test_a_collect_and_the_handler_are_one_step_for_one_another(overlay):
    """The handler stops between marking a page and unprotecting it, and a collect comes: it must not take the mark and
    go, or the write that follows is reported by nobody."""
    program = HELD_UP + (
        "gate.hold_unprotect = 1\n"
        "writer = write(7)\n"
        "wait_until(lambda: gate.holding, 'the handler')\n"
        "collecting = Worker(collect)\n"
        "waited = not collecting.done(0.2)\n"
        "gate.hold_unprotect = 0\n"
        "writer.value()\n"
        "print(json.dumps([waited, collecting.value(), collect()]))\n"
        "log.close()\n"
    )
    waited, (first, sent), (last, now) = run(overlay, program)
    assert now == 7
    assert (first, sent) == ([5], 7) or last == [5], "the write was reported by no collect"
    assert waited


def test_what_cannot_be_protected_stays_pending(overlay):
    """D7: EAGAIN for longer than a collect tries. The page is reported again, and was written without a trap."""
    program = HELD_UP + (
        "write(7).value()\n"
        "gate.deny_protect = 1000\n"
        "answer = [collect()]\n"
        "write(8).value()\n"
        "gate.deny_protect = 2\n"
        "answer += [log.faults, collect()]\n"
        "write(9).value()\n"
        "print(json.dumps([*answer, log.faults, collect(), collect()]))\n"
        "log.close()\n"
    )
    assert run(overlay, program) == [[[5], 7], 1, [[5], 8], 2, [[5], 9], [[], 9]]


def test_a_writer_that_cannot_be_let_go_at_once_is_let_go_later(overlay):
    """D7: the reader does not wait; it comes back. The page is reported once it can be written."""
    program = HELD_UP + (
        "gate.deny_unprotect = 20\nwrite(7).value()\n"
        "print(json.dumps([gate.deny_unprotect, collect(), collect()]))\nlog.close()\n"
    )
    assert run(overlay, program) == [0, [[5], 7], [[], 7]]


def test_transparent_huge_pages_are_precise():
    memory = mmap.mmap(-1, 6 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    sweep(memory, 1)
    with WriteProtectDirtyLog(memory) as log:
        write(memory, 700)
        assert collect(log) == [700]
        sweep(memory, 2)
        assert collect(log) == list(range((6 << 20) // PAGE))
        assert log.faults == 1 + (6 << 20) // PAGE


def test_a_fork_changes_nothing(log, memory):
    """The child holds the descriptor, its memory is its own, and the parent's stays protected."""
    write(memory, 1)
    child = Child(lambda: (memory[PAGE], memory.write(b"child"), read_bytes(address_of(memory), 5)))
    assert child.value() == (7, 5, b"child")
    assert collect(log) == [1]
    write(memory, 1)
    write(memory, 0, 1)
    assert collect(log) == [0, 1]


def test_a_forked_child_closes_its_copy_alone(log, memory):
    def closes():
        log.close()
        return log.closed

    assert Child(closes).value()
    write(memory, 5)
    assert collect(log) == [5]


def test_a_forked_child_cannot_take_the_pages_of_its_parent(log, memory):
    def collects():
        with pytest.raises(UnsupportedError, match=r"the parent's memory"):
            collect(log)
        return True

    write(memory, 5)
    assert Child(collects).value()
    assert collect(log) == [5]


def test_closing_beside_a_child_that_holds_the_descriptor():
    """Closing ours is not the last close: what lets everybody go is that the memory is unregistered."""
    memory = filled()
    log = WriteProtectDirtyLog(memory)
    gate, opener = os.pipe()
    child = Child(lambda: os.read(gate, 1))
    log.close()
    write(memory, 3)
    os.write(opener, b"x")
    assert child.value() == b"x"
    os.close(gate)
    os.close(opener)


def test_memory_that_is_unmapped_is_an_error():
    address = leaked_mapping(8)
    log = WriteProtectDirtyLog((ctypes.c_char * (8 * PAGE)).from_address(address))
    Worker(unmap, address + 4 * PAGE, 2 * PAGE).value()
    wanted = f"munmap of memory whose writes are logged on \\[{address + 4 * PAGE:#x}, {address + 6 * PAGE:#x}\\)"
    with pytest.raises(UffdError, match=wanted):
        log.collect_into(Bitmap(8))
    # The rest is let go: nobody waits for a log that cannot be trusted.
    Writer(address, 3).value()
    log.close()
    unmap(address, 4 * PAGE)
    unmap(address + 6 * PAGE, 2 * PAGE)


def test_memory_that_is_moved_is_an_error():
    address = leaked_mapping(8)
    log = WriteProtectDirtyLog((ctypes.c_char * (8 * PAGE)).from_address(address))
    moved = Worker(remap, address, 8 * PAGE).value()
    with pytest.raises(UffdError, match="mremap of memory whose writes are logged"):
        log.collect_into(Bitmap(8))
    log.close()
    unmap(moved, 8 * PAGE)


MOVED = """
import json, sys
from concurrency import Worker
from pagecore import Bitmap, UffdError, WriteProtectDirtyLog
from trap_rig import sweep
from uffd_helpers import PAGE, Writer, _libc, leaked_mapping, read_bytes
import ctypes
address, now = leaked_mapping(8), int(sys.argv[1])
ctypes.memset(address, 1, 4 * PAGE)
log = WriteProtectDirtyLog((ctypes.c_char * (8 * PAGE)).from_address(address))
target = leaked_mapping(now)
moved = Worker(_libc.mremap, address, 8 * PAGE, now * PAGE, 3, target).value()
for page in reversed(range(now)):
    Writer(moved + page * PAGE, 7).value()
try:
    answer = log.collect_into(Bitmap(8))
except UffdError as error:
    answer = str(error)
log.close()
print(json.dumps([answer, read_bytes(moved, now * PAGE)[::PAGE].hex()]))
"""


@pytest.mark.parametrize("now", [8, 16])
def test_memory_that_was_moved_is_let_go(tmp_path, now):
    """The registration moves along, and grows with it: what traps there is no page of the log."""
    message, content = run(tmp_path, MOVED, now)
    assert "mremap of memory whose writes are logged" in message
    assert content == "07" * now


def test_shared_memory_needs_a_promise():
    shared = make("shared", 16)
    try:
        with pytest.raises(UnsupportedError, match=r"PageTracker\.mark"):
            WriteProtectDirtyLog(shared.mapping)
        with WriteProtectDirtyLog(shared.mapping, marked={"mappings"}) as log:
            assert log.misses == {"pins", "mappings"}
            write(shared.mapping, 2)
            assert collect(log) == [2]
            write(shared.other, 5)
            assert collect(log) == []
            # The mark outlives a discard of this mapping, whose content stays.
            Worker(discard, address_of(shared.mapping) + 2 * PAGE, PAGE).value()
            assert collect(log) == [2]
            write(shared.mapping, 2, 9)
            assert collect(log) == [2]
    finally:
        shared.close()


def test_pinned_memory_needs_a_promise(memory, tmp_path):
    """The kernel writes to a registered buffer of io_uring without looking at the page table: nothing traps."""
    (tmp_path / "data").write_bytes(b"Z" * PAGE)
    ring = Ring()
    try:
        ring.register(address_of(memory), 8 * PAGE)
        with pytest.raises(UnsupportedError, match=r"pinned 32 kB.*marked=\{'pins'\}"):
            WriteProtectDirtyLog(memory)
        with WriteProtectDirtyLog(memory, marked={"pins"}) as log, open(tmp_path / "data", "rb") as file:
            assert ring.read(file.fileno(), address_of(memory) + 2 * PAGE, PAGE) == PAGE
            assert collect(log) == []
            assert memory[2 * PAGE] == ord("Z")
    finally:
        ring.close()
        wait_until(lambda: not pinned(), "the end of the pins")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": b"x" * PAGE}, ValueError, "writable"),
        ({"memory": bytearray(100)}, ValueError, "length 100 is not a positive multiple"),
        ({"memory": anonymous(1), "marked": {"vhost"}}, ValueError, "there are 'pins' and 'mappings'"),
        ({"memory": anonymous(1), "marked": "pins"}, TypeError, "not one name"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        WriteProtectDirtyLog(**arguments)


def test_memory_that_is_registered_already_is_refused(uffd, memory):
    uffd.register(memory)
    with pytest.raises(UffdError, match=r"UFFDIO_REGISTER.*busy"):
        WriteProtectDirtyLog(memory)


def test_a_user_who_may_not_is_told_the_fix():
    def refused():
        give_up_privileges()
        with pytest.raises(UnsupportedError) as caught:
            WriteProtectDirtyLog(anonymous(1))
        return str(caught.value)

    assert "mount /proc" in Child(refused).value() or "sysctl" in Child(refused).value()


def test_close_lets_writers_go_and_gives_the_memory_back(memory):
    log = WriteProtectDirtyLog(memory)
    write(memory, 1)
    log.close()
    log.close()
    assert log.closed
    sweep(memory, 9)
    with pytest.raises(ClosedError):
        log.collect_into(Bitmap(NPAGES))
    with pytest.raises(ClosedError), log:
        pass
    memory.close()


def test_writers_and_discards_meet_a_close():
    """Nobody sleeps on, whatever was queued when it closed."""
    memory = filled(600)
    for _ in range(10):
        with Hammer(memory) as hammer:
            log = WriteProtectDirtyLog(memory)
            run_together(log.close, lambda: discard(address_of(memory), 300 * PAGE))
            hammer.stop()


def test_a_log_that_is_dropped_warns_and_lets_go(memory):
    logs = [WriteProtectDirtyLog(memory)]
    with pytest.warns(ResourceWarning, match="unclosed <WriteProtectDirtyLog"):
        logs.clear()
    sweep(memory, 2)
    memory.close()


def test_a_writer_with_the_gil_is_served(memory):
    """The handler needs no GIL: a plain assignment holds it while it waits."""
    with WriteProtectDirtyLog(memory) as log:
        memory[3 * PAGE] = 1
        assert collect(log) == [3]


def test_no_thread_and_no_descriptor_is_left(memory):
    def count():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    WriteProtectDirtyLog(memory).close()
    before = count()
    for _ in range(3):
        WriteProtectDirtyLog(memory).close()
        with pytest.raises(ValueError, match="marked names"):
            WriteProtectDirtyLog(memory, marked={"nobody"})
        with pytest.raises(UnsupportedError, match="registering a file"), open("/proc/self/exe", "rb") as file:
            WriteProtectDirtyLog(mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE))
    wait_until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)), f"{before} of each")
