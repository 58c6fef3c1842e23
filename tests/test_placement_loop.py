"""The placement loop with all its threads, on the real kernel."""

import contextlib
import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from concurrency import DEADLINE, Worker, wait_until
from pagecore import (
    BusyError,
    ClosedError,
    Feature,
    PageState,
    PlacementLoop,
    Userfaultfd,
)
from pagecore.page_source import BufferSource
from placement_rig import (
    AGAIN,
    END,
    FILL,
    GONE,
    SENT,
    ZEROS,
    Peer,
    header,
    pages_frame,
    pushed,
    served,
)
from uffd_helpers import PAGE, discard, read_bytes

pytestmark = pytest.mark.kernel


@pytest.fixture
def rig():
    with served(512) as rig:
        yield rig


def test_faults_and_prefetch_from_a_buffer(rig):
    with PlacementLoop([rig.region], BufferSource(rig.content), threads=2) as loop:
        assert rig.touch(300).value() == rig.page(300)
        assert loop.stats().faults == 1
        loop.prefetch([(0, 100), (400, 112)])
        assert loop.wait_resident(213 / 512, DEADLINE)
        assert loop.wait_ended(DEADLINE)
        assert loop.unsettled().tolist() == [[100, 200], [301, 99]]
        loop.prefetch([(0, 512)])
        assert loop.wait_settled(DEADLINE)
        assert loop.stats().duplicates == 0
    assert read_bytes(rig.address(0), 512 * PAGE) == rig.content.tobytes()


def test_a_wait_ends_at_its_time_out(rig):
    with pushed(rig) as (loop, _):
        assert not loop.wait_resident(1.0, 0.01)
        assert not loop.wait_ended(0.01)
        assert not loop.wait_settled(0.01)
        assert loop.wait_resident(0.0, 0)


def test_a_python_thread_may_touch_what_is_served():
    """Design section 9: it sleeps with the GIL held, and is woken by threads that never need it."""
    script = """
        import faulthandler, mmap, threading
        faulthandler.dump_traceback_later(20, exit=True)
        from pagecore import Feature, PlacementLoop, Userfaultfd
        from pagecore.page_source import BufferSource
        memory = mmap.mmap(-1, 256 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        content = bytes(range(1, 256)) * (256 * 4096 // 255 + 1)
        content = content[:256 * 4096]
        view = memoryview(memory)
        with Userfaultfd(features=Feature.EVENT_REMOVE) as uffd:
            with PlacementLoop([uffd.register(memory)], BufferSource(content), around=1) as loop:
                for page in range(256):
                    assert view[page * 4096] == content[page * 4096]    # no GIL is released here
                memory.madvise(mmap.MADV_DONTNEED, 0, 4096)             # nor here, until the event is read
                assert view[0] == 0
                assert loop.stats().faults >= 256
                assert loop.error is None
            view.release()
        print("served")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")


def test_bulk_pages_and_zeros_are_placed_until_the_end(rig):
    with pushed(rig, bulk_lanes=2) as (loop, peer):
        peer.bulk[0].sendall(pages_frame(0, rig.page(0, 200)) + header(ZEROS, 200, 56) + header(END))
        assert not loop.wait_ended(0.05), "one of two lanes is not at its end"
        peer.bulk[1].sendall(pages_frame(256, rig.page(256, 256)) + header(END))
        assert loop.wait_ended(DEADLINE)
        assert loop.wait_settled(DEADLINE)
        stats = loop.stats()
    assert (stats.placed, stats.zeroed, stats.duplicates, stats.resident) == (456, 56, 0, 512)
    assert read_bytes(rig.address(0), 200 * PAGE) == rig.page(0, 200)
    assert read_bytes(rig.address(200), 56 * PAGE) == bytes(56 * PAGE)


def test_an_urgent_answer_overtakes_the_bulk_stream(rig):
    with pushed(rig) as (loop, peer):
        waiter = rig.touch(17)
        assert peer.next_request() == (17, 1, 0)
        peer.urgent.sendall(pages_frame(17, rig.page(17)))
        assert waiter.value() == rig.page(17)
        # The waiter runs as soon as the page is there, the loop counts it after that.
        wait_until(lambda: loop.stats().latency["owed"].count == 1, "the latency is counted")
        latency = loop.stats().latency["owed"]
        assert 0 < latency.percentile(99) <= latency.max_ns == latency.total_ns


def test_already_sent_leaves_the_request_standing(rig):
    """D9: the page comes on another stream, and that wakes."""
    with pushed(rig) as (loop, peer):
        waiter = rig.touch(17)
        assert peer.next_request() == (17, 1, 0)
        peer.urgent.sendall(header(SENT, 17, 1))
        wait_until(lambda: loop.stats().already_sent == 1, "the answer is read")
        assert loop.states[0].requested.test(17)
        assert not waiter.done()
        peer.bulk[0].sendall(pages_frame(17, rig.page(17)))
        assert waiter.value() == rig.page(17)


def test_asking_again_waits_for_a_socket_that_takes_nothing(rig):
    """S7: the controller's thread waits, bounded; the reader goes on."""
    with pushed(rig) as (loop, peer):
        left = fill_up(peer.near_urgent)
        asked = Worker(loop.request_again, [(4, 2), (9, 1)])
        assert not asked.done(0.02)
        while left:
            left -= len(peer.urgent.recv(min(left, 65536)))
        assert peer.next_request() == (4, 2, AGAIN)
        assert peer.next_request() == (9, 1, AGAIN)
        asked.value()
        assert loop.error is None


