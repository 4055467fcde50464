"""Claims that hold for every monitor, applied by discovery: a new one is covered when it is registered."""

import doctest
import importlib
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopguard import monitors
from loopguard.types import Expectation

SETTINGS = {"eprocess": {"problems": 50}}
"""What a kind cannot do without."""


def build(kind, **more):
    return monitors.build(kind, metric="score", **{**SETTINGS.get(kind, {}), **more})


def curve(n, *, seed=0):
    """A noisy curve inside (0, 1), so that it suits a share of problems as well as a loss."""
    noise = random.Random(seed)
    return [min(0.9, max(0.1, 0.5 + noise.gauss(0, 0.05))) for _ in range(n)]


def feed(monitor, values, *, start=0, armed=True):
    return [monitor.read(value, at=start + i, armed=armed) for i, value in enumerate(values)]


def trips(signals):
    return [signal.at for signal in signals if signal and signal.level == "trip"]


@pytest.mark.parametrize("kind", monitors.KINDS)
class TestEveryMonitor:
    @pytest.mark.parametrize("cut", [0, 1, 23, 64, 150, 305])
    def test_state_is_json_and_a_copy_judges_alike(self, kind, cut):
        """At any reading, also in the middle of a suspicion or of an announced change."""
        values = curve(300) + [0.95] * 6 + curve(100, seed=1)
        first, second = build(kind), build(kind)
        for monitor in (first, second):
            monitor.expect(Expectation(kind="data", at=148, span=4))
        feed(first, values[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert feed(first, values[cut:], start=cut) == feed(second, values[cut:], start=cut)
        assert first.limits() == second.limits()
        assert first.state_dict() == second.state_dict()

    def test_saving_leaves_no_tie_to_the_monitor(self, kind):
        monitor = build(kind)
        feed(monitor, curve(200))
        saved = monitor.state_dict()
        kept = json.dumps(saved)
        feed(monitor, [0.99] * 50, start=200)
        assert json.dumps(saved) == kept

    def test_a_steady_stream_is_quiet(self, kind):
        """A healthy run makes no signals at all."""
        assert set(feed(build(kind), [0.5] * 600)) == {None}

    def test_noise_around_a_steady_level_never_trips(self, kind):
        assert trips(feed(build(kind), curve(3000))) == []

    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300, -1e300])
    def test_what_is_no_usable_number_stops_a_promotion_at_least(self, kind, odd):
        monitor = build(kind)
        feed(monitor, curve(200))
        signal = monitor.read(odd, at=200)
        if kind == "bounds" and math.isfinite(odd):
            assert signal is None
        else:
            assert signal.level == "trip" or signal.holds
            assert str(odd) in signal.reason

    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300])
    @pytest.mark.parametrize("at", [0, 5, 200])
    def test_what_is_no_usable_number_does_not_poison_the_rest(self, kind, odd, at):
        """Shown such a value, a monitor goes on as one that never was."""
        values = curve(400)
        shown, spared = build(kind), build(kind)
        for monitor in (shown, spared):
            feed(monitor, values[:at])
        shown.read(odd, at=at)
        assert feed(shown, values[at:], start=at) == feed(spared, values[at:], start=at)

    def test_unarmed_it_only_learns(self, kind):
        monitor = build(kind)
        if not monitor.immediate:
            assert set(feed(monitor, curve(200) + [0.9] * 50, armed=False)) == {None}

    def test_it_starts_over_when_told(self, kind):
        """A level that would trip is the new normal after `rebase`."""
        monitor = build(kind)
        feed(monitor, curve(300))
        monitor.rebase()
        assert trips(feed(monitor, [value / 4 for value in curve(300, seed=2)], start=300)) == []

    def test_a_rate_that_cannot_be_is_refused(self, kind):
        if kind != "bounds":
            with pytest.raises(ValueError, match=r"every is 3; less than 100 leaves no room for noise"):
                build(kind, every=3)

    def test_the_example_in_its_docstring_runs(self, kind):
        failed, run = doctest.testmod(importlib.import_module(f"loopguard.monitors.{kind}"))
        assert run > 0
        assert failed == 0

    @settings(deadline=None, max_examples=25)
    @given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60), seed=st.integers(0, 3))
    def test_no_value_makes_it_fail(self, kind, values, seed):
        """Whatever comes, after any history: a Signal or None, with numbers that are numbers."""
        monitor = build(kind)
        feed(monitor, curve(80, seed=seed))
        for signal in feed(monitor, values, start=80):
            if signal:
                assert signal.reason
                assert signal.level in {"warn", "trip"}
        json.dumps(monitor.state_dict(), allow_nan=False)


WORSE = [*curve(300), *[0.8 + (value - 0.5) * 8 for value in curve(300, seed=3)]]
"""A level that jumps, stays, and begins to jump about."""


@pytest.mark.parametrize("kind", ["jump", "variance", "drift"])
class TestUnits:
    """Thresholds are in units of the run's own noise: one setting fits all."""

    @settings(deadline=None, max_examples=15)
    @given(scale=st.floats(1e-6, 1e6))
    def test_another_unit_changes_nothing(self, kind, scale):
        plain, scaled = build(kind), build(kind)
        assert trips(feed(plain, WORSE)) == trips(feed(scaled, [value * scale for value in WORSE])) != []


@pytest.mark.parametrize("kind", ["jump", "drift"])
def test_a_reward_is_a_loss_turned_over(kind):
    loss, reward = build(kind, good="down"), build(kind, good="up")
    assert trips(feed(loss, WORSE))[0] == trips(feed(reward, [-value for value in WORSE]))[0]


class TestDefaults:
    def test_a_loss_is_watched_by_all_that_suit_it(self):
        kinds = [type(m).__name__ for m in monitors.defaults("loss", good="down", min=0)]
        assert kinds == ["Bounds", "Jump", "Variance", "Drift"]

    def test_a_share_of_problems_is_watched_as_one(self):
        kinds = [type(m).__name__ for m in monitors.defaults("pass_at_1", good="up", min=0, max=1, problems=100)]
        assert kinds == ["Bounds", "EProcess", "Drift"]

    @pytest.mark.parametrize(("metric", "good"), [("grad_norm", "down"), ("entropy", "none")])
    def test_what_grows_or_has_no_better_side_cannot_drift(self, metric, good):
        kinds = [type(m).__name__ for m in monitors.defaults(metric, good=good)]
        assert kinds == ["Bounds", "Jump", "Variance"]

    def test_false_alarms_are_shared_out(self):
        """The rate is that of the metric, whatever the number of monitors."""
        shares = [m.every for m in monitors.defaults("loss", good="down", every=1000) if not m.immediate]
        assert sum(1 / share for share in shares) == pytest.approx(1 / 1000)

    def test_a_domain_without_room_is_refused(self):
        with pytest.raises(ValueError, match="min 2 is above max 1"):
            monitors.defaults("loss", good="down", min=2, max=1)


def test_an_unknown_kind_is_a_key_error():
    with pytest.raises(KeyError):
        monitors.build("oracle", metric="loss")
