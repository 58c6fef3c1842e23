"""Several regions of different page sizes in one tracker; placing units; counts; recovery of all of them."""

import numpy as np
import pytest

from pagecore import (
    AnswerKind,
    Bitmap,
    BusyError,
    MemoryDirtyLog,
    PageTracker,
    TrackedRegion,
    UnsupportedError,
    settled_checksum,
)
from tracker_rig import StepLog, pages

OWED, FREE, SENT, GONE = AnswerKind
M2, G1 = 2 << 20, 1 << 30


def region(id, npages, **options):
    return TrackedRegion(id=id, npages=npages, **options)


def three(**options):
    return PageTracker(regions=[region(1, 100), region(7, 10, page_size=M2), region(2, 3, page_size=G1)], **options)


def listed(batch):
    return [(id, runs.tolist()) for id, runs in batch]


# ---- describing them


def test_sizes_and_specs():
    tracker = three()
    assert [spec.id for spec in tracker.regions] == [1, 7, 2]
    assert tracker.region(7).nbytes == 10 * M2
    assert (tracker.size, len(tracker), tracker.dirty_count) == (113, 113, 113)
    assert tracker.counts() == (113, 0, 0, 100 * 4096 + 10 * M2 + 3 * G1, 100 * 4096 + 10 * M2 + 3 * G1)
    assert tracker.counts(7).dirty_bytes == 10 * M2
    assert "113 pages in 3 regions" in repr(tracker)
    for ask in (lambda: tracker.page_size, lambda: tracker.dirty_log, lambda: tracker.dirty, tracker.take):
        with pytest.raises(ValueError, match="3 regions: name one"):
            ask()
    assert PageTracker(10, page_size=M2).region().page_size == M2
    assert PageTracker(regions=[]).take_batch() == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PageTracker(regions=[region(1, 1), region(1, 2)]), ValueError, "region 1 is there twice"),
        (lambda: PageTracker(5, regions=[region(1, 1)]), TypeError, "npages cannot stand beside"),
        (lambda: PageTracker(regions=[region(1, 1)], page_size=4096), TypeError, "page_size cannot stand"),
        (lambda: PageTracker(regions=[5]), TypeError, "a TrackedRegion, not int"),
        (lambda: region(-1, 1), ValueError, r"region id -1 is outside \[0, 65536\)"),
        (lambda: region(1 << 16, 1), ValueError, "65536"),
        (lambda: region(1, -1), ValueError, "npages -1 is negative"),
        (lambda: region(1, 4.0), TypeError, "float"),
        (lambda: region(1, 1, page_size=4095), ValueError, "page_size 4095 is no power of two"),
        (lambda: region(1, 1, page_size=2 * G1), ValueError, "page_size 2147483648"),
        (lambda: region(1, 4, page_size=M2, host_page_size=4096), ValueError, "less than page_size"),
        (lambda: region(1, 513, host_page_size=M2), ValueError, "npages 513 is not a multiple of 512"),
        (lambda: region(1, 1 << 40, page_size=G1), ValueError, "2\\^63 bytes"),
        (lambda: region(1, 10, dirty_log=MemoryDirtyLog(11)), ValueError, "log of 11 pages"),
        (lambda: region(1, 10, dirty_log=3), TypeError, "not int"),
    ],
)
def test_bad_descriptions_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.take(region=3),
        lambda t: t.put_back([[0, 1]], region=3),
        lambda t: t.mark([[0, 1]], region=3),
        lambda t: t.discard_runs(3),
        lambda t: t.hinted_pages(3),
        lambda t: t.counts(3),
        lambda t: t.dirty_of(3),
        lambda t: t.region(3),
        lambda t: t.remove_region(3),
        lambda t: t.hint_session().clear_runs([[0, 1]], 1, region=3),
        lambda t: t.hint_session().clear_bytes([[0, 4096]], 1, region=3),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_region_that_is_not_there(call):
    tracker = three()
    with pytest.raises(IndexError, match="region 3 is not tracked; there are: 1, 7, 2"):
        call(tracker)
    assert tracker.dirty_count == 113


def test_bounds_are_those_of_the_region():
    tracker = three()
    with pytest.raises(IndexError, match=r"\[9, 11\) are outside \[0, 10\)"):
        tracker.put_back([[9, 2]], region=7)
    with pytest.raises(IndexError, match=r"outside \[0, 3\)"):
        tracker.mark([[3, 1]], region=2)
    assert tracker.resolve(9, 2, region=7) == [(OWED, 9, 1), (GONE, 10, 1)]


# ---- take


