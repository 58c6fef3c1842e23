"""place(), place_zeros(), poison() and wake() against the real kernel: each answer of it provoked on purpose.

Every test asserts what is in the pages, what was counted, and what became of the thread that waited.
"""

from __future__ import annotations

import errno
import functools
import json
import mmap
import os
import signal

import pytest

from concurrency import Worker, run_together, wait_until
from pagecore import (
    Bitmap,
    EventKind,
    PlaceResult,
    Region,
    UffdError,
    Userfaultfd,
)
from uffd_helpers import (
    PAGE,
    PROT_NONE,
    Child,
    Toucher,
    address_of,
    anonymous,
    content,
    discard,
    leaked_mapping,
    next_events,
    page,
    protect,
    queued,
    sleeping,
    toucher,
    unmap,
    waiters,
)

pytestmark = pytest.mark.kernel


def counts(result: PlaceResult) -> dict[str, int]:
    """The counts that are not zero."""
    names = ("placed", "present", "zeroed", "deferred", "gone", "absent", "excluded", "moved", "peer_gone")
    return {name: int(getattr(result, name)) for name in names if getattr(result, name)}


def settle(place) -> PlaceResult:
    """Call it until nothing is deferred: the event was read, but the discarding thread must run too."""
    return wait_until(lambda: (result := place()).deferred == 0 and result, "the discard to end")


def test_place_makes_pages_present_and_wakes(uffd, region):
    with toucher(uffd, region, 2) as waiter:
        assert counts(region.place(0, page(10, 4))) == {"placed": 4}
        assert waiter.value() == 12
    assert content(region, 0, 4) == [10, 11, 12, 13]
    assert waiters(uffd) == 0


def test_place_of_nothing_is_legal_at_every_edge(region):
    assert counts(region.place(0, b"")) == {}
    assert counts(region.place(16, b"")) == {}
    assert counts(region.place_zeros(16, 0)) == {}
    region.wake(16, 0)


def test_eexist_never_overwrites_and_wakes(uffd, region):
    """D2, fact 3: a page placed without waking is found present; that alone must wake the waiter."""
    with toucher(uffd, region, 5) as waiter:
        assert counts(region.place(5, page(1), wake=False)) == {"placed": 1}
        assert waiters(uffd) == 1, "DONTWAKE must leave the waiter asleep, else this test shows nothing"
        assert counts(region.place(5, page(2))) == {"present": 1}
        assert waiter.value() == 1
    assert content(region, 5) == [1]


def test_eexist_wakes_even_without_wake(uffd, region):
    with toucher(uffd, region, 5) as waiter:
        region.place(5, page(1), wake=False)
        assert counts(region.place(5, page(2), wake=False)) == {"present": 1}
        assert waiter.value() == 1


def test_wake_releases_a_run_that_was_placed_without_waking(uffd, region):
    with toucher(uffd, region, 3) as one, toucher(uffd, region, 6) as two:
        assert counts(region.place(0, page(50, 8), wake=False)) == {"placed": 8}
        assert waiters(uffd) == 2
        region.wake(0, 8)
        assert (one.value(), two.value()) == (53, 56)


def test_wake_of_a_missing_page_faults_again(uffd, region):
    with toucher(uffd, region, 3) as waiter:
        assert len(next_events(uffd)) == 1
        region.wake(3, 1)
        assert next_events(uffd)[0].start == region.address + 3 * PAGE
        region.place(3, page(9))
        assert waiter.value() == 9


def test_present_page_in_the_middle_of_a_run(uffd, region):
    """D6: the kernel stops at page 3 with EAGAIN and 3 pages done; resumed there it says EEXIST."""
    region.place(3, page(99))
    received = Bitmap(16)
    with toucher(uffd, region, 1) as before, toucher(uffd, region, 6) as after:
        assert counts(region.place(0, page(10, 8), received=received)) == {"placed": 7, "present": 1}
        assert (before.value(), after.value()) == (11, 16)
    assert content(region, 0, 8) == [10, 11, 12, 99, 14, 15, 16, 17]
    assert received.runs().tolist() == [[0, 8]]


