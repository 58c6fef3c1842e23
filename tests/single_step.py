"""Stops one thread of another process within its own instructions, where no hook and no kernel call is (ptrace)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Callable
from typing import Self

WALL = 0x40000000
CONT, SINGLESTEP, DETACH, SYSCALL = 7, 9, 17, 24
GETEVENTMSG, SEIZE, GET_SYSCALL_INFO = 0x4201, 0x4206, 0x420E
TRACESYSGOOD, TRACECLONE, EXITKILL = 0x1, 0x8, 0x100000
EVENT_CLONE = 3
ENTRY, EXIT = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int = 0, data: int | ctypes.Array[ctypes.c_char] = 0) -> None:
    if _libc.ptrace(request, thread, address, ctypes.cast(data, ctypes.c_void_p)) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")


def _stop_of(thread: int) -> int:
    """Wait for a thread's next stop; its status without the lowest byte."""
    _, status = os.waitpid(thread, WALL)
    assert os.WIFSTOPPED(status), f"thread {thread} has ended: {status:#x}"
    return status >> 8


class Stepped:
    """A thread that a process is about to start; nothing else is held up once it is there. A context manager.

    Everything is called on the thread that made it.

    Parameters
    ----------
    process : int
    number : int
        Which of the threads that its main thread starts from now on, from 1.
    begin : callable
        Called once they would be noticed.
    """

    def __init__(self, process: int, number: int, begin: Callable[[], object]) -> None:
        self._process = process
        _ptrace(SEIZE, process, 0, TRACECLONE | TRACESYSGOOD | EXITKILL)
        begin()
        while number:
            stop = _stop_of(process)
            if stop >> 8 == EVENT_CLONE:
                message = ctypes.create_string_buffer(8)
                _ptrace(GETEVENTMSG, process, 0, message)
                self.thread = int.from_bytes(message, "little")
                _stop_of(self.thread)
                number -= 1
                if number:
                    _ptrace(DETACH, self.thread)
            _ptrace(CONT if number else DETACH, process, 0, 0 if stop >> 8 else stop)

    def run_to_call(self, wanted: Callable[[int], bool]) -> None:
        """Run to the entry of a kernel call, chosen by its number."""
        while not wanted(self._next_call(ENTRY)):
            pass

    def run_to_return(self) -> int:
        """Run to where the kernel call returns; what it returns."""
        return self._next_call(EXIT)

    def _next_call(self, kind: int) -> int:
        while True:
            _ptrace(SYSCALL, self.thread)
            if _stop_of(self.thread) == signal.SIGTRAP | 0x80:
                info = ctypes.create_string_buffer(88)
                _ptrace(GET_SYSCALL_INFO, self.thread, len(info), info)
                if info.raw[0] == kind:
                    # struct ptrace_syscall_info: the number, or the result, stands behind 24 bytes.
                    return int(struct.unpack_from("<q", info.raw, 24)[0])

    def step_until(self, condition: Callable[[], bool], limit: int = 50_000) -> None:
        """Run an instruction at a time."""
        for _ in range(limit):
            if condition():
                return
            # Signals on their way are dropped.
            _ptrace(SINGLESTEP, self.thread)
            _stop_of(self.thread)
        raise AssertionError(f"not within {limit} instructions")

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """What stands in the process's memory."""
        with open(f"/proc/{self._process}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return struct.unpack(f"<{count}Q", memory.read(count * 8))

    def let_go(self) -> None:
        """Let it run on for itself. Nobody waits for the end of a process of which a thread is still held."""
        if self.thread:
            thread, self.thread = self.thread, 0
            _ptrace(DETACH, thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.let_go()
