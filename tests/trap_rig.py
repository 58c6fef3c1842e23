"""What the tests of trapped writes share: writers in C, and memory in a known state."""

from __future__ import annotations

import ctypes
import functools
import tempfile

from concurrency import Worker
from preload import compiled
from uffd_helpers import PAGE, address_of


@functools.cache
def writers() -> ctypes.CDLL:
    """The writers in C, compiled once; ctypes calls them without the GIL."""
    with tempfile.TemporaryDirectory() as directory:
        loaded = ctypes.CDLL(compiled("trap_writers.c", directory))
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    loaded.hammer.argtypes = [pointer, word, word, pointer]
    loaded.hammer.restype = loaded.hammer_and_log.restype = word
    loaded.sweep.argtypes = [pointer, word, word, ctypes.c_uint8]
    loaded.sweep.restype = loaded.log_page.restype = None
    loaded.log_page.argtypes = [pointer, word]
    loaded.hammer_and_log.argtypes = [pointer, word, word, pointer, pointer, word]
    return loaded


class Gate:
    """In a process that runs the build of injection.py: holds up, or denies, calls that protect and unprotect."""

    def __init__(self):
        import pagecore._uffd_ioctl as module

        hook = ctypes.c_void_p.in_dll(ctypes.CDLL(module.__file__), "pagecore_injected_ioctl")
        hook.value = ctypes.cast(writers().gate, ctypes.c_void_p).value

    def __getattr__(self, name):
        return ctypes.c_uint64.in_dll(writers(), name).value

    def __setattr__(self, name, value):
        ctypes.c_uint64.in_dll(writers(), name).value = value


class Hammer:
    """Threads that add to random words of memory until they are stopped; `with` stops them."""

    def __init__(self, memory, threads=2, seed=1):
        self.flag = ctypes.c_uint64(0)
        self._arguments = (address_of(memory), len(memory) // PAGE)
        self._threads, self._seed = threads, seed
        self.workers = []

    def __enter__(self):
        self.workers = [
            Worker(writers().hammer, *self._arguments, self._seed + index, ctypes.addressof(self.flag))
            for index in range(self._threads)
        ]
        return self

    def stop(self):
        """Stop, and return how often they wrote."""
        self.flag.value = 1
        return sum(worker.value() for worker in self.workers)

    def __exit__(self, *_):
        self.stop()


def sweep(memory, value, step=1):
    """Write to the last byte of each page, without the GIL."""
    writers().sweep(address_of(memory), len(memory) // PAGE, step, value)
