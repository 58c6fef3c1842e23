"""The log of another process's memory: exact while it runs, with its cooperation; without, refused with the reason."""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import os
import random
import signal
import socket
import sys
import time

import pytest

from concurrency import DEADLINE, SEED, wait_until
from pagecore import (
    Bitmap,
    Feature,
    PagemapDirtyLog,
    PageTracker,
    PeerGoneError,
    RegisterMode,
    UnsupportedError,
    Userfaultfd,
    probe,
)
from uffd_helpers import PAGE, Child, address_of, anonymous, discard, give_up_privileges

pytestmark = pytest.mark.kernel
NPAGES = 512


@pytest.fixture(autouse=True, scope="module")
def _available():
    item = probe.probe()["pagemap-scan"]
    if not item.available:
        pytest.skip(f"{item.why}; fix: {item.remedy}")


def serve(control, cooperation):
    """What the other process does: opens its memory to be tracked, and then what it is told, command by command."""
    memory = anonymous(NPAGES)
    address = address_of(memory)
    ctypes.memset(address, 1, NPAGES // 2 * PAGE)
    uffd = Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) if cooperation else None
    if cooperation == "registers":
        uffd.register(memory, mode=RegisterMode.WP)
    rights = (
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd.fileno()]))] if cooperation == "sends" else []
    )
    number = uffd.fileno() if uffd else -1
    control.sendmsg([array.array("q", [address, number]).tobytes()], rights)
    generator = random.Random(SEED)
    while command := control.recv(1):
        if command == b"w":  # writes until it is told to stop, with discards in between
            control.setblocking(False)
            steps = 0
            while True:
                page = int(generator.random() ** 2 * NPAGES)
                ctypes.memset(address + page * PAGE, generator.randrange(256), PAGE)
                steps += 1
                if steps % 97 == 0:
                    discard(address + generator.randrange(NPAGES) * PAGE, PAGE)
                if steps % 16 == 0:
                    try:
                        if control.recv(1):
                            break
                    except BlockingIOError:
                        pass
            control.setblocking(True)
        elif command == b"1":
            ctypes.memset(address + 300 * PAGE, 9, 1)
        elif command == b"x":
            os.execv(sys.executable, [sys.executable, "-c", "import os; os.read(0, 1)"])
        control.send(b".")
    return True


class Target:
    """The other process."""

    def __init__(self, cooperation):
        self.control, theirs = socket.socketpair()
        self.control.settimeout(DEADLINE)

        def run():
            self.control.close()
            os.dup2(theirs.fileno(), 0)  # what it execs waits there
            return serve(theirs, cooperation)

        self.child = Child(run)
        theirs.close()
        body, rights, _, _ = self.control.recvmsg(16, 256)
        self.address, self.number = array.array("q", body)
        self.uffd = Userfaultfd.adopt(array.array("i", rights[0][2])[0]) if rights else None
        self.pid = self.child.pid

    def log(self, **arguments):
        arguments.setdefault("uffd", self.uffd)
        return PagemapDirtyLog.of_process(self.pid, self.address, NPAGES * PAGE, **arguments)

    def send(self, command):
        self.control.send(command)

    def call(self, command):
        self.send(command)
        assert self.control.recv(1) == b"."

    def kill(self):
        """End it, and give its number back."""
        os.kill(self.pid, signal.SIGKILL)
        self.child.ended()
        self.pid = 0

    def close(self):
        self.control.close()
        if self.pid:
            self.child.ended()
        if self.uffd is not None:
            self.uffd.close()


@pytest.fixture
def target(request):
    target = Target(getattr(request, "param", "sends"))
    yield target
    target.close()


def written(log):
    found = Bitmap(log.size)
    assert log.collect_into(found) == found.count()
    return set(found.indices().tolist())


# ---- with cooperation