def test_present_pages_at_both_ends_and_side_by_side(region):
    for index in (0, 1, 7):
        region.place(index, page(99))
    assert counts(region.place(0, page(10, 8))) == {"placed": 5, "present": 3}
    assert content(region, 0, 8) == [99, 99, 12, 13, 14, 15, 16, 99]


def test_touched_before_registration_counts_as_present(uffd, memory):
    memory[4 * PAGE] = 77
    region = uffd.register(memory)
    assert counts(region.place(4, page(1))) == {"present": 1}
    assert content(region, 4) == [77]


def test_eagain_while_a_remove_event_is_unread(uffd, region):
    """D7, fact 4: until the discarding thread has run again nothing can be placed, and nothing is lost."""
    claimed, received = Bitmap(16), Bitmap(16)
    with toucher(uffd, region, 2) as waiter:
        next_events(uffd)  # the fault, so that the REMOVE is what comes next
        discarding = Worker(lambda: discard(region.address + 8 * PAGE, PAGE))
        queued(uffd)
        result = region.place(0, page(10, 4), claimed=claimed, received=received)
        assert counts(result) == {"deferred": 4}
        assert not claimed.any()
        assert not received.any()
        assert waiters(uffd) == 1
        assert discarding.is_alive(), "the caller of madvise sleeps until its event is read"
        region.wake(15, 1)  # WAKE works all the time
        (event,) = next_events(uffd)
        assert event[:3] == (EventKind.REMOVE, region.address + 8 * PAGE, region.address + 9 * PAGE)
        assert counts(settle(lambda: region.place(0, page(10, 4), claimed=claimed, received=received))) == {"placed": 4}
        assert waiter.value() == 12
        discarding.value()
    assert claimed.runs().tolist() == received.runs().tolist() == [[0, 4]]


def test_zeros_and_poison_are_deferred_too(uffd, region):
    discarding = Worker(lambda: discard(region.address, PAGE))
    queued(uffd)
    assert counts(region.place_zeros(4, 3)) == {"deferred": 3}
    assert counts(region.poison(8, 2)) == {"deferred": 2}
    next_events(uffd)
    assert counts(settle(lambda: region.place_zeros(4, 3))) == {"zeroed": 3}
    discarding.value()


def test_deferred_pages_are_the_last_of_the_run(uffd, region):
    """Pages that another claim holds count as present up to the word where the kernel says EAGAIN."""
    claimed = Bitmap(16)
    claimed.set_range(0, 3)
    discarding = Worker(lambda: discard(region.address + 15 * PAGE, PAGE))
    queued(uffd)
    assert counts(region.place(0, page(1, 8), claimed=claimed)) == {"present": 3, "deferred": 5}
    assert claimed.runs().tolist() == [[0, 3]], "what was won is given back, what another holds is not"
    next_events(uffd)
    discarding.value()


def test_discarded_page_is_missing_again(uffd, region):
    region.place(0, page(1))
    discarding = Worker(lambda: discard(region.address, PAGE))
    next_events(uffd)
    discarding.value()
    with toucher(uffd, region, 0) as waiter:
        assert counts(region.place(0, page(2))) == {"placed": 1}
        assert waiter.value() == 2


def test_enoent_in_the_middle_of_a_run(uffd):
    """Fact 5: two pages of the run are unmapped. Nothing else is lost, and their claims are given back."""
    address = leaked_mapping(16)
    region = uffd.register_address(address, 16 * PAGE)
    claimed, received = Bitmap(16), Bitmap(16)
    unmap(address + 6 * PAGE, 2 * PAGE)
    with toucher(uffd, region, 3) as before, toucher(uffd, region, 12) as after:
        result = region.place(0, page(10, 16), claimed=claimed, received=received)
        assert counts(result) == {"placed": 14, "gone": 2}
        assert (before.value(), after.value()) == (13, 22)
    assert claimed.runs().tolist() == received.runs().tolist() == [[0, 6], [8, 8]]
    assert content(region, 0, 6) + content(region, 8, 8) == [*range(10, 16), *range(18, 26)]
    unmap(address, 16 * PAGE)


