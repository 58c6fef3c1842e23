"""Dirty rates: counted from logs, estimated from samples, and both against what was really written."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from concurrency import DEADLINE, Worker
from pagecore import Bitmap, DirtyLog, MemoryDirtyLog, PeerGoneError, UnsupportedError, Userfaultfd
from pagecore.dirty_rate import Figure, draw, estimate, measure_dirty_rate, sample_dirty_rate
from pagecore.testing import open_guest, page_checksums
from pagecore.testing._machine_state import layout

PAGE = 4096
NPAGES = 1000

pytestmark = pytest.mark.timeout(60)


def counted(pages):
    return Figure(pages, pages, pages)


class Script:
    """A wait that takes no time: each call makes the next of some writes, and the last may ask for an end."""

    def __init__(self, *writes, end=False):
        self.writes = list(writes)
        self.end = end
        self.asked = []

    def __call__(self, seconds):
        self.asked.append(seconds)
        self.writes.pop(0)()
        return self.end and not self.writes


# ---- logs


def marks(log, *pages):
    return lambda: log.bitmap.set_indices(list(pages))


def test_counts_what_was_written_in_each_interval_and_in_all():
    log = MemoryDirtyLog(NPAGES)
    log.bitmap.set_range(500, 100)  # before: nobody's interval
    seen = []
    wait = Script(marks(log, 1, 2, 3), marks(log), marks(log, 3, 4))
    found = measure_dirty_rate(log, seconds=7, intervals=3, wait=wait, report=seen.append)
    assert wait.asked == [7, 7, 7]
    assert [interval.pages for interval in found.intervals] == [counted(3), counted(0), counted(2)]
    assert list(found.intervals) == seen
    assert found.working_set == counted(4)
    assert found.pages == counted(5)
    assert (found.method, found.npages, found.sampled, found.unknown) == ("log", NPAGES, NPAGES, 0)
    assert not found.stopped


def test_rates_are_bytes_by_the_measured_seconds():
    log = MemoryDirtyLog(NPAGES)
    found = measure_dirty_rate(log, intervals=2, page_size=1 << 21, wait=Script(marks(log, 1), marks(log, 1, 2)))
    rates = [interval.bytes_per_second.value for interval in found.intervals]
    for interval, pages in zip(found.intervals, (1, 2), strict=True):
        assert interval.bytes_per_second == counted(pages * (1 << 21) / interval.seconds)
    assert found.seconds == sum(interval.seconds for interval in found.intervals) > 0
    assert found.bytes_per_second == counted(3 * (1 << 21) / found.seconds)
    assert found.spread == (min(rates), max(rates))


def test_intervals_follow_one_another_and_do_not_overlap():
    log = MemoryDirtyLog(NPAGES)
    began = time.monotonic()
    found = measure_dirty_rate(log, intervals=50, wait=lambda _seconds: log.bitmap.fill())
    assert 0 < found.seconds <= time.monotonic() - began


def test_a_true_answer_of_the_wait_ends_it_with_this_interval():
    log = MemoryDirtyLog(NPAGES)
    found = measure_dirty_rate(log, intervals=9, wait=Script(marks(log, 1), marks(log, 2), end=True))
    assert found.stopped
    assert [interval.pages.value for interval in found.intervals] == [1, 1]


def test_an_event_stops_it_from_another_thread():
    stop = threading.Event()
    began = threading.Event()
    worker = Worker(
        lambda: measure_dirty_rate(
            MemoryDirtyLog(NPAGES), seconds=3600, intervals=9, wait=lambda s: (began.set(), stop.wait(s))[1]
        )
    )
    assert began.wait(DEADLINE)
    stop.set()
    found = worker.value()
    assert found.stopped
    assert len(found.intervals) == 1


class LateLog(DirtyLog):
    """Goes on reporting a page until it is re-armed, and notices no write meanwhile, as KVM's with manual protect."""

    def __init__(self, size):
        super().__init__(size, rearms_at_collect=False)
        self.reported = Bitmap(size)
        self.rearmed = []

    def write(self, *pages):
        self.reported.set_indices(list(pages))

    def collect_into(self, bitmap):
        return bitmap.merge(self.reported)

    def rearm(self, first, count):
        self.rearmed.append((first, count))
        self.reported.clear_range(first, count)


