"""HintSession: epochs, commands, and exactly one DONE on every path (design rules S3 to S6)."""

import gc
import json
import warnings

import numpy as np
import pytest

from concurrency import run_together
from pagecore import (
    BusyError,
    Command,
    HintSession,
    HintState,
    MemoryDirtyLog,
    PageTracker,
    ResumedHintSession,
)


class Guest:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []
        self.fails = []

    def __call__(self, command, epoch):
        if command in self.fails:
            raise OSError(f"no way to say {command.name}")
        self.told.append((command, epoch))

    @property
    def done(self):
        return sum(command is Command.DONE for command, _ in self.told)


@pytest.fixture
def guest():
    return Guest()


@pytest.fixture
def tracker():
    tracker = PageTracker(100, dirty_log=MemoryDirtyLog(100))
    tracker.sync()
    return tracker


def test_rounds_and_states(tracker, guest):
    session = tracker.hint_session(on_command=guest)
    assert (session.state, session.epoch, session.promise, session.fill) == (HintState.STOP, 0, "armed", 0)
    assert session.start() == session.epoch == tracker.epoch == 1
    assert session.state is HintState.REQUESTED
    session.clear_runs([[0, 10]], 1)
    assert session.state is HintState.START
    assert session.stop()
    assert not session.stop()
    assert session.state is HintState.STOP
    tracker.sync()
    assert session.start() == 2
    assert session.state is HintState.REQUESTED
    assert session.finish()
    assert session.state is HintState.DONE
    assert guest.told == [
        (Command.START, 1),
        (Command.STOP, 1),
        (Command.START, 2),
        (Command.DONE, 2),
    ]
    assert "done, epoch 2, 10 pages hinted, 0 hints stale" in repr(session)


def test_the_epoch_is_open_when_the_guest_hears_of_it(tracker):
    answers = []
    session = tracker.hint_session(
        on_command=lambda command, epoch: answers.append(session.clear_runs([[0, 1]], epoch))
    )
    session.start()
    assert answers == [1]
    session.stop()
    assert answers == [1, 0]
    session.finish()


def test_a_sync_ends_the_epoch_without_a_stop(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        session.start()
        tracker.sync()
        assert session.state is HintState.STOP
        assert tracker.epoch == 0
        assert session.clear_runs([[0, 10]], 1) == 0
        assert session.start() == 2
    # The guest hears of the end of each epoch before it hears of the next.
    assert [command.name for command, _ in guest.told] == ["START", "STOP", "START", "DONE"]


@pytest.mark.parametrize("epoch", [0, -1, 2, 1 << 64, (1 << 64) + 1])
def test_hints_of_no_open_epoch_are_stale(tracker, epoch):
    with tracker.hint_session() as session:
        session.start()
        assert session.clear_runs([[0, 10], [20, 1]], epoch) == 0
        assert session.stale == 2
        assert session.hinted_pages == 0
        assert session.state is HintState.REQUESTED
    assert tracker.hinted_count == 0


def test_hints_after_the_end_are_stale(tracker):
    with tracker.hint_session() as session:
        epoch = session.start()
    assert session.clear_runs([[0, 10]], epoch) == 0
    assert session.stale == 1


def test_counts(tracker):
    with tracker.hint_session() as session:
        epoch = session.start()
        assert session.clear_runs([[0, 10], [5, 10]], epoch) == 15
        assert session.clear_runs([[0, 20]], epoch) == 5
        assert session.clear_runs([], epoch) == 0
    assert session.hinted_pages == 20
    assert session.stale == 0


def test_epoch_ids_are_never_used_twice(tracker):
    ids = []
    for _ in range(2):
        with tracker.hint_session() as session:
            ids.append(session.start())
            session.stop()
            ids.append(session.start())
    assert ids == [1, 2, 3, 4]


def test_one_session_at_a_time(tracker):
    session = tracker.hint_session()
    with pytest.raises(BusyError, match="has not ended"):
        tracker.hint_session()
    session.finish()
    tracker.hint_session().finish()


def test_start_twice_is_refused(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        session.start()
        with pytest.raises(BusyError, match="hint epoch 1 is open"):
            session.start()
        assert tracker.epoch == 1
    for call in (session.start, session.stop, session.hand_over):
        with pytest.raises(BusyError, match="done"):
            call()
    assert guest.done == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"promise": "hoped"}, ValueError, "'hoped' is neither"),
        ({"fill": 1 << 32}, ValueError, r"fill 4294967296 is outside \[0, 4294967296\)"),
        ({"fill": -1}, ValueError, "fill -1"),
        ({"fill": b"\xaa"}, TypeError, "not an integer"),
        ({"fill": True}, TypeError, "not an integer"),
        ({"marked": "vmm"}, TypeError, "not one name"),
        ({"on_command": 3}, TypeError, "not callable"),
    ],
)
def test_constructor_refuses_and_owes_no_done(tracker, arguments, error, message):
    with pytest.raises(error, match=message):
        tracker.hint_session(**arguments)
    gc.collect()
    tracker.hint_session(fill=0xFFFF_FFFF).finish()


