"""The guests: that they run, check themselves, hint, log what they write, and stop where asked."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
import pytest

from concurrency import Worker, wait_until
from guest_rig import (
    DEADLINE,
    NPAGES,
    SIZE,
    allocated_pages,
    both,
    data_first,
    guests,
    run_steps,
)
from pagecore import Bitmap
from pagecore.errors import BusyError, ClosedError, PagecoreError, UnsupportedError
from pagecore.testing import _machine_state, open_guest, page_checksums, verify_memory
from uffd_helpers import sleeping


@pytest.fixture
def make():
    with guests() as build:
        yield build


@both
@pytest.mark.parametrize("vcpus", [1, 2])
def test_runs_checks_itself_and_verifies(make, kind, vcpus):
    guest = make(kind, seed=11, vcpus=vcpus)
    assert guest.kind == kind
    assert guest.reason
    guest.boot()
    booted = verify_memory(guest)
    assert booted.exact
    assert booted.steps == (0,) * vcpus
    assert 0.4 < booted.free / (booted.free + booted.right) < 0.55

    run_steps(guest, 20_000)
    stats = guest.stats()
    assert stats.steps == 20_000 * vcpus
    assert stats.self_checks > 5_000
    assert stats.self_check_errors == 0
    assert stats.first_error == ""
    assert min(stats.pages_written, stats.pages_freed, stats.pages_allocated) > 0
    found = verify_memory(guest)
    assert found.exact, str(found)
    assert found.steps == (20_000,) * vcpus
    assert found.free == stats.free_pages
    assert found.right + found.free + found.reserved_right + found.unchecked == NPAGES
    assert 0.4 < found.free / (found.free + found.right) < 0.6


@both
def test_stops_exactly_where_asked(make, kind):
    guest = make(kind, seed=5)
    guest.boot()
    run_steps(guest, 1)
    run_steps(guest, 1023)
    run_steps(guest, 0)
    run_steps(guest, 777)
    assert guest.stats().steps == 1801
    assert verify_memory(guest).exact

    guest.stop_after(1 << 40)
    guest.run()
    assert guest.wait_stopped(0.0) is False
    before = guest.stats().steps
    guest.stop_after(5_000)
    assert guest.wait_stopped(DEADLINE)
    # A running vCPU counts from the end of its batch.
    assert guest.stats().steps >= before + 5_000
    assert verify_memory(guest).exact


@both
def test_pause_stands_still_and_is_idempotent(make, kind):
    guest = make(kind, vcpus=2)
    guest.boot()
    assert guest.pause() == 0.0
    begin = time.monotonic()
    first = guest.run()
    last = guest.pause()
    assert begin <= first <= last <= time.monotonic()
    assert guest.pause() == last
    frozen = page_checksums(guest.memory)
    steps = guest.stats().steps
    assert (page_checksums(guest.memory) == frozen).all()
    assert guest.stats().steps == steps
    assert guest.resume() >= last
    assert guest.pause() > last
    assert verify_memory(guest).exact


@both
def test_the_report_names_exactly_the_free_pages(make, kind):
    guest = make(kind, seed=3, vcpus=2, free_share=0.3)
    guest.boot()
    seen = []
    writes = []
    guest.on_hints = lambda epoch, runs: seen.append((epoch, runs))
    guest.on_vmm_write = lambda runs: writes.extend(runs.tolist())
    guest.announce("START", 7)
    control = [[int(page), 1] for page in (_machine_state.layout(NPAGES, 2)["vcpu_first"] + 6 * np.arange(2))]
    assert writes == control
    guest.stop_after(0)
    guest.run()
    assert guest.wait_hints_reported(7, DEADLINE)
    assert guest.wait_stopped(DEADLINE)
    guest.pause()
    assert {epoch for epoch, _ in seen} == {7}
    assert all(runs.dtype == np.int64 and runs.shape[1] == 2 for _, runs in seen)
    hinted = [page for _, runs in seen for first, count in runs for page in range(first, first + count)]
    assert len(hinted) == len(set(hinted))
    free = set(range(data_first(guest), NPAGES)) - set(allocated_pages(guest).tolist())
    assert set(hinted) == free
    assert len(free) == verify_memory(guest).free
    # S12: what the machine wrote (commands, consumer indices) is reported, and is the control pages alone.
    assert all(run in control for run in writes)
    assert len(writes) > 4


@both
def test_hints_follow_frees_and_end_with_stop(make, kind):
    guest = make(kind, seed=9, free_share=0.5)
    guest.boot()
    hinted = []
    guest.on_hints = lambda epoch, runs: hinted.append((epoch, int(runs[:, 1].sum())))
    guest.announce("START", 1)
    guest.stop_after(0)
    guest.run()
    assert guest.wait_hints_reported(1, DEADLINE)
    report = sum(count for _, count in hinted)
    run_steps(guest, 30_000)
    # Far more frees than the ring has entries: the guest left to have it drained, and lost none.
    assert guest.stats().pages_freed > 1024
    assert sum(count for _, count in hinted) - report == guest.stats().pages_freed

    guest.announce("STOP", 1)
    before = list(hinted)
    run_steps(guest, 5_000)
    assert hinted == before
    guest.announce("START", 2)
    run_steps(guest, 5_000)
    assert guest.wait_hints_reported(2, DEADLINE)
    assert {epoch for epoch, _ in hinted[len(before) :]} == {2}
    guest.announce("DONE", 2)
    before = list(hinted)
    run_steps(guest, 5_000)
    assert hinted == before
    assert verify_memory(guest).exact


def test_a_stopped_guest_still_reports(make):
    guest = make()
    guest.boot()
    run_steps(guest, 10)
    guest.run()
    guest.announce("START", 4)
    assert guest.wait_hints_reported(4, DEADLINE)
    assert guest.stats().steps == 10


@pytest.mark.kernel
def test_what_happens_does_not_depend_on_the_host(make):
    """Same seed and steps: the same data and table, in a process, under KVM, with hints and without."""
    sums = []
    for kind, hints in (("process", False), ("process", True), ("kvm", True)):
        guest = make(kind, seed=21, vcpus=2)
        guest.boot()
        if hints:
            guest.announce("START", 1)
        for steps in (7_000, 1, 2_999) if hints else (10_000,):
            run_steps(guest, steps)
        first = _machine_state.layout(NPAGES, 2)["table_first"]
        sums.append(page_checksums(guest.memory, [[first, NPAGES - first]]))
    assert (sums[0] == sums[1]).all()
    assert (sums[0] == sums[2]).all()


def test_the_program_stands_alone(make):
    """A copy elsewhere does the same: no relocations, no calls, no constants outside its section."""
    code = _machine_state.program_code()
    assert 256 < len(code) <= 4 * 4096
    results = []
    with mmap.mmap(-1, 16384, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as copy:
        copy[: len(code)] = code
        for copied in (True, False):
            guest = make(seed=2)
            guest.boot()
            guest.announce("START", 1)
            guest.stop_after(1_000)
            if copied:
                left = [guest._machine.call_copy(copy) for _ in range(3)]
                assert left[-1] == 3
            else:
                guest.run()
                assert guest.wait_stopped(DEADLINE)
                guest.pause()
            first = _machine_state.layout(NPAGES)["table_first"]
            results.append(page_checksums(guest.memory, [[first, NPAGES - first]]))
    assert (results[0] == results[1]).all()


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="reads x86-64 instructions")
def test_the_program_calls_nothing_and_reads_nothing_outside():
    """What the run of a copy cannot show: paths that it does not take."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not there: apt-get install binutils")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", "-j", "pagecore_guest", _machine_state.__file__],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    instructions = [line.split(":", 1)[1].strip() for line in listing.splitlines() if ":\t" in line]
    assert len(instructions) > 100
    assert not [text for text in instructions if text.startswith("call") or "(%rip)" in text]
    # Other registers than the general ones would not be in KVM_GET_REGS.
    assert not [text for text in instructions if re.search(r"%(xmm|ymm|zmm|mm|st|fs|gs)", text)]


