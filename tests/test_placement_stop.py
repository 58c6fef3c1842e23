"""How a loop ends: by policy, with faults parked, under a flood, and with a process killed on either side."""

import array
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import Feature, PageState, PlacementLoop, RegisterMode, Userfaultfd
from pagecore.page_source import BufferSource
from placement_rig import pages_frame, pushed, served
from uffd_helpers import PAGE, Child, address_of, anonymous, discard, page, read_bytes

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(256) as rig:
        yield rig


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def run_child(script):
    """Its exit status; bounded by its own dump."""
    prologue = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import faulthandler
        faulthandler.dump_traceback_later(20, exit=True)
        from placement_rig import *
        from uffd_helpers import *
    """
    program = textwrap.dedent(prologue) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False, text=True)


def test_a_stop_that_poisons_leaves_no_zeros_behind(rig):
    """D12: what nobody will fill fails closed; what is settled, released or hinted stays what it is."""
    with pushed(rig, on_stop="poison") as (loop, peer):
        peer.bulk[0].sendall(pages_frame(0, rig.page(0, 10)))
        wait_until(lambda: loop.stats().placed == 10, "ten pages")
        discard(rig.address(20), 2 * PAGE)
        loop.states[0].hinted.set_range(30, 2)
    state = loop.states[0]
    assert state.excluded.runs().tolist() == [[10, 10], [22, 8], [32, 224]]
    assert loop.stats().poisoned == 242
    rig.uffd.unregister(rig.region)
    assert read_bytes(rig.address(0), 10 * PAGE) == rig.page(0, 10)
    assert read_bytes(rig.address(20), PAGE) == bytes(PAGE)
    assert read_bytes(rig.address(30), PAGE) == bytes(PAGE), "hinted, and its fill is zeros"


def test_hinted_pages_with_another_fill_are_poisoned_too(rig):
    with pushed(rig, on_stop="poison", fill=0x01010101) as (loop, _):
        loop.states[0].hinted.set_range(30, 2)
    assert loop.states[0].excluded.test_range(30, 2)


def test_a_loop_that_has_failed_poisons_all_the_same(rig):
    """D12: a stream that broke off is why pages are missing, and no reason to let them become zeros."""
    with pushed(rig, on_stop="poison") as (loop, peer):
        peer.bulk[0].sendall(pages_frame(0, rig.page(0, 10)))
        peer.bulk[0].close()
        wait_until(lambda: loop.error is not None and loop.stats().placed == 10, "the end of the stream")
    assert loop.states[0].excluded.runs().tolist() == [[10, 246]]
    assert (loop.unsettled().tolist(), loop.stats().poisoned) == ([], 246)


def test_who_waits_at_a_stop_that_poisons_gets_sigbus():
    found = run_child("""
        with served(16) as rig:
            with pushed(rig, on_stop="poison") as (loop, peer):
                waiter = rig.touch(3)
                assert peer.next_request() == (3, 1, 0)
            waiter.value()
    """)
    assert found.returncode == -signal.SIGBUS, found.stderr


def test_who_waits_at_a_stop_that_wakes_waits_for_the_next_loop(rig):
    with pushed(rig, on_stop="wake") as (loop, peer):
        waiter = rig.touch(3)
        assert peer.next_request() == (3, 1, 0)
    assert not loop.states[0].excluded.any()
    with PlacementLoop([rig.region], BufferSource(rig.content)):
        assert waiter.value() == rig.page(3)


def test_a_stop_poisons_although_a_discard_is_pending(rig, door):
    """The kernel says "again" until somebody reads the event, and that is the loop still."""
    with pushed(rig, start=False, on_stop="poison") as (loop, _):
        loop.start()
        thread = Worker(lambda: [discard(rig.address(5), PAGE) for _ in range(300)])
        wait_until(lambda: loop.stats().removed == 1, "the first discard")
        stopping = Worker(loop.stop)
        stopping.value()
        while not thread.done(0.001):
            rig.uffd.read_events()
    assert loop.unsettled().tolist() == []
    assert loop.states[0].released.runs().tolist() == [[5, 1]]


def test_parked_pages_are_poisoned_at_such_a_stop(rig, door):
    """Their claims are given back first; a claimed page would be left out. No thread is there to place them before."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content), on_stop="poison")
    state = loop.states[0]
    thread = rig.discard(5)
    rig.wait_readable()
    door.place(loop, 100, rig.page(100))
    assert door.parked(loop) == 1
    door.begin_reading(loop)
    loop.stop()
    thread.value()
    assert state.excluded.test(100)
    assert state.released.runs().tolist() == [[5, 1]]
    assert loop.unsettled().tolist() == []


