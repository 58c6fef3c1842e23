"""What the tests of the guests share: guests that are closed in the end, and what their memory says of them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from pagecore.errors import UnsupportedError
from pagecore.testing import _machine_state, open_guest

SIZE = 16 << 20
NPAGES = SIZE // 4096
DEADLINE = 20.0

both = pytest.mark.parametrize(
    "kind", ["process", pytest.param("kvm", marks=pytest.mark.kernel)], ids=["process", "kvm"]
)


@contextlib.contextmanager
def guests():
    """Open guests that are closed when the test ends; skip where KVM cannot be had, saying what would help."""
    opened = []

    def build(kind="process", size=SIZE, **options):
        try:
            guest = open_guest(size, kind=kind, **options)
        except UnsupportedError as error:
            pytest.skip(str(error))
        opened.append(guest)
        return guest

    yield build
    for guest in opened:
        guest.close()


def run_steps(guest, steps):
    guest.stop_after(steps)
    guest.run()
    assert guest.wait_stopped(DEADLINE)
    guest.pause()


def copy_memory(source, destination):
    destination.memory[:] = source.memory[:]


def pages_of(runs):
    return {page for first, count in runs for page in range(first, first + count)}


def data_first(guest):
    return _machine_state.layout(guest.npages, guest.config.vcpus)["data_first"]


def allocated_pages(guest):
    """Data pages that are allocated, by the guest's own table: a shorthand for tests that damage one."""
    layout = _machine_state.layout(guest.npages, guest.config.vcpus)
    first, count = layout["data_first"], layout["data_pages"]
    table = np.frombuffer(guest.read(layout["table_first"] * 4096, count * 4), dtype=np.uint32)
    return first + np.flatnonzero(table & 1)
