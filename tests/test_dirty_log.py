"""The DirtyLog protocol in both its forms, and the log in memory."""

import errno
import threading

import numpy as np
import pytest

import pagecore
from concurrency import Worker
from pagecore import Bitmap, DirtyLog, MemoryDirtyLog


class PythonLog(DirtyLog):
    """The Python form: a set of pages."""

    def __init__(self, size):
        super().__init__(size, rearms_at_collect=False, misses={"vmm"})
        self.pages = set()
        self.rearmed = []

    def collect_into(self, bitmap):
        newly = bitmap.set_indices(np.array(sorted(self.pages), dtype=np.int64))
        self.pages.clear()
        return newly

    def rearm(self, first, count):
        self.rearmed.append((first, count))


def test_python_log_is_called_by_the_tracker():
    log = PythonLog(100)
    tracker = pagecore.PageTracker(100, dirty_log=log, all_dirty=False)
    log.pages |= {3, 99}
    assert tracker.sync() == 2
    assert tracker.dirty.indices().tolist() == [3, 99]
    assert log.rearmed == [(0, 100)]


def test_attributes():
    log = PythonLog(100)
    assert (log.size, len(log), log.rearms_at_collect) == (100, 100, False)
    assert log.misses == frozenset({"vmm"})
    assert isinstance(log.misses, frozenset)
    assert "PythonLog of 100 pages" in repr(log)
    with pytest.raises(AttributeError):
        log.size = 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": -1, "rearms_at_collect": True}, ValueError, "size -1 is negative"),
        ({"size": 1, "rearms_at_collect": True, "misses": "vmm"}, TypeError, "not one name"),
        ({"size": 1, "rearms_at_collect": True, "misses": [3]}, TypeError, "no name of a writer"),
        ({"size": 1.5, "rearms_at_collect": True}, TypeError, "float"),
        ({"size": 1}, TypeError, "rearms_at_collect"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        DirtyLog(**arguments)


def test_a_log_without_methods_says_so():
    log = DirtyLog(10, rearms_at_collect=False)
    with pytest.raises(NotImplementedError, match="collect_into"):
        log.collect_into(Bitmap(10))
    with pytest.raises(NotImplementedError, match="rearm"):
        log.rearm(0, 10)
    # A log that re-arms at collect has nothing to do here.
    DirtyLog(10, rearms_at_collect=True).rearm(0, 10)


@pytest.mark.parametrize("run", [(-1, 2), (0, 11), (11, 0), (1 << 70, 1)])
def test_rearm_checks_the_run(run):
    with pytest.raises(IndexError, match=r"outside \[0, 10\)"):
        DirtyLog(10, rearms_at_collect=True).rearm(*run)


def test_rearm_refuses_a_negative_count():
    with pytest.raises(ValueError, match="count -1 is negative"):
        DirtyLog(10, rearms_at_collect=True).rearm(3, -1)


def test_memory_log_moves_bits_out():
    log = MemoryDirtyLog(130)
    log.bitmap.set_range(60, 70)
    fetched = Bitmap(130)
    fetched.set_range(60, 1)
    assert log.collect_into(fetched) == 69
    assert fetched.runs().tolist() == [[60, 70]]
    assert log.bitmap.count() == 0
    assert log.collect_into(fetched) == 0
    # The exchange was the re-arm: the next write is logged.
    log.bitmap[129] = True
    assert log.rearms_at_collect
    again = Bitmap(130)
    assert log.collect_into(again) == 1
    assert again.runs().tolist() == [[129, 1]]


def test_memory_log_over_shared_words():
    words = bytearray(3 * 8)
    log = MemoryDirtyLog(130, Bitmap.from_buffer(words, 130), misses=["vhost"])
    assert log.misses == {"vhost"}
    np.frombuffer(words, np.uint64)[2] = 2
    fetched = Bitmap(130)
    assert log.collect_into(fetched) == 1
    assert fetched[129]
    assert words == bytes(24)


def test_memory_log_refuses_another_size():
    with pytest.raises(ValueError, match="bitmap of 129 pages does not fit a log of 130"):
        MemoryDirtyLog(130, Bitmap(129))
    with pytest.raises(ValueError, match="bitmap of 129 pages does not fit a log of 130"):
        MemoryDirtyLog(130).collect_into(Bitmap(129))
    with pytest.raises(TypeError):
        MemoryDirtyLog(130).collect_into(None)


def test_memory_log_of_no_pages():
    log = MemoryDirtyLog(0)
    assert log.collect_into(Bitmap(0)) == 0
    log.rearm(0, 0)


def test_a_failed_log_names_the_call():
    class Failing(MemoryDirtyLog):
        def collect_into(self, bitmap):
            pagecore.errors.raise_for_errno(errno.EINVAL, "KVM_GET_DIRTY_LOG")

    tracker = pagecore.PageTracker(10, dirty_log=Failing(10))
    with pytest.raises(pagecore.UffdError, match="KVM_GET_DIRTY_LOG"):
        tracker.sync()


@pytest.mark.stress
def test_no_bit_is_lost_between_writer_and_collector():
    log = MemoryDirtyLog(4096)
    writes = 200
    barrier = threading.Barrier(3, timeout=20)

    def writer(offset):
        barrier.wait()
        for step in range(writes):
            log.bitmap.set_runs([[(offset + 7 * step) % 4096, 1]])

    writers = [Worker(writer, offset) for offset in (0, 2048)]
    collected = Bitmap(4096)
    barrier.wait()
    while any(worker.is_alive() for worker in writers):
        log.collect_into(collected)
    for worker in writers:
        worker.value()
    log.collect_into(collected)
    expected = {(offset + 7 * step) % 4096 for offset in (0, 2048) for step in range(writes)}
    assert set(collected.indices().tolist()) == expected
