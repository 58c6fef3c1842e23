"""The guests: that they run, check themselves, hint, stop where asked, and carry on elsewhere from their state."""

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
from pagecore import Bitmap
from pagecore.errors import BusyError, ClosedError, PagecoreError, ProtocolError, UnsupportedError
from pagecore.testing import (
    GuestConfig,
    PlacementAudit,
    _machine_state,
    compare_placed,
    open_guest,
    page_checksums,
    verify_memory,
)
from uffd_helpers import sleeping

SIZE = 16 << 20
NPAGES = SIZE // 4096
DEADLINE = 20.0

both = pytest.mark.parametrize(
    "kind", ["process", pytest.param("kvm", marks=pytest.mark.kernel)], ids=["process", "kvm"]
)


@pytest.fixture
def make(request):
    """Open guests that are closed when the test ends; skip where KVM cannot be had, saying what would help."""
    guests = []

    def build(kind="process", size=SIZE, **options):
        try:
            guest = open_guest(size, kind=kind, **options)
        except UnsupportedError as error:
            pytest.skip(str(error))
        guests.append(guest)
        return guest

    yield build
    for guest in guests:
        guest.close()


def run_steps(guest, steps):
    guest.stop_after(steps)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    guest.pause()


def copy_memory(source, destination):
    destination.memory[:] = source.memory[:]


def pages_of(runs):
    return {page for first, count in runs for page in range(first, first + count)}


def data_first(guest):
    return _machine_state.layout(guest.npages, guest.config.vcpus)["data_first"]


def allocated_pages(guest):
    """Data pages that are allocated, by the guest's own table: a shorthand for tests that damage one."""
    layout = _machine_state.layout(guest.npages, guest.config.vcpus)
    first, count = layout["data_first"], layout["data_pages"]
    table = np.frombuffer(guest.read(layout["table_first"] * 4096, count * 4), dtype=np.uint32)
    return first + np.flatnonzero(table & 1)


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


class TestVerify:
    @pytest.fixture
    def guest(self, make):
        guest = make(seed=77, vcpus=2)
        guest.boot()
        run_steps(guest, 4_000)
        assert verify_memory(guest).exact
        return guest

    @staticmethod
    def written_page(guest):
        """An allocated page whose content is not zeros."""
        for page in allocated_pages(guest):
            if any(guest.memory[int(page) * 4096 : int(page) * 4096 + 8]):
                return int(page)
        raise AssertionError("no such page")

    def test_a_flipped_bit(self, guest):
        page = self.written_page(guest)
        guest.memory[page * 4096 + 4095] ^= 0x80
        found = verify_memory(guest)
        assert (found.wrong, found.wrong_pages, found.exact) == (1, (page,), False)
        assert str(page) in str(found)

    def test_a_zeroed_page(self, guest):
        page = self.written_page(guest)
        guest.memory[page * 4096 : (page + 1) * 4096] = bytes(4096)
        assert verify_memory(guest).wrong_pages == (page,)

    def test_a_stale_page_and_a_stale_table_with_it(self, guest):
        layout = _machine_state.layout(NPAGES, 2)
        before = guest.memory[:]
        run_steps(guest, 4_000)
        assert verify_memory(guest).exact
        now = allocated_pages(guest)
        old = np.frombuffer(before, np.uint8).reshape(-1, 4096)
        new = np.frombuffer(guest.memory[:], np.uint8).reshape(-1, 4096)
        page = next(int(page) for page in now if (old[page] != new[page]).any())
        guest.memory[page * 4096 : (page + 1) * 4096] = before[page * 4096 : (page + 1) * 4096]
        assert verify_memory(guest).wrong_pages == (page,)
        # The guest's own table may say that the old version is right: it is not believed.
        first, count = layout["table_first"], layout["table_pages"]
        table = slice(first * 4096, (first + count) * 4096)
        guest.memory[table] = before[table]
        found = verify_memory(guest)
        assert found.wrong_pages == (page,)
        assert found.reserved_wrong > 0

    def test_a_stale_control_page(self, guest):
        first = _machine_state.layout(NPAGES, 2)["vcpu_first"]
        before = guest.memory[first * 4096 : (first + 1) * 4096]
        run_steps(guest, 4_000)
        guest.memory[first * 4096 : (first + 1) * 4096] = before
        found = verify_memory(guest)
        assert found.wrong > 0
        assert verify_memory(guest, steps=[8_000, 8_000]).reserved_wrong_pages == (first,)

    def test_garbage_in_the_control_page_ends(self, guest):
        first = _machine_state.layout(NPAGES, 2)["vcpu_first"]
        guest.memory[first * 4096 : (first + 1) * 4096] = b"\xfe" * 4096
        found = verify_memory(guest)
        assert first in found.reserved_wrong_pages

    @pytest.mark.parametrize("name", ["paging_first", "code_first"])
    def test_a_damaged_page_that_never_changes(self, guest, name):
        page = _machine_state.layout(NPAGES, 2)[name]
        guest.memory[page * 4096] ^= 1
        found = verify_memory(guest)
        assert (found.reserved_wrong_pages, found.wrong) == ((page,), 0)
        assert not found.exact

    def test_free_pages_may_hold_anything(self, guest):
        free = set(range(data_first(guest), NPAGES)) - set(allocated_pages(guest).tolist())
        for page in free:
            guest.memory[page * 4096 : (page + 1) * 4096] = bytes(4096)
        found = verify_memory(guest)
        assert found.exact
        assert found.free == len(free)
        run_steps(guest, 1_000)
        assert verify_memory(guest).exact

    def test_memory_and_config_alone(self, guest):
        assert verify_memory(guest.memory, guest.config).exact
        assert not verify_memory(guest.memory, GuestConfig(SIZE, seed=78, vcpus=2)).exact
        with pytest.raises(ValueError, match="config"):
            verify_memory(guest.memory)
        with pytest.raises(ValueError, match="33554432"):
            verify_memory(guest.memory, GuestConfig(32 << 20, seed=77, vcpus=2))
        with pytest.raises(ValueError, match="steps of 1 vCPUs, need 2"):
            verify_memory(guest, steps=[1])