def test_batches_go_over_the_regions_and_wrap():
    tracker = three()
    assert listed(tracker.take_batch(max_pages=98)) == [(1, [[0, 98]])]
    tracker.put_back([[0, 1]], region=1)
    assert listed(tracker.take_batch(max_pages=5)) == [(1, [[98, 2]]), (7, [[0, 3]])]
    tracker.put_back([[1, 1]], region=7)
    assert listed(tracker.take_batch(max_pages=12)) == [(7, [[3, 7]]), (2, [[0, 3]]), (1, [[0, 1]]), (7, [[1, 1]])]
    assert tracker.take_batch() == []
    assert tracker.dirty_count == 0


def test_batches_keep_to_bytes():
    tracker = three()
    assert listed(tracker.take_batch(max_bytes=100 * 4096 + M2)) == [(1, [[0, 100]]), (7, [[0, 1]])]
    assert listed(tracker.take_batch(max_bytes=M2 - 1)) == [(7, [[1, 1]])]
    tracker.take(max_bytes=8 * M2, region=7)
    assert listed(tracker.take_batch(max_bytes=1)) == [(2, [[0, 1]])]
    assert listed(tracker.take_batch(max_bytes=10 * G1, max_runs=1)) == [(2, [[1, 2]])]


def test_a_take_of_one_region_leaves_the_others():
    tracker = three()
    assert tracker.take(4, region=7).tolist() == [[0, 4]]
    assert tracker.take(4, region=7).tolist() == [[4, 4]]
    assert (tracker.dirty_of(1).count(), tracker.dirty_of(2).count()) == (100, 3)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_bytes": -1}, {"max_pages": 0}, {"max_runs": 0}])
def test_batches_refuse_limits_below_one(limits):
    tracker = three()
    with pytest.raises(ValueError, match=r"is less than 1|is negative"):
        tracker.take_batch(**limits)
    assert tracker.dirty_count == 113


def test_the_next_take_begins_behind_the_last_request():
    tracker = three()
    tracker.resolve(40, 2, region=1)
    assert listed(tracker.take_batch(max_pages=3)) == [(1, [[42, 3]])]
    tracker.resolve(5, region=7)
    assert listed(tracker.take_batch(max_pages=5)) == [(7, [[6, 4]]), (2, [[0, 1]])]
    tracker.resolve(99, region=1)
    assert tracker.take(3, region=1).tolist() == [[0, 3]]


# ---- coming and going


def test_regions_come_and_go_between_rounds():
    log = MemoryDirtyLog(50)
    tracker = PageTracker(regions=[region(1, 10)])
    tracker.sync()
    with tracker.hint_session() as session:
        session.start()
        with pytest.raises(BusyError, match="epoch 1 is open"):
            tracker.add_region(region(2, 50, dirty_log=log))
        with pytest.raises(BusyError, match="epoch 1 is open"):
            tracker.remove_region(1)
        session.stop()
        tracker.add_region(region(2, 50, dirty_log=log))
        # S4: all are armed before an epoch begins.
        with pytest.raises(BusyError, match="sync"):
            session.start()
        tracker.sync()
        epoch = session.start()
        assert session.clear_runs([[0, 7]], epoch, region=2) == 7
        session.stop()
        with pytest.raises(ValueError, match="region 1 is tracked already"):
            tracker.add_region(region(1, 5))
        with pytest.raises(TypeError, match="TrackedRegion"):
            tracker.add_region(3)
        with pytest.raises(UnsupportedError, match="held"):
            tracker.add_region(region(3, 5, dirty_log=StepLog(5), rearm="lazy"))
        with pytest.raises(UnsupportedError, match="vmm"):
            tracker.add_region(region(3, 5, dirty_log=MemoryDirtyLog(5, misses={"vmm"})))
        tracker.remove_region(1)
        assert tracker.resolve(3, 5, region=1) == [(GONE, 3, 5)]
        assert tracker.resolve(0, 8) == [(FREE, 0, 7), (OWED, 7, 1)]
        assert tracker.dirty_count == 42


# ---- whole units (S10)


def units():
    log = MemoryDirtyLog(2048)
    tracker = PageTracker(2048, host_page_size=M2, dirty_log=log, all_dirty=False)
    tracker.sync()
    return tracker, log


