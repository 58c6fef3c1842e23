"""What the tests of the background snapshot share: memory to be saved, and a snapshot that has to stop midway."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

from concurrency import Worker, wait_until
from pagecore import BackgroundSnapshot
from uffd_helpers import PAGE, _libc, address_of, anonymous, discard, sleeping

MIB = 1 << 20
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def filled(nbytes):
    """Anonymous memory in which pages differ."""
    memory = anonymous(nbytes // PAGE)
    for page in range(0, nbytes, PAGE):
        memory[page : page + 8] = (page + 1).to_bytes(8, "little")
    return memory


def same(left, right):
    """Compare two mappings without copies."""
    return len(left) == len(right) and _libc.memcmp(address_of(left), address_of(right), len(left)) == 0


def shared(nbytes):
    return mmap.mmap(-1, nbytes)


class Blocked:
    """A snapshot whose sink is memory with missing pages: it stops until they are placed."""

    def __init__(self, uffd):
        self.memory = filled(4 * MIB)
        self.before = self.memory[:]
        self.sink = shared(4 * MIB)
        self._region = uffd.register(self.sink)
        self.snapshot = BackgroundSnapshot(self.memory, self.sink)
        self.last = address_of(self.memory) + 1000 * PAGE
        sleeping(uffd, 1)

    def discard(self, wait=True):
        """Discard pages that are not saved yet; returns when everything waits for it."""
        discarding = Worker(discard, self.last, 8 * PAGE)
        if wait:
            wait_until(lambda: self.snapshot.progress.held, "the snapshot to be held up")
        return discarding

    def unblock(self):
        self._region.place_zeros(0, self._region.size)


@contextlib.contextmanager
def blocked_snapshot(uffd):
    one = Blocked(uffd)
    yield one
    one.unblock()
    one.snapshot.close()
