"""Bounds: a metric must be a finite number inside its declared domain."""

import math

import pytest

from loopguard.monitors.bounds import Bounds
from loopguard.types import Reading


def read(bounds, value, at=1, *, armed=True):
    return bounds.read(Reading(metric=bounds.metric, value=value, at=at), armed=armed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_finite_number_trips_with_or_without_limits(value):
    assert read(Bounds(metric="loss"), value).level == "trip"
    assert read(Bounds(metric="loss", min=-10, max=10), value).level == "trip"


def test_limits_belong_to_the_domain():
    bounds = Bounds(metric="accuracy", min=0, max=1)
    assert [read(bounds, value).level for value in (0, 1, -1e-9, 1 + 1e-9)] == ["ok", "ok", "trip", "trip"]


def test_a_trip_says_value_range_direction_and_when():
    signal = read(Bounds(metric="loss", min=0), -0.25, at=17)
    assert (signal.value, signal.low, signal.high, signal.since, signal.direction) == (-0.25, 0, None, 17, "down")
    assert signal.reason == "loss is -0.25, below its domain, which starts at 0"


def test_trips_before_it_is_armed():
    """A loss below zero is a bug from the first update on."""
    assert read(Bounds(metric="loss", min=0), -1, armed=False).level == "trip"


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match=r"min 2 is above max 1"):
        Bounds(metric="loss", min=2, max=1)