def test_enoent_at_the_end_and_of_everything(uffd):
    address = leaked_mapping(16)
    region = uffd.register_address(address, 16 * PAGE)
    unmap(address + 11 * PAGE, 5 * PAGE)
    assert counts(region.place(0, page(10, 16))) == {"placed": 11, "gone": 5}
    unmap(address, 11 * PAGE)
    assert counts(region.place_zeros(0, 16)) == {"gone": 16}


def test_a_run_over_an_edge_between_registered_mappings_is_placed_whole(uffd, region):
    """mprotect splits the mapping in three; the kernel places nothing across an edge, and we must find it."""
    protect(region.address + 4 * PAGE, 5 * PAGE, mmap.PROT_READ)
    assert counts(region.place(0, page(10, 16))) == {"placed": 16}
    assert content(region, 0, 16) == list(range(10, 26))


def test_waiter_on_memory_that_went_away_is_woken_to_its_fault():
    """munmap leaves the waiter asleep in the kernel; GONE must wake it, and it dies by SIGSEGV."""

    def dies():
        uffd = Userfaultfd()
        address = leaked_mapping(4)
        region = uffd.register_address(address, 4 * PAGE)
        thread = Toucher(address)
        sleeping(uffd, 1)
        unmap(address, 4 * PAGE)
        assert counts(region.place(0, page(1, 4))) == {"gone": 4}
        thread.join(10)
        os._exit(3)  # still alive: the waiter was never woken

    assert Child(dies).ended() == -signal.SIGSEGV


def test_esrch_when_the_process_has_ended():
    """A grandchild holds the descriptor of a child that ends: the run is gone, and the peer with it."""
    to_parent, to_grandchild = os.pipe(), os.pipe()

    def child():
        uffd = Userfaultfd()
        region = uffd.register(anonymous(16))
        owner = os.getpid()
        if os.fork() == 0:
            claimed, received = Bitmap(16), Bitmap(16)
            alive = counts(region.place(0, page(1, 2), claimed=claimed, received=received))
            os.write(to_parent[1], b"1")
            os.read(to_grandchild[0], 1)
            wait_until(lambda: os.getppid() != owner, "the end of the owner")
            result = counts(region.place(2, page(1, 4), claimed=claimed, received=received))
            zeros = counts(region.place_zeros(8, 2))
            answer = json.dumps((alive, result, zeros, claimed.runs().tolist(), received.runs().tolist()))
            os.write(to_parent[1], answer.encode())
            os._exit(0)
        os.read(to_grandchild[0], 1)

    process = Child(child)
    assert os.read(to_parent[0], 1) == b"1"
    os.write(to_grandchild[1], b"22")
    process.ended()
    os.close(to_parent[1])
    alive, result, zeros, claimed, received = json.loads(os.read(to_parent[0], 4096))
    for descriptor in (to_parent[0], *to_grandchild):
        os.close(descriptor)
    assert alive == {"placed": 2}, "a child's copy of the descriptor acts on its parent's memory (fact 10)"
    assert result == {"gone": 4, "peer_gone": 1}
    assert zeros == {"gone": 2, "peer_gone": 1}
    assert claimed == received == [[0, 2]]


def test_unreadable_source(uffd, region):
    """EFAULT after two good pages, a partial result first; the waiter behind it hears of the failure."""
    source = anonymous(4)
    source[:] = page(10, 4)
    protect(address_of(source) + 2 * PAGE, PAGE, PROT_NONE)
    claimed, received = Bitmap(16), Bitmap(16)
    with toucher(uffd, region, 1) as served, toucher(uffd, region, 3) as waiter:
        next_events(uffd, 2)
        with pytest.raises(UffdError) as caught:
            region.place(0, source, claimed=claimed, received=received)
        assert caught.value.errno == errno.EFAULT
        assert caught.value.operation == "UFFDIO_COPY"
        assert (caught.value.address, caught.value.length) == (region.address + 2 * PAGE, 2 * PAGE)
        assert "2 of 4 pages" in caught.value.__notes__[0]
        assert claimed.runs().tolist() == received.runs().tolist() == [[0, 2]]
        assert served.value() == 11
        assert next_events(uffd)[0].start == region.address + 3 * PAGE, "woken, it faulted again"
        protect(address_of(source) + 2 * PAGE, PAGE, mmap.PROT_READ)
        assert counts(region.place(0, source, claimed=claimed, received=received)) == {
            "placed": 2,
            "present": 2,
        }
        assert waiter.value() == 13