def fill_up(stream):
    """Send until the socket takes no more; returns the bytes that its peer has to read first."""
    sent = 0
    stream.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += stream.send(bytes(PAGE))
    return sent


def test_a_fill_answer_uses_the_sessions_fill(rig):
    with pushed(rig, fill=0x01010101) as (_, peer):
        waiter = rig.touch(17)
        assert peer.next_request() == (17, 1, 0)
        peer.urgent.sendall(header(FILL, 17, 1))
        assert waiter.value() == b"\x01" * PAGE


def test_a_request_that_the_socket_does_not_take_is_sent_later(rig):
    """The reader of the descriptor never sleeps in a send: a discard could not be read meanwhile."""
    with pushed(rig) as (loop, peer):
        left = fill_up(peer.near_urgent)
        waiter = rig.touch(21)
        wait_until(lambda: loop.stats().deferred > 0, "the request is put off")
        assert discard(rig.address(100), PAGE) is None, "the reader is free to read a discard"
        while left:
            left -= len(peer.urgent.recv(min(left, 65536)))
        assert peer.next_request() == (21, 1, 0)
        peer.urgent.sendall(pages_frame(21, rig.page(21)))
        assert waiter.value() == rig.page(21)


def dies_of_sigbus(answer):
    """Run a child whose touch is answered by `answer`; returns its exit status."""
    script = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import faulthandler
        faulthandler.dump_traceback_later(20, exit=True)
        from placement_rig import *
        with served(16) as rig, pushed(rig) as (loop, peer):
            waiter = rig.touch(3)
            assert peer.next_request() == (3, 1, 0)
            peer.urgent.sendall({answer})
            waiter.value()
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60, check=False
    ).returncode


def test_a_page_that_nobody_has_is_a_sigbus_and_not_zeros():
    """D12."""
    assert dies_of_sigbus("header(GONE, 3, 1)") == -signal.SIGBUS


def test_the_child_of_the_sigbus_test_lives_when_it_is_answered():
    assert dies_of_sigbus("pages_frame(3, rig.page(3))") == 0


def test_a_stalling_session_leaves_a_gone_page_missing(rig):
    with pushed(rig, on_lost="stall") as (loop, peer):
        waiter = rig.touch(3)
        assert peer.next_request() == (3, 1, 0)
        peer.urgent.sendall(header(GONE, 3, 1) + pages_frame(4, rig.page(4)))
        wait_until(lambda: loop.stats().placed == 1, "the lane went on")
        assert not waiter.done()
        peer.urgent.sendall(pages_frame(3, rig.page(3)))
        assert waiter.value() == rig.page(3)


