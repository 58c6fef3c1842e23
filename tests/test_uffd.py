"""Userfaultfd: ways in, handshake, registering, events, life cycle, and what the file must refuse."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import logging
import mmap
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest

from concurrency import Worker, wait_until
from pagecore import (
    BusyError,
    ClosedError,
    EventKind,
    FaultFlag,
    Feature,
    UffdError,
    UnsupportedError,
    Userfaultfd,
    _descriptor,
)
from pagecore._descriptor import query_access
from uffd_helpers import (
    PAGE,
    Child,
    Toucher,
    address_of,
    anonymous,
    discard,
    give_up_privileges,
    leaked_mapping,
    next_events,
    page,
    protect,
    queued,
    remap,
    sleeping,
    toucher,
    unmap,
)

pytestmark = pytest.mark.kernel


def test_the_descriptor_never_blocks_and_is_not_inherited_over_exec(uffd):
    assert fcntl.fcntl(uffd.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
    assert not os.get_inheritable(uffd.fileno())
    assert uffd.features == Feature.EVENT_REMOVE
    assert uffd.user_mode_only is False


def test_feature_that_the_kernel_lacks_names_the_kernel_that_has_it(monkeypatch):
    features, ioctls = query_access("user-mode")
    monkeypatch.setattr(_descriptor, "query_access", lambda access: (features & ~Feature.MOVE, ioctls))
    with pytest.raises(UnsupportedError, match=r"MOVE is not available: it needs Linux 6\.8") as caught:
        Userfaultfd(Feature.MOVE | Feature.EVENT_REMOVE)
    assert "MOVE" in caught.value.feature


def test_features_of_newer_kernels_are_ignored_and_unknown_requests_refused(monkeypatch):
    features, ioctls = query_access("user-mode")
    monkeypatch.setattr(_descriptor, "query_access", lambda access: (features | 1 << 50, ioctls))
    with Userfaultfd(Feature.EVENT_REMOVE) as uffd:
        assert uffd.features == Feature.EVENT_REMOVE
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="0x4000000000000"):
        Userfaultfd(1 << 50)


def test_kernel_without_userfaultfd(monkeypatch):
    """Both answers, of a kernel built without it and of one before user mode, name what is needed."""

    def refuse(number):
        def query(access):
            raise UffdError(number, f"userfaultfd ({access})")

        return query

    monkeypatch.setattr(_descriptor, "query_access", refuse(errno.ENOSYS))
    with pytest.raises(UnsupportedError, match="CONFIG_USERFAULTFD"):
        Userfaultfd()
    monkeypatch.setattr(_descriptor, "query_access", refuse(errno.EINVAL))
    with pytest.raises(UnsupportedError, match=r"Linux 5\.11"):
        Userfaultfd(user_mode_only=True)
    monkeypatch.setattr(_descriptor, "query_access", refuse(errno.EMFILE))
    with pytest.raises(UffdError, match="Too many open files"):
        Userfaultfd()


@pytest.fixture
def closed_to_users():
    with open("/proc/sys/vm/unprivileged_userfaultfd", encoding="ascii") as sysctl:
        if sysctl.read().strip() != "0":
            pytest.skip("every user may here; fix: sysctl -w vm.unprivileged_userfaultfd=0")


def test_without_permission_the_fix_is_named(closed_to_users):
    def unprivileged():
        give_up_privileges()
        answers = []
        for access in ("device", "syscall"):
            with pytest.raises(UffdError) as caught:
                query_access(access)
            answers.append(caught.value.errno)
        with pytest.raises(UnsupportedError) as refused:
            Userfaultfd(user_mode_only=False)
        return answers, str(refused.value)

    answers, message = Child(unprivileged).value()
    assert answers == [errno.EACCES, errno.EPERM]
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in message
    assert "/dev/userfaultfd" in message
    assert "CAP_SYS_PTRACE" in message


def test_without_permission_user_mode_works_with_a_warning(closed_to_users):
    """Touches from user space are served; the kernel's own, here of write(2), fail instead of waiting (fact 13)."""

    def unprivileged():
        give_up_privileges()
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
        logging.getLogger("pagecore").addHandler(handler)
        uffd = Userfaultfd(Feature.EVENT_REMOVE)
        memory = anonymous(4)
        region = uffd.register(memory)
        thread = Toucher(region.address)
        sleeping(uffd, 1)
        region.place(0, page(7))
        value = thread.value()
        reader, writer = os.pipe()
        try:
            os.write(writer, memoryview(memory)[PAGE : 2 * PAGE])
            answer = 0
        except OSError as error:
            answer = error.errno
        os.close(reader)
        os.close(writer)
        mode = uffd.user_mode_only
        uffd.close()
        return messages, value, answer, mode

    messages, value, answer, mode = Child(unprivileged).value()
    ((level, text),) = [message for message in messages if message[0] != "DEBUG"]
    assert level == "WARNING"
    assert "user mode only" in text
    assert "vm.unprivileged_userfaultfd=1" in text
    assert (value, answer, mode) == (7, errno.EFAULT, True)


