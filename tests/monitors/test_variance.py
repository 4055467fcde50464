"""Variance: seeded streams, exact answers."""

import pytest
from monitor_kit import feed, first_trip, noisy, trips

from loopguard.monitors.variance import Variance
from loopguard.types import Expectation


def variance(**settings):
    return Variance(metric="loss", **settings)


def blowup(factor, *, at=200, n=500, seed=0):
    """Noise around 2.0 that grows from one reading on."""
    return [2.0 + one * (factor if i >= at else 1) for i, one in enumerate(noisy(0.0, n, seed=seed))]


@pytest.mark.parametrize(("factor", "first"), [(6, 216), (5, 220), (4, 228)])
def test_noise_that_grows_trips(factor, first):
    signal = first_trip(feed(variance(), blowup(factor)))
    assert signal.at == first
    assert 200 <= signal.since < 205
    assert signal.score > 2
    assert "from one reading to the next where" in signal.reason


def test_promotion_waits_before_it_is_sure():
    signals = [s for s in feed(variance(), blowup(6)) if s]
    assert signals[0].level == "warn"
    assert signals[0].holds
    assert signals[0].at < first_trip(signals).at


def test_a_jump_of_the_level_is_not_its_business():
    assert trips(feed(variance(), noisy(lambda at: 2.0 if at < 200 else 9.0, 500, seed=1))) == []


def test_a_steep_trend_is_not_either():
    assert trips(feed(variance(), noisy(lambda at: 50.0 - at / 50, 1000, seed=2))) == []


def test_single_outliers_are_not_either():
    curve = noisy(2.0, 600, seed=3)
    for at in range(100, 600, 50):
        curve[at] = 9.0
    assert trips(feed(variance(), curve)) == []


def test_bursts_that_belong_to_the_run_are_usual():
    """Every tenth reading is far out, from the first on."""
    curve = [one + (3.0 if i % 10 == 0 else 0.0) for i, one in enumerate(noisy(2.0, 1000, seed=4))]
    assert trips(feed(variance(), curve)) == []


def test_a_reward_that_stands_still_and_then_learns_is_quiet():
    noise = noisy(0.0, 800, seed=5, sigma=10.0)
    assert trips(feed(Variance(metric="reward"), [-200.0 + (noise[i] if i > 300 else 0.0) for i in range(800)])) == []


@pytest.mark.parametrize("kind", ["lr", "data"])
def test_an_announced_change_may_change_the_noise(kind):
    watching = variance()
    watching.expect(Expectation(kind=kind, at=200, span=10))
    curve = blowup(6, n=600)
    assert trips(feed(watching, curve)) == []
    assert trips(feed(watching, [2.0 + 8 * (one - 2.0) for one in blowup(6, at=0, n=100, seed=7)], start=600)) != []


def test_no_epoch_explains_noise():
    watching = variance()
    watching.expect(Expectation(kind="epoch", at=200, span=10))
    assert trips(feed(watching, blowup(6)))[0] == 216


def test_no_single_value_is_beyond_its_limits():
    watching = variance()
    feed(watching, noisy(2.0, 300, seed=6))
    assert watching.limits() == (None, None)