def test_precopy_sends_what_was_written_and_the_switch_whole_units():
    tracker, log = units()
    log.bitmap.set_indices([3, 700])
    assert tracker.sync() == 2
    assert tracker.take(1).tolist() == [[3, 1]]
    tracker.sync(last=True)
    assert tracker.discard_runs().tolist() == [[512, 512]]
    assert tracker.dirty_count == 512
    # One unit goes out whole, or not at all.
    assert tracker.take(1).tolist() == [[512, 512]]
    tracker.put_back([[600, 1]])
    assert tracker.dirty_count == 512
    assert tracker.resolve(700) == [(OWED, 512, 512)]
    assert tracker.resolve(2047, 5) == [(SENT, 1536, 512), (GONE, 2048, 4)]
    # Back in precopy: parts again.
    tracker.owe_all()
    assert tracker.take(5).shape == (1, 2)
    assert tracker.dirty_count == 2043


def test_units_in_a_batch_keep_to_the_limits():
    tracker = PageTracker(regions=[region(1, 1024, host_page_size=M2), region(2, 1024, host_page_size=M2)])
    for id in (1, 2):
        tracker.discard_pages(id)
    assert listed(tracker.take_batch(max_pages=1)) == [(1, [[0, 512]])]
    assert listed(tracker.take_batch(max_pages=1023)) == [(1, [[512, 512]])]
    assert listed(tracker.take_batch(max_bytes=2 * M2)) == [(2, [[0, 1024]])]
    assert tracker.take_batch() == []


def test_hints_are_rounded_inward_to_units():
    tracker, _ = units()
    tracker.owe_all()
    with tracker.hint_session() as session:
        epoch = session.start()
        assert session.clear_runs([[1, 1023]], epoch) == 512
        assert session.clear_runs([[1025, 1000], [2000, 48]], epoch) == 0
        assert session.clear_bytes([[3 * M2 - 1, M2 + 1]], epoch) == 512
    assert tracker.hinted.runs().tolist() == [[512, 512], [1536, 512]]


def test_a_unit_free_in_parts_is_owed():
    """Hinted, one page written and sent: what was sent is lost when the unit is discarded."""
    tracker, log = units()
    tracker.owe_all()
    with tracker.hint_session() as session:
        epoch = session.start()
        assert session.clear_runs([[0, 1024]], epoch) == 1024
        log.bitmap[5] = True
        tracker.sync()
        tracker.take(5000)
    assert (tracker.dirty_count, tracker.hinted_count) == (0, 1023)
    assert tracker.hinted_runs().tolist() == [[512, 512]]
    assert tracker.dirty.runs().tolist() == [[0, 512]]
    assert (tracker.dirty_count, tracker.hinted_count) == (512, 512)
    # And so after a recovery in which a part of a unit is said to be settled.
    settled = Bitmap(2048)
    settled.set_range(0, 100)
    settled.set_range(1024, 1024)
    assert tracker.reload(settled) == 512
    assert tracker.dirty.runs().tolist() == [[0, 512]]
    assert tracker.hinted.runs().tolist() == [[512, 512]]


@pytest.mark.parametrize("page_size", [8192, 128 << 10, 256 << 10, M2, G1])
def test_a_page_is_dirty_if_any_part_is(page_size):
    ratio = page_size // 4096
    log = MemoryDirtyLog(5 * ratio)
    tracker = PageTracker(5, page_size=page_size, dirty_log=log, all_dirty=False)
    log.bitmap.set_indices([0, 2 * ratio - 1, 4 * ratio, 4 * ratio + 1])
    assert tracker.sync() == 3
    assert pages(tracker.take()) == [0, 1, 4]
    assert tracker.sync() == 0
    assert PageTracker(5, page_size=page_size, dirty_log=MemoryDirtyLog(5)).sync() == 0


# ---- counts


def counted(tracker):
    dirty = sum(tracker.dirty_of(spec.id).count() for spec in tracker.regions)
    hinted = sum(tracker.hinted_of(spec.id).count() for spec in tracker.regions)
    assert (tracker.dirty_count, tracker.hinted_count) == (dirty, hinted)
    assert tracker.remaining_count == dirty + hinted
    return dirty, hinted