def test_freed_pages_keep_their_content(make):
    guest = make(seed=4)
    guest.boot()
    free = set(range(data_first(guest), NPAGES)) - set(allocated_pages(guest).tolist())
    filled = [page for page in free if any(guest.memory[page * 4096 : page * 4096 + 64])]
    assert len(filled) > len(free) * 0.8
    assert len(filled) < len(free)  # some versions are zero pages


@both
@pytest.mark.parametrize("vcpus", [1, 2])
def test_carries_on_in_a_second_guest(make, kind, vcpus):
    source = make(kind, seed=13, vcpus=vcpus)
    source.boot()
    source.run()
    source.pause()
    state = source.save_state()
    destination = make(kind, seed=13, vcpus=vcpus, role="destination")
    copy_memory(source, destination)
    destination.load_state(state)
    run_steps(destination, 5_000)
    found = verify_memory(destination)
    assert found.exact, str(found)
    assert all(there == here + 5_000 for there, here in zip(found.steps, verify_memory(source).steps, strict=True))


@both
def test_a_stop_asked_for_at_the_source_holds_at_the_destination(make, kind):
    source = make(kind, seed=14)
    source.boot()
    source.run()
    source.stop_after(1 << 30)
    source.pause()
    source.stop_after(3_000)
    destination = make(kind, seed=14, role="destination")
    destination.load_state(source.save_state())
    copy_memory(source, destination)
    destination.run()
    assert destination.wait_stopped(DEADLINE)
    destination.pause()
    assert verify_memory(destination).steps[0] == verify_memory(source).steps[0] + 3_000


@both
def test_a_stop_asked_for_while_a_vcpu_is_busy_is_in_the_memory_that_migrates(make, kind):
    guest = make(kind, seed=15)
    guest.boot()
    busy, release = threading.Event(), threading.Event()

    def hold(epoch, runs):
        busy.set()
        assert release.wait(DEADLINE)

    guest.on_hints = hold
    guest.announce("START", 1)
    guest.run()
    assert busy.wait(DEADLINE)
    guest.stop_after(2_000)
    with pytest.raises(TimeoutError, match="did not leave the guest"):
        guest.pause(timeout=0.0)
    release.set()
    guest.pause()
    destination = make(kind, seed=15, role="destination")
    destination.load_state(guest.save_state())
    copy_memory(guest, destination)
    destination.run()
    assert destination.wait_stopped(DEADLINE)
    destination.pause()
    assert destination.stats().steps == guest.stats().steps + 2_000


CHILD = """
import sys
from pagecore.testing import open_guest, verify_memory
kind, path = sys.argv[1:]
with open_guest(16 << 20, kind=kind, seed=31, vcpus=2, role="destination") as guest:
    with open(path, "rb") as image:
        guest.memory[:] = image.read(guest.config.size)
        guest.load_state(image.read())
    guest.stop_after(3_000)
    guest.run()
    assert guest.wait_stopped(20)
    guest.pause()
    found = verify_memory(guest)
    print(found.exact, *found.steps, guest.stats().self_check_errors)
"""


@both
def test_carries_on_in_another_process(make, kind, tmp_path):
    guest = make(kind, seed=31, vcpus=2)
    guest.boot()
    guest.run()
    guest.pause()
    image = tmp_path / "image"
    image.write_bytes(guest.memory[:] + guest.save_state())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(image)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = [str(step + 3_000) for step in verify_memory(guest).steps]
    assert done.stdout.split() == ["True", *steps, "0"]


def test_a_state_that_does_not_fit_is_refused(make):
    guest = make(seed=1)
    guest.boot()
    state = guest.save_state()
    for options, field in (
        ({"seed": 2}, "seed"),
        ({"vcpus": 2, "seed": 1}, "vcpus"),
        ({"size": 32 << 20, "seed": 1}, "size"),
        ({"free_share": 0.25, "seed": 1}, "free share"),
    ):
        with pytest.raises(ProtocolError, match=field):
            make(role="destination", **options).load_state(state)
    for damaged, field in (
        (b"", "0 bytes"),
        (state[:-1], "bytes"),
        (state + b"x", "announces"),
        (b"XXXX" + state[4:], "magic"),
        (state[:4] + b"\x09" + state[5:], "version"),
        (state[:20] + bytes([state[20] ^ 1]) + state[21:], "checksum"),
    ):
        with pytest.raises(ProtocolError, match=field):
            guest.load_state(damaged)
    guest.load_state(state)