@both
def test_the_guest_finds_damage_itself(make, kind):
    guest = make(kind, seed=8)
    guest.boot()
    run_steps(guest, 100)
    for page in allocated_pages(guest):
        guest.memory[int(page) * 4096 + 800] ^= 1
    run_steps(guest, 100)
    stats = guest.stats()
    assert stats.self_check_errors > 0
    assert "word 100" in stats.first_error
    assert not verify_memory(guest).exact
    assert verify_memory(guest).self_check_errors == stats.self_check_errors


def test_freed_pages_keep_their_content(make):
    guest = make(seed=4)
    guest.boot()
    free = set(range(data_first(guest), NPAGES)) - set(allocated_pages(guest).tolist())
    filled = [page for page in free if any(guest.memory[page * 4096 : page * 4096 + 64])]
    assert len(filled) > len(free) * 0.8
    assert len(filled) < len(free)  # some versions are zero pages


def test_a_process_logs_exactly_what_it_writes(make):
    guest = make(seed=29, vcpus=2)
    guest.boot()
    guest.announce("START", 1)
    run_steps(guest, 10)
    log = guest.dirty_log
    log.collect_into(Bitmap(NPAGES))
    for command, steps in (("STOP", 1), ("STOP", 3_000), ("START", 3_000)):
        before = page_checksums(guest.memory)
        guest.announce(command, 2)
        run_steps(guest, steps)
        changed = set(np.flatnonzero(before != page_checksums(guest.memory)).tolist())
        reported = Bitmap(NPAGES)
        log.collect_into(reported)
        pages = set(reported.indices().tolist())
        assert changed - pages == set()
        # Zeros written over zeros are a write too, and change nothing.
        assert all(not any(guest.memory[page * 4096 : (page + 1) * 4096]) for page in pages - changed)
        assert log.collect_into(reported) == 0
    # Nothing but the guest writes here: its own counters are in the log too.
    guest.announce("STOP", 2)
    guest.stop_after(1 << 40)
    log.collect_into(Bitmap(NPAGES))
    guest.run()
    guest.pause()
    reported = Bitmap(NPAGES)
    log.collect_into(reported)
    control = _machine_state.layout(NPAGES, 2)["vcpu_first"]
    assert reported[control]
    assert reported[control + 6]


