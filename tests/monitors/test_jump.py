"""Jump: seeded streams, exact answers."""

import math

import pytest
from monitor_kit import feed, first_trip, noisy, trips

from loopguard.monitors.jump import Jump
from loopguard.types import Expectation


def jump(**settings):
    return Jump(metric="loss", **settings)


def step(to, *, at=200, n=300, seed=1):
    """A loss around 2.0 that is somewhere else from one reading on."""
    return noisy(lambda i: 2.0 if i < at else to, n, seed=seed)


class TestTrips:
    @pytest.mark.parametrize(
        ("after", "direction"), [(1.2, "down"), (2.8, "up"), (1.4, "down"), (20.0, "up")], ids=lambda value: str(value)
    )
    def test_a_large_step_of_the_level_trips_on_its_fourth_reading(self, after, direction):
        signal = first_trip(feed(jump(), step(after)))
        assert (signal.at, signal.since, signal.direction) == (203, 200, direction)
        assert signal.low < 2.0 < signal.high
        assert signal.once_in > 100_000
        assert not signal.at_once

    @pytest.mark.parametrize(("after", "first"), [(2.2, 212), (2.15, 221), (2.1, 261)])
    def test_a_small_step_for_the_worse_takes_more_readings(self, after, first):
        assert trips(feed(jump(), step(after)))[0] == first

    @pytest.mark.parametrize("after", [1.8, 1.85])
    def test_a_small_step_for_the_better_is_what_training_does(self, after):
        assert trips(feed(jump(), step(after))) == []

    def test_promotion_waits_before_it_is_sure(self):
        """The first stage: a warning that holds, from half of the limit on."""
        signals = feed(jump(), step(2.2))
        assert [s.at for s in signals if s and s.level == "warn" and s.holds] == list(range(205, 212))

    @pytest.mark.parametrize(
        ("good", "up", "down"), [("down", 203, 203), ("up", None, 203), ("none", 203, 203)], ids=["down", "up", "none"]
    )
    def test_direction_says_which_side_is_a_fault(self, good, up, down):
        for after, first in ((2.5, up), (1.5, down)):
            signal = first_trip(feed(jump(good=good), step(after, seed=2)))
            assert (signal.at if signal else None) == first

    def test_the_baseline_does_not_learn_the_jump(self):
        """Without anybody's answer it goes on tripping: the new level never becomes normal by itself."""
        assert trips(feed(jump(), step(3.0, n=1000))) == list(range(203, 1000))

    def test_the_reason_says_all_of_it_in_one_sentence(self):
        signal = first_trip(feed(jump(), step(1.2)))
        assert signal.reason == (
            "loss fell from 2.009 to 1.201, 13.7 times its noise, since update 200 "
            "(too good is a fault too, such as leaked labels); healthy runs do so once in 990,000 readings"
        )

    def test_a_slow_collapse_of_a_reward_trips(self):
        """A slide over ten readings, as policies do it."""
        reward = noisy(lambda i: 2.0 - min(1.0, max(0.0, (i - 200) / 10)), 300, seed=7, sigma=0.1)
        signal = first_trip(feed(jump(good="up"), reward))
        assert signal.direction == "down"
        assert 203 <= signal.at <= 212


class TestStaysQuiet:
    def test_a_falling_level_with_noise_never_trips(self):
        curve = noisy(lambda at: 1.0 + 3.0 * math.exp(-at / 2000), 20_000, seed=2, sigma=0.1)
        assert trips(feed(jump(), curve)) == []

    @pytest.mark.parametrize("tau", [15, 40, 100])
    def test_the_start_of_training_is_no_leak(self, tau):
        curve = noisy(lambda at: 2.0 + 9.0 * math.exp(-at / tau), 1000, seed=3)
        assert trips(feed(jump(), curve)) == []

    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
    def test_a_curve_without_noise_may_fall_faster_and_faster(self, power):
        """Full batches: there is no noise to compare a bend with."""
        assert trips(feed(jump(), [10.0 - 8.0 * (at / 800) ** power for at in range(800)])) == []

    def test_a_knee_of_the_learning_rate_is_quiet(self):
        curve = noisy(lambda at: 2.0 - 0.24 * (1 - math.exp(-max(0, at - 300) / 100)), 700, seed=4)
        assert trips(feed(jump(), curve)) == []

    @pytest.mark.parametrize("sigmas", [-20, -10, 10, 20])
    def test_single_outliers_are_noted_and_no_more(self, sigmas):
        curve = noisy(2.0, 400, seed=3)
        curve[300] = 2.0 + 0.05 * sigmas
        signals = [s for s in feed(jump(), curve) if s]
        assert [(s.at, s.level, s.holds) for s in signals] == [(300, "warn", False)]
        assert "one reading" in signals[0].reason

    def test_two_outliers_in_a_row_do_not_trip(self):
        curve = noisy(2.0, 400, seed=3)
        curve[300] = curve[301] = 4.0
        assert trips(feed(jump(), curve)) == []

    def test_outliers_do_not_pull_the_baseline(self):
        """One reading in twenty far out, and still a step of the level is found on its fourth reading."""
        curve = step(2.8)
        for i in range(100, 200, 20):
            curve[i] = 10.0
        assert trips(feed(jump(), curve))[0] == 203

    def test_gains_are_noted_where_up_is_good(self):
        signals = [s for s in feed(jump(good="up"), step(2.5, seed=2)) if s]
        assert {s.level for s in signals} == {"warn"}
        assert not any(s.holds for s in signals)

    def test_a_change_below_min_change_is_taken_in(self):
        assert trips(feed(jump(), step(2.3)))[0] == 205
        assert trips(feed(jump(min_change=0.25), step(2.3, n=600))) == []
        assert trips(feed(jump(min_change=0.25), step(2.8)))[0] == 203


