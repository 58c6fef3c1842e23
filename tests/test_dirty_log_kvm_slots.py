"""All of KVM's logs in a tracker of several slots; who excludes whom; and KVMs that lack something."""

from __future__ import annotations

import errno
import signal

import pytest

from concurrency import DEADLINE, Worker
from kvm_rig import NPAGES, SIZE, bits, collect, open_kvm_guest, run_and_check, run_steps, slow_bitmap
from pagecore import AnswerKind, PageTracker, TrackedRegion
from pagecore.errors import BusyError, PagecoreError
from pagecore.testing import open_guest, page_checksums, verify_memory
from preload import compiled, run_with
from uffd_helpers import sleeping

pytestmark = pytest.mark.kernel

LOGS = ["get", "clear", "ring"]


def regions_of(guest, **options):
    return [
        TrackedRegion(id=number, npages=count, dirty_log=log, **options)
        for number, ((_, count), log) in enumerate(zip(guest.slots, guest.dirty_logs, strict=True))
    ]


def mark_in(tracker, guest):
    """S12: what the machine wrote, told to the region that has it."""

    def mark(runs):
        for first, count in runs.tolist():
            for number, (begin, pages) in enumerate(guest.slots):
                low, high = max(first, begin), min(first + count, begin + pages)
                if low < high:
                    tracker.mark([[low - begin, high - low]], region=number)

    return mark


@pytest.mark.parametrize(
    ("dirty_log", "rearm"), [("get", "sync"), ("clear", "sync"), ("clear", "lazy"), ("ring", "sync")]
)
def test_memory_of_several_slots_is_copied_under_a_running_guest(dirty_log, rearm):
    """Torn and stale copies are owed again and copied anew, until the guest stands still: each slot by its own log."""
    with open_kvm_guest(dirty_log, slots=3, ring_size=4096) as guest:
        options = {"rearm": "lazy", "chunk_shift": 8} if rearm == "lazy" else {}
        tracker = PageTracker(regions=regions_of(guest, **options))
        guest.on_vmm_write = mark_in(tracker, guest)
        image = bytearray(SIZE)
        tracker.sync()
        guest.run()
        for number in range(6):
            if number == 5:
                guest.pause()
            tracker.sync(last=number == 5)
            while batch := tracker.take_batch():
                for region, runs in batch:
                    begin = guest.slots[region][0]
                    for first, count in runs.tolist():
                        run = slice((begin + first) * 4096, (begin + first + count) * 4096)
                        image[run] = guest.memory[run]
        found = verify_memory(image, guest.config)
        assert found.exact, str(found)
        assert min(found.steps) > 0
        assert (page_checksums(image) == page_checksums(guest.memory)).all()


def test_a_sync_rearms_what_is_cleared_apart():
    """Hints may promise `armed` beside manual protection: the page that is used again is owed again (S3)."""
    with open_kvm_guest("clear") as guest:
        tracker = PageTracker(NPAGES, dirty_log=guest.dirty_log)
        guest.on_vmm_write = tracker.mark
        tracker.sync()
        with tracker.hint_session("armed", marked=guest.dirty_log.misses) as session:
            assert session.clear_runs([[0, NPAGES]], session.start()) == NPAGES
            run_steps(guest, 100)
            assert tracker.sync() > 0
        written = tracker.dirty.indices().tolist()
        assert tracker.resolve(written[0])[0].kind is AnswerKind.OWED


@pytest.mark.parametrize("dirty_log", LOGS)
def test_one_at_a_time(dirty_log, uffd):
    """A collect that sleeps on its caller's bitmap: others are told so, and nobody waits or overwrites its buffer."""
    with open_kvm_guest(dirty_log) as guest, slow_bitmap(uffd, NPAGES) as (bitmap, region):
        log = guest.dirty_log
        run_steps(guest, 50)
        worker = Worker(log.collect_into, bitmap)
        sleeping(uffd, 1)
        uses = [lambda: collect(log), log.disable, log.close]
        if dirty_log == "clear":
            uses += [lambda: log.rearm(0, 1), lambda: log.rearm_seen(0, 64, bits({1}))]
        for use in uses:
            with pytest.raises(BusyError, match="of this dirty log is under way"):
                use()
        region.place_zeros(0, 1)
        assert worker.value() == bitmap.count() > 0
        log.rearm(0, NPAGES)
        run_and_check(guest, 50)


def test_slots_are_parts_of_the_guest():
    with open_kvm_guest("get", slots=8) as guest:
        assert len(guest.slots) == 8
        at = 0
        for (first, count), log in zip(guest.slots, guest.dirty_logs, strict=True):
            assert first == at
            assert count % 64
            assert (log.slot, log.size) == (guest.slots.index((first, count)), count)
            at += count
        assert at == NPAGES
        with pytest.raises(PagecoreError, match=r"8 memory slots.*dirty_logs"):
            guest.dirty_log  # noqa: B018
        run_and_check(guest, 200)
        assert verify_memory(guest).exact