def test_wrong_policies_are_refused(rig):
    with pytest.raises(ValueError, match="on_stop 'zeros' is neither"):
        PlacementLoop([rig.region], BufferSource(rig.content), on_stop="zeros")
    with pytest.raises(ValueError, match="around 0 is less than 1"):
        PlacementLoop([rig.region], BufferSource(rig.content), around=0)


def test_faults_that_nobody_would_serve_are_refused(open_uffd):
    """A write-protect fault of a settled page would be woken again and again."""
    uffd = open_uffd(Feature.EVENT_REMOVE)
    region = uffd.register(anonymous(4), mode=RegisterMode.MISSING | RegisterMode.WP)
    with pytest.raises(ValueError, match="region 0 reports write-protect faults"):
        PlacementLoop([region], BufferSource(bytes(4 * PAGE)))


def test_a_flood_of_discards_costs_no_memory_and_starves_nobody(rig):
    """Trap 44: every table has its size from the start, and the reader leaves the flood to serve faults."""
    with PlacementLoop([rig.region], BufferSource(rig.content), around=1) as loop:
        over = threading.Event()

        def flood(first):
            count = 0
            while not over.is_set():
                discard(rig.address(first), PAGE)
                count += 1
            return count

        discard(rig.address(200), 50 * PAGE)
        before = resident()
        floods = [Worker(flood, 200 + which) for which in range(4)]
        for index in range(10):
            assert rig.touch(index).value() == rig.page(index)
        over.set()
        assert sum(flood.value() for flood in floods) > 100
        assert resident() - before < 4 << 20
        assert loop.error is None
        assert loop.stats().removed == 50


def resident():
    with open("/proc/self/statm") as fields:
        return int(fields.read().split()[1]) * PAGE


def test_closing_the_descriptor_while_pages_are_placed_waits_for_the_ioctl():
    """D13: over and over, at any moment; nothing is placed through a number that is somebody else's."""
    for round in range(20):
        with served(256) as rig:
            loop = PlacementLoop([rig.region], BufferSource(rig.content), threads=2).start()
            loop.prefetch([(0, 256)])
            if round % 2:
                wait_until(lambda loop=loop: loop.stats().placed > 32, "some placements")
            rig.uffd.close()
            loop.stop()
            state = loop.states[0]
            assert state.claimed == state.received
            received = state.received.runs().tolist()
            for first, count in received:
                assert read_bytes(rig.address(first), count * PAGE) == rig.page(first, count)


# A process on either side is killed ---------------------------------------------------------------------------------


class Guest:
    """A process with 64 registered pages; it sends its descriptor, then says what it reads, page by page."""

    def __init__(self, *, keep):
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(DEADLINE)

        def run():
            self._socket.close()
            uffd = Userfaultfd(Feature.EVENT_REMOVE)
            memory = anonymous(64)
            uffd.register(memory)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd.fileno()]))
            theirs.sendmsg([address_of(memory).to_bytes(8, "little")], [rights])
            if not keep:
                uffd.close()
            while command := theirs.recv(1):
                theirs.send(read_bytes(address_of(memory) + command[0] * PAGE, 1))

        self.child = Child(run)
        theirs.close()
        body, rights, _, _ = self._socket.recvmsg(8, 64)
        self.address = int.from_bytes(body, "little")
        self.fd = array.array("i", rights[0][2])[0]

    def touch(self, index):
        self._socket.send(bytes([index]))

    def answer(self):
        return self._socket.recv(1)

    def close(self):
        self._socket.close()


