"""Drift: seeded streams, exact answers."""

import math

import pytest
from monitor_kit import feed, first_trip, noisy, trips

from loopguard.monitors.drift import Drift
from loopguard.types import Expectation


def drift(**settings):
    return Drift(metric="loss", **settings)


def ramp(to, *, over=400, at=300, n=1200, seed=6):
    """A level of 2.0 that creeps to another one and stays."""
    return noisy(lambda i: 2.0 + (to - 2.0) * min(1.0, max(0.0, (i - at) / over)), n, seed=seed)


@pytest.mark.parametrize(("to", "first"), [(2.6, 399), (2.3, 449), (2.1, 724)])
def test_a_creep_for_the_worse_trips(to, first):
    signal = first_trip(feed(drift(), ramp(to)))
    assert (signal.at, signal.direction) == (first, "up")
    assert 300 <= signal.since < first
    assert signal.low is None
    assert 2.0 < signal.high < to
    assert "since about update" in signal.reason


def test_a_reward_drifts_down():
    signal = first_trip(feed(Drift(metric="reward", good="up"), ramp(1.7)))
    assert (signal.at, signal.direction) == (474, "down")
    assert signal.high is None
    assert signal.score < 0


def test_a_creep_for_the_better_is_what_training_does():
    assert trips(feed(drift(), ramp(1.4))) == []


def test_what_comes_back_is_no_drift():
    """A bump of 5 %, about a hundred readings wide."""
    bump = noisy(lambda i: 2.0 + 0.1 * math.exp(-(((i - 500) / 30) ** 2)), 1000, seed=7)
    assert trips(feed(drift(), bump)) == []


def test_a_change_below_min_change_does_not_matter():
    assert trips(feed(drift(min_change=0.2), ramp(2.3))) == []


def test_what_a_metric_does_anyway_is_not_held_against_it():
    """Readings that follow each other: the level of a block says little about the next."""
    value, curve = 0.0, []
    for one in noisy(0.0, 20_000, seed=8, sigma=0.1):
        value = 0.5 * value + one
        curve.append(4.0 + value)
    assert trips(feed(drift(), curve)) == []


@pytest.mark.parametrize("kind", ["epoch", "lr", "data"])
def test_the_best_is_looked_for_after_an_announced_change(kind):
    watching = drift()
    watching.expect(Expectation(kind=kind, at=300, span=50))
    assert trips(feed(watching, noisy(lambda i: 2.0 if i < 300 else 2.3, 1200, seed=6))) == []


def test_what_creeps_after_an_announced_change_trips():
    watching = drift()
    watching.expect(Expectation(kind="lr", at=300, span=5))
    curve = noisy(lambda i: (2.0 if i < 300 else 2.3) + max(0.0, (i - 600) / 1000), 1200, seed=6)
    assert trips(feed(watching, curve))[0] == 729


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="it is down or up"):
        drift(good="none")
    with pytest.raises(ValueError, match="at least 8 readings"):
        drift(block=5)
    with pytest.raises(ValueError, match="cannot be negative"):
        drift(min_change=-0.1)