def test_user_mode_can_be_chosen(open_uffd):
    assert open_uffd(user_mode_only=True).user_mode_only is True


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bytearray(PAGE + 1), ValueError, "not a (positive )?multiple of page size 4096"),
        (lambda: bytes(PAGE), ValueError, "writable"),
        (lambda: b"", ValueError, "writable"),
        (bytearray, ValueError, "length 0 is not a positive multiple"),
        (lambda: "text", TypeError, "bytes-like"),
        (lambda: memoryview(anonymous(4))[::2], ValueError, "contiguous"),
        (lambda: memoryview(anonymous(4))[1 : PAGE + 1], ValueError, "is not a multiple of page size 4096"),
        (lambda: memoryview(anonymous(4))[: PAGE - 1], ValueError, "length 4095"),
    ],
)
def test_memory_that_cannot_be_registered(uffd, make, error, message):
    with pytest.raises(error, match=message):
        uffd.register(make())


def test_files_and_private_memfds_are_refused_by_name(uffd, tmp_path):
    """The mask that the kernel returns looks the same for all of them."""
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with open(path, "r+b") as file:
        for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
            with pytest.raises(UnsupportedError, match="registering a file"):
                uffd.register(mmap.mmap(file.fileno(), PAGE, flags=flags))
    descriptor = os.memfd_create("memory")
    os.ftruncate(descriptor, PAGE)
    with pytest.raises(UnsupportedError, match="registering a private mapping of shared memory"):
        uffd.register(mmap.mmap(descriptor, PAGE, flags=mmap.MAP_PRIVATE))
    os.close(descriptor)


def test_range_with_a_hole_or_of_two_kinds_is_refused(uffd):
    address = leaked_mapping(8)
    unmap(address + 3 * PAGE, PAGE)
    with pytest.raises(ValueError, match="is not wholly mapped"):
        uffd.register_address(address, 8 * PAGE)
    with pytest.raises(ValueError, match="is not wholly mapped"):
        uffd.register_address(1 << 46, PAGE)
    with pytest.raises(ValueError, match="is not a multiple"):
        uffd.register_address(address + 1, PAGE)
    with pytest.raises(ValueError, match="is outside"):
        uffd.register_address(2**64 - PAGE, 2 * PAGE)
    with pytest.raises(ValueError, match="is outside"):
        uffd.register_address(-PAGE, PAGE)
    unmap(address, 8 * PAGE)