def test_a_log_that_is_re_armed_apart_is_re_armed_exactly_where_it_reported():
    log = LateLog(NPAGES)
    log.write(900)
    wait = Script(lambda: log.write(1, 2, 70), lambda: log.write(2, 999))
    found = measure_dirty_rate(log, intervals=2, wait=wait)
    assert [interval.pages.value for interval in found.intervals] == [3, 2]
    assert found.working_set.value == 4
    assert log.rearmed == [(900, 1), (1, 2), (70, 1), (2, 1), (999, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, r"seconds 0 are outside \(0, inf\)"),
        ({"seconds": float("nan")}, "seconds nan are outside"),
        ({"intervals": 0}, "intervals 0 are below 1"),
        ({"page_size": 0}, "page size 0 is below 1"),
    ],
)
def test_bad_numbers_are_refused_before_the_log_is_touched(options, message):
    log = MemoryDirtyLog(NPAGES)
    log.bitmap.set(3)
    with pytest.raises(ValueError, match=message):
        measure_dirty_rate(log, **options)
    assert log.bitmap.count() == 1


def test_a_log_of_no_pages():
    found = measure_dirty_rate(MemoryDirtyLog(0), wait=Script(lambda: None))
    assert found.pages == found.working_set == counted(0)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kind", "log_kind"),
    [("kvm", "get"), ("kvm", "clear"), ("kvm", "ring"), ("process", "marks"), ("process", "pagemap")],
)
def test_the_demo_guest_is_reported_as_it_counts_itself(kind, log_kind):
    """Every page whose content changed; and no more than the guest says that it wrote, beside its tables, control pages
    and stacks, which it does not count."""
    try:
        guest = open_guest(32 << 20, kind=kind, seed=11, vcpus=2, dirty_log=log_kind)
    except UnsupportedError as error:
        pytest.skip(str(error))

    def steps(count):
        guest.stop_after(count)
        guest.run()
        assert guest.wait_stopped(DEADLINE)
        guest.pause()

    with guest:
        guest.boot()
        log = guest.dirty_log
        # KVM reports a page that a vCPU merely reads for the first time, so first all of them are read.
        steps(60_000)
        before, written = page_checksums(guest.memory), guest.stats().pages_written
        found = measure_dirty_rate(log, intervals=2, wait=Script(lambda: steps(1500), lambda: steps(1500)))
        written = guest.stats().pages_written - written
        changed = int((page_checksums(guest.memory) != before).sum())
        reserved = layout(guest.npages, 2)["data_first"]
    assert written > 500
    assert changed <= found.working_set.value <= found.pages.value
    assert found.pages.value <= written + 2 * reserved
    # Few of so many pages are written twice in an interval.
    assert found.pages.value >= 0.8 * written


# ---- samples

SIZE = 16 << 20
FREE = SIZE // PAGE // 2
# What the interpreter itself writes between two looks.
NOISE = 300

