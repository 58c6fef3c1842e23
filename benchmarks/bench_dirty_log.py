"""A collect of the kernel's log and of KVM's beside the bare calls, on the same memory in the same run.

What is timed is the collect with its re-arm alone, after a share of the pages was written. ``pagecore bench logs``
measures every kind of log, in paired rounds and with gates; here pytest-benchmark's clock runs, so that two states of
the code can be compared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagecore import Bitmap, KvmDirtyLog, PagemapDirtyLog, UnsupportedError
from pagecore.bench import _floor_dirty
from pagecore.bench.dirty_log import Pages, Words, writer

PAGE = 4096
SIZE = 64 << 20
NPAGES = SIZE // PAGE
ROUNDS = 20

over_shares = pytest.mark.parametrize("share", [0.0, 0.01, 1.0], ids=["0%", "1%", "100%"])


@pytest.fixture(scope="module")
def memory():
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = bytes(SIZE)
    yield memory
    memory.close()


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def measure(
    benchmark: Any, call: Callable[[], object], found: Callable[[], int], setup: Callable[[], None], pages: Pages
) -> None:
    """Time rounds of `call`, each after `setup`; after the last one `found` says how many pages it reported."""
    benchmark.extra_info.update(pages=NPAGES, bytes=SIZE, dirty=len(pages))
    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    assert found() == len(pages)


@over_shares
@pytest.mark.parametrize("who", ["floor", "pagecore", "read"])
def test_pagemap(benchmark: Any, memory: mmap.mmap, share: float, who: str) -> None:
    benchmark.group = f"dirty-pagemap {share:.0%}"
    at, pages, bitmap, words = address_of(memory), Pages(NPAGES, share), Bitmap(NPAGES), Words(NPAGES)
    runs, entries = np.ones((NPAGES, 3), np.uint64), np.ones(NPAGES, np.uint64)
    number = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        log = PagemapDirtyLog(memory)
    except UnsupportedError as error:
        os.close(number)
        pytest.skip(str(error))

    def setup() -> None:
        _floor_dirty.scan(number, at, SIZE, 0, 0)
        bitmap.reset()
        words.clear()
        runs[:] = 0
        _floor_dirty.write(at, pages.address, len(pages))

    calls = {
        "floor": lambda: _floor_dirty.scan(number, at, SIZE, runs.ctypes.data, len(runs)),
        "pagecore": lambda: log.collect_into(bitmap),
        "read": lambda: _floor_dirty.read_pagemap(number, at, NPAGES, entries.ctypes.data, words.address),
    }
    found = {
        "floor": lambda: int((runs[:, 1] - runs[:, 0]).sum()) // PAGE,
        "pagecore": bitmap.count,
        "read": words.count,
    }
    with log:
        measure(benchmark, calls[who], found[who], setup, pages)
    os.close(number)


@over_shares
@pytest.mark.parametrize("who", ["floor", "pagecore"])
def test_kvm(benchmark: Any, memory: mmap.mmap, share: float, who: str) -> None:
    benchmark.group = f"dirty-kvm {share:.0%}"
    at, pages, bitmap, words = address_of(memory), Pages(NPAGES, share), Bitmap(NPAGES), Words(NPAGES)
    try:
        vm = _floor_dirty.WriterVm(at, SIZE)
    except OSError as error:
        pytest.skip(f"no KVM: {error}")
    log = KvmDirtyLog(vm.vm_fd, NPAGES, host_address=at)
    log.enable()
    write = writer(vm)

    def setup() -> None:
        bitmap.reset()
        words.clear()
        write(pages)

    calls: dict[str, Callable[[], object]] = {
        "floor": lambda: _floor_dirty.kvm_get(vm.vm_fd, 0, words.address),
        "pagecore": lambda: log.collect_into(bitmap),
    }
    measure(benchmark, calls[who], {"floor": words.count, "pagecore": bitmap.count}[who], setup, pages)
    log.close()
    vm.close()