def test_counts_follow_every_call():
    log = MemoryDirtyLog(1000)
    tracker = PageTracker(regions=[region(0, 1000, dirty_log=log), region(1, 640, host_page_size=64 << 10)])
    tracker.sync()
    assert counted(tracker) == (1640, 0)
    with tracker.hint_session() as session:
        epoch = session.start()
        session.clear_runs([[0, 500], [400, 200]], epoch, region=0)
        session.clear_runs([[8, 100]], epoch, region=1)
        assert counted(tracker) == (1640 - 600 - 80, 680)
        taken = tracker.take(100, region=0)
        log.bitmap.set_range(0, 700)
        tracker.sync()
        assert counted(tracker) == (1560, 80)
        epoch = session.start()
        tracker.take(300, region=0)
        log.bitmap.set_range(0, 10)
        tracker.sync()
        epoch = session.start()
        runs = tracker.take(10, region=1)
        session.clear_runs([[0, 640]], epoch, region=1)
        session.clear_runs([[0, 1000]], epoch, region=0)
        # Put back after a hint of it: owed, and not free too.
        tracker.put_back(taken, region=0)
        tracker.put_back(runs, region=1)
        counted(tracker)
    tracker.resolve(0, 100, region=0)
    tracker.resolve(600, 100, True, region=0)
    counted(tracker)
    tracker.mark([[0, 10], [5, 10]], region=0)
    assert tracker.counts().marked == 15
    tracker.sync()
    assert tracker.counts(0).marked == 0
    for id in (0, 1):
        tracker.discard_pages(id)
        counted(tracker)
    tracker.owe_hinted()
    assert counted(tracker)[1] == 0
    tracker.owe_all()
    assert counted(tracker) == (1640, 0)


# ---- recovery


def switched():
    tracker = PageTracker(regions=[region(1, 10), region(2, 70)])
    tracker.sync()
    with tracker.hint_session() as session:
        session.clear_runs([[0, 4]], session.start(), region=1)
        tracker.take_batch()
    tracker.sync(last=True)
    reports = {1: Bitmap(10), 2: Bitmap(70)}
    reports[1].set_range(2, 5)
    reports[2].set_range(0, 69)
    return tracker, reports


def test_reload_of_all_regions():
    tracker, reports = switched()
    tracker.begin_generation(3)
    sums = {id: settled_checksum(bitmap, region=id, generation=3) for id, bitmap in reports.items()}
    assert tracker.reload(reports, generation=3, checksum=sums) == 4
    assert tracker.dirty_of(1).indices().tolist() == [7, 8, 9]
    assert tracker.dirty_of(2).indices().tolist() == [69]
    assert tracker.hinted_of(1).indices().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"settled": Bitmap(10)}, ValueError, "one settled bitmap for 2 regions"),
        ({"settled": {1: Bitmap(10)}}, ValueError, r"regions \[1\]; those tracked are \[1, 2\]"),
        ({"settled": {1: Bitmap(10), 3: Bitmap(70)}}, ValueError, r"\[1, 3\]"),
        ({"settled": {1: Bitmap(70), 2: Bitmap(70)}}, ValueError, "70 pages does not fit a region of 10"),
        ({"settled": {1: Bitmap(10), 2: np.zeros(70, bool)}}, TypeError, "not ndarray"),
        ({"settled": {1: Bitmap(10), 2: None}}, TypeError, "not NoneType"),
        ({"generation": 2}, ValueError, "generation 2; this connection's is 3"),
        ({"generation": 3.0}, TypeError, "float"),
        ({"checksum": {1: 0, 2: 0}}, ValueError, "region 1: checksum 0x[0-9a-f]+ is not 0x00000000"),
        ({"checksum": "x"}, (ValueError, TypeError), "str"),
    ],
)
def test_a_refused_reload_changes_nothing(change, error, message):
    tracker, reports = switched()
    tracker.begin_generation(3)
    arguments = {"settled": reports, "generation": 3, **change}
    with pytest.raises(error, match=message):
        tracker.reload(**arguments)
    assert (tracker.dirty_count, tracker.hinted_count) == (0, 4)
    # Nor does it count as the report of this generation.
    assert tracker.reload(reports, generation=3) == 4


def test_a_report_of_another_region_does_not_fit():
    tracker = PageTracker(regions=[region(1, 10), region(2, 10)])
    one, two = Bitmap(10), Bitmap(10)
    one.fill()
    sums = {1: settled_checksum(one, region=1), 2: settled_checksum(two, region=2)}
    with pytest.raises(ValueError, match="another region"):
        tracker.reload({1: two, 2: one}, checksum=sums)
    assert tracker.reload({1: one, 2: two}, checksum=sums) == 10


def test_a_generation_reports_once_and_rises():
    tracker, reports = switched()
    tracker.begin_generation(3)
    tracker.reload(reports, generation=3)
    with pytest.raises(ValueError, match="generation 3 has reported its settled pages before"):
        tracker.reload(reports, generation=3)
    for generation in (3, 2, -1, 1 << 64):
        with pytest.raises(ValueError, match=r"is outside \[4, "):
            tracker.begin_generation(generation)
    tracker.begin_generation(9)
    assert tracker.generation == 9
    tracker.reload(reports, generation=9)
