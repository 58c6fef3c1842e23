"""The figures of a round, and the advice that follows from them."""

import dataclasses
import math

import pytest

from pagecore import Advice, ConvergenceMeter

MIB = 1 << 20


def end(meter, remaining, *, seconds=1.0, sent=100 * MIB, newly_dirty=None):
    return meter.end_round(
        seconds=seconds, sent=sent, newly_dirty=remaining if newly_dirty is None else newly_dirty, remaining=remaining
    )


def test_figures_of_a_round():
    figures = end(ConvergenceMeter(0.1), 50 * MIB, seconds=2.0, newly_dirty=30 * MIB)
    assert (figures.round, figures.dirty_rate, figures.bandwidth) == (1, 15 * MIB, 50 * MIB)
    assert figures.expected_downtime == 1.0
    # 1 s of debt, divided by 50/15 each round, comes below 0.1 s in the second.
    assert figures.rounds_left == 2
    assert figures.advice is Advice.GO_ON
    with pytest.raises(dataclasses.FrozenInstanceError):
        figures.round = 3


def test_a_given_bandwidth_is_believed():
    figures = end(ConvergenceMeter(0.1, bandwidth=10 * MIB), 50 * MIB)
    assert (figures.bandwidth, figures.expected_downtime) == (10 * MIB, 5.0)
    assert figures.rounds_left == math.inf


def test_the_measured_bandwidth_follows_the_link():
    meter = ConvergenceMeter(0.1)
    end(meter, 50 * MIB, sent=100 * MIB)
    assert end(meter, 40 * MIB, sent=50 * MIB).bandwidth == 75 * MIB
    # A round that sent nothing says nothing about the link.
    assert end(meter, 30 * MIB, sent=0).bandwidth == 75 * MIB


def test_what_fits_in_the_downtime_is_finished():
    meter = ConvergenceMeter(0.5)
    assert end(meter, 50 * MIB).advice is Advice.FINISH
    assert end(ConvergenceMeter(0.0), 0, sent=0).advice is Advice.FINISH


@pytest.mark.parametrize(("postcopy", "advice"), [(True, Advice.POSTCOPY), (False, Advice.THROTTLE)])
def test_a_debt_that_does_not_shrink(postcopy, advice):
    meter = ConvergenceMeter(0.1, postcopy=postcopy)
    given = [end(meter, left * MIB).advice for left in (90, 89, 88, 60, 59, 58)]
    assert given == [Advice.GO_ON, Advice.GO_ON, advice, Advice.GO_ON, Advice.GO_ON, advice]


def test_nothing_sent_and_something_owed_never_ends():
    figures = end(ConvergenceMeter(1.0), MIB, sent=0)
    assert figures.expected_downtime == math.inf
    assert figures.advice is Advice.GO_ON
    assert end(ConvergenceMeter(0.1), 50 * MIB, newly_dirty=0).rounds_left == 1
    assert end(ConvergenceMeter(0.0), 50 * MIB).rounds_left == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"downtime_limit": -1}, "downtime_limit -1"),
        ({"downtime_limit": math.nan}, "downtime_limit nan"),
        ({"downtime_limit": 1, "bandwidth": 0}, "bandwidth 0"),
        ({"downtime_limit": 1, "patience": 0}, "patience 0"),
    ],
)
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceMeter(**arguments)


@pytest.mark.parametrize("change", [{"seconds": 0}, {"seconds": math.nan}, {"sent": -1}, {"remaining": -1}])
def test_a_bad_round_does_not_count(change):
    meter = ConvergenceMeter(0.1)
    with pytest.raises(ValueError, match=next(iter(change))):
        meter.end_round(**{"seconds": 1.0, "sent": 1, "newly_dirty": 1, "remaining": 1, **change})
    assert end(meter, 1).round == 1
