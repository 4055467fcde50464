"""Chart: the sum, its limit, and what the limit makes of a run."""

import random

import pytest

from loopguard.monitors.chart import Chart, odds


def chart(**settings):
    return Chart(**{"slack": 1.0, "cap": 4.0, "start": 2.0, "first": 20.0, "least": 8.0, "every": 100_000, **settings})


def test_it_gains_what_is_above_the_slack_and_no_more_than_the_cap():
    watching = chart()
    for at, score in enumerate([2.5, 100.0, -1.0]):
        watching.take(score, at=at)
    assert (watching.sum, watching.since) == (1.5 + 3.0 - 2.0, 0)


def test_it_never_falls_below_zero_and_forgets_since_when():
    watching = chart()
    watching.take(3.0, at=7)
    watching.take(-50.0, at=8)
    assert (watching.sum, watching.since) == (0.0, None)


def test_the_first_limit_is_passed_once_in_every():
    watching = chart(every=100_000)
    watching.sum = watching.limit
    assert watching.limit == pytest.approx(20.0)
    assert watching.once_in == pytest.approx(100_000)


def test_a_rarer_rate_has_a_higher_limit():
    assert chart(every=1_000).limit < chart().limit < chart(every=10_000_000).limit


def test_a_calm_run_brings_it_down_to_the_least():
    watching = chart()
    watching.calibrate(1_000_000)
    assert watching.limit == 8.0


def test_a_restless_run_does_not_bring_it_up():
    noise, watching = random.Random(0), chart()
    for at in range(20_000):
        watching.take(noise.gauss(0.8, 3.0), at=at)
    watching.calibrate(20_000)
    assert watching.limit == pytest.approx(20.0)


def test_what_was_cleared_is_not_remembered_as_healthy():
    told, untold = chart(), chart()
    told.take(4.0, at=0)
    told.take(4.0, at=1)
    told.clear()
    for watching in (told, untold):
        watching.calibrate(500)
    assert told.limit == untold.limit


@pytest.mark.parametrize(
    ("once_in", "words"),
    [
        (138_271.9, "once in 140,000 readings"),
        (98, "once in 98 readings"),
        (4e12, "less than once in a billion readings"),
    ],
)
def test_odds_are_words(once_in, words):
    assert odds(once_in) == words
