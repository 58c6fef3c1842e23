"""CallableSource: the slow lane, and everything that a Python function can do wrong."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import PlacementLoop, SourceError, UnsupportedError
from pagecore.page_source import CallableSource
from placement_rig import Served, served
from uffd_helpers import PAGE, Child

pytestmark = pytest.mark.kernel

# The tests' memory is this process's own: every toucher runs without the GIL, so that the function can.
OWN = {"allow_own_process": True}


@pytest.fixture
def rig() -> Iterator[Served]:
    with served(64) as rig:
        yield rig


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pagecore.page_source")


def test_a_function_serves_faults_and_prefetch(rig: Served) -> None:
    asked = []

    def pages(region: int, first: int, count: int) -> bytes | None:
        asked.append((region, first, count))
        return None if first == 40 else rig.page(first, count)

    with CallableSource(pages, timeout=DEADLINE, **OWN) as source, PlacementLoop([rig.region], source) as loop:
        assert (source.lanes, source.bulk_lanes, source.max_pages) == (1, 0, 16)
        assert rig.touch(9).value() == rig.page(9)
        assert rig.touch(40).value() == bytes(PAGE)
        loop.prefetch([(10, 20), (60, 4)])
        wait_until(lambda: loop.stats().placed == 25, "the prefetched pages")
        assert asked == [(0, 9, 1), (0, 40, 1), (0, 10, 16), (0, 26, 4), (0, 60, 4)]
        assert bytes(rig.memory[10 * PAGE : 30 * PAGE]) == rig.page(10, 20)
        assert loop.stats().zeroed == 1


@pytest.mark.parametrize("answer", [bytes(PAGE), bytearray(PAGE), memoryview(bytes(PAGE))])
def test_any_buffer_will_do(rig: Served, answer: bytes) -> None:
    with CallableSource(lambda *_: answer, timeout=DEADLINE, **OWN) as source, PlacementLoop([rig.region], source):
        assert rig.touch(3).value() == bytes(PAGE)


def boom(*_: int) -> bytes:
    raise KeyError("no such page")


def broken_pipe(*_: int) -> bytes:
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("wrong", "said", "kind"),
    [
        (boom, "the callable raised: Input/output error", KeyError),
        (broken_pipe, "the callable raised: Broken pipe", BrokenPipeError),
        (lambda *_: bytes(PAGE - 1), "the callable returned another length", ValueError),
        (lambda *_: bytes(2 * PAGE), "the callable returned another length", ValueError),
        (lambda *_: b"", "the callable returned another length", ValueError),
        (lambda *_: "text", "the callable raised", TypeError),
        (lambda *_: 5, "the callable raised", TypeError),
        (lambda one: b"", "the callable raised", TypeError),
    ],
)
def test_what_a_function_does_wrong_is_a_source_error(
    rig: Served, wrong: Callable[..., bytes], said: str, kind: type[Exception]
) -> None:
    """D12: never zeros; the pages of the run stay missing under this policy, others are served on."""

    def pages(region: int, first: int, count: int) -> bytes:
        return wrong(region, first, count) if first == 5 else rig.page(first, count)

    with (
        CallableSource(pages, timeout=DEADLINE, **OWN) as source,
        PlacementLoop([rig.region], source, on_lost="stall") as loop,
    ):
        waiter = rig.touch(5)
        with pytest.raises(SourceError, match=f"page 5: {said}") as caught:
            loop.wait_settled(DEADLINE)
        assert (caught.value.first_page, caught.value.page_count) == (5, 1)
        assert isinstance(source.last_error, kind)
        assert rig.touch(6).value() == rig.page(6)
        assert not waiter.done()
        assert not loop.states[0].received.test(5)
    rig.region.place(5, rig.page(5))
    assert waiter.value() == rig.page(5)


def test_by_policy_its_pages_are_poisoned(rig: Served) -> None:
    """D12: a prefetch, so that nobody is there to get the SIGBUS."""
    with CallableSource(boom, timeout=DEADLINE, **OWN) as source, PlacementLoop([rig.region], source) as loop:
        loop.prefetch([(8, 3)])
        wait_until(lambda: loop.stats().poisoned == 3, "three poisoned pages")
        assert loop.states[0].excluded.indices().tolist() == [8, 9, 10]


def test_a_function_that_hangs_is_timed_out(rig: Served) -> None:
    """What it returns in the end is dropped; then it serves again."""
    hang, calls = threading.Event(), []

    def pages(region: int, first: int, count: int) -> bytes:
        calls.append(first)
        if first == 5:
            assert hang.wait(DEADLINE)
        return rig.page(first, count)

    with (
        CallableSource(pages, timeout=0.3, **OWN) as source,
        PlacementLoop([rig.region], source, on_lost="stall") as loop,
    ):
        waiter, behind = rig.touch(5), None
        wait_until(lambda: calls == [5], "the call")
        behind = rig.touch(6)
        with pytest.raises(SourceError, match="page 5: the callable: Connection timed out"):
            loop.wait_settled(DEADLINE)
        # The one behind it is not left to wait for ever either: it was never called for.
        wait_until(lambda: loop.stats().requested == 2, "both requests")
        loop.prefetch([(7, 1)])
        wait_until(lambda: source.pending == 0, "the end of every wait")
        assert calls == [5]
        hang.set()
        assert rig.touch(9).value() == rig.page(9)
        assert calls == [5, 9]
        assert loop.states[0].received.indices().tolist() == [9]
        assert not waiter.done()
        assert not behind.done()
    for page in (5, 6):
        rig.region.place(page, rig.page(page))
    assert (waiter.value(), behind.value()) == (rig.page(5), rig.page(6))


def test_memory_of_this_process_is_refused(rig: Served) -> None:
    """Design section 9: a thread that waits for a page with the GIL held would keep the function from running."""
    with (
        CallableSource(lambda *_: None, timeout=1) as source,
        pytest.raises(UnsupportedError, match="a Python callable for memory of this process"),
    ):
        PlacementLoop([rig.region], source)


def test_a_thread_that_keeps_the_gil_is_let_go_by_the_time_out() -> None:
    """Time-outs are kept by threads without the GIL: the worst case ends, and fails closed."""

    def touch_with_the_gil_held() -> int:
        with served(8) as rig:
            source = CallableSource(lambda *_: None, timeout=0.1, **OWN)
            PlacementLoop([rig.region], source).start()
            return rig.memory[0]

    assert Child(touch_with_the_gil_held).ended() == -signal.SIGBUS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, r"timeout 0.0 is outside \(0, 3600\]"),
        ({"timeout": -1}, "timeout -1.0"),
        ({"timeout": float("nan")}, "timeout nan"),
        ({"timeout": 3601}, "timeout 3601.0"),
        ({"timeout": 1, "page_size": 0}, "16 pages of 0 bytes"),
        ({"timeout": 1, "page_size": -4096}, "16 pages of -4096 bytes"),
        ({"timeout": 1, "max_pages": 0}, "0 pages of 4096 bytes"),
        ({"timeout": 1, "max_pages": 2**19}, r"524288 pages of 4096 bytes are outside \(0, 1 GiB\]"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CallableSource(lambda *_: None, **options)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="5 cannot be called"):
        CallableSource(5, timeout=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="timeout"):
        CallableSource(lambda *_: None)  # type: ignore[call-arg]


def test_a_pushing_source_is_not_fetched() -> None:
    with CallableSource(lambda *_: None, timeout=1) as source, pytest.raises(ValueError, match="pushes"):
        source.fetch(0, 1)


def test_a_full_queue_asks_again_later(rig: Served) -> None:
    """1024 runs may wait; the next are taken when there is room, and none is forgotten."""
    gate = threading.Event()

    def pages(region: int, first: int, count: int) -> None:
        assert gate.wait(DEADLINE)

    with (
        served(1500) as big,
        CallableSource(pages, timeout=DEADLINE, **OWN) as source,
        PlacementLoop([big.region], source) as loop,
    ):
        asking = Worker(loop.prefetch, [(page, 1) for page in range(1500)])
        wait_until(lambda: source.pending == 1025, "a full queue")
        assert not asking.done()
        gate.set()
        asking.value()
        assert loop.wait_settled(DEADLINE)
        wait_until(lambda: loop.stats().zeroed == 1500, "the counter")


def test_closed_it_answers_nothing_and_its_thread_ends(rig: Served) -> None:
    source = CallableSource(lambda *_: None, timeout=DEADLINE, **OWN)
    with PlacementLoop([rig.region], source, on_lost="stall") as loop:
        assert rig.touch(1).value() == bytes(PAGE)
        source.close()
        source.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "pagecore-callable"]
        loop.prefetch([(2, 1)])
        with pytest.raises(SourceError, match="Cannot send after transport endpoint shutdown"):
            loop.wait_settled(DEADLINE)


def test_a_close_that_has_to_wait_too_long_says_so() -> None:
    hang = threading.Event()
    with served(4) as rig:
        source = CallableSource(lambda *_: hang.wait(DEADLINE) and None, timeout=0.05, **OWN)
        with PlacementLoop([rig.region], source, on_lost="stall") as loop:
            loop.prefetch([(0, 1)])
            wait_until(lambda: loop.error is not None, "the time-out")
            with pytest.raises(TimeoutError, match=r"has not returned within 1 s$"):
                source.close()
        hang.set()


def test_a_source_that_is_dropped_ends_its_thread() -> None:
    def function(*_: int) -> None: ...

    source = CallableSource(function, timeout=1)
    watch = weakref.ref(function)
    del source, function
    gc.collect()
    wait_until(lambda: watch() is None, "the end of the thread")