def test_a_fault_outside_every_region_fails_with_the_table(rig):
    """D14: the descriptor serves more memory than the loop was given."""
    other = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    stray = rig.uffd.register(other, region_id=9)
    with pushed(rig) as (loop, _):
        waiter = Worker(read_bytes, stray.address, 1)
        with pytest.raises(Exception, match=r"fault at 0x[0-9a-f]+ is outside every region: .*Region"):
            loop.wait_settled(DEADLINE)
        stray.place_zeros(0, 4)
        assert waiter.value() == b"\0"


def test_a_stopped_loop_leaves_its_waiters_to_the_next(rig):
    """D10: stopping wakes; who is woken faults again, and the next loop serves it."""
    with pushed(rig) as (_, peer):
        waiter = rig.touch(33)
        assert peer.next_request() == (33, 1, 0)
    assert not waiter.done()
    with PlacementLoop([rig.region], BufferSource(rig.content)):
        assert waiter.value() == rig.page(33)


def test_what_the_last_loop_asked_for_is_asked_again(rig):
    """D9: after a reconnect nobody else asks: `requested` keeps the fault from doing it."""
    with pushed(rig) as (loop, peer):
        waiter = rig.touch(33)
        assert peer.next_request() == (33, 1, 0)
        loop.request_again([(40, 1)])
        assert peer.next_request() == (40, 1, AGAIN)
        peer.bulk[0].sendall(pages_frame(40, rig.page(40)))
        wait_until(lambda: loop.stats().placed == 1, "one of the two comes")
        states = loop.states
    with pushed(rig, states=states) as (loop, peer):
        assert peer.next_request() == (33, 1, 0)
        assert peer.no_request()
        peer.urgent.sendall(pages_frame(33, rig.page(33)))
        assert waiter.value() == rig.page(33)


def test_a_start_that_fails_leaves_nothing_behind(rig, monkeypatch):
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    begin, begun = threading.Thread.start, []

    def fail_third(thread):
        begun.append(thread)
        if len(begun) == 3:
            raise RuntimeError("can't start new thread")
        begin(thread)

    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_third)
        with pytest.raises(RuntimeError, match="can't start"):
            loop.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", fail_eventfd)
        with pytest.raises(OSError, match="too many"):
            PlacementLoop([rig.region], BufferSource(rig.content)).start()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    with PlacementLoop([rig.region], BufferSource(rig.content)):
        assert rig.touch(3).value() == rig.page(3)


def fail_eventfd(*_):
    raise OSError("too many open files")


def test_two_starts_at_once_are_one(rig, monkeypatch):
    """The second comes while the first is half done: it must not take the first one's descriptor away."""
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    duplicate, second = os.dup, []

    def dup(number):
        monkeypatch.setattr(os, "dup", duplicate)
        second.append(Worker(loop.start))
        second[0].done(0.05)
        return duplicate(number)

    monkeypatch.setattr(os, "dup", dup)
    loop.start()
    with pytest.raises(BusyError):
        second[0].value()
    loop.stop()


def test_a_stop_that_was_interrupted_can_be_called_again(rig, monkeypatch):
    loop = PlacementLoop([rig.region], BufferSource(rig.content)).start()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.stop()
    loop.stop()
    assert not loop.running
    with PlacementLoop([rig.region], BufferSource(rig.content)):
        assert rig.touch(3).value() == rig.page(3)


def test_a_stopped_loop_asks_for_nothing(rig):
    with pushed(rig) as (loop, _):
        pass
    for method in (loop.prefetch, loop.request_again):
        with pytest.raises(ClosedError):
            method([(4, 1)])
    assert loop.error is None
    assert not loop.states[0].requested.any()