def test_killing_the_faulting_process_ends_the_loop_with_peer_gone():
    """And nothing hangs: its faults are gone with it, and its placements say so."""
    before = open_descriptors()
    guest = Guest(keep=True)
    uffd = Userfaultfd.adopt(guest.fd)
    region = uffd.region_at(guest.address, 64 * PAGE)
    with uffd, PlacementLoop([region], BufferSource(page(1, 64))) as loop:
        guest.touch(3)
        assert guest.answer() == b"\x04"
        os.kill(guest.child.pid, signal.SIGKILL)
        assert guest.child.ended() == -signal.SIGKILL
        loop.prefetch([(10, 20)])
        with pytest.raises(Exception, match="has ended"):
            loop.wait_settled(DEADLINE)
    assert loop.states[0].claimed.runs().tolist() == [[3, 1]]
    guest.close()
    assert open_descriptors() == before


def test_killing_the_serving_process_leaves_the_guest_waiting_and_not_with_zeros():
    """D12: as long as somebody holds a duplicate, what is missing stays missing, and the next handler serves it."""
    guest = Guest(keep=True)
    over = os.pipe()
    handler = Child(lambda: serve(guest, 1, over))
    guest.touch(3)
    assert guest.answer() == b"\x04"
    os.kill(handler.pid, signal.SIGKILL)
    assert handler.ended() == -signal.SIGKILL
    guest.touch(5)
    wait_until(lambda: readable(guest.fd), "the fault")
    second = Child(lambda: serve(guest, 1, over))
    assert guest.answer() == b"\x06"
    guest.touch(3)
    assert guest.answer() == b"\x04", "present since the first handler"
    os.close(over[1])
    assert second.value() is None
    os.close(over[0])
    os.close(guest.fd)
    guest.close()
    guest.child.value()


def readable(number):
    with open(f"/proc/self/fdinfo/{number}", encoding="ascii") as lines:
        return "pending:\t0" not in lines.read()


def serve(guest, first, over):
    """In a process of its own, until the test closes its end of a pipe."""
    reader, writer = over
    os.close(writer)
    uffd = Userfaultfd.adopt(os.dup(guest.fd))
    region = uffd.region_at(guest.address, 64 * PAGE)
    with PlacementLoop([region], BufferSource(page(first, 64))):
        os.read(reader, 1)


def test_a_handler_that_dies_with_a_fault_half_served_loses_none():
    """Read by the dead handler, and never answered: whoever takes over wakes all, and they fault again (D10)."""
    guest = Guest(keep=True)

    def read_and_die():
        uffd = Userfaultfd.adopt(os.dup(guest.fd))
        wait_until(uffd.read_events, "the fault")
        os.kill(os.getpid(), signal.SIGKILL)

    guest.touch(7)
    assert Child(read_and_die).ended() == -signal.SIGKILL
    uffd = Userfaultfd.adopt(guest.fd)
    region = uffd.region_at(guest.address, 64 * PAGE)
    with uffd, PlacementLoop([region], BufferSource(page(1, 64))) as loop:
        assert guest.answer() == b"\x08"
        assert loop.stats().faults == 1
    guest.close()
    guest.child.value()


def test_nothing_is_left_open_after_many_loops():
    before = open_descriptors(), threading.active_count()
    for _ in range(5):
        with served(16) as rig:
            states = [PageState(16)]
            for _ in range(3):
                with PlacementLoop([rig.region], BufferSource(rig.content), states=states, watchdog=5) as loop:
                    waiter = rig.touch(3)
                    assert waiter.value() == rig.page(3)
                assert not loop.running
    assert (open_descriptors(), threading.active_count()) == before
