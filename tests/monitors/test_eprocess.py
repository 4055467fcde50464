"""E-process: seeded streams, exact answers, and the guarantee where it can be seen."""

import random

import pytest
from monitor_kit import feed, first_trip, trips

from loopguard.monitors.eprocess import EProcess
from loopguard.types import Expectation


def eprocess(problems=100, **settings):
    return EProcess(metric="pass_at_1", problems=problems, **settings)


def passes(rate, n, *, problems=100, seed=0):
    """Evaluations over `problems` that are each solved with chance `rate(at)`, or that number."""
    coin = random.Random(seed)
    rates = [rate(at) if callable(rate) else rate for at in range(n)]
    return [sum(coin.random() < one for _ in range(problems)) / problems for one in rates]


@pytest.mark.parametrize(("to", "first"), [(0.3, 52), (0.39, 52), (0.45, 54)])
def test_a_fall_trips_within_a_few_evaluations(to, first):
    signal = first_trip(feed(eprocess(), passes(lambda at: 0.64 if at < 50 else to, 80)))
    assert (signal.at, signal.since, signal.direction) == (first, 50, "down")
    assert signal.once_in >= 100_000
    assert to < signal.low < 0.64
    assert "by chance alone" in signal.reason


def test_it_warns_before():
    signals = [s for s in feed(eprocess(), passes(lambda at: 0.64 if at < 50 else 0.39, 80)) if s]
    assert (signals[0].level, signals[0].holds) == ("warn", True)
    assert signals[0].at < first_trip(signals).at


def test_one_evaluation_is_never_enough():
    """Nor are two: not even if nothing at all was solved."""
    for n in (1, 2):
        curve = passes(0.64, 100)
        curve[50 : 50 + n] = [0.0] * n
        assert trips(feed(eprocess(), curve)) == []


def test_an_error_rate_is_the_same_turned_over():
    right = passes(lambda at: 0.64 if at < 50 else 0.39, 80)
    wrong = [round(1 - one, 2) for one in right]
    assert trips(feed(eprocess(), right)) == trips(feed(eprocess(good="down"), wrong))


def test_gains_are_no_business_of_its():
    assert set(feed(eprocess(), passes(lambda at: 0.2 + at / 200, 150))) == {None}


def test_the_guarantee_holds_for_rates_that_rise_and_rest():
    """Asked for once in 200 evaluations, over 200 runs of 100: no more than 100 trips are promised on average."""
    tripped = 0
    for seed in range(200):
        curve = passes(lambda at: min(0.7, 0.3 + at / 100), 100, problems=20, seed=seed)
        tripped += first_trip(feed(eprocess(20, every=200), curve)) is not None
    assert tripped <= 100


def test_more_problems_see_smaller_falls():
    few = first_trip(feed(eprocess(100), passes(lambda at: 0.6 if at < 50 else 0.54, 58)))
    many = first_trip(feed(eprocess(2000), passes(lambda at: 0.6 if at < 50 else 0.54, 58, problems=2000)))
    assert few is None
    assert many.since == 50


def test_other_data_has_another_rate():
    watching = eprocess()
    watching.expect(Expectation(kind="data", at=50, span=2))
    assert trips(feed(watching, passes(lambda at: 0.64 if at < 50 else 0.39, 120))) == []


@pytest.mark.parametrize("kind", ["epoch", "lr"])
def test_nothing_else_excuses_a_fall(kind):
    watching = eprocess()
    watching.expect(Expectation(kind=kind, at=50, span=10))
    assert trips(feed(watching, passes(lambda at: 0.64 if at < 50 else 0.39, 80)))[0] == 52


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_that_solves_nothing_or_everything_is_quiet(share):
    assert set(feed(eprocess(), [share] * 100)) == {None}


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="a score over no problem says nothing"):
        eprocess(0)
    with pytest.raises(ValueError, match="it is up for a pass rate"):
        eprocess(good="none")