def test_the_dirty_rate_is_kept(make):
    rate = 4 << 20
    guest = make(dirty_rate=rate, vcpus=2)
    guest.boot()
    begin = guest.run()
    guest.stop_after(1_000)
    assert guest.wait_stopped(DEADLINE)
    elapsed = guest.pause() - begin
    stats = guest.stats()
    # At most a batch of each vCPU ahead of the rate.
    assert stats.pages_written * 4096 <= rate * elapsed + 2 * 4096 * guest.config.batch
    assert guest.config.batch < 1024


def test_a_guest_that_hints_keeps_the_rate_too(make):
    # At this rate a batch is long enough to free something, so that nearly all come back to Python with hints.
    rate = 128 << 20
    guest = make(dirty_rate=rate)
    guest.on_hints = lambda epoch, runs: None
    guest.boot()
    begin = guest.run()
    guest.announce("START", 1)
    assert guest.wait_hints_reported(1, DEADLINE)
    wait_until(lambda: guest.stats().pages_written >= 20_000, "20 000 pages written")
    elapsed = guest.pause() - begin
    assert guest.stats().pages_written * 4096 <= rate * elapsed + 2 * 4096 * guest.config.batch


def test_pause_does_not_wait_for_the_pace(make):
    # A page of 4096 bytes at 16 bytes a second: four minutes.
    guest = make(dirty_rate=16, free_share=0.0)
    guest.boot()
    guest.run()
    wait_until(lambda: guest.stats().pages_written, "the first page written")
    guest.pause(timeout=DEADLINE)
    guest.resume(timeout=DEADLINE)


def test_a_callback_that_fails_does_not_end_the_guest(make, caplog):
    guest = make(seed=6)
    guest.boot()

    def broken(epoch, runs):
        raise LookupError(f"epoch {epoch}")

    guest.on_hints = broken
    guest.announce("START", 1)
    guest.run()
    with pytest.raises(LookupError, match="epoch 1"):
        guest.wait_hints_reported(1, DEADLINE)
    with pytest.raises(LookupError, match="epoch 1"):
        guest.pause()
    assert "a callback of" in caplog.text
    assert verify_memory(guest).exact


def test_a_callback_cannot_pause_its_own_guest(make):
    guest = make()
    guest.boot()
    guest.on_hints = lambda epoch, runs: guest.pause()
    guest.announce("START", 1)
    guest.run()
    with pytest.raises(RuntimeError, match="wait for itself"):
        guest.wait_hints_reported(1, DEADLINE)


def ring_index(guest, produced):
    """Overwrite the guest's own idea of its ring, as a guest gone wrong would."""
    control = _machine_state.layout(NPAGES)["vcpu_first"] * 4096
    guest.memory[control + 26 * 8 : control + 27 * 8] = produced.to_bytes(8, "little")


def test_a_ring_that_claims_too_much_fails_the_vcpu(make, caplog):
    guest = make()
    guest.boot()
    guest.stop_after(0)
    ring_index(guest, 5_000)
    guest.run()
    with pytest.raises(PagecoreError, match="claims 5000 entries of 1024"):
        guest.wait_stopped(DEADLINE)
    with pytest.raises(PagecoreError, match="5000"):
        guest.pause()
    assert "vCPU 0" in caplog.text