CHILD = f"""
import mmap, sys
memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
shared = mmap.mmap(int(sys.argv[1]), {SIZE})

def write(first, count, value, to=memory):
    for page in range(first, first + count):
        to[page * {PAGE} + 7] = value

def read(first, count, of=memory):
    return sum(of[page * {PAGE}] for page in range(first, first + count))

write(0, {FREE}, 1)         # the second half is not populated
write(0, {FREE}, 2)
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Child:
    """A process with memory of its own and memory that it shares with us, which does what it is told."""

    def __init__(self):
        self.memfd = os.memfd_create("sampled")
        os.ftruncate(self.memfd, SIZE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.memfd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=[self.memfd],
        )
        assert self.process.stdout.readline() == "ready\n"

    @property
    def pid(self):
        return self.process.pid

    def do(self, line):
        return lambda: self._do(line)

    def _do(self, line):
        self.process.stdin.write(line + "\n")
        assert self.process.stdout.readline() == "done\n"

    def end(self):
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)

    def present(self, name):
        """Pages of its mapping of that name that are in its page tables."""
        entries = []
        with open(f"/proc/{self.pid}/maps") as lines, open(f"/proc/{self.pid}/pagemap", "rb") as pagemap:
            for line in lines:
                first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
                if name in line if name else last - first == SIZE and line.split()[4] == "0":
                    pagemap.seek(first // PAGE * 8)
                    entries.append(np.frombuffer(pagemap.read((last - first) // PAGE * 8), np.uint64))
        assert entries
        return int((np.concatenate(entries) >> np.uint64(63)).sum())


@pytest.fixture
def child():
    child = Child()
    yield child
    child.end()
    os.close(child.memfd)


EVERY = {"pages_per_gib": (1 << 30) // PAGE}


@pytest.mark.kernel
def test_a_sample_of_all_pages_finds_each_written_page(child):
    nothing, writes = child.do("pass"), [child.do(f"write(0, {count}, 3)") for count in (2000, 1000)]
    found = sample_dirty_rate(child.pid, intervals=4, wait=Script(nothing, writes[0], nothing, writes[1]), **EVERY)
    assert found.method == "sampling"
    assert found.sampled == found.npages > 2 * SIZE // PAGE
    pages = [interval.pages for interval in found.intervals]
    assert all(figure == counted(figure.value) for figure in pages)
    # The second time the same was written again: that cannot be seen.
    for figure, least in zip(pages, (0, 2000, 0, 0), strict=True):
        assert least <= figure.value <= least + NOISE
    assert 2000 <= found.working_set.value <= 2000 + NOISE
    assert found.unknown >= SIZE // PAGE  # shared memory of which the process has no page yet


@pytest.mark.kernel
def test_a_sample_says_what_it_may_be_off(child):
    child.do("write(0, 1000, 4)")()
    found = sample_dirty_rate(child.pid, pages_per_gib=1, wait=Script(child.do("write(0, 2000, 5)")), seed=5)
    assert found.sampled == 1024 < found.npages
    pages = found.intervals[0].pages
    assert pages.low < pages.value < pages.high
    assert pages.low <= 2000 <= pages.high
    assert found.working_set == pages
    rate = found.bytes_per_second
    assert rate == Figure(*(bound * PAGE / found.seconds for bound in pages))


def test_the_same_seed_draws_the_same_sample():
    assert np.array_equal(draw(10_000, 300, 1), draw(10_000, 300, 1))
    assert not np.array_equal(draw(10_000, 300, 1), draw(10_000, 300, 2))
    assert np.array_equal(draw(77, 77, 1), np.arange(77))


@pytest.mark.kernel
def test_what_is_not_populated_is_neither_read_nor_populated(child):
    before = child.present(""), child.present("memfd:sampled")
    assert before == (FREE, 0)
    sample_dirty_rate(child.pid, wait=Script(child.do("pass")), **EVERY)
    assert (child.present(""), child.present("memfd:sampled")) == before
    assert os.fstat(child.memfd).st_blocks == 0


@pytest.mark.kernel
def test_the_first_touch_and_the_discard_of_a_page_are_writes_if_they_change_it(child):
    read_first = child.do(f"read({FREE}, 1000)")
    written_first = child.do(f"write({FREE + 1000}, 500, 6)")
    discarded = child.do(f"memory.madvise(mmap.MADV_DONTNEED, 0, 700 * {PAGE})")
    found = sample_dirty_rate(child.pid, intervals=3, wait=Script(read_first, written_first, discarded), **EVERY)
    for interval, least in zip(found.intervals, (0, 500, 700), strict=True):
        assert least <= interval.pages.value <= least + NOISE


@pytest.mark.kernel
def test_shared_memory_that_comes_into_the_page_tables_is_written_unless_it_is_zeros(child):
    os.pwrite(child.memfd, b"x" * (800 * PAGE), 0)
    content, zeros = child.do("read(0, 800, shared)"), child.do("read(800, 800, shared)")
    away = child.do("shared.madvise(mmap.MADV_DONTNEED)")  # out of the page tables; its content stays
    found = sample_dirty_rate(child.pid, intervals=4, wait=Script(content, zeros, away, content), **EVERY)
    for interval, least in zip(found.intervals, (800, 0, 0, 0), strict=True):
        assert least <= interval.pages.value <= least + NOISE


@pytest.mark.kernel
def test_pages_that_cannot_be_read_any_more_are_stepped_over(child):
    protect = (
        "import ctypes; at = ctypes.addressof(ctypes.c_char.from_buffer(memory)); protect = ctypes.CDLL(None).mprotect"
    )
    child.do(protect)()
    closed = child.do(
        f"assert not protect(ctypes.c_void_p(at + 100 * {PAGE}), {3 * PAGE}, 0);"
        f"assert not protect(ctypes.c_void_p(at + 1000 * {PAGE}), {PAGE}, 0);"
        "write(0, 100, 9); write(103, 897, 9); write(1001, 999, 9)"
    )
    found = sample_dirty_rate(child.pid, wait=Script(closed), **EVERY)
    assert 1996 <= found.intervals[0].pages.value <= 1996 + NOISE


@pytest.mark.kernel
def test_mappings_that_go_away_do_not_end_it(child):
    found = sample_dirty_rate(child.pid, wait=Script(child.do("memory.close()")), **EVERY)
    assert found.intervals[0].pages.value >= FREE  # they read as zeros: as discarded


@pytest.mark.kernel
def test_a_process_that_ends_is_gone(child):
    with pytest.raises(PeerGoneError, match=f"process {child.pid}"):
        sample_dirty_rate(child.pid, wait=Script(child.end), **EVERY)
    with pytest.raises(PeerGoneError, match=f"no process {child.pid}"):
        sample_dirty_rate(child.pid)


@pytest.mark.kernel
def test_a_process_that_has_ended_and_waits_for_its_parent_is_gone(child):
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(PeerGoneError, match=f"process {child.pid}"):
        sample_dirty_rate(child.pid)


@pytest.mark.kernel
def test_without_the_right_to_trace_it_the_fix_is_named():
    script = """
