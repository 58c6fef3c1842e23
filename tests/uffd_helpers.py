"""What tests of registered memory share: memory, waiters without the GIL, deadlines, children that end.

Nobody here touches a missing page with the GIL held: a ctypes call drops it, so that the thread which waits in
the kernel does not stop the test that is about to place the page.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from concurrency import DEADLINE, Worker, wait_threads_gone, wait_until
from pagecore import Event, Region, Userfaultfd

PAGE = 4096
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def protect(address: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    _checked(_libc.mprotect(address, length, prot))


def unmap(address: int, length: int) -> None:
    """munmap(2)."""
    _checked(_libc.munmap(address, length))


def is_readable(address: int) -> bool:
    """Whether the page can be read, asked of the kernel: poison and guard pages cannot. A missing one would wait."""

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    byte = ctypes.create_string_buffer(1)
    local, remote = Vector(ctypes.addressof(byte), 1), Vector(address, 1)
    arguments = (os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return _libc.process_vm_readv(*arguments) == 1


def is_protected(address: int, process: int | str = "self") -> bool:
    """Whether the page carries write-protection; with WP_ASYNC a log calls it clean then, and written otherwise."""
    with open(f"/proc/{process}/pagemap", "rb", buffering=0) as pagemap:
        entry = os.pread(pagemap.fileno(), 8, address // PAGE * 8)
    return bool(int.from_bytes(entry, "little") >> 57 & 1)


def leaked_mapping(
    npages: int, size: int = PAGE, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1
) -> int:
    """Memory that a test may unmap by halves: Python's own mapping object would unmap it again."""
    address = _libc.mmap(None, npages * size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return address


def remap(address: int, length: int) -> int:
    """mremap(2) to a new place; with EVENT_REMAP enabled it sleeps until the event is read. The new address."""
    target = leaked_mapping(length // PAGE)
    return _libc.mremap(address, length, length, 3, target)  # MREMAP_MAYMOVE | MREMAP_FIXED


def discard(address: int, length: int) -> None:
    """MADV_DONTNEED; with EVENT_REMOVE enabled it sleeps, without the GIL, until the event is read."""
    _checked(_libc.madvise(address, length, mmap.MADV_DONTNEED))


def read_bytes(address: int, length: int) -> bytes:
    """Copy memory without the GIL; waits while a page of it is missing."""
    buffer = ctypes.create_string_buffer(length)
    ctypes.memmove(buffer, address, length)
    return buffer.raw


def map_afresh(address: int, length: int) -> None:
    """Replace part of a mapping by new, unregistered memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    assert _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address


def anonymous(npages: int) -> mmap.mmap:
    """Private anonymous memory without transparent huge pages, which would populate neighbours."""
    memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def address_of(memory: mmap.mmap) -> int:
    """The address of a mapping."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def page(value: int, count: int = 1, size: int = PAGE) -> bytes:
    """`count` pages, the first full of `value`, the next of `value` + 1, ..."""
    return b"".join(bytes([(value + index) % 256]) * size for index in range(count))


def content(region: Region, first: int, count: int = 1) -> list[int]:
    """The first byte of each page, read without the GIL; for present pages, since missing ones wait."""
    return [Toucher(region.address + (first + index) * region.page_size).value() for index in range(count)]


def waiters(uffd: Userfaultfd) -> int:
    """How many threads sleep on pages of this descriptor, as the kernel counts them."""
    with open(f"/proc/self/fdinfo/{uffd.fileno()}", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("total:"))


def sleeping(uffd: Userfaultfd, count: int) -> None:
    """Wait until `count` threads sleep on pages of this descriptor."""
    wait_until(lambda: waiters(uffd) == count, f"{count} waiters")


def queued(uffd: Userfaultfd) -> None:
    """Wait until the kernel has queued a message that nobody has read."""
    wait_until(lambda: select.select([uffd], [], [], 0)[0], "a queued message")


def next_events(uffd: Userfaultfd, count: int = 1) -> list[Event]:
    """Read until `count` events have come."""
    events: list[Event] = []

    def enough() -> bool:
        events.extend(uffd.read_events())
        return len(events) >= count

    wait_until(enough, f"{count} events")
    return events


class Writer(Worker):
    """Writes one byte on a thread of its own, without the GIL."""

    def __init__(self, address: int, value: int) -> None:
        super().__init__(lambda: ctypes.memset(address, value, 1) and None)


class Toucher(Worker):
    """Reads one byte on a thread of its own, without the GIL; waits there while the page is missing."""

    def __init__(self, address: int) -> None:
        super().__init__(lambda: read_bytes(address, 1)[0])


@contextlib.contextmanager
def toucher(uffd: Userfaultfd, region: Region, index: int) -> Iterator[Toucher]:
    """A thread that sleeps on a missing page; on the way out it must have been let go."""
    before = waiters(uffd)
    thread = Toucher(region.address + index * region.page_size)
    sleeping(uffd, before + 1)
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the waiter was never woken"


def give_up_privileges() -> None:
    """Become nobody, for good; everything needed was imported before."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


class Child:
    """A forked child that runs one function and sends its result, or ends by a signal; bounded in time."""

    def __init__(self, function: Callable[[], Any]) -> None:
        wait_threads_gone()
        reader, writer = os.pipe()
        self._reader = reader
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads: the child runs none of their locks, only what it is given.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._run(function, writer)
        os.close(writer)

    def _run(self, function: Callable[[], Any], writer: int) -> None:
        status = 1
        try:
            os.close(self._reader)
            faulthandler.disable()
            # A handler of Python would wait for a thread that sleeps in a fault, for ever.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(DEADLINE) + 5)
            with os.fdopen(writer, "wb") as stream:
                try:
                    answer = (True, function())
                except BaseException:
                    answer = (False, traceback.format_exc())
                pickle.dump(answer, stream)
            status = 0
        finally:
            os._exit(status)

    def value(self, deadline: float = DEADLINE) -> Any:
        """What the function returned."""
        data = self._drain(deadline)
        status = self.ended(deadline)
        if not data:
            raise AssertionError(f"the child ended by status {status} without an answer")
        good, answer = pickle.loads(data)
        assert good, answer
        return answer

    def ended(self, deadline: float = DEADLINE) -> int:
        """The exit code of the child, or minus the signal that ended it."""

        def reaped() -> tuple[int, int] | None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return (pid, status) if pid else None

        try:
            _, status = wait_until(reaped, "the end of a child", deadline)
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
        return os.waitstatus_to_exitcode(status)

    def _drain(self, deadline: float) -> bytes:
        data = b""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if select.select([self._reader], [], [], 0.1)[0]:
                chunk = os.read(self._reader, 1 << 16)
                if not chunk:
                    break
                data += chunk
        return data