def test_unreadable_source_at_once(region):
    source = anonymous(1)
    address = address_of(source)
    protect(address, PAGE, PROT_NONE)
    with pytest.raises(UffdError, match="UFFDIO_COPY") as caught:
        region.place(0, source)
    assert caught.value.errno == errno.EFAULT
    assert counts(region.place(0, page(1))) == {"placed": 1}


def test_claims_are_won_bit_by_bit(uffd):
    """D1: whoever loses a claim issues nothing, whatever is in the page."""
    region = uffd.register(anonymous(200))
    claimed, received = Bitmap(200), Bitmap(200)
    for first, last in ((0, 1), (5, 9), (62, 66), (127, 129), (150, 151), (198, 200)):
        claimed.set_range(first, last - first)
    taken = claimed.count()
    result = region.place(1, page(1, 199), claimed=claimed, received=received)
    assert counts(result) == {"placed": 200 - taken, "present": taken - 1}
    assert received.runs().tolist() == [[1, 4], [9, 53], [66, 61], [129, 21], [151, 47]]
    assert claimed.count() == 200
    assert [content(region, index)[0] for index in (1, 4, 9, 61, 66, 129, 197)] == [1, 4, 9, 61, 66, 129, 197]
    assert counts(region.place_zeros(5, 4)) == {"zeroed": 4}, "those that were claimed by another are missing"


def test_lost_claims_leave_the_waiter_to_the_winner(uffd, region):
    claimed = Bitmap(16)
    claimed.set(2)
    with toucher(uffd, region, 2) as waiter:
        assert counts(region.place(2, page(1), claimed=claimed)) == {"present": 1}
        assert waiters(uffd) == 1
        region.place(2, page(2))  # the winner's own placement
        assert waiter.value() == 2


@pytest.mark.parametrize("first", [0, 1, 63, 64, 65, 100])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_claims_at_word_edges(uffd, first, count):
    region = uffd.register(anonymous(256))
    claimed, received = Bitmap(256), Bitmap(256)
    assert counts(region.place(first, page(0, count), claimed=claimed, received=received)) == {"placed": count}
    assert claimed.runs().tolist() == received.runs().tolist() == [[first, count]]
    assert counts(region.place(first, page(7, count), claimed=claimed, received=received)) == {"present": count}


def test_failure_gives_back_the_claims_of_its_word_alone(uffd):
    """A failure in the middle of a word keeps lost claims, placed pages and later words as they were."""
    region = uffd.register(anonymous(256))
    source = anonymous(200)
    protect(address_of(source) + 70 * PAGE, PAGE, PROT_NONE)
    claimed, received = Bitmap(256), Bitmap(256)
    claimed.set(75)
    claimed.set(140)
    with pytest.raises(UffdError):
        region.place(0, source, claimed=claimed, received=received)
    assert received.runs().tolist() == [[0, 70]]
    assert claimed.runs().tolist() == [[0, 70], [75, 1], [140, 1]]


@pytest.mark.stress
def test_two_placers_place_each_page_once(uffd):
    npages, placers = 2048, 3
    region = uffd.register(anonymous(npages))
    claimed, received = Bitmap(npages), Bitmap(npages)

    def place(value):
        results = [
            region.place(first, bytes([value]) * (48 * PAGE), claimed=claimed, received=received)
            for first in range(0, npages - 32, 48)
        ]
        return sum(r.placed for r in results), sum(r.present for r in results)

    totals = run_together(*[functools.partial(place, value) for value in range(1, placers + 1)])
    covered = len(range(0, npages - 32, 48)) * 48
    assert sum(placed for placed, _ in totals) == covered
    assert sum(present for _, present in totals) == covered * (placers - 1)
    assert received.runs().tolist() == claimed.runs().tolist() == [[0, covered]]


def test_zeros(uffd, region):
    region.place(2, page(5))
    received = Bitmap(16)
    with toucher(uffd, region, 3) as waiter:
        assert counts(region.place_zeros(0, 4, received=received)) == {"zeroed": 3, "present": 1}
        assert waiter.value() == 0
    assert content(region, 0, 4) == [0, 0, 5, 0]
    assert received.runs().tolist() == [[0, 4]]


