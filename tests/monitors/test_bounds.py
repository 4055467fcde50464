"""Bounds: a metric must be a finite number inside its declared domain."""

import math

import pytest

from loopguard.monitors.bounds import Bounds
from loopguard.types import Expectation


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_finite_number_trips_with_or_without_limits(value):
    assert Bounds(metric="loss").read(value, at=1).level == "trip"
    assert Bounds(metric="loss", min=-10, max=10).read(value, at=1).level == "trip"


def test_limits_belong_to_the_domain():
    bounds = Bounds(metric="accuracy", min=0, max=1)
    assert [bounds.read(value, at=1) is None for value in (0, 1, -1e-9, 1 + 1e-9)] == [True, True, False, False]
    assert bounds.limits() == (0, 1)


def test_a_trip_says_value_range_direction_and_when():
    signal = Bounds(metric="loss", min=0).read(-0.25, at=17)
    assert (signal.value, signal.low, signal.high, signal.since, signal.direction) == (-0.25, 0, None, 17, "down")
    assert signal.at_once
    assert signal.reason == "loss is -0.25, below its domain, which starts at 0"


def test_trips_before_it_is_armed():
    """A loss below zero is a bug from the first update on."""
    assert Bounds(metric="loss", min=0).read(-1, at=1, armed=False).level == "trip"


def test_no_announcement_makes_the_impossible_possible():
    bounds = Bounds(metric="loss", min=0)
    bounds.expect(Expectation(kind="data", at=5, span=10))
    assert bounds.read(-1, at=6).level == "trip"


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match=r"min 2 is above max 1"):
        Bounds(metric="loss", min=2, max=1)
