"""A fork of the tests waits for threads that are on their way out, and for no others."""

import _thread
import hashlib
import mmap
import threading

import pytest

from concurrency import Worker, threads_on_their_way_out, wait_threads_gone, wait_until
from uffd_helpers import Child


def test_a_fork_waits_for_a_thread_that_python_knows_no_more():
    # One that `threading` does not list looks like one that was joined; hashing needs no GIL, like what comes after.
    zeros = mmap.mmap(-1, 512 << 20)
    _thread.start_new_thread(hashlib.sha256, (zeros,))
    wait_until(threads_on_their_way_out, "a thread that runs")
    with pytest.raises(AssertionError, match="on their way out"):
        wait_threads_gone(0.05)
    wait_threads_gone()


def test_a_thread_that_runs_holds_up_no_fork():
    go = threading.Event()
    worker = Worker(go.wait, 20)
    assert Child(lambda: 7).value() == 7
    go.set()
    assert worker.value()