def test_which_guest_has_which_log():
    with open_guest(SIZE, dirty_log="marks") as guest:
        assert (guest.kind, guest.log_kind) == ("process", "marks")
        assert guest.slots == ((0, NPAGES),)
        assert guest.dirty_logs == (guest.dirty_log,)
        guest.stop_logging()
        assert guest.dirty_log.rearms_at_collect
    for options, message in [
        ({"dirty_log": "soft"}, "'soft' is none of auto"),
        ({"dirty_log": "marks", "kind": "kvm"}, "'marks' is not for a kvm guest: it has get, clear, ring"),
        ({"dirty_log": "ring", "kind": "process"}, "'ring' is not for a process guest"),
        ({"slots": 2, "kind": "process"}, "2 memory slots are for kind='kvm'"),
        ({"slots": 9, "kind": "kvm"}, "9 memory slots are outside"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_guest(SIZE, **options)
    for dirty_log in LOGS:
        with open_kvm_guest(dirty_log) as guest:
            assert (guest.kind, guest.log_kind) == ("kvm", dirty_log)


# ---- other kernels: KVM_CHECK_EXTENSION and KVM_RESET_DIRTY_RINGS by a shim, each case in a process of its own

LACKING = """
import sys
from pagecore import KvmDirtyRing, UnsupportedError
from pagecore.testing import open_guest
for dirty_log in ("clear", "ring"):
    try:
        with open_guest(16 << 20, dirty_log=dirty_log) as guest:
            guest.dirty_log
    except UnsupportedError as error:
        print(error)
with open_guest(16 << 20, kind="kvm", dirty_log="get") as guest:
    guest.boot()
    try:
        KvmDirtyRing.switch_on(guest._machine.vm_fd)
    except UnsupportedError as error:
        print(error)
    guest.dirty_log
"""

CUT_SHORT = """
import sys
from kvm_rig import collect, open_kvm_guest, run_and_check, run_steps
from pagecore import Bitmap, ProtocolError, UffdError
with open_kvm_guest("ring") as guest:
    log = guest.dirty_log
    if sys.argv[1] == "whole":
        for _ in range(3):
            run_and_check(guest, 100)
    elif sys.argv[1] == "short":
        run_steps(guest, 100)
        found = Bitmap(log.size)
        for _ in range(3):
            try:
                log.collect_into(found)
            except ProtocolError as error:
                print(error, found.count())
        assert log.ring.reap() == 0, "all was reset nevertheless: no vCPU is kept out"
        run_steps(guest, 100)
        assert log.ring.reap() > 0
        log.disable()
        log.enable()
        for _ in range(3):
            run_and_check(guest, 100)
    else:
        run_steps(guest, 100)
        found = Bitmap(log.size)
        try:
            log.collect_into(found)
        except UffdError as error:
            print(error, found.count())
"""

STORM = """
import ctypes, os, signal
from kvm_rig import open_kvm_guest, run_and_check
shim = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
count = lambda name: ctypes.c_long.in_dll(shim, name).value
seen = {signal.SIGUSR1: 0, signal.SIGALRM: 0}
def note(number, frame):
    seen[number] += 1
with open_kvm_guest("ring") as guest:
    guest.dirty_log
    for number in seen:
        signal.signal(number, note)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    for _ in range(20):
        run_and_check(guest, 2_000)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
print(count("resets"), count("unblocked_resets"), seen[signal.SIGUSR1], seen[signal.SIGALRM])
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return compiled("kvm_shim.c", tmp_path_factory.mktemp("shim"))


def run(shim, program, *arguments, **settings):
    return run_with(shim, program, *arguments, timeout=DEADLINE, **settings).splitlines()


def test_a_kvm_without_these_logs(shim):
    """Asked, not tried: a KVM that has no such thing may take the ioctl for another one."""
    clear, ring, switch_on = run(shim, LACKING, LACKING="168,192,223")
    assert clear.startswith("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is not available: Linux 5.2")
    assert ring.startswith("KVM's dirty ring is not available: Linux 5.11")
    assert switch_on.startswith("KVM_CAP_DIRTY_LOG_RING is not available: Linux 5.11")


def test_a_kvm_with_the_older_ring(shim):
    """Before Linux 6.1 the ring has another number; on x86 it is the same."""
    run(shim, CUT_SHORT, "whole", LACKING="223")


def test_no_signal_reaches_a_reset(shim):
    """Linux 6.16: a pending signal ends a reset, and up to 64 pages that count as reset are not protected again."""
    (line,) = run(shim, STORM, SIGNAL=str(int(signal.SIGUSR1)))
    resets, unblocked, sent, ticks = map(int, line.split())
    assert resets >= 20
    assert unblocked == 0
    assert sent, "what was sent meanwhile is delivered afterwards"
    assert ticks


@pytest.mark.parametrize("settings", [{}, {"IDLE_ERRNO": str(errno.EINTR)}])
def test_a_reset_that_is_cut_short_fails_the_log(shim, settings):
    """A stop or the freezer cannot be blocked: nobody knows which pages stayed writable, until logging begins anew."""
    lines = run(shim, CUT_SHORT, "short", IDLE_RESETS="20", **settings)
    assert len(lines) == 3
    assert all("a reset cut short" in line and line.endswith(" 0") for line in lines)


def test_a_reset_that_gets_nowhere_is_an_error(shim):
    (line,) = run(shim, CUT_SHORT, "never", IDLE_RESETS="1000000")
    assert "Input/output error" in line
    assert line.endswith(" 0"), "nothing was handed on"