def test_a_loop_starts_once_and_reads_alone(rig):
    source = BufferSource(rig.content)
    with PlacementLoop([rig.region], source) as loop:
        with pytest.raises(BusyError):
            loop.start()
        with pytest.raises(BusyError, match="another reader"), PlacementLoop([rig.region], source):
            pass
        with pytest.raises(BusyError):
            rig.uffd.read_events()
    loop.stop()
    with pytest.raises(ClosedError):
        loop.start()
    assert rig.uffd.read_events() == []


def test_closing_the_descriptor_under_the_loop_turns_nothing_into_zeros(rig):
    """D12, D13: the loop holds a duplicate; the number of the closed one may be anybody's by now."""
    with pushed(rig) as (loop, peer):
        waiter = rig.touch(44)
        assert peer.next_request() == (44, 1, 0)
        rig.uffd.close()
        assert not waiter.done(0.02)
        peer.urgent.sendall(pages_frame(44, rig.page(44)))
        with pytest.raises(OSError, match="Bad file descriptor"):
            loop.wait_settled(DEADLINE)
        assert not waiter.done()
    assert waiter.value() == bytes(PAGE), "only now is the last descriptor closed"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads 0 is less than 1"),
        ({"duplicates": "some"}, ValueError, "'some' is neither"),
        ({"on_lost": "zeros"}, ValueError, "'zeros' is neither"),
        ({"states": []}, ValueError, "0 states for 1 regions"),
        ({"states": [PageState(3)]}, ValueError, "the planes have 3 pages, the region has 512"),
        ({"states": [None]}, TypeError, "PageState"),
        ({"fill": -1}, OverflowError, "negative"),
        ({"observer": object()}, TypeError, "observer"),
    ],
)
def test_wrong_options_are_refused(rig, options, error, message):
    with pytest.raises(error, match=message):
        PlacementLoop([rig.region], BufferSource(rig.content), **options)