import os, sys
from pagecore import UnsupportedError
from pagecore.dirty_rate import sample_dirty_rate
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    sample_dirty_rate(1)
except UnsupportedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.startswith("reading the memory of process 1 is not available: "), done.stderr
    assert "CAP_SYS_PTRACE (sudo)" in done.stdout


@pytest.mark.kernel
def test_memory_whose_faults_somebody_serves_is_not_waited_for():
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        uffd = Userfaultfd()
    except UnsupportedError as error:
        pytest.skip(str(error))
    with uffd:
        uffd.register(memory)
        worker = Worker(lambda: sample_dirty_rate(os.getpid(), wait=lambda _seconds: None, **EVERY))
        # Broken, it sleeps in the kernel until the descriptor is closed.
        assert worker.done(DEADLINE)
        assert worker.value().npages > SIZE // PAGE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pid": 0}, r"process 0 is outside \[1, 2147483648\)"),
        ({"pages_per_gib": 0}, r"0 pages a GiB are outside \[1, 262144\]"),
        ({"seconds": -1}, "seconds -1 are outside"),
    ],
)
def test_bad_numbers_of_a_sample_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample_dirty_rate(**{"pid": os.getpid(), **options})


@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("sampled", [200, 900])
def test_the_interval_holds_the_truth_as_often_as_it_says(share, sampled):
    npages, tries = 2000, 400
    held = 0
    for seed in range(tries):
        written = np.random.default_rng([seed, 1]).random(npages) < share
        figure = estimate(int(written[draw(npages, sampled, seed)].sum()), sampled, npages)
        assert 0 <= figure.low <= figure.value <= figure.high <= npages
        held += figure.low <= written.sum() <= figure.high
    assert held >= 0.93 * tries
    # And is no wider than it has to be: some two standard deviations each way.
    if sampled == 900:
        assert figure.high - figure.low < 0.08 * npages


def test_the_interval_closes_as_the_sample_becomes_the_whole():
    assert estimate(3, 10, 10) == counted(3)
    widths = [figure.high - figure.low for figure in (estimate(n // 4, n, 1000) for n in (100, 400, 800, 996))]
    assert widths == sorted(widths, reverse=True)
    assert estimate(0, 100, 1000).low == 0
    assert estimate(100, 100, 1000).high == 1000
