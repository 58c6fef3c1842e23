"""A fork of the tests waits for threads that are on their way out, and for no others."""

import _thread
import hashlib
import mmap
import os
import threading

import pytest

import uffd_helpers
from concurrency import Worker, threads_on_their_way_out, wait_threads_gone, wait_until
from uffd_helpers import Child


def test_a_thread_that_python_knows_no_more_is_waited_for():
    # One that `threading` does not list looks like one that was joined; hashing needs no GIL, like what comes after.
    zeros = mmap.mmap(-1, 512 << 20)
    _thread.start_new_thread(hashlib.sha256, (zeros,))
    wait_until(threads_on_their_way_out, "a thread that runs")
    with pytest.raises(AssertionError, match="on their way out"):
        wait_threads_gone(0.05)
    wait_threads_gone()


def test_the_wait_comes_before_the_fork(monkeypatch):
    order, fork = [], os.fork
    monkeypatch.setattr(uffd_helpers, "wait_threads_gone", lambda: order.append("wait"))
    monkeypatch.setattr(os, "fork", lambda: order.append("fork") or fork())
    assert Child(lambda: 7).value() == 7
    assert order == ["wait", "fork"]


def test_a_thread_that_runs_holds_up_no_fork():
    go = threading.Event()
    worker = Worker(go.wait, 20)
    assert Child(lambda: 7).value() == 7
    go.set()
    assert worker.value()
