"""Features that change what a descriptor does: SIGBUS, and the event of fork, which brings a descriptor of its own."""

from __future__ import annotations

import array
import errno
import mmap
import os
import resource
import signal
import socket

import pytest

from concurrency import Worker, wait_until
from pagecore import EventKind, Feature, PlacementLoop, RegisterMode, UffdError, UnsupportedError, Userfaultfd
from pagecore.page_source import BufferSource
from uffd_helpers import (
    PAGE,
    Child,
    Toucher,
    address_of,
    anonymous,
    give_up_privileges,
    is_readable,
    next_events,
    page,
    read_bytes,
)

pytestmark = pytest.mark.kernel
FORK = Feature.EVENT_FORK | Feature.EVENT_REMOVE


class ForkingPeer:
    """A process with eight registered pages, which forks when told; both then touch what they are told to."""

    def __init__(self, features: int = 0, mode: RegisterMode = RegisterMode.MISSING) -> None:
        self._socket, theirs = socket.socketpair()
        self._child_socket, childs = socket.socketpair()
        for end in (self._socket, self._child_socket):
            end.settimeout(20)

        def serve(end: socket.socket) -> None:
            while command := end.recv(8):
                end.send(read_bytes(int.from_bytes(command, "little"), 1))

        def run() -> None:
            self._socket.close()
            self._child_socket.close()
            uffd = Userfaultfd(FORK | features)
            memory = anonymous(8)
            uffd.register(memory, mode=mode)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd.fileno()]))
            theirs.sendmsg([address_of(memory).to_bytes(8, "little")], [rights])
            theirs.recv(1)
            if os.fork() == 0:
                theirs.close()
                serve(childs)
                os._exit(0)
            childs.close()
            serve(theirs)

        self.process = Child(run)
        theirs.close()
        childs.close()
        body, rights, _, _ = self._socket.recvmsg(8, 64)
        self.address = int.from_bytes(body, "little")
        self.fd = array.array("i", rights[0][2])[0]

    def fork(self) -> None:
        """It sleeps there until the event is read."""
        self._socket.send(b"f")

    def touch(self, index: int, *, child: bool) -> int:
        end = self._child_socket if child else self._socket
        end.send((self.address + index * PAGE).to_bytes(8, "little"))
        return end.recv(1)[0]

    def close(self) -> None:
        self._socket.close()
        self._child_socket.close()


@pytest.fixture
def forking():
    peer = ForkingPeer()
    yield peer
    peer.close()


def test_a_fork_brings_a_descriptor_of_the_child(forking):
    with Userfaultfd.adopt(forking.fd) as uffd:
        region = uffd.region_at(forking.address, 8 * PAGE)
        region.place(0, page(10))
        forking.fork()
        (event,) = next_events(uffd)
        assert (event.kind, event.thread) == (EventKind.FORK, 0)
        with event.child as child:
            assert child.features == FORK
            assert child.remote
            copy = child.region_at(region.address, region.nbytes, region_id=1)
            touching = Worker(lambda: forking.touch(2, child=True))
            (fault,) = next_events(child)
            assert fault.start == copy.address + 2 * PAGE
            assert uffd.read_events() == [], "the child's faults are its own"
            assert copy.place(2, page(52)).placed == 1
            assert touching.value() == 52
            assert forking.touch(0, child=True) == 10, "what was there is shared"
            assert region.place(2, page(12)).placed == 1, "in the parent it is missing still"
            assert forking.touch(2, child=False) == 12
        # The child's waiters are let go with its descriptor; trap 24 says what they read.
        assert forking.touch(5, child=True) == 0


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_placement_loop_closes_the_descriptors_of_children(forking):
    """Trap 23: read() installs them in the reader, whether it wants them or not."""
    uffd = Userfaultfd.adopt(forking.fd)
    region = uffd.region_at(forking.address, 8 * PAGE)
    with uffd, PlacementLoop([region], BufferSource(page(20, 8))):
        before = open_descriptors()
        forking.fork()
        assert forking.touch(3, child=False) == 23, "fork() has returned, so the event was read"
        wait_until(lambda: open_descriptors() == before, "the child's descriptor to be closed")


def test_a_fork_event_waits_until_there_is_room_for_its_descriptor(forking):
    """Trap 23: EMFILE, and the event stays queued."""
    with Userfaultfd.adopt(forking.fd) as uffd:
        forking.fork()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

            def refused() -> int:
                try:
                    return len(uffd.read_events())
                except UffdError as error:
                    return -(error.errno or 0)

            assert wait_until(refused, "the event") == -errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        (event,) = uffd.read_events()
        assert event.kind is EventKind.FORK
        event.child.close()


def test_children_of_a_failed_read_are_closed(forking, monkeypatch):
    """Whatever goes wrong between the system call and the caller, no descriptor is left behind."""
    with Userfaultfd.adopt(forking.fd) as uffd:
        forking.fork()
        before = open_descriptors()

        def fail(*_arguments):
            raise MemoryError

        monkeypatch.setattr("pagecore._descriptor.Handed", fail)
        with pytest.raises(MemoryError):
            wait_until(uffd.read_events, "the event")
        assert open_descriptors() == before


def test_following_forks_needs_a_privilege():
    def unprivileged():
        give_up_privileges()
        with pytest.raises(UnsupportedError) as refused:
            Userfaultfd(Feature.EVENT_FORK, user_mode_only=True)
        return str(refused.value), open_descriptors()

    message, _ = Child(unprivileged).value()
    assert "EVENT_FORK for this user" in message
    assert "CAP_SYS_PTRACE" in message


def test_without_the_event_a_child_reads_zeros(uffd, region):
    """Trap 24: nobody is told, and what was missing is lost; so is the registration."""
    region.place(0, page(1))
    address = region.address
    assert Child(lambda: list(read_bytes(address, 2 * PAGE)[::PAGE])).value() == [1, 0]


def test_sigbus_instead_of_waiting():
    """The kernel's own accesses get EFAULT; nobody sleeps, and nobody is told."""

    def dies():
        uffd = Userfaultfd(Feature.SIGBUS)
        memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region = uffd.register(memory)
        region.place(0, page(1))
        good = Toucher(region.address).value() == 1 and not is_readable(region.address + PAGE)
        if not good or uffd.read_events():
            os._exit(3)
        read_bytes(region.address + PAGE, 1)
        os._exit(4)

    assert Child(dies).ended() == -signal.SIGBUS