def test_mappings_of_one_kind_are_one_region(uffd):
    """mprotect splits a mapping; what stands behind it stays the same."""
    memory = anonymous(8)
    protect(address_of(memory) + 2 * PAGE, PAGE, mmap.PROT_READ)
    assert uffd.register(memory).size == 8


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (2 << 20, ValueError, "is not a positive multiple of page size 2097152"),
        (1 << 30, ValueError, "is not a positive multiple of page size 1073741824"),
        (8192, ValueError, "is not that of private anonymous memory of 4096 bytes a page"),
        (1000, ValueError, "page size 1000"),
        (8191, ValueError, "page size 8191"),
        (0, ValueError, "page size 0"),
    ],
)
def test_page_sizes(uffd, size, error, message):
    memory = memoryview(mmap.mmap(-1, 16 * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    start = address_of(memory.obj) % (2 * PAGE)
    memory = memory[start : start + 16 * PAGE]
    with pytest.raises(error, match=message):
        uffd.register(memory, page_size=size)


@pytest.mark.parametrize("number", [-1, 1 << 16])
def test_region_ids_are_16_bits(uffd, memory, number):
    with pytest.raises(ValueError, match=rf"region id {number} is outside \[0, 65536\)"):
        uffd.register(memory, region_id=number)


def test_region_says_what_it_is(uffd, memory):
    region = uffd.register(memory, region_id=7)
    assert (region.id, region.size, len(region), region.page_size) == (7, 16, 16, PAGE)
    assert (region.nbytes, region.address, region.uffd) == (16 * PAGE, address_of(memory), uffd)
    assert region.ioctls >> 3 & 1
    assert repr(region).startswith("<Region 7 [0x")


def test_region_keeps_its_memory_alive_until_unregistered(uffd):
    memory = anonymous(4)
    region = uffd.register(memory)
    with pytest.raises(BufferError):
        memory.close()
    with toucher(uffd, region, 1) as waiter:
        uffd.unregister(region)  # fact 9: the waiter goes on, and reads zeros
        assert waiter.value() == 0
    memory.close()
    with pytest.raises(ClosedError, match="not registered"):
        region.place(0, page(1))
    with pytest.raises(ClosedError, match="not registered"):
        uffd.unregister(region)


def test_unregister_leaves_nobody_asleep(uffd, door):
    """Fact 15: without the WAKE after it, one in seven of these touches sleeps for ever."""
    memory, flag = anonymous(16), anonymous(1)
    for spins in range(0, 1600, 4):
        discard(address_of(memory), len(memory))
        region = uffd.register(memory)
        flag[0] = 0
        waiter = Worker(door.touch_when, address_of(flag), region.address, spins)
        wait_until(lambda: flag[0] == 2, "the toucher to spin")
        flag[0] = 1
        uffd.unregister(region)
        assert waiter.value(2.0) == 0, f"asleep after {spins} spins"


def test_memory_can_be_registered_once(open_uffd, uffd, memory):
    region = uffd.register(memory)
    with pytest.raises(ValueError, match="overlaps the region"):
        uffd.register(memoryview(memory)[4 * PAGE : 8 * PAGE])
    other = open_uffd()
    with pytest.raises(UffdError, match="UFFDIO_REGISTER") as caught:
        other.register(memory)
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(ValueError, match="belongs to another"):
        other.unregister(region)
    uffd.unregister(region)
    other.register(memory)


def test_fault_event_says_where_and_how(open_uffd, memory):
    uffd = open_uffd(Feature.THREAD_ID)
    region = uffd.register(memory)
    thread = Toucher(region.address + 3 * PAGE + 100)
    (event,) = next_events(uffd)
    assert event.kind is EventKind.FAULT
    assert event[1:4] == (region.address + 3 * PAGE, 0, FaultFlag(0))
    assert event.thread == thread.native_id
    region.place_zeros(3, 1)
    thread.value()


def test_write_fault_is_flagged(open_uffd, memory):
    uffd = open_uffd()
    region = uffd.register(memory)
    zero = os.open("/dev/zero", os.O_RDONLY)
    writing = Worker(lambda: os.preadv(zero, [memoryview(memory)[PAGE : 2 * PAGE]], 0))
    (event,) = next_events(uffd)
    assert event[:4] == (EventKind.FAULT, region.address + PAGE, 0, FaultFlag.WRITE)
    region.place_zeros(1, 1)
    assert writing.value() == PAGE
    os.close(zero)


def test_faults_come_before_a_remove_that_came_first(uffd, region):
    """Fact 8, the reason for D4."""
    region.place(5, page(1))
    discarding = Worker(lambda: discard(region.address + 5 * PAGE, PAGE))
    queued(uffd)
    threads = [Toucher(region.address + index * PAGE) for index in (0, 1)]
    sleeping(uffd, 2)
    events = uffd.read_events()
    assert [event.kind for event in events] == [EventKind.FAULT, EventKind.FAULT, EventKind.REMOVE]
    assert events[2][1:3] == (region.address + 5 * PAGE, region.address + 6 * PAGE)
    discarding.value()
    wait_until(lambda: region.place_zeros(0, 2).deferred == 0, "the discard to end")
    assert [thread.value() for thread in threads] == [0, 0]


def test_unmap_and_remap_are_reported(open_uffd):
    uffd = open_uffd(Feature.EVENT_UNMAP | Feature.EVENT_REMAP)
    address = leaked_mapping(64)
    region = uffd.register_address(address, 64 * PAGE)
    unmapping = Worker(lambda: unmap(address + 32 * PAGE, PAGE))
    (event,) = next_events(uffd)
    assert event[:3] == (EventKind.UNMAP, address + 32 * PAGE, address + 33 * PAGE)
    unmapping.value()
    moving = Worker(lambda: remap(address + 40 * PAGE, 2 * PAGE))
    events = next_events(uffd, 2)  # it also unmaps the old place
    assert [event.kind for event in events] == [EventKind.REMAP, EventKind.UNMAP]
    assert events[0][1:4] == (address + 40 * PAGE, moving.value(), 2 * PAGE)
    uffd.close()
    assert region.size == 64
    unmap(address, 64 * PAGE)


def test_events_are_read_in_batches(uffd):
    region = uffd.register(anonymous(64))
    threads = [Toucher(region.address + index * PAGE) for index in range(40)]
    sleeping(uffd, 40)
    assert len(uffd.read_events(1)) == 1
    assert len(uffd.read_events(3)) == 3
    rest = uffd.read_events(100)
    assert len(rest) == 36
    assert uffd.read_events() == []
    region.place_zeros(0, 40)
    assert [thread.value() for thread in threads] == [0] * 40


@pytest.mark.stress
def test_more_events_than_one_read_takes(uffd):
    region = uffd.register(anonymous(150))
    threads = [Toucher(region.address + index * PAGE) for index in range(150)]
    sleeping(uffd, 150)
    assert len({event.start for event in uffd.read_events(1000)}) == 150
    region.place_zeros(0, 150)
    assert [thread.value() for thread in threads] == [0] * 150


@pytest.mark.parametrize("count", [0, -1, 65537])
def test_event_count_is_bounded(uffd, count):
    with pytest.raises(ValueError, match=rf"max_events {count} is outside \[1, 65536\]"):
        uffd.read_events(count)


@pytest.mark.stress
def test_two_readers_are_refused(uffd):
    """D4. The loser of two threads that read at once is told; a native loop holds the role for its whole life."""
    refused = threading.Event()
    end = time.monotonic() + 20

    def read():
        while not refused.is_set() and time.monotonic() < end:
            try:
                uffd.read_events()
            except BusyError:
                refused.set()

    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        readers = [Worker(read) for _ in range(4)]
        for reader in readers:
            reader.value(30)
    finally:
        sys.setswitchinterval(old)
    assert refused.is_set()
    assert uffd.read_events() == [], "the role was given back"


def test_close_waits_for_the_ioctl_in_flight(open_uffd, memory):
    """D13: the placement sleeps on a source page; meanwhile the number must not become somebody else's."""
    uffd, other = open_uffd(), open_uffd()
    region = uffd.register(memory)
    source = anonymous(1)
    slow = other.register(source)
    number = uffd.fileno()
    placing = Worker(lambda: region.place(0, source))
    sleeping(other, 1)
    closing = Worker(uffd.close)
    wait_until(lambda: uffd.closed, "close() to begin")
    with pytest.raises(ClosedError):
        region.place(1, page(1))
    with pytest.raises(ClosedError):
        uffd.read_events()
    assert closing.is_alive()
    os.fstat(number)
    slow.place(0, page(42))
    assert placing.value().placed == 1
    closing.value()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert memory[0] == 42


def test_close_in_a_forked_child_waits_for_nobody(open_uffd, memory):
    """The counter was copied with a thread of the parent in an ioctl; that thread does not exist in the child."""
    uffd, other = open_uffd(), open_uffd()
    region = uffd.register(memory)
    source = anonymous(1)
    slow = other.register(source)
    placing = Worker(lambda: region.place(0, source))
    sleeping(other, 1)

    def child():
        uffd.close()
        return uffd.closed

    assert Child(child).value() is True
    slow.place(0, page(42))
    assert placing.value().placed == 1, "the parent's descriptor is open"


def test_close_lets_every_waiter_go(open_uffd, memory):
    """Fact 9: nobody waits for ever, but what was missing reads as zeros (D12 says what to do about that)."""
    uffd = open_uffd()
    region = uffd.register(memory)
    threads = [Toucher(region.address + index * PAGE) for index in range(3)]
    sleeping(uffd, 3)
    uffd.close()
    assert [thread.value() for thread in threads] == [0, 0, 0]


def test_a_duplicate_holds_the_waiters_after_close(open_uffd, memory):
    uffd = open_uffd()
    region = uffd.register(memory)
    duplicate = os.dup(uffd.fileno())
    thread = Toucher(region.address)
    sleeping(uffd, 1)
    uffd.close()
    with open(f"/proc/self/fdinfo/{duplicate}", encoding="ascii") as lines:
        assert "total:\t1\n" in lines.read()
    assert thread.is_alive()
    os.close(duplicate)
    assert thread.value() == 0


def test_closed_objects_say_so(uffd, region):
    uffd.close()
    uffd.close()
    assert uffd.closed
    calls = [
        uffd.fileno,
        uffd.read_events,
        uffd.__enter__,
        lambda: uffd.register(anonymous(1)),
        lambda: uffd.unregister(region),
        lambda: region.place(0, page(1)),
        lambda: region.place_zeros(0, 1),
        lambda: region.poison(0, 1),
        lambda: region.wake(0, 1),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert "closed" in repr(uffd)


def test_context_manager_closes():
    with Userfaultfd() as uffd:
        number = uffd.fileno()
    assert uffd.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_forgotten_descriptor_warns_and_closes():
    uffd = Userfaultfd()
    number = uffd.fileno()
    with pytest.warns(ResourceWarning, match=r"unclosed <Userfaultfd fd="):
        del uffd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_constructor_that_fails_owns_no_descriptor():
    """An object that never got its descriptor must not close number 0 when it goes."""
    before = os.fstat(0)
    with pytest.raises(TypeError):
        Userfaultfd(no_such_argument=1)
    with pytest.raises(TypeError):
        Userfaultfd("features")
    gc.collect()
    assert os.fstat(0)[:3] == before[:3]


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_descriptors_are_not_copied(uffd, region, duplicate):
    for thing in (uffd, region):
        with pytest.raises(TypeError, match="cannot be pickled"):
            duplicate(thing)


def test_inherited_descriptor_registers_nothing(uffd, region):
    """Fact 10: in a forked child it would act on this process's memory at the child's addresses."""

    def child():
        with pytest.raises(UnsupportedError, match="inherited over fork"):
            uffd.register(anonymous(1))
        return region.place(3, page(33)).placed

    assert Child(child).value() == 1
    assert Toucher(region.address + 3 * PAGE).value() == 33


def test_header_agrees_with_the_build_host(tmp_path):
    """_kernel_abi.h checks itself; here under warnings, and against what the Python side spells as numbers."""
    source = tmp_path / "check.c"
    lines = [f'_Static_assert({feature.value} == UFFD_FEATURE_{feature.name}, "");' for feature in Feature]
    lines += [
        f'_Static_assert({kind.value} == UFFD_EVENT_{name}, "");'
        for name, kind in (
            ("PAGEFAULT", EventKind.FAULT),
            ("FORK", EventKind.FORK),
            ("REMAP", EventKind.REMAP),
            ("REMOVE", EventKind.REMOVE),
            ("UNMAP", EventKind.UNMAP),
        )
    ]
    lines += [f'_Static_assert({flag.value} == UFFD_PAGEFAULT_FLAG_{flag.name}, "");' for flag in FaultFlag]
    source.write_text('#include "_kernel_abi.h"\n' + "\n".join(lines) + "\nint main(void) { return 0; }\n")
    include = os.path.join(os.path.dirname(os.path.dirname(__file__)), "src", "pagecore")
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I", include, "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