@pytest.mark.kernel
def test_a_state_of_the_other_kind_is_refused(make):
    kvm = make("kvm")
    process = make("process", role="destination")
    with pytest.raises(ProtocolError, match="kind: kvm does not fit this guest's process"):
        process.load_state(kvm.save_state())


@both
def test_a_copy_loop_with_the_dirty_log_is_exact(make, kind):
    """Precopy in miniature, hints on, so that the machine writes too: what the log misses it reports (S12)."""
    guest = make(kind, seed=17, vcpus=2)
    destination = make(kind, seed=17, vcpus=2, role="destination")
    guest.boot()
    marked = Bitmap(guest.npages)
    guest.on_vmm_write = marked.set_runs
    guest.run()
    log = guest.dirty_log
    owed = Bitmap(guest.npages)
    owed.fill()
    for round_number in range(6):
        guest.announce("START", round_number + 1)
        for first, count in owed.take_runs():
            copied = slice(int(first) * 4096, int(first + count) * 4096)
            destination.memory[copied] = guest.memory[copied]
        if round_number == 4:
            guest.pause()
        log.collect_into(owed)
        marked.drain_into(owed)
    destination.load_state(guest.save_state())
    assert verify_memory(destination.memory, destination.config).exact
    assert (page_checksums(destination.memory) == page_checksums(guest.memory)).all()
    destination.announce("DONE", 5)
    run_steps(destination, 2_000)
    assert verify_memory(destination).exact


@pytest.mark.kernel
@both
def test_runs_on_while_its_pages_arrive(make, kind):
    """Postcopy in miniature: the destination's vCPUs fault on missing memory, served without the GIL."""
    from pagecore import Feature, PlacementLoop, Userfaultfd
    from pagecore.page_source import BufferSource

    source = make(kind, seed=19, vcpus=2)
    source.boot()
    source.run()
    source.pause()
    destination = make(kind, seed=19, vcpus=2, role="destination")
    destination.load_state(source.save_state())
    audit = PlacementAudit(NPAGES)
    with Userfaultfd(Feature.EVENT_REMOVE) as uffd:
        if uffd.user_mode_only and kind == "kvm":
            pytest.skip("a vCPU's faults need a full userfaultfd: sudo sysctl vm.unprivileged_userfaultfd=1")
        region = uffd.register(destination.memory)
        try:
            with PlacementLoop([region], BufferSource(source.memory), observer=audit) as loop:
                destination.stop_after(3_000)
                destination.announce("DONE", 1)
                destination.run()
                assert destination.wait_stopped(DEADLINE)
                destination.pause()
                loop.prefetch([[0, NPAGES]])
                assert loop.wait_resident(1.0, DEADLINE)
                assert loop.stats().faults > 0
        finally:
            uffd.unregister(region)
    # Each page arrived as the source had it, although the guest has written many of them since.
    assert audit.content.all()
    assert not audit.zeros.any()
    assert audit.twice == 0
    assert not compare_placed(source.memory, audit.content, audit.zeros, audit.sums()).any()
    found = verify_memory(destination)
    assert found.exact, str(found)
    assert found.steps == tuple(step + 3_000 for step in verify_memory(source).steps)


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


def test_a_destination_process_keeps_no_log(make):
    with pytest.raises(PagecoreError, match="keeps no dirty log"):
        _ = make(role="destination").dirty_log


def test_an_open_guest_left_behind_warns():
    guest = open_guest(SIZE, kind="process")
    with pytest.warns(ResourceWarning, match="unclosed <Guest process source of 16 MiB"):
        del guest


def test_page_checksums():
    memory = bytearray(os.urandom(4096)) * 3 + bytes(4096)
    sums = page_checksums(memory)
    assert sums.dtype == np.uint64
    assert sums[0] == sums[1] == sums[2] != sums[3]
    memory[4096 + 4095] ^= 1
    changed = page_checksums(memory)
    assert changed[1] != sums[1]
    assert (np.delete(changed, 1) == np.delete(sums, 1)).all()
    assert (page_checksums(memory, [[3, 1], [0, 2]]) == changed[[3, 0, 1]]).all()
    assert len(page_checksums(b"")) == 0
    assert len(page_checksums(memory, np.empty((0, 2), np.int64))) == 0
    with pytest.raises(IndexError, match=r"pages \[3, 5\) are outside \[0, 4\)"):
        page_checksums(memory, [[3, 2]])
    with pytest.raises(ValueError, match="shape"):
        page_checksums(memory, [1, 2, 3])
    with pytest.raises(ValueError, match="4095 bytes"):
        page_checksums(bytes(4095))