class TestOuterLimit:
    def test_one_absurd_value_trips_at_once(self):
        curve = noisy(2.0, 400, seed=3)
        curve[300] = 50 * curve[300]
        signal = first_trip(feed(jump(), curve))
        assert (signal.at, signal.since, signal.at_once) == (300, 300, True)
        assert "which" not in signal.reason
        assert signal.low < 2.0 < signal.high < 100.0

    def test_limits_is_where_that_begins(self):
        watching = jump()
        feed(watching, noisy(2.0, 300, seed=3))
        low, high = watching.limits()
        assert watching.read(high + 0.01, at=300).at_once
        assert watching.read(low - 0.01, at=301).at_once
        assert watching.limits() == (low, high)

    def test_there_is_none_before_there_is_a_level(self):
        assert jump().limits() == (None, None)

    def test_a_gain_has_no_limit(self):
        watching = jump(good="up")
        feed(watching, noisy(2.0, 300, seed=3))
        low, high = watching.limits()
        assert low < 2.0
        assert high is None
        assert watching.read(1e6, at=300).level == "warn"

    def test_bursts_that_a_run_is_used_to_are_inside(self):
        """A gradient norm that bursts to twenty times its level now and then."""
        curve = noisy(0.3, 1000, seed=5, sigma=0.02)
        for i in (90, 250, 500, 800):
            curve[i] = 3.0 if i < 500 else 6.0
        assert trips(feed(Jump(metric="grad_norm"), curve)) == []


class TestAnnouncedChanges:
    @staticmethod
    def told(kind, curve, *, at=300, span=5, **settings):
        watching = jump(**settings)
        watching.expect(Expectation(kind=kind, at=at, span=span))
        return feed(watching, curve)

    @pytest.mark.parametrize("kind", ["epoch", "lr", "data"])
    def test_the_better_side_may_step_and_the_level_is_learned_again(self, kind):
        curve = noisy(lambda at: 2.0 if at < 300 else 1.4 if at < 400 else 2.0, 500, seed=4)
        assert trips(self.told(kind, curve))[0] == 403

    @pytest.mark.parametrize("kind", ["lr", "data"])
    def test_the_worse_side_may_step_for_another_rate_or_mix(self, kind):
        assert trips(self.told(kind, step(2.6, at=300, n=500, seed=4))) == []

    def test_no_epoch_explains_a_step_for_the_worse(self):
        assert trips(self.told("epoch", step(2.6, at=300, n=500, seed=4)))[0] == 303

    @pytest.mark.parametrize(("then", "direction"), [(0.9, "down"), (1.9, "up")])
    def test_a_fault_soon_after_the_change_is_still_found(self, then, direction):
        """Ten readings after the span, five after the new level."""
        curve = noisy(lambda at: 2.0 if at < 300 else 1.4 if at < 315 else then, 500, seed=4)
        signal = first_trip(self.told("epoch", curve))
        assert (signal.at, signal.direction) == (318, direction)

    @pytest.mark.parametrize("kind", ["epoch", "lr", "data"])
    def test_the_impossible_stays_impossible(self, kind):
        curve = step(1.4, at=300, n=400, seed=4)
        curve[302] = 300.0
        assert [s.at for s in self.told(kind, curve) if s and s.at_once] == [302]

    def test_a_change_that_does_not_come_is_no_harm(self):
        assert trips(self.told("data", noisy(2.0, 500, seed=4))) == []

    def test_it_holds_for_its_span_and_no_longer(self):
        """Announced for 300 to 304, and coming at 320."""
        assert trips(self.told("data", step(2.6, at=320, n=500, seed=4)))[0] == 323

    def test_updates_may_come_in_strides(self):
        """A run that logs each hundredth update, told of one between two readings."""
        watching = jump()
        watching.expect(Expectation(kind="epoch", at=29_950, span=1))
        said = [watching.read(value, at=100 * i) for i, value in enumerate(step(1.4, at=300, n=400, seed=4))]
        assert trips(said) == []

    def test_several_may_be_announced_in_any_order(self):
        curve = noisy(lambda at: 2.0 - 0.5 * (at // 150), 600, seed=4)
        watching = jump()
        for at in (450, 150, 300):
            watching.expect(Expectation(kind="epoch", at=at, span=3))
        assert trips(feed(watching, curve)) == []


class TestRate:
    def test_a_rarer_rate_needs_more_evidence(self):
        seldom = trips(feed(jump(every=1e7), step(2.2)))[0]
        often = trips(feed(jump(every=1e4), step(2.2)))[0]
        assert often < 212 < seldom

    def test_a_calm_run_lowers_its_own_limit(self):
        """After 3,000 calm readings a small step shows sooner than after 200."""
        calm = noisy(lambda i: 2.0 if i < 3000 else 2.15, 3200, seed=1)
        assert trips(feed(jump(), calm))[0] - 3000 < trips(feed(jump(), step(2.15)))[0] - 200

    @pytest.mark.slow
    def test_independent_noise_trips_no_more_often_than_said(self):
        """Once in 100,000 readings; a hundred times as often is asked for, to see something in a test."""
        watching, said = jump(every=1000), 0
        for at, value in enumerate(noisy(2.0, 100_000, seed=6, sigma=0.1)):
            signal = watching.read(value, at=at)
            if signal and signal.level == "trip":
                said += 1
                watching.rebase()
        assert said <= 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"good": "sideways"}, "it is down, up or none"),
        ({"warmup": 5}, "it needs at least 9 readings"),
        ({"window": 20}, "cannot be shorter than warmup"),
        ({"min_change": -1}, "it cannot be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jump(**settings)