def test_no_region_and_one_id_twice_are_refused(rig):
    source = BufferSource(rig.content)
    with pytest.raises(ValueError, match="at least one region"):
        PlacementLoop([], source)
    other = rig.uffd.register(mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    with pytest.raises(ValueError, match="two regions of one descriptor have the id 0"):
        PlacementLoop([rig.region, other], source)


def test_regions_that_are_none_or_dead_are_refused(rig):
    source = BufferSource(rig.content)
    with pytest.raises(TypeError, match="Region"):
        PlacementLoop([rig.region, None], source)
    rig.uffd.unregister(rig.region)
    with pytest.raises(ClosedError):
        PlacementLoop([rig.region], source)


def test_planes_that_are_shared_by_two_regions_are_refused():
    """The reader would take their lock twice, and the pages of one region would be those of the other."""
    with served(4) as rig:
        memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        other = rig.uffd.register(memory, region_id=1)
        state = PageState(4)
        with pytest.raises(ValueError, match="two regions have the same planes"):
            PlacementLoop([rig.region, other], BufferSource(rig.content), states=[state, state])


@pytest.mark.parametrize("page_size", [512, 8192])
def test_a_source_of_other_pages_is_refused(rig, page_size):
    """Its pages would be read past their end, or placed where they do not belong."""
    with pytest.raises(ValueError, match=f"the source has pages of {page_size} bytes, region 0 of 4096"):
        PlacementLoop([rig.region], BufferSource(rig.content, page_size=page_size))


def test_a_descriptor_that_reports_no_discards_is_refused():
    """D3: the guest's discard would go unseen, and old data would be placed over its zeros."""
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with Userfaultfd() as uffd:
        region = uffd.register(memory)
        with pytest.raises(ValueError, match="without EVENT_REMOVE"):
            PlacementLoop([region], BufferSource(bytes(4 * PAGE)))


@pytest.mark.parametrize("runs", [[(510, 3)], [(-1, 1)], [(0, -1)], [(2**62, 2**62)]])
def test_runs_outside_the_region_are_refused(rig, runs):
    loop = PlacementLoop([rig.region], BufferSource(rig.content))
    for method in (loop.prefetch, loop.forget, loop.give_up):
        with pytest.raises((IndexError, ValueError)):
            method(runs)
    assert not loop.states[0].released.any()
    assert not loop.states[0].excluded.any()


def test_a_source_that_fails_makes_no_zeros(rig):
    """D12: a short buffer is an error that names the page; the page stays missing."""
    with PlacementLoop([rig.region], BufferSource(rig.content[: 100 * PAGE])) as loop:
        waiter = rig.touch(200)
        with pytest.raises(Exception, match="page 200"):
            loop.wait_settled(DEADLINE)
        assert not waiter.done()
        assert not loop.states[0].claimed.any()
    with PlacementLoop([rig.region], BufferSource(rig.content)):
        assert waiter.value() == rig.page(200)


def test_threads_and_descriptors_are_given_back(rig):
    def descriptors():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    threads = threading.active_count()
    for _ in range(3):
        with pushed(rig, bulk_lanes=2):
            pass
    assert descriptors() == before
    assert threading.active_count() == threads


def test_regions_share_a_loop_and_keep_their_pages_apart():
    memories = [mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    with Userfaultfd(features=Feature.EVENT_REMOVE) as uffd:
        regions = [uffd.register(memory, region_id=10 + index) for index, memory in enumerate(memories)]
        peer = Peer()
        with PlacementLoop(regions, peer.source) as loop:
            waiter = Worker(read_bytes, regions[1].address + 5 * PAGE, PAGE)
            wait_until(lambda: loop.states[1].requested.test(5), "the right region asks")
            assert not loop.states[0].requested.any()
            peer.bulk[0].sendall(pages_frame(5, b"\x11" * PAGE, region=11))
            assert waiter.value() == b"\x11" * PAGE
            assert loop.unsettled(region_id=10).tolist() == [[0, 16]]
            with pytest.raises(ValueError, match="no region has the id 0"):
                loop.unsettled()
        peer.close()


@pytest.mark.stress
@pytest.mark.parametrize("seed", [1, 2])
def test_touches_discards_prefetch_and_late_duplicates_agree(seed):
    """Every page reads as the source's content, or as zeros once it was discarded; nobody is stuck."""
    npages = 2048
    with served(npages, seed=seed) as rig, pushed(rig, bulk_lanes=2) as (loop, peer):
        start = threading.Barrier(5)
        discarded = {page for page in range(npages) if page % 7 == 3}

        def toucher(which):
            generator = random.Random(seed * 10 + which)
            order = list(range(npages))
            generator.shuffle(order)
            start.wait(DEADLINE)
            return {page: read_bytes(rig.address(page), PAGE) for page in order}

        def discarder():
            start.wait(DEADLINE)
            for page in sorted(discarded):
                discard(rig.address(page), PAGE)

        def answerer():
            start.wait(DEADLINE)
            while True:
                try:
                    page, count, _ = peer.next_request()
                except (AssertionError, OSError):
                    return
                peer.urgent.sendall(pages_frame(page, rig.page(page, count)))

        def pusher():
            start.wait(DEADLINE)
            push(peer.bulk[0], rig, npages, 8)
            # A second copy of everything, on another stream: each page is a duplicate, or dropped.
            push(peer.bulk[1], rig, npages, 64)

        touchers = [Worker(toucher, which) for which in range(2)]
        jobs = [Worker(discarder), Worker(pusher)]
        answers = Worker(answerer)
        results = [job.value(60) for job in touchers]
        for job in jobs:
            job.value(60)
        assert loop.wait_ended(DEADLINE)
        assert loop.wait_settled(DEADLINE)
        for result in results:
            for page, data in result.items():
                assert data == rig.page(page) or (page in discarded and data == bytes(PAGE)), f"page {page}"
        for page in discarded:
            assert read_bytes(rig.address(page), PAGE) == bytes(PAGE), f"page {page} came back after its discard"
        assert loop.error is None
        assert loop.stats().removed == len(discarded)
        peer.urgent.shutdown(2)
        answers.value()


def push(stream, rig, npages, step):
    for page in range(0, npages, step):
        stream.sendall(pages_frame(page, rig.page(page, step)))
    stream.sendall(header(END))