# ---- bytes ----


@pytest.mark.parametrize(
    ("ranges", "hinted"),
    [
        ([[0, 4096]], [0]),
        ([[1, 8191]], [1]),
        ([[1, 8190]], []),
        ([[4095, 2]], []),
        ([[0, 4095]], []),
        ([[4096, 0]], []),
        ([[2048, 16384], [99 * 4096, 4096]], [1, 2, 3, 99]),
        (np.array([[8192, 4096]], dtype=np.uint64), [2]),
        ([], []),
    ],
)
def test_bytes_are_rounded_inward(tracker, ranges, hinted):
    with tracker.hint_session() as session:
        assert session.clear_bytes(ranges, session.start()) == len(hinted)
    assert tracker.hinted.indices().tolist() == hinted


@pytest.mark.parametrize(
    ("ranges", "error"),
    [
        ([[100 * 4096, 1]], IndexError),
        ([[0, 4096], [-5, 5]], IndexError),
        ([[-1, 0]], IndexError),
        ([[0, -4096]], IndexError),
        ([[-(1 << 63), (1 << 63) - 1]], IndexError),
        ([[(1 << 63) - 1, (1 << 63) - 1]], IndexError),
        (np.array([[(1 << 64) - 4096, 8192]], dtype=np.uint64), IndexError),
        ([[0.0, 4096.0]], TypeError),
        ([4096], ValueError),
    ],
)
def test_bytes_outside_change_nothing(tracker, ranges, error):
    with tracker.hint_session() as session:
        epoch = session.start()
        with pytest.raises(error):
            session.clear_bytes(ranges, epoch)
    assert tracker.hinted_count == 0


@pytest.mark.parametrize(
    ("ranges", "hinted", "clipped"),
    [
        ([[0, 100 * 4096 + 1]], 100, 1),
        ([[1, 100 * 4096]], 99, 1),
        ([[0, 4096], [-1, 5]], 1, 1),
        ([[-4096, 3 * 4096]], 2, 1),
        ([[0, (1 << 63) - 1]], 100, 1),
        (np.array([[98 * 4096 + 1, (1 << 64) - 1]], dtype=np.uint64), 1, 1),
        ([[99 * 4096, 4096], [100 * 4096, 0]], 1, 0),
    ],
)
def test_bytes_over_an_end_are_clipped_and_counted(tracker, ranges, hinted, clipped):
    with tracker.hint_session() as session:
        assert session.clear_bytes(ranges, session.start()) == hinted
        assert session.clipped == clipped


def test_runs_over_an_end_are_clipped_and_counted(tracker):
    with tracker.hint_session() as session:
        epoch = session.start()
        assert session.clear_runs([[99, 2], [-3, 5], [50, 1], [90, 1 << 62]], epoch) == 2 + 1 + 10
        assert session.clipped == 3
        # Under another epoch nothing of it counts but that it was stale.
        assert session.clear_runs([[99, 2]], epoch + 1) == 0
        assert (session.clipped, session.stale) == (3, 1)
    assert tracker.hinted.runs().tolist() == [[0, 2], [50, 1], [90, 10]]


# ---- DONE, exactly once ----


