"""The loop where the kernel notes writes: what was written stays written, and poison stays poison."""

import signal

import pytest

from concurrency import wait_until
from pagecore import Feature, PagecoreError, PlacementLoop, RegisterMode, UnsupportedError, Userfaultfd
from pagecore.page_source import BufferSource
from placement_rig import pushed, served
from test_uffd_adopt import Peer
from test_uffd_events import ForkingPeer
from test_uffd_place import counts
from uffd_helpers import PAGE, Writer, is_protected, is_readable, page

pytestmark = pytest.mark.kernel
NOTED = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
MODE = RegisterMode.MISSING | RegisterMode.WP


@pytest.fixture
def stepped():
    """(rig, loop); no thread of the loop runs."""
    with served(16, features=NOTED, mode=MODE) as rig, pushed(rig, start=False) as (loop, _):
        yield rig, loop


@pytest.fixture
def forking():
    peer = ForkingPeer(NOTED, MODE)
    yield peer
    peer.close()
    peer.process.ended()


def test_a_page_that_is_asked_about_keeps_its_record(stepped, door):
    """D15: several threads on one page are several faults; asking must not call clean what the guest has written."""
    rig, loop = stepped
    door.place(loop, 3, rig.page(3, 2))
    Writer(rig.address(3), 7).value()
    for _ in range(3):
        door.serve(loop, 3)
        door.serve(loop, 4)
    assert not is_protected(rig.address(3)), "it was written"
    assert is_protected(rig.address(4)), "it was not"
    assert loop.error is None


def test_a_lost_page_under_a_marker_is_still_found(stepped, door):
    """D15: a marker of protection is not the page."""
    rig, loop = stepped
    rig.region.protect(0, 16)
    loop.states[0].claimed.set(3)
    loop.states[0].received.set(3)
    door.serve(loop, 3)
    door.serve(loop, 3)
    with pytest.raises(PagecoreError, match="page 3 was received and is missing"):
        loop.wait_ended(0)
    assert not is_readable(rig.address(3))


def test_a_fault_on_a_poisoned_page_does_not_make_it_zeros(stepped, door):
    """D12: zeros are a COPY here, which would undo the marker."""
    rig, loop = stepped
    waiter = rig.touch(3)
    rig.wait_fault_pending()
    loop.give_up([(4, 1)])
    door.serve(loop, 4)
    assert not is_readable(rig.address(4))
    loop.states[0].excluded.set(5)
    door.serve(loop, 5)
    assert not is_readable(rig.address(5)), "whatever was there: never zeros"
    assert loop.stats().poisoned == 2
    door.place(loop, 3, rig.page(3))
    assert waiter.value() == rig.page(3)


def test_an_excluded_page_that_cannot_be_poisoned_is_an_error(stepped, door):
    rig, loop = stepped
    loop.states[0].excluded.set(5)
    rig.uffd.close()
    door.serve(loop, 5)
    assert loop.error is not None


@pytest.mark.parametrize("noted", [True, False])
def test_poison_in_another_process_protects_nothing_again(noted):
    """What is there cannot be told. A page that was written is never called clean, and a marker is no page; where
    writes trap instead, none gets by."""
    peer = Peer(features=NOTED if noted else Feature.WP_UNPOPULATED, mode=MODE)
    with peer._socket, Userfaultfd.adopt(peer.fd) as uffd:
        region = uffd.region_at(peer.address, 8 * PAGE, mode=MODE)
        region.place(0, page(20), protect=False)
        region.protect(4, 4)
        assert counts(region.poison(0, 8)) == ({"present": 1, "placed": 7} if noted else {"present": 5, "placed": 3})
        assert not is_protected(peer.address, peer.child.pid)
        assert is_protected(peer.address + 5 * PAGE, peer.child.pid) is not noted
        peer.touch(peer.address)
        assert peer.touched() == 20
        peer.touch(peer.address + 2 * PAGE)
        with pytest.raises(IndexError):  # its socket is at its end: it died
            peer.touched()
    assert peer.child.ended() == -signal.SIGBUS


def test_the_child_of_a_guest_reads_no_zeros_under_markers(forking):
    """Trap 58: POISON takes them for pages."""
    uffd = Userfaultfd.adopt(forking.fd)
    region = uffd.region_at(forking.address, 8 * PAGE, mode=MODE)
    region.protect(0, 8)
    with uffd, PlacementLoop([region], BufferSource(page(20, 8))) as loop:
        forking.fork()
        wait_until(lambda: loop.stats().forks == 1, "the event")
        with pytest.raises(UnsupportedError, match="child of the process"):
            loop.wait_settled(10)
        assert forking.touch(3, child=False) == 23
        with pytest.raises(IndexError):
            forking.touch(5, child=True)
