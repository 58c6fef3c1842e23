"""Threads and waits that end: every test of several threads is bounded, and tells which thread failed or hung."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

DEADLINE = 20.0
# What stress tests are run with; raised by hand for a long search.
SECONDS = float(os.environ.get("PAGECORE_STRESS_SECONDS", "1.0"))
SEED = int(os.environ.get("PAGECORE_STRESS_SEED", "20261"))


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Poll until the condition is true, and return it; or fail."""
    end = time.monotonic() + deadline
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline} s for {what}")
        time.sleep(0.0005)
    return result


def threads_on_their_way_out() -> set[int]:
    """Threads of this process that run and that `threading` does not list: what libraries keep sleeps."""
    running = set()
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = pathlib.Path(f"/proc/self/task/{name}/stat").read_text(encoding="ascii")
            # proc_pid_stat(5): the state follows the name in brackets.
            if stat.rpartition(") ")[2][0] != "S":
                running.add(int(name))
    # Listed last: who ends meanwhile is on the way out already.
    return running - {thread.native_id for thread in threading.enumerate()}


def wait_threads_gone(deadline: float = DEADLINE) -> None:
    """Before a fork: wait until threads that were joined, or ended, are gone from the kernel, too.

    Such a thread still frees what it had. The C library keeps the locks of that whole over a fork; AddressSanitizer (of
    GCC 12) does not, and a child that has a copy of a lock which somebody held waits for ever.
    """
    wait_until(lambda: not threads_on_their_way_out(), "threads that are on their way out", deadline)


class Worker(threading.Thread):
    """A thread whose result, or exception, is asked for under a deadline."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True, name=getattr(function, "__name__", str(function)))
        self._function = functools.partial(function, *arguments)
        self._result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self.error = error

    def done(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, or does so in time."""
        self.join(timeout)
        return not self.is_alive()

    def value(self, deadline: float = DEADLINE) -> Any:
        """What the function returned; raises what it raised."""
        if not self.done(deadline):
            raise AssertionError(f"a worker did not end within {deadline} s: {self.name}")
        if self.error is not None:
            raise self.error
        return self._result


def run_together(*functions: Callable[[], Any], deadline: float = 60 + SECONDS) -> list[Any]:
    """Call all of them, begun at one barrier, each in a thread of its own; returns their results in order.

    Fails with the tracebacks of those that raised, the names of those that hang, and the seed.
    """
    barrier = threading.Barrier(len(functions))

    def body(function: Callable[[], Any]) -> Any:
        barrier.wait(deadline)
        return function()

    workers = [Worker(body, function) for function in functions]
    end = time.monotonic() + deadline
    stuck = [
        getattr(function, "__name__", str(function))
        for worker, function in zip(workers, functions, strict=True)
        if not worker.done(max(0.0, end - time.monotonic()))
    ]
    failures = ["".join(traceback.format_exception(worker.error)) for worker in workers if worker.error is not None]
    assert not failures, f"seed {SEED}:\n" + "\n".join(failures)
    assert not stuck, f"seed {SEED}: still running after {deadline} s: {stuck}"
    return [worker.value() for worker in workers]
