"""Working sets: runs in the order of their first touch, and the file that keeps them."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrency import DEADLINE, Worker
from pagecore import BusyError, ClosedError, PlacementLoop, ProtocolError, WorkingSet
from pagecore.page_source import BufferSource
from placement_rig import served
from uffd_helpers import PAGE, read_bytes

TOUCHES = [(0, 5), (0, 6), (1, 100), (0, 4), (0, 90), (0, 7), (1, 99), (0, 8)]


def test_neighbours_are_one_run_at_the_place_of_the_first():
    found = WorkingSet.from_touches(TOUCHES, [7, 3])
    assert found.runs.tolist() == [[7, 4, 5], [3, 99, 2], [7, 90, 1]]
    assert found.pages == 8


def test_a_page_between_two_runs_joins_them():
    assert WorkingSet.from_touches([(0, 1), (0, 9), (0, 3), (0, 2)], [0]).runs.tolist() == [[0, 1, 3], [0, 9, 1]]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60)), unique=True))
def test_every_page_is_there_once(touches):
    found = WorkingSet.from_touches(touches, [4, 9])
    pages = [(region, page) for region, first, count in found.runs.tolist() for page in range(first, first + count)]
    assert sorted(pages) == sorted(((4, 9)[index], page) for index, page in touches)
    assert WorkingSet.from_bytes(found.to_bytes()) == found
    if touches:
        assert (4, 9)[touches[0][0]] == found.runs[0, 0]


def test_stretches_of_one_region_are_parts():
    parts = WorkingSet([(1, 0, 2), (1, 9, 1), (0, 4, 4), (1, 3, 1)]).parts()
    assert [(region, runs.tolist()) for region, runs in parts] == [(1, [[0, 2], [9, 1]]), (0, [[4, 4]]), (1, [[3, 1]])]
    assert list(WorkingSet([]).parts()) == []


def test_the_file_is_what_it_says(tmp_path):
    WorkingSet([(2, 1 << 40, 3)], 2 << 20).save(tmp_path / "ws")
    data = (tmp_path / "ws").read_bytes()
    assert data[:24] == b"PGWS" + struct.pack("<HHQQ", 1, 0, 2 << 20, 1)
    assert data[28:] == struct.pack("<IIQ", 2, 3, 1 << 40)
    assert data[24:28] == struct.pack("<I", zlib.crc32(data[:24] + data[28:]))
    assert WorkingSet.load(tmp_path / "ws").runs.tolist() == [[2, 1 << 40, 3]]


def test_every_changed_byte_is_noticed():
    data = WorkingSet([(0, 5, 1), (1, 7, 3)]).to_bytes()
    for index in range(len(data)):
        with pytest.raises(ProtocolError):
            WorkingSet.from_bytes(data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :])
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            WorkingSet.from_bytes(data[:length])
    with pytest.raises(ProtocolError, match="runs"):
        WorkingSet.from_bytes(data + b"\0")


def signed(header, body=b""):
    return header + struct.pack("<I", zlib.crc32(header + body)) + body


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("magic", signed(b"PGWX" + struct.pack("<HHQQ", 1, 0, 4096, 0))),
        ("version", signed(b"PGWS" + struct.pack("<HHQQ", 2, 0, 4096, 0))),
        ("reserved", signed(b"PGWS" + struct.pack("<HHQQ", 1, 9, 4096, 0))),
        ("runs", signed(b"PGWS" + struct.pack("<HHQQ", 1, 0, 4096, 1 << 60))),
        ("run", signed(b"PGWS" + struct.pack("<HHQQ", 1, 0, 4095, 0))),
        ("run", signed(b"PGWS" + struct.pack("<HHQQ", 1, 0, 4096, 1), struct.pack("<IIQ", 1 << 20, 1, 0))),
        ("run", signed(b"PGWS" + struct.pack("<HHQQ", 1, 0, 4096, 1), struct.pack("<IIQ", 0, 0, 0))),
        ("first", signed(b"PGWS" + struct.pack("<HHQQ", 1, 0, 4096, 1), struct.pack("<IIQ", 0, 1, 1 << 63))),
    ],
)
def test_values_that_cannot_be_right_are_refused_though_the_checksum_is(field, data):
    with pytest.raises(ProtocolError, match=f"^{field}"):
        WorkingSet.from_bytes(data)


@given(st.binary(max_size=200))
def test_anything_else_is_refused_and_nothing_worse(data):
    with pytest.raises(ProtocolError):
        WorkingSet.from_bytes(data)


@pytest.mark.parametrize("runs", [[(0, 1)], [(0, -1, 1)], [(0, 1, 0)], [(1 << 16, 0, 1)], [(0, 1 << 52, 1)]])
def test_runs_outside_their_bounds_are_refused(runs):
    with pytest.raises(ValueError):
        WorkingSet(runs)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ws"
    WorkingSet([(0, 1, 1)]).save(path)

    def fail(_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            WorkingSet([(0, 2, 2)]).save(path)
    assert WorkingSet.load(path).runs.tolist() == [[0, 1, 1]]
    assert os.listdir(tmp_path) == ["ws"]


def test_the_runs_cannot_be_changed():
    found = WorkingSet(np.array([(0, 1, 1)]))
    with pytest.raises(ValueError):
        found.runs[0, 0] = 5


@pytest.mark.kernel
def test_a_working_set_is_recorded_saved_and_replayed(tmp_path):
    """Replayed, it is there before the guest asks: no fault is left."""
    order = [300, 301, 302, 7, 5, 6, 400, 303]
    with served(512) as rig, PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        with pytest.raises(ValueError, match="no working set is recorded"):
            loop.working_set()
        rig.touch(511).value()
        loop.record_working_set()
        with pytest.raises(BusyError):
            loop.record_working_set()
        for page in order:
            rig.touch(page).value()
        assert loop.stats().ahead == 0, "a guess would hide touches"
        assert loop.working_set().runs.tolist() == [[0, 300, 4], [0, 5, 3], [0, 400, 1]]
        loop.working_set().save(tmp_path / "ws")
    with served(512) as rig, PlacementLoop([rig.region], BufferSource(rig.content)) as loop:
        loop.replay(WorkingSet.load(tmp_path / "ws"))
        assert loop.wait_ended(DEADLINE)
        assert loop.states[0].received.runs().tolist() == [[5, 3], [300, 4], [400, 1]]
        for page in order:
            assert Worker(read_bytes, rig.address(page), PAGE).value() == rig.page(page)
        assert loop.stats().faults == 0
        with pytest.raises(ValueError, match="pages of 8192 bytes"):
            loop.replay(WorkingSet([(0, 0, 1)], 8192))
        with pytest.raises(ValueError, match="no region has the id 3"):
            loop.replay(WorkingSet([(0, 9, 1), (3, 0, 1)]))
        with pytest.raises((IndexError, ValueError)):
            loop.replay(WorkingSet([(0, 9, 1), (0, 512, 1)]))
        assert loop.stats().placed == 8, "what is refused is refused whole"
    with pytest.raises(ClosedError):
        loop.replay(WorkingSet([(0, 9, 1)]))


@pytest.mark.kernel
def test_what_is_touched_first_is_replayed_first(door):
    """On one thread the queue is emptied in the order of the recording, over regions too."""
    observer = door.RecordingObserver()
    with served(512) as rig, PlacementLoop([rig.region], BufferSource(rig.content), observer=observer) as loop:
        loop.replay(WorkingSet([(0, 90, 2), (0, 10, 20), (0, 300, 1)]))
        assert loop.wait_ended(DEADLINE)
    assert [call[:2] for call in observer.calls()] == [(90, 2), (10, 16), (26, 4), (300, 1)]


@pytest.mark.kernel
def test_the_background_and_a_recording_exclude_one_another():
    with served(16) as rig, pytest.raises(ValueError, match="without the background fill"):
        PlacementLoop([rig.region], BufferSource(rig.content), background=True).record_working_set()
