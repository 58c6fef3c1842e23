"""The background snapshot: exactly the memory at its start, whoever writes and discards meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import re

import pytest

from concurrency import DEADLINE, SEED, Worker, wait_until
from injection import run
from memory_kinds import make
from pagecore import BackgroundSnapshot
from pagecore.testing import open_guest
from preload import compiled, run_with
from snapshot_rig import MIB, blocked_snapshot, filled, same, shared
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
    read_bytes,
    sleeping,
)

pytestmark = pytest.mark.kernel


@pytest.fixture
def memory():
    return filled(4 * MIB)


@contextlib.contextmanager
def fork_holding(memory, sink):
    """A forked child: its memory stays what it is now. Yields a function that has it compare that with the sink."""
    gate, opener = os.pipe()
    child = Child(lambda: (os.read(gate, 1), same(memory, sink))[1])

    def compare():
        os.write(opener, b"x")
        return child.value()

    try:
        yield compare
    finally:
        os.close(gate)
        os.close(opener)


def prove(uffd, nbytes, forked):
    """Writers are held; fork and snapshot; writers go on; the image is what the child still has."""
    memory, sink = filled(nbytes), shared(nbytes)
    # The first page of the sink is not there: whoever saves from the beginning waits, and the writers go first.
    region = uffd.register(sink)
    region.place_zeros(1, region.size - 1)
    with contextlib.ExitStack() as stack:
        if forked == "before":
            compare = stack.enter_context(fork_holding(memory, sink))
        snapshot = stack.enter_context(BackgroundSnapshot(memory, sink))
        stack.callback(region.place_zeros, 0, 1)
        if forked == "after":
            compare = stack.enter_context(fork_holding(memory, sink))
        hammer = stack.enter_context(Hammer(memory, seed=SEED))
        wait_until(lambda: snapshot.progress.faults > 20, "writers to be caught")
        region.place_zeros(0, 1)
        assert snapshot.wait(100)
        hammer.stop()
        assert (snapshot.state, snapshot.progress[:2]) == ("complete", (nbytes // PAGE, nbytes // PAGE))
        assert not same(memory, sink), "nobody wrote"
        assert compare()


@pytest.mark.stress
@pytest.mark.parametrize("forked", ["before", "after"])
def test_the_image_is_the_memory_that_a_forked_child_holds(uffd, forked):
    """The child may even hold the descriptor: it is not registered, and reads on."""
    prove(uffd, 64 * MIB, forked)


@pytest.mark.ci
@pytest.mark.slow
def test_the_image_of_a_gibibyte(uffd):
    prove(uffd, 1 << 30, "before")


def test_into_a_file(memory, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x" * (5 * MIB))
    before = memory[:]
    with open(path, "r+b") as file:
        snapshot = BackgroundSnapshot(memory, file)
    # The file is held by a duplicate.
    with snapshot, Hammer(memory):
        assert snapshot.wait(DEADLINE)
        assert path.read_bytes() == before
    assert snapshot.closed
    memory.close()


def test_pages_that_were_never_populated_are_zeros_and_holes(tmp_path):
    memory = anonymous(4096)
    memory[5 * PAGE] = 1
    memory[4000 * PAGE] = 2
    before = memory[:]
    sink = shared(len(memory))
    sweep(sink, 9)
    (tmp_path / "image").write_bytes(b"x" * (5 * MIB))
    with open(tmp_path / "image", "r+b") as file:
        for target in (sink, file):
            with BackgroundSnapshot(memory, target) as snapshot, Hammer(memory):
                assert snapshot.wait(DEADLINE)
            assert snapshot.progress.populated in (2, 4096)
            memory.madvise(mmap.MADV_DONTNEED)
            memory[5 * PAGE] = 1
            memory[4000 * PAGE] = 2
        assert sink[:] == before
        assert file.read() == before
        assert os.fstat(file.fileno()).st_blocks * 512 < 64 * PAGE


def test_touching_what_was_never_populated(tmp_path):
    """A touch of a missing page is served, and its page is zeros in the image, whoever comes first."""
    memory, sink = anonymous(2048), shared(8 * MIB)
    with BackgroundSnapshot(memory, sink) as snapshot:
        Writer(address_of(memory) + 2047 * PAGE, 5).value()
        assert read_bytes(address_of(memory) + 2046 * PAGE, 1) == b"\0"
    assert snapshot.progress.saved == 2048
    assert sink[:] == bytes(8 * MIB)
    assert memory[2047 * PAGE] == 5


HOLDS_PREAD = r"""
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
uint64_t hold, holding;
static void stop(uint64_t where)
{
    const struct timespec pause = {0, 100000};
    while (__atomic_load_n(&hold, __ATOMIC_SEQ_CST) == where) {
        __atomic_store_n(&holding, 1, __ATOMIC_SEQ_CST);
        nanosleep(&pause, 0);
    }
}
ssize_t pread64(int fd, void *buffer, size_t length, off_t offset)
{
    stop(1);
    const ssize_t got = syscall(SYS_pread64, fd, buffer, length, offset);
    stop(2);
    return got;
}
"""
LOOKS = """
import ctypes, json, os, sys
from concurrency import DEADLINE, wait_until
from pagecore import BackgroundSnapshot
from uffd_helpers import PAGE, Writer, address_of, anonymous
shim = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
hold, holding = (ctypes.c_uint64.in_dll(shim, name) for name in ("hold", "holding"))
memory, sink = anonymous(64), bytearray(64 * PAGE)
memory[3 * PAGE] = 1
hold.value = int(sys.argv[1])
with BackgroundSnapshot(memory, sink) as snapshot:
    wait_until(lambda: holding.value, "the thread that saves")
    Writer(address_of(memory) + 5 * PAGE, 7).value()
    hold.value = 0
    snapshot.wait(DEADLINE)