def test_zeros_over_a_present_page_wake(uffd, region):
    with toucher(uffd, region, 3) as waiter:
        region.place(3, page(8), wake=False)
        assert counts(region.place_zeros(3, 1, wake=False)) == {"present": 1}
        assert waiter.value() == 8


def test_poison_is_a_fault_and_not_a_wait():
    def dies():
        uffd = Userfaultfd()
        memory = anonymous(16)
        region = uffd.register(memory)
        thread = Toucher(region.address + PAGE)
        sleeping(uffd, 1)
        region.place(0, page(1))
        assert counts(region.poison(0, 3)) == {"placed": 2, "present": 1}
        thread.join(10)
        os._exit(3)  # still alive: the waiter was never woken

    assert Child(dies).ended() == -signal.SIGBUS


def test_copy_undoes_poison(region):
    """Fact 7, and the reason for D12's `excluded` plane: the kernel does not protect a marker from COPY."""
    assert counts(region.poison(0, 2)) == {"placed": 2}
    assert counts(region.place_zeros(0, 1)) == {"present": 1}
    assert counts(region.place(0, page(3, 2))) == {"placed": 2}
    assert content(region, 0, 2) == [3, 4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.place(0, b"x" * 4000), ValueError, "length 4000 is not a multiple of page size 4096"),
        (lambda r: r.place(16, bytes(PAGE)), IndexError, r"page 16 is outside \[0, 16\)"),
        (lambda r: r.place(15, bytes(2 * PAGE)), IndexError, r"pages \[15, 17\) are outside \[0, 16\)"),
        (lambda r: r.place(-1, bytes(PAGE)), IndexError, r"page -1 is outside \[0, 16\)"),
        (lambda r: r.place(2**70, bytes(PAGE)), IndexError, r"page 1180591620717411303424 is outside"),
        (lambda r: r.place(0, "text"), TypeError, "bytes-like"),
        (lambda r: r.place("0", bytes(PAGE)), TypeError, None),
        (lambda r: r.place(0, memoryview(bytes(4 * PAGE))[::2]), BufferError, None),
        (lambda r: r.place(0, b"", claimed=Bitmap(15)), ValueError, "15 pages does not fit a region of 16"),
        (lambda r: r.place(0, b"", received=Bitmap(17)), ValueError, "17 pages does not fit a region of 16"),
        (lambda r: r.place(0, b"", claimed=[]), TypeError, "Bitmap"),
        (lambda r: r.place_zeros(0, -1), ValueError, "page count -1 is negative"),
        (lambda r: r.place_zeros(0, 17), IndexError, r"pages \[0, 17\) are outside \[0, 16\)"),
        (lambda r: r.place_zeros(8, 2**64), IndexError, "are outside"),
        (lambda r: r.poison(16, 1), IndexError, "page 16 is outside"),
        (lambda r: r.wake(17, 0), IndexError, "page 17 is outside"),
    ],
)
def test_bad_arguments_change_nothing(region, call, error, message):
    with pytest.raises(error, match=message):
        call(region)
    assert counts(region.place_zeros(0, 16)) == {"zeroed": 16}


def test_the_source_is_pinned_during_the_call(open_uffd, uffd, region):
    """D13: the ioctl sleeps on a source page that is missing itself; its buffer cannot be closed now."""
    source = anonymous(1)
    other = open_uffd()
    slow = other.register_address(address_of(source), PAGE)
    placing = Worker(lambda: region.place(0, source))
    sleeping(other, 1)
    with pytest.raises(BufferError):
        source.close()
    slow.place(0, page(42))
    assert counts(placing.value()) == {"placed": 1}
    assert content(region, 0) == [42]
    other.unregister(slow)
    source.close()


def test_results_are_read_only_and_made_by_place_alone(region):
    result = region.place(0, page(1))
    with pytest.raises(AttributeError):
        result.placed = 5
    with pytest.raises(TypeError):
        PlaceResult()
    with pytest.raises(TypeError):
        Region()
    assert repr(result).startswith("PlaceResult(placed=1, present=0")