@pytest.mark.parametrize("target", ["sends", "registers"], indirect=True)
def test_memory_is_tracked_and_copied_while_its_process_runs(target):
    """Precopy of another process: what was there, then round by round what was written, ends as its final memory."""
    copy = bytearray(NPAGES * PAGE)
    memory = os.open(f"/proc/{target.pid}/mem", os.O_RDONLY)
    try:
        with target.log() as log:
            assert log.pid == target.pid
            assert log.populated.runs().tolist() == [[0, NPAGES // 2]]
            tracker = PageTracker(log.size, dirty_log=log, all_dirty=False)
            tracker.mark(log.populated.runs())

            def send():
                """One round; how many pages."""
                newly = tracker.sync()
                while len(runs := tracker.take(max_pages=64)):
                    for first, count in runs.tolist():
                        data = os.pread(memory, count * PAGE, target.address + first * PAGE)
                        assert len(data) == count * PAGE
                        copy[first * PAGE : (first + count) * PAGE] = data
                return newly

            assert send() == NPAGES // 2
            target.send(b"w")
            for _ in range(30):
                wait_until(send, "writes of the other process")
            target.call(b"s")
            send()
            final = os.pread(memory, NPAGES * PAGE, target.address)
            assert written(log) == set()
    finally:
        os.close(memory)
    different = [page for page in range(NPAGES) if final[page * PAGE :][:PAGE] != copy[page * PAGE :][:PAGE]]
    assert different == []


@pytest.mark.parametrize("target", ["keeps"], indirect=True)
def test_the_descriptor_can_be_fetched_from_a_process_that_may_be_traced(target):
    pidfd = os.pidfd_open(target.pid)
    fd = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, target.number, 0)  # pidfd_getfd
    os.close(pidfd)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    with Userfaultfd.adopt(fd) as uffd, target.log(uffd=uffd) as log:
        target.call(b"1")
        assert written(log) == {300}


def test_closing_the_log_ends_the_registration_over_there(target):
    with target.log() as log:
        target.call(b"1")
        assert written(log) == {300}
        with target.log(uffd=None) as second:  # it is registered, by the first
            target.call(b"1")
            assert written(second) == {300}
            assert written(log) == set()  # two logs take pages from one another
    with pytest.raises(UnsupportedError, match="not registered"):
        target.log(uffd=None)
    target.call(b"1")
    with target.log() as log:
        assert written(log) == set()


# ---- without


@pytest.mark.parametrize("target", [""], indirect=True)
def test_without_cooperation_it_is_refused_with_what_is_missing(target):
    """Soft-dirty bits would not refuse: clearing them succeeds on kernels that have none, and no page is ever dirty."""
    with open(f"/proc/{target.pid}/clear_refs", "w", encoding="ascii") as file:
        file.write("4")
    with pytest.raises(UnsupportedError, match=r"without its cooperation.*WP_ASYNC.*SCM_RIGHTS.*Soft-dirty") as caught:
        target.log()
    assert f"{target.address:#x}" in str(caught.value)


def test_the_descriptor_of_another_process_is_refused():
    memory = anonymous(4)  # at the same address in both, which inherit it
    with contextlib.closing(Target("sends")) as one, contextlib.closing(Target("sends")) as other:
        for _ in range(2):  # nothing stays registered
            with pytest.raises(ValueError, match="another process's memory"):
                PagemapDirtyLog.of_process(one.pid, address_of(memory), 4 * PAGE, uffd=other.uffd)
        with PagemapDirtyLog.of_process(other.pid, address_of(memory), 4 * PAGE, uffd=other.uffd) as log:
            assert written(log) == set()


def test_other_users_processes_are_refused(target):
    if os.geteuid():
        pytest.skip("only root can become another user; fix: run the tests as root")
    memory, address = target.pid, target.address

    def child():
        give_up_privileges()
        try:
            PagemapDirtyLog.of_process(memory, address, NPAGES * PAGE)
        except UnsupportedError as error:
            return str(error)

    refusal = Child(child).value()
    assert f"reading /proc/{target.pid}/pagemap as user 65534" in refusal
    assert "run as root" in refusal


# ---- the end of the process


def test_the_end_of_the_process_is_no_quiet_round(target):
    log, pid = target.log(), target.pid
    target.call(b"1")
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for call in (lambda: written(log), lambda: log.rearm(0, 4)):
        with pytest.raises(PeerGoneError, match=f"process {pid} has ended"):
            call()
    with pytest.raises(PeerGoneError):
        target.log(uffd=None)  # a zombie
    target.kill()
    with pytest.raises(PeerGoneError, match=f"no process {pid}"):
        PagemapDirtyLog.of_process(pid, target.address, NPAGES * PAGE)
    log.close()


def test_another_program_in_the_process_is_not_its_memory(target):
    log = target.log()
    target.send(b"x")
    link = f"/proc/{target.pid}/cmdline"

    def replaced():
        with open(link, "rb") as file:
            return b"os.read(0, 1)" in file.read()

    wait_until(replaced, "exec")
    with pytest.raises(PeerGoneError, match="runs another program"):
        written(log)
    log.close()


def test_a_process_with_the_number_of_one_that_ended_is_not_mistaken_for_it(target):
    if os.geteuid():
        pytest.skip("only root can choose the number of a process; fix: run the tests as root")
    log = target.log()
    number = target.pid
    target.kill()
    deadline = time.monotonic() + DEADLINE
    while True:
        with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
            file.write(str(number - 1))
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        try:
            if pid == number:
                with pytest.raises(PeerGoneError):
                    written(log)
                break
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert time.monotonic() < deadline, "the number was never given out again"
    log.close()


def test_numbers_that_are_no_process():
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for pid in (-1, 0, 1 << 30):
        with pytest.raises(PeerGoneError):
            PagemapDirtyLog.of_process(pid, address_of(memory), PAGE)