print(json.dumps([memory[5 * PAGE], sink[5 * PAGE], sink[3 * PAGE]]))
"""


@pytest.mark.parametrize("where", [1, 2])
def test_a_page_that_is_filled_while_the_other_thread_looks(tmp_path, where):
    """Before or after it asks which pages are there: what is written then is not in the image."""
    (tmp_path / "hold.c").write_text(HOLDS_PREAD)
    library = compiled(tmp_path / "hold.c", tmp_path)
    assert json.loads(run_with(library, LOOKS, str(where))) == [7, 0, 1]


def test_what_is_reclaimed_before_it_is_saved_is_not_the_later_write(uffd, request):
    """MADV_FREE before the start, reclaimed when the other thread has claimed it and is about to read it."""
    # The kernel takes note of MADV_FREE for each processor, and reclaims only what it has taken note of.
    processors = os.sched_getaffinity(0)
    request.addfinalizer(lambda: os.sched_setaffinity(0, processors))
    os.sched_setaffinity(0, {min(processors)})
    memory, sink = filled(64 * PAGE), shared(64 * PAGE)
    address = address_of(memory) + 40 * PAGE
    _checked(_libc.madvise(address, PAGE, 8))
    region = uffd.register(sink)
    with BackgroundSnapshot(memory, sink) as snapshot, contextlib.ExitStack() as stack:
        stack.callback(region.place_zeros, 0, region.size)
        sleeping(uffd, 1)
        with open("/proc/self/pagemap", "rb") as pagemap:
            for _ in range(100):
                _checked(_libc.madvise(address, PAGE, 21))  # MADV_PAGEOUT
                if not os.pread(pagemap.fileno(), 8, address // PAGE * 8)[7] & 0xC0:
                    break
            else:
                pytest.skip("the kernel did not reclaim the page")
        writer = Writer(address, 0xEE)
        writer.done(0.1)
        stack.close()
        assert snapshot.wait(DEADLINE)
        writer.value()
    assert sink[40 * PAGE : 41 * PAGE] == bytes(PAGE)
    assert memory[40 * PAGE] == 0xEE


@pytest.mark.parametrize("kind", ["kvm", "process"])
def test_the_memory_of_a_guest(kind):
    with contextlib.closing(open_guest(16 * MIB, kind=kind, seed=SEED)) as guest:
        guest.boot()
        guest.run()
        wait_until(lambda: guest.stats().pages_written > 100, "the guest's first writes")
        guest.pause()
        before, sink = bytes(memoryview(guest.memory)), bytearray(16 * MIB)
        snapshot = BackgroundSnapshot(guest.memory, sink)
        guest.resume()
        with snapshot:
            assert snapshot.wait(DEADLINE)
        guest.pause()
        assert bytes(sink) == before
        assert bytes(memoryview(guest.memory)) != before


def test_shared_memory(memory):
    kind = make("shared", 1024)
    try:
        sweep(kind.mapping, 3, step=2)
        before = kind.mapping[:]
        sink = shared(len(before))
        with BackgroundSnapshot(kind.mapping, sink) as snapshot, Hammer(kind.mapping):
            assert snapshot.wait(DEADLINE)
        assert sink[:] == before
    finally:
        kind.close()


def test_transparent_huge_pages_stay_huge():
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -address_of(memory) % (2 * MIB)
    memory.madvise(mmap.MADV_HUGEPAGE)
    sweep(memory, 1)
    part = memoryview(memory)[start : start + 6 * MIB]

    def huge():
        with open("/proc/self/smaps") as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge()
    if not before:
        pytest.skip("no huge page was made; fix: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    sink = bytearray(6 * MIB)
    with BackgroundSnapshot(part, sink) as snapshot:
        assert snapshot.wait(DEADLINE)
    assert sink == part
    assert huge() == before


def test_a_writer_with_the_gil_is_served(memory):
    before, sink = memory[:], shared(len(memory))
    with BackgroundSnapshot(memory, sink):
        for page in range(len(memory) // PAGE - 1, -1, -1):
            memory[page * PAGE] ^= 0xFF
    assert sink[:] == before


def test_the_kernel_writes_too(memory):
    before, sink = memory[:], shared(len(memory))
    reader, writer = os.pipe()
    os.write(writer, b"x")
    with BackgroundSnapshot(memory, sink):
        os.readv(reader, [(ctypes.c_char * 1).from_address(address_of(memory) + len(memory) - PAGE)])
    os.close(reader)
    os.close(writer)
    assert sink[:] == before
    assert memory[len(memory) - PAGE] == ord("x")


# ---- discards


@pytest.mark.stress
def test_discards_are_never_seen_in_the_image():
    for seed in range(8):
        memory = filled(8 * MIB)
        before, sink = memory[:], shared(8 * MIB)
        generator = random.Random(SEED + seed)

        def discards(memory=memory, generator=generator):
            for _ in range(20):
                discard(address_of(memory) + generator.randrange(2000) * PAGE, 40 * PAGE)

        with BackgroundSnapshot(memory, sink) as snapshot, Hammer(memory, seed=seed):
            discarding = [Worker(discards), Worker(discards)]
            assert snapshot.wait(DEADLINE)
            for each in discarding:
                each.value()
        assert sink[:] == before


@pytest.fixture
def blocked(uffd):
    with blocked_snapshot(uffd) as one:
        yield one


def test_a_discard_waits_until_everything_is_saved(blocked):
    """Its pages are in the image as they were; it is done afterwards, and so are the writes that had to wait."""
    discarding = blocked.discard()
    writer = Writer(blocked.last - PAGE, 7)
    assert not writer.done(0.05)
    assert not discarding.done()
    assert blocked.memory[1000 * PAGE] == blocked.before[1000 * PAGE]
    blocked.unblock()
    assert blocked.snapshot.wait(DEADLINE)
    discarding.value()
    writer.value()
    assert blocked.sink[:] == blocked.before
    assert not blocked.snapshot.progress.held
    assert blocked.memory[1000 * PAGE : 1008 * PAGE] == bytes(8 * PAGE)
    assert blocked.memory[999 * PAGE] == 7


def test_who_claimed_a_page_unprotects_it(uffd):
    """The reader is stopped in the middle of page 700, and the other thread saves all around it: nobody may write."""
    memory, sink = filled(4 * MIB), shared(4 * MIB)
    before = memory[:]
    region = uffd.register(sink)
    region.place_zeros(1, 699)
    region.place_zeros(701, 323)
    with BackgroundSnapshot(memory, sink) as snapshot:
        sleeping(uffd, 1)
        writers = [Writer(address_of(memory) + 700 * PAGE, 7)]
        sleeping(uffd, 2)
        region.place_zeros(0, 1)
        wait_until(lambda: snapshot.progress.saved == 1023, "all other pages")
        writers.append(Writer(address_of(memory) + 700 * PAGE + 9, 8))
        assert not any(writer.done(0.05) for writer in writers)
        region.place_zeros(700, 1)
        for writer in writers:
            writer.value()
    assert sink[:] == before


SLIPS = """
import json
from pagecore import PagecoreError, Userfaultfd
from snapshot_rig import Blocked
from trap_rig import Gate, sweep
gate = Gate()
with Userfaultfd() as uffd:
    blocked = Blocked(uffd)
    gate.hide_again = 1
    discarding = blocked.discard(wait=False)
    try:
        answer = blocked.snapshot.wait(20)
    except PagecoreError as error:
        answer = str(error)
    discarding.value()
    sweep(blocked.memory, 9)
    print(json.dumps([answer, blocked.snapshot.state, blocked.memory[1000 * 4096]]))
    blocked.unblock()
    blocked.snapshot.close()
