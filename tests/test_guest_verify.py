"""What verifies a guest's memory: that it finds every kind of damage, and nothing else."""

from __future__ import annotations

import os

import numpy as np
import pytest

from guest_rig import NPAGES, SIZE, allocated_pages, data_first, guests, run_steps
from pagecore.testing import GuestConfig, _machine_state, page_checksums, verify_memory


@pytest.fixture
def make():
    with guests() as build:
        yield build


class TestVerify:
    @pytest.fixture
    def guest(self, make):
        guest = make(seed=77, vcpus=2)
        guest.boot()
        run_steps(guest, 4_000)
        assert verify_memory(guest).exact
        return guest

    @staticmethod
    def written_page(guest):
        """An allocated page whose content is not zeros."""
        for page in allocated_pages(guest):
            if any(guest.memory[int(page) * 4096 : int(page) * 4096 + 8]):
                return int(page)
        raise AssertionError("no such page")

    def test_a_flipped_bit(self, guest):
        page = self.written_page(guest)
        guest.memory[page * 4096 + 4095] ^= 0x80
        found = verify_memory(guest)
        assert (found.wrong, found.wrong_pages, found.exact) == (1, (page,), False)
        assert str(page) in str(found)

    def test_a_zeroed_page(self, guest):
        page = self.written_page(guest)
        guest.memory[page * 4096 : (page + 1) * 4096] = bytes(4096)
        assert verify_memory(guest).wrong_pages == (page,)

    def test_a_stale_page_and_a_stale_table_with_it(self, guest):
        layout = _machine_state.layout(NPAGES, 2)
        before = guest.memory[:]
        run_steps(guest, 4_000)
        assert verify_memory(guest).exact
        now = allocated_pages(guest)
        old = np.frombuffer(before, np.uint8).reshape(-1, 4096)
        new = np.frombuffer(guest.memory[:], np.uint8).reshape(-1, 4096)
        page = next(int(page) for page in now if (old[page] != new[page]).any())
        guest.memory[page * 4096 : (page + 1) * 4096] = before[page * 4096 : (page + 1) * 4096]
        assert verify_memory(guest).wrong_pages == (page,)
        # The guest's own table may say that the old version is right: it is not believed.
        first, count = layout["table_first"], layout["table_pages"]
        table = slice(first * 4096, (first + count) * 4096)
        guest.memory[table] = before[table]
        found = verify_memory(guest)
        assert found.wrong_pages == (page,)
        assert found.reserved_wrong > 0

    def test_a_stale_control_page(self, guest):
        first = _machine_state.layout(NPAGES, 2)["vcpu_first"]
        before = guest.memory[first * 4096 : (first + 1) * 4096]
        run_steps(guest, 4_000)
        guest.memory[first * 4096 : (first + 1) * 4096] = before
        found = verify_memory(guest)
        assert found.wrong > 0
        assert verify_memory(guest, steps=[8_000, 8_000]).reserved_wrong_pages == (first,)

    def test_garbage_in_the_control_page_ends(self, guest):
        first = _machine_state.layout(NPAGES, 2)["vcpu_first"]
        guest.memory[first * 4096 : (first + 1) * 4096] = b"\xfe" * 4096
        found = verify_memory(guest)
        assert first in found.reserved_wrong_pages

    @pytest.mark.parametrize("name", ["paging_first", "code_first"])
    def test_a_damaged_page_that_never_changes(self, guest, name):
        page = _machine_state.layout(NPAGES, 2)[name]
        guest.memory[page * 4096] ^= 1
        found = verify_memory(guest)
        assert (found.reserved_wrong_pages, found.wrong) == ((page,), 0)
        assert not found.exact

    def test_free_pages_may_hold_anything(self, guest):
        free = set(range(data_first(guest), NPAGES)) - set(allocated_pages(guest).tolist())
        for page in free:
            guest.memory[page * 4096 : (page + 1) * 4096] = bytes(4096)
        found = verify_memory(guest)
        assert found.exact
        assert found.free == len(free)
        run_steps(guest, 1_000)
        assert verify_memory(guest).exact

    def test_memory_and_config_alone(self, guest):
        assert verify_memory(guest.memory, guest.config).exact
        assert not verify_memory(guest.memory, GuestConfig(SIZE, seed=78, vcpus=2)).exact
        with pytest.raises(ValueError, match="config"):
            verify_memory(guest.memory)
        with pytest.raises(ValueError, match="33554432"):
            verify_memory(guest.memory, GuestConfig(32 << 20, seed=77, vcpus=2))
        with pytest.raises(ValueError, match="steps of 1 vCPUs, need 2"):
            verify_memory(guest, steps=[1])


def test_page_checksums():
    memory = bytearray(os.urandom(4096)) * 3 + bytes(4096)
    sums = page_checksums(memory)
    assert sums.dtype == np.uint64
    assert sums[0] == sums[1] == sums[2] != sums[3]
    memory[4096 + 4095] ^= 1
    changed = page_checksums(memory)
    assert changed[1] != sums[1]
    assert (np.delete(changed, 1) == np.delete(sums, 1)).all()
    assert (page_checksums(memory, [[3, 1], [0, 2]]) == changed[[3, 0, 1]]).all()
    assert len(page_checksums(b"")) == 0
    assert len(page_checksums(memory, np.empty((0, 2), np.int64))) == 0
    with pytest.raises(IndexError, match=r"pages \[3, 5\) are outside \[0, 4\)"):
        page_checksums(memory, [[3, 2]])
    with pytest.raises(ValueError, match="shape"):
        page_checksums(memory, [1, 2, 3])
    with pytest.raises(ValueError, match="4095 bytes"):
        page_checksums(bytes(4095))
