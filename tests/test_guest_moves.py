"""A guest that carries on elsewhere, from its state and its memory: in another guest, another process, page by page."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from guest_rig import DEADLINE, NPAGES, both, copy_memory, guests, run_steps
from pagecore import Bitmap
from pagecore.errors import PagecoreError, ProtocolError
from pagecore.testing import PlacementAudit, compare_placed, page_checksums, verify_memory


@pytest.fixture
def make():
    with guests() as build:
        yield build


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


def test_a_destination_process_keeps_no_log(make):
    with pytest.raises(PagecoreError, match="keeps no dirty log"):
        _ = make(role="destination").dirty_log
