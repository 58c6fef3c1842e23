"""The writers that PagemapDirtyLog misses: each is shown to be missed, declared, and refused where that can be told."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

import pytest

from concurrency import wait_until
from pagecore import Bitmap, HintSession, PagemapDirtyLog, PageTracker, UnsupportedError, probe
from uffd_helpers import PAGE, Child, address_of, anonymous

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True, scope="module")
def _available():
    item = probe.probe()["pagemap-scan"]
    if not item.available:
        pytest.skip(f"{item.why}; fix: {item.remedy}")


def written(log):
    found = Bitmap(log.size)
    assert log.collect_into(found) == found.count()
    return set(found.indices().tolist())


@pytest.fixture
def shared():
    """A memfd mapped twice, the log of the first mapping, and the second one."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * PAGE)
    memory, other = (mmap.mmap(fd, 16 * PAGE) for _ in range(2))
    memory[:] = bytes(16 * PAGE)
    with PagemapDirtyLog(memory, marked={"mappings"}) as log:
        yield memory, other, fd, log
    os.close(fd)


class Ring:
    """As much of io_uring as reads a file into a registered buffer; each read is done when `read` returns."""

    SETUP, ENTER, REGISTER = 425, 426, 427
    READ_FIXED, GETEVENTS = 4, 1

    def __init__(self):
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        params = ctypes.create_string_buffer(120)
        self._fd = self._checked(self._call(self.SETUP, 8, params))
        entries, completions = struct.unpack_from("2I", params, 0)
        _, self._tail, _, _, _, _, self._array, _ = struct.unpack_from("8I", params, 40)
        self._head, self._done, _, _, _, self._results, _, _ = struct.unpack_from("8I", params, 80)
        length = max(self._array + 4 * entries, self._results + 16 * completions)
        self._ring = mmap.mmap(self._fd, length)
        self._requests = mmap.mmap(self._fd, 64 * entries, offset=0x10000000)
        self._mask = (entries - 1, completions - 1)

    def _checked(self, result):
        if result < 0:
            number = ctypes.get_errno()
            if number in (1, 38):
                pytest.skip("no io_uring for this user; fix: sysctl -w kernel.io_uring_disabled=0")
            raise OSError(number, os.strerror(number))
        return result

    def register(self, address, length):
        """Pin memory."""
        self._checked(self._call(self.REGISTER, self._fd, 0, struct.pack("2Q", address, length), 1))

    def read(self, file, address, length):
        """Read the beginning of a file to an address in the registered buffer; how many bytes."""
        tail = struct.unpack_from("I", self._ring, self._tail)[0]
        slot = tail & self._mask[0]
        request = struct.pack("<BBHiQQIIQHHiQQ", self.READ_FIXED, 0, 0, file, 0, address, length, *[0] * 7)
        self._requests[64 * slot : 64 * slot + 64] = request
        struct.pack_into("I", self._ring, self._array + 4 * slot, slot)
        struct.pack_into("I", self._ring, self._tail, tail + 1)
        self._checked(self._call(self.ENTER, self._fd, 1, 1, self.GETEVENTS, None, 0))
        head = struct.unpack_from("I", self._ring, self._head)[0]
        result = struct.unpack_from("<QiI", self._ring, self._results + 16 * (head & self._mask[1]))[1]
        struct.pack_into("I", self._ring, self._head, head + 1)
        return result

    def close(self):
        self._call(self.REGISTER, self._fd, 1, None, 0)  # or else the kernel unpins some time after the close
        self._ring.close()
        self._requests.close()
        os.close(self._fd)


def pinned():
    """Whether this process has pinned memory."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return any(line.startswith("VmPin:") and int(line.split()[1]) for line in lines)


@pytest.fixture
def ring():
    ring = Ring()
    yield ring
    ring.close()
    wait_until(lambda: not pinned(), "the end of the pins")


# ---- shown


def test_a_write_through_another_mapping_is_missed(shared):
    memory, other, _, log = shared
    other[3 * PAGE] = 9
    memory[5 * PAGE] = 9
    assert memory[3 * PAGE] == 9
    assert written(log) == {5}


def test_a_write_of_another_process_is_missed_where_the_memory_is_shared(shared):
    memory, other, _, log = shared

    def write():
        other[7 * PAGE] = 9
        return True

    assert Child(write).value()
    assert memory[7 * PAGE] == 9
    assert written(log) == set()


def test_a_write_to_the_file_is_missed(shared):
    memory, _, fd, log = shared
    os.pwrite(fd, b"new", 4 * PAGE)
    assert memory[4 * PAGE : 4 * PAGE + 3] == b"new"
    assert written(log) == set()


def test_a_read_into_a_registered_buffer_is_missed(ring):
    """io_uring keeps the pages pinned: the kernel writes to them without looking at the page table."""
    memory = anonymous(8)
    memory[:] = bytes(8 * PAGE)
    file = os.memfd_create("file")
    os.pwrite(file, b"z" * PAGE, 0)
    ring.register(address_of(memory), 8 * PAGE)
    with PagemapDirtyLog(memory, marked={"pins"}) as log:
        assert ring.read(file, address_of(memory) + 2 * PAGE, PAGE) == PAGE
        assert memory[2 * PAGE : 3 * PAGE] == b"z" * PAGE
        assert written(log) == set()
        memory[6 * PAGE] = 1
        assert written(log) == {6}
    os.close(file)


def test_writers_that_mark_are_in_the_next_sync(shared):
    """What the acknowledgement promises: the write, then the mark (S12)."""
    _, other, fd, log = shared
    tracker = PageTracker(16, dirty_log=log, all_dirty=False)
    other[3 * PAGE] = 9
    os.pwrite(fd, b"new", 8 * PAGE)
    tracker.mark([(3, 1), (8, 1)])
    assert tracker.sync() == 2
    assert tracker.dirty.indices().tolist() == [3, 8]


# ---- declared


def test_misses_are_declared_and_hints_refused_beside_them(shared):
    log = shared[3]
    assert log.misses == {"pins", "mappings"}
    tracker = PageTracker(16, dirty_log=log)
    with pytest.raises(UnsupportedError, match=r"misses \(mappings, pins\)"):
        HintSession(tracker)
    with HintSession(tracker, marked=log.misses):
        pass


# ---- refused


def test_shared_memory_is_refused_unless_its_writers_mark(shared):
    memory = shared[0]
    shared[3].close()
    for marked in ((), {"pins"}):
        with pytest.raises(UnsupportedError, match=r"shared memory.*other mappings.*mark"):
            PagemapDirtyLog(memory, marked=marked)
    anywhere = mmap.mmap(-1, 4 * PAGE)  # shared with children yet to be forked
    with pytest.raises(UnsupportedError, match="shared memory"):
        PagemapDirtyLog(anywhere)


def test_files_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4 * PAGE)
    with pytest.raises(UnsupportedError, match="registering a file"):
        PagemapDirtyLog(memory, marked={"mappings"})


def test_a_process_with_pinned_memory_is_refused_unless_its_writers_mark(ring):
    memory, buffers = anonymous(8), anonymous(16)
    with PagemapDirtyLog(memory) as log:
        assert log.misses == {"pins"}
    ring.register(address_of(buffers), 16 * PAGE)
    with pytest.raises(UnsupportedError, match=r"pinned 64 kB.*marked=\{'pins'\}"):
        PagemapDirtyLog(memory)
    with PagemapDirtyLog(memory, marked={"pins"}) as log:
        assert written(log) == set()