def test_done_once_however_often_it_is_finished(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        session.start()
        assert session.finish()
        assert not session.finish()
    assert guest.told == [(Command.START, 1), (Command.DONE, 1)]


def test_done_without_a_single_epoch(tracker, guest):
    with tracker.hint_session(on_command=guest):
        pass
    assert guest.told == [(Command.DONE, 0)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_done_when_the_controller_fails(tracker, guest, error):
    session = tracker.hint_session(on_command=guest)

    def control():
        with session:
            session.start()
            raise error

    with pytest.raises(error):
        control()
    assert guest.done == 1
    assert session.state is HintState.DONE
    assert tracker.epoch == 0


def test_done_when_the_session_is_dropped(tracker, guest):
    session = tracker.hint_session(on_command=guest)
    session.start()
    with pytest.warns(ResourceWarning, match="HintSession was never finished"):
        del session
    assert guest.done == 1
    assert tracker.epoch == 0
    tracker.hint_session().finish()


def test_done_when_the_session_is_collected_in_a_cycle(tracker):
    class Controller:
        def __init__(self):
            self.session = tracker.hint_session(on_command=self.announce)

        def announce(self, command, epoch):
            told.append(command)

    told = []
    controller = Controller()
    controller.session.start()
    del controller
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert told == [Command.START, Command.DONE]


def test_a_destructor_does_not_raise(tracker, guest, caplog):
    guest.fails = [Command.DONE]
    session = tracker.hint_session(on_command=guest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del session
    assert "could not be told DONE" in caplog.text


def test_done_that_was_not_delivered_may_be_given_again(tracker, guest):
    session = tracker.hint_session(on_command=guest)
    session.start()
    guest.fails = [Command.DONE]
    with pytest.raises(OSError, match="DONE"):
        session.finish()
    assert session.state is HintState.STOP
    guest.fails = []
    assert session.finish()
    assert guest.done == 1


def test_a_second_failure_is_a_note_on_the_first(tracker, guest):
    guest.fails = [Command.DONE]
    with (
        pytest.raises(RuntimeError) as caught,
        tracker.hint_session(on_command=guest) as session,
    ):
        raise RuntimeError
    assert "could not be told DONE" in caught.value.__notes__[0]
    guest.fails = []
    session.finish()


def test_a_start_that_fails_leaves_no_epoch_open(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        guest.fails = [Command.START]
        with pytest.raises(OSError, match="START"):
            session.start()
        assert tracker.epoch == 0
        assert session.state is HintState.STOP
        guest.fails = []
        assert session.start() == 2


def test_a_stop_that_fails_has_ended_the_epoch(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        session.start()
        guest.fails = [Command.STOP]
        with pytest.raises(OSError, match="STOP"):
            session.stop()
        assert session.clear_runs([[0, 1]], 1) == 0
        guest.fails = []
    assert guest.done == 1


def test_a_callback_that_comes_back_gives_no_second_done(tracker):
    told = []

    def come_back(command, epoch):
        told.append(command)
        assert not session.finish() or command is not Command.DONE

    session = tracker.hint_session(on_command=come_back)
    session.finish()
    assert told == [Command.DONE]


@pytest.mark.stress
def test_two_threads_finish_one_session(tracker, guest):
    for _ in range(50):
        session = tracker.hint_session(on_command=guest)
        assert sorted(run_together(session.finish, session.finish)) == [False, True]
    assert guest.done == 50


# ---- the switch ----


def test_handed_over_and_finished_at_the_destination(tracker, guest):
    there = Guest()
    with tracker.hint_session(fill=0xAAAA_5555, on_command=guest) as session:
        session.start()
        session.clear_runs([[0, 10]], 1)
        state = json.loads(json.dumps(session.hand_over()))
        assert session.state is HintState.HANDED_OVER
        assert session.clear_runs([[10, 10]], 1) == 0
        assert not session.finish()
        with pytest.raises(BusyError, match="handed over"):
            session.hand_over()
    assert guest.told == [(Command.START, 1), (Command.STOP, 1)]
    assert state == {"epoch": 1, "promise": "armed", "fill": 0xAAAA_5555, "stale": 0, "hinted_pages": 10}

    with HintSession.resume(state, there) as resumed:
        assert isinstance(resumed, ResumedHintSession)
        assert (resumed.epoch, resumed.fill, resumed.state) == (1, 0xAAAA_5555, HintState.STOP)
        assert resumed.finish()
    assert there.told == [(Command.DONE, 1)]
    assert resumed.state is HintState.DONE


def test_dropped_after_the_hand_over_says_nothing(tracker, guest):
    session = tracker.hint_session(on_command=guest)
    session.hand_over()
    del session
    gc.collect()
    assert guest.told == []


def test_dropped_at_the_destination_gives_done(tracker):
    there = Guest()
    session = tracker.hint_session()
    resumed = HintSession.resume(session.hand_over(), there)
    with pytest.warns(ResourceWarning, match="ResumedHintSession was never finished"):
        del resumed
    assert there.done == 1


def test_taken_back_where_the_guest_never_ran_there(tracker, guest):
    with tracker.hint_session(on_command=guest) as session:
        session.start()
        session.hand_over()
        session.take_back()
        assert session.state is HintState.STOP
        with pytest.raises(BusyError, match="not handed over"):
            session.take_back()
        tracker.sync()
        assert session.start() == 2
    assert guest.done == 1


def test_not_taken_back_beside_a_new_session(tracker):
    session = tracker.hint_session()
    session.hand_over()
    other = tracker.hint_session()
    with pytest.raises(BusyError, match="has not ended"):
        session.take_back()
    assert session.state is HintState.HANDED_OVER
    other.finish()
    session.take_back()
    session.finish()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "epoch None"),
        ({"epoch": 1}, "fill None"),
        ({"epoch": -1, "fill": 0}, "epoch -1"),
        ({"epoch": 1, "fill": 1 << 32}, r"fill 4294967296 is no integer in \[0, 4294967296\)"),
        ({"epoch": 1, "fill": -1}, "fill -1"),
        ({"epoch": True, "fill": 0}, "epoch True"),
        ({"epoch": "1", "fill": 0}, "epoch '1'"),
    ],
)
def test_resume_checks_what_the_peer_sent(state, message):
    there = Guest()
    with pytest.raises(ValueError, match=message):
        HintSession.resume(state, there)
    gc.collect()
    assert there.told == []
