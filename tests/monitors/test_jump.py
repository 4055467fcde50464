"""Jump: seeded streams, exact answers."""

import math
import random

import pytest

from loopguard.monitors.jump import Jump
from loopguard.types import Reading


def feed(jump, values, *, armed=True):
    return [jump.read(Reading(metric="loss", value=value, at=at), armed=armed) for at, value in enumerate(values)]


def trips(signals):
    return [signal.at for signal in signals if signal.level == "trip"]


def noisy(level, n, *, seed, sigma=0.05):
    noise = random.Random(seed)
    return [level(at) + noise.gauss(0, sigma) for at in range(n)]


@pytest.mark.parametrize(
    ("after", "direction", "first"), [(1.2, "down", 202), (2.8, "up", 202), (1.4, "down", 202), (20.0, "up", 202)]
)
def test_a_step_of_the_level_trips_on_its_third_reading(after, direction, first):
    signals = feed(Jump(metric="loss"), noisy(lambda at: 2.0 if at < 200 else after, 260, seed=1))
    assert trips(signals)[0] == first
    assert (signals[first].direction, signals[first].since) == (direction, 200)
    assert signals[first].low < 2.0 < signals[first].high


def test_a_falling_level_with_noise_never_trips():
    """The stream that the docstring's false-alarm sentence is about."""
    curve = noisy(lambda at: 1.0 + 3.0 * math.exp(-at / 2000), 20_000, seed=2, sigma=0.1)
    assert trips(feed(Jump(metric="loss"), curve)) == []


def test_two_outliers_in_a_row_warn_and_do_not_trip():
    curve = noisy(lambda _: 2.0, 200, seed=3)
    curve[150] = curve[151] = 40.0
    signals = feed(Jump(metric="loss"), curve)
    assert trips(signals) == []
    assert [signal.at for signal in signals if signal.level == "warn"] == [150, 151]


def test_unarmed_it_only_learns():
    curve = noisy(lambda at: 2.0 if at < 200 else 1.0, 260, seed=4)
    assert trips(feed(Jump(metric="loss"), curve, armed=False)) == []


def test_a_change_below_min_change_is_no_jump_however_sure_it_is():
    curve = [2.0 if at < 200 else 1.9 for at in range(260)]
    assert trips(feed(Jump(metric="loss", min_change=0.25), curve)) == []
    assert trips(feed(Jump(metric="loss", min_change=0.01), curve))[0] == 202


def test_a_restored_monitor_goes_on_as_if_nothing_had_happened():
    curve = noisy(lambda at: 2.0 if at < 200 else 1.2, 260, seed=5)
    whole = feed(Jump(metric="loss"), curve)
    first, second = Jump(metric="loss"), Jump(metric="loss")
    feed(first, curve[:150])
    second.load_state_dict(first.state_dict())
    resumed = [second.read(Reading(metric="loss", value=v, at=150 + i), armed=True) for i, v in enumerate(curve[150:])]
    assert resumed == whole[150:]


@pytest.mark.parametrize("settings", [{"window": 7}, {"confirm": 0}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="it needs at least"):
        Jump(metric="loss", **settings)