def test_hints_outside_the_memory_are_dropped(make):
    guest = make()
    guest.boot()
    seen = []
    guest.on_hints = lambda epoch, runs: seen.extend(runs.tolist())
    ring = (_machine_state.layout(NPAGES)["vcpu_first"] + 1) * 4096
    for at, (first, count) in enumerate(((NPAGES, 1), (NPAGES - 1, 2), (0xFFFFFFFF, 0xFFFFFFFF), (NPAGES - 1, 1))):
        guest.memory[ring + 16 * at : ring + 16 * at + 16] = np.array(
            [3, first | count << 32], dtype=np.uint64
        ).tobytes()
    guest.stop_after(0)
    ring_index(guest, 4)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    assert seen == [[NPAGES - 1, 1]]
    assert guest.stats().bad_hints == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": SIZE + 4096}, "16781312"),
        ({"size": 8 << 20}, "8388608"),
        ({"seed": -1}, "seed -1"),
        ({"vcpus": 17}, "17 vCPUs"),
        ({"vcpus": 0}, "0 vCPUs"),
        ({"free_share": 1.0}, "free_share 1.0"),
        ({"dirty_rate": 0}, "dirty_rate 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        open_guest(**{"size": SIZE, "kind": "process", **options})


def test_bad_names():
    with pytest.raises(ValueError, match="kind 'xen'"):
        open_guest(SIZE, kind="xen")
    with pytest.raises(ValueError, match="role 'both'"):
        open_guest(SIZE, role="both")


def test_without_kvm(make, tmp_path):
    absent = str(tmp_path / "kvm")
    with pytest.raises(UnsupportedError, match="modprobe"):
        open_guest(SIZE, kind="kvm", device=absent)
    guest = make("auto", device=absent)
    assert guest.kind == "process"
    assert absent in guest.reason
    with pytest.raises(UnsupportedError, match="KVM"):
        open_guest(SIZE, kind="kvm", device="/dev/null")


UNPRIVILEGED = """
import os, sys
from pagecore.errors import UnsupportedError
from pagecore.testing import open_guest
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if os.access("/dev/kvm", os.R_OK | os.W_OK):
    print("allowed")
    sys.exit()
with open_guest(16 << 20) as guest:
    print(guest.kind, guest.reason, sep="|")
try:
    open_guest(16 << 20, kind="kvm")
except UnsupportedError as error:
    print(error)
"""


@pytest.mark.kernel
def test_without_permission_for_kvm():
    if not os.path.exists("/dev/kvm"):
        pytest.skip("/dev/kvm is not there: test_without_kvm covers that")
    done = subprocess.run([sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    if lines == ["allowed"]:
        pytest.skip("every user may use /dev/kvm here: sudo chmod 660 /dev/kvm")
    kind, reason = lines[0].split("|")
    assert kind == "process"
    assert "usermod -aG kvm" in reason
    assert "no permission for /dev/kvm" in lines[1]


def test_life_cycle(make):
    guest = make()
    assert guest.memory[0] == 0
    guest.boot()
    with pytest.raises(ValueError, match="command 'GO'"):
        guest.announce("GO", 1)
    with pytest.raises(IndexError, match="outside"):
        guest.read(SIZE - 1, 2)
    guest.run()
    with pytest.raises(BusyError, match="still running"):
        guest._machine.close()
    guest.close()
    guest.close()
    assert guest.stats().steps >= 0
    for use in (guest.boot, guest.run, guest.pause, guest.save_state, lambda: guest.dirty_log):
        with pytest.raises(ClosedError):
            use()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]


@pytest.mark.kernel
def test_a_guest_is_not_closed_under_a_call(make, open_uffd):
    """Its machine would be gone when the call comes back from a missing page."""
    guest = make("process", role="destination")
    uffd = open_uffd()
    region = uffd.register(guest.memory)
    reader = Worker(guest.read, 0, 1)
    sleeping(uffd, 1)
    with pytest.raises(BusyError, match="1 calls of this guest are still running"):
        guest._machine.close()
    with pytest.warns(ResourceWarning, match="left open"):
        guest.close()
    region.place_zeros(0, 1)
    assert reader.value() == bytes(1)
    uffd.unregister(region)
    guest._machine.close()


def test_an_open_guest_left_behind_warns():
    guest = open_guest(SIZE, kind="process")
    with pytest.warns(ResourceWarning, match="unclosed <Guest process source of 16 MiB"):
        del guest
