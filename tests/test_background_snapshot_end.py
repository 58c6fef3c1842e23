"""How a background snapshot ends: cancelled, failed, dropped, or refused before it began."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re

import pytest

from concurrency import DEADLINE, Worker, wait_until
from injection import run
from pagecore import BackgroundSnapshot, ClosedError, UffdError, UnsupportedError
from snapshot_rig import MIB, blocked_snapshot, filled, shared
from trap_rig import Hammer, sweep
from uffd_helpers import PAGE, Child, Writer, _checked, _libc, anonymous, give_up_privileges

pytestmark = pytest.mark.kernel


@pytest.fixture
def memory():
    return filled(4 * MIB)


@pytest.fixture
def blocked(uffd):
    with blocked_snapshot(uffd) as one:
        yield one


RELEASES = """
import ctypes, json, threading
import pagecore._uffd_ioctl as module
from concurrency import Worker, wait_until
from pagecore import BackgroundSnapshot, Userfaultfd
from snapshot_rig import Blocked
UNREGISTER = 0x8010AA01
ioctl = ctypes.CDLL(None).ioctl
ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
holding, go = threading.Event(), threading.Event()

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
def answer(fd, request, argument):
    if request == UNREGISTER:
        holding.set()
        go.wait(20)
    return ioctl(fd, request, argument)

with Userfaultfd() as uffd:
    blocked = Blocked(uffd)
    hook = ctypes.c_void_p.in_dll(ctypes.CDLL(module.__file__), "pagecore_injected_ioctl")
    hook.value = ctypes.cast(answer, ctypes.c_void_p).value
    cancels = [Worker(blocked.snapshot.cancel)]
    held = holding.wait(20)
    cancels.append(Worker(blocked.snapshot.cancel))
    early = cancels[1].done(0.1)
    go.set()
    for cancel in cancels:
        cancel.value()
    hook.value = None
    blocked.unblock()
    blocked.snapshot.close()
    print(json.dumps([held, early, blocked.snapshot.state]))
"""


def test_every_cancel_returns_after_the_protection_is_off(overlay):
    assert run(overlay, RELEASES) == [True, False, "cancelled"]


def test_a_full_disk_ends_it_with_one_error(tmp_path):
    def fills():
        clone_newns, ms_rec, ms_private = 0x20000, 0x4000, 1 << 18
        _checked(_libc.unshare(clone_newns))
        _checked(_libc.mount(b"none", b"/", None, ctypes.c_ulong(ms_rec | ms_private), None))
        _checked(_libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", ctypes.c_ulong(0), b"size=1m"))
        memory = filled(4 * MIB)
        with open(tmp_path / "image", "w+b") as file:
            snapshot = BackgroundSnapshot(memory, file)
        with Hammer(memory):
            with pytest.raises(UffdError) as caught:
                snapshot.wait(DEADLINE)
            sweep(memory, 9)
        state = snapshot.state
        snapshot.close()
        return caught.value.errno, str(caught.value), state

    number, message, state = Child(fills).value()
    assert (number, state) == (errno.ENOSPC, "failed")
    assert re.search(r"writing the snapshot on \[0x\w+, 0x\w+\): No space left on device", message)


def test_cancel_lets_everybody_go(blocked):
    """Writers that wait, discards that wait, and whoever waits for the end."""
    discarding = blocked.discard()
    writer = Writer(blocked.last - PAGE, 7)
    waiting = [Worker(blocked.snapshot.wait, DEADLINE) for _ in range(2)]
    assert not blocked.snapshot.wait(0.01)
    blocked.snapshot.cancel()
    blocked.snapshot.cancel()
    discarding.value()
    writer.value()
    for each in waiting:
        with pytest.raises(ClosedError, match="no image"):
            each.value()
    assert blocked.snapshot.state == "cancelled"
    sweep(blocked.memory, 9)
    blocked.unblock()
    blocked.snapshot.close()
    blocked.snapshot.close()
    with pytest.raises(ClosedError), blocked.snapshot:
        pass


def test_an_exception_cancels(blocked):
    class Stop(Exception):
        pass

    def fail():
        with blocked.snapshot:
            # Its thread ends when its copy does.
            Worker(lambda: wait_until(lambda: blocked.snapshot.state == "cancelled", "the end") and blocked.unblock())
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert (blocked.snapshot.state, blocked.snapshot.closed) == ("cancelled", True)


def test_one_that_is_dropped_warns_and_lets_go(memory):
    snapshots = [BackgroundSnapshot(memory, shared(len(memory)))]
    with pytest.warns(ResourceWarning, match="unclosed <BackgroundSnapshot of 1024 pages"):
        snapshots.clear()
    sweep(memory, 2)
    memory.close()


def test_no_thread_and_no_descriptor_is_left(memory, tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    BackgroundSnapshot(memory, bytearray(len(memory))).close()
    before = count()
    for _ in range(3):
        with BackgroundSnapshot(memory, bytearray(len(memory))):
            pass
        with open(tmp_path / "image", "w+b") as file, BackgroundSnapshot(memory, file.fileno()):
            pass
        with pytest.raises(ValueError, match="overlaps"):
            BackgroundSnapshot(memory, memory)
    wait_until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)), f"{before} of each")


def test_sinks_that_are_refused(memory, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"keep me")
    for sink, message in (
        (bytes(len(memory)), "writable"),
        (bytearray(len(memory) - 1), f"{len(memory) - 1} bytes does not hold {len(memory)}"),
    ):
        with pytest.raises(ValueError, match=message):
            BackgroundSnapshot(memory, sink)
    for flags, message in ((os.O_RDONLY, "reading alone"), (os.O_WRONLY | os.O_APPEND, "O_APPEND")):
        fd = os.open(path, flags)
        with pytest.raises(ValueError, match=message):
            BackgroundSnapshot(memory, fd)
        os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match="no regular file"):
        BackgroundSnapshot(memory, writer)
    os.close(reader)
    os.close(writer)
    assert path.read_bytes() == b"keep me"
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(PermissionError):
        BackgroundSnapshot(memory, sealed)
    os.close(sealed)
    # Nothing was protected.
    sweep(memory, 3)
    with pytest.raises(TypeError, match="cannot be pickled"):
        BackgroundSnapshot.__new__(BackgroundSnapshot).__reduce__()


def test_memory_that_is_not_complete_is_refused(uffd):
    """Pages that have not come yet would be zeros in the image: the other descriptor has the memory."""
    memory = anonymous(4)
    uffd.register(memory)
    with pytest.raises(UffdError, match=r"UFFDIO_REGISTER.*busy"):
        BackgroundSnapshot(memory, bytearray(4 * PAGE))


def test_a_user_who_may_not_is_told_the_fix():
    def refused():
        give_up_privileges()
        with pytest.raises(UnsupportedError) as caught:
            BackgroundSnapshot(anonymous(1), bytearray(PAGE))
        return str(caught.value)

    assert re.search("mount /proc|sysctl", Child(refused).value())