"""


def test_a_discard_whose_event_slipped_through_fails_the_snapshot(overlay):
    """It is read too early when the kernel's sign for it is hidden: then the pages are named, and nobody waits on."""
    message, state, content = run(overlay, SLIPS)
    assert re.search(r"pages \[1000, 1008\) were discarded before they were saved", message)
    assert (state, content) == ("failed", 0)


EARLY = """
import json
from concurrency import Worker, wait_until
from pagecore import BackgroundSnapshot
from snapshot_rig import filled
from trap_rig import Gate
from uffd_helpers import PAGE, address_of, discard, read_bytes
gate = Gate()
memory, sink = filled(64 * PAGE), bytearray(64 * PAGE)
before = memory[:]
address = address_of(memory)
discard(address + 50 * PAGE, PAGE)
gate.deny_protect = denied = 1 << 40
making = Worker(BackgroundSnapshot, memory, sink)
wait_until(lambda: gate.deny_protect < denied, "the constructor")
for _ in range(20):
    discarding = Worker(discard, address + 8 * PAGE, 4 * PAGE)
    read_bytes(address + 50 * PAGE, PAGE)
    discarding.value()
waits = not making.done()
gate.deny_protect = 0
with making.value() as snapshot:
    done = snapshot.wait(20)
wanted = bytearray(before)
wanted[8 * PAGE : 12 * PAGE] = bytes(4 * PAGE)
wanted[50 * PAGE : 51 * PAGE] = bytes(PAGE)
print(json.dumps([waits, done, sink == wanted]))
"""


def test_discards_before_the_moment_hold_nobody_up(overlay):
    """The reader runs before everything is protected: an event that it held would keep that from ever happening."""
    assert run(overlay, EARLY) == [True, True, True]
