"""The update gate: bounds first, then history, and freeze where anything is unclear."""

import math

import pytest

from loopguard.errors import MonitorError
from loopguard.gates.updates import UpdateGate
from loopguard.policy.schema import Freeze, Updates


def gate(*, loss_kind="discrete", monitors=None, freeze=None):
    monitors = monitors or [
        {"kind": "jump", "metric": "loss"},
        {"kind": "bounds", "metric": "loss"},
        {"kind": "bounds", "metric": "grad_norm", "min": 0.0},
    ]
    updates = Updates.model_validate({"loss_kind": loss_kind, "monitors": tuple(monitors)})
    return UpdateGate(updates, Freeze.model_validate(freeze or {}))


def decide(gate, loss, update=1, *, grad_norm=1.0, armed=True):
    return gate.decide({"loss": loss, "grad_norm": grad_norm}, update=update, armed=armed)


def test_a_quiet_update_is_allowed():
    assert decide(gate(), 2.0).result == "allow"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.1])
def test_an_impossible_loss_freezes_in_time(loss):
    decision = decide(gate(), loss, armed=False)
    assert (decision.result, decision.rule, decision.facts["withheld_in_time"]) == ("freeze", "bounds:loss", True)


def test_a_gradient_that_is_not_finite_freezes_although_the_loss_is_fine():
    assert decide(gate(), 2.0, grad_norm=math.nan).rule == "bounds:grad_norm"


def test_rounding_below_zero_is_no_bug_and_a_density_may_be_negative():
    assert decide(gate(), -1e-12).result == "allow"
    assert decide(gate(loss_kind="density"), -3.0).result == "allow"


def test_a_missing_metric_freezes():
    """The last branch: no reading, no update."""
    decision = gate().decide({"loss": 2.0}, update=3, armed=True)
    assert (decision.result, decision.rule) == ("freeze", "missing:grad_norm")


def steady(watch, *, until=80):
    for update in range(1, until):
        assert decide(watch, 2.0 + update % 5 / 50, update).result == "allow"
    return watch


def test_a_jump_freezes_and_says_that_suspect_updates_were_applied():
    watch = steady(gate())
    frozen = next(d for update in range(80, 100) if (d := decide(watch, 0.5, update)).result == "freeze")
    assert (frozen.rule, frozen.facts["withheld_in_time"]) == ("jump:loss", False)
    [signal] = frozen.signals
    assert signal.since == 80
    assert signal.at <= 85
    assert signal.once_in is not None


def test_a_value_beyond_every_measure_is_withheld_in_time():
    watch = steady(gate())
    frozen = decide(watch, 500.0, 80)
    assert (frozen.rule, frozen.facts["withheld_in_time"]) == ("jump:loss", True)


def test_while_a_monitor_is_suspicious_nothing_should_be_promoted():
    """Before it is sure enough to freeze; and a single outlier is forgiven by the next readings."""
    watch = steady(gate())
    holding = []
    for update in range(80, 100):
        if decide(watch, 0.5, update).result == "freeze":
            break
        holding.append(bool(watch.holding))
    assert any(holding)
    again = steady(gate())
    assert decide(again, 0.5, 80).result == "allow"
    for update in range(81, 100):
        decide(again, 2.0 + update % 5 / 50, update)
    assert not again.holding


def test_the_limits_for_a_device_hold_what_would_be_withheld_in_time():
    watch = steady(gate())
    low, high = watch.limits(armed=True)["loss"]
    assert low == -1e-6
    assert 3 < high < 500
    assert watch.limits(armed=True)["grad_norm"] == (0.0, None)
    assert watch.limits(armed=False)["loss"] == (-1e-6, None)


def test_one_rate_of_false_alarms_is_shared_by_the_monitors():
    rules = [
        {"kind": "bounds", "metric": "loss"},
        {"kind": "jump", "metric": "loss"},
        {"kind": "drift", "metric": "loss"},
    ]
    watch = gate(monitors=rules)
    assert [getattr(monitor, "every", None) for monitor in watch._monitors[:3]] == [None, 200_000.0, 200_000.0]


def test_a_gradient_that_is_no_number_is_stopped_though_no_rule_names_it():
    watch = gate(monitors=[{"kind": "bounds", "metric": "loss"}])
    assert watch.decide({"loss": 1.0}, update=1, armed=True).result == "allow"
    assert decide(watch, 1.0, 2, grad_norm=math.inf).rule == "bounds:grad_norm"


def test_under_another_policy_known_monitors_go_on_and_new_ones_begin_to_learn():
    old = steady(gate())
    rules = [
        {"kind": "drift", "metric": "loss"},
        {"kind": "bounds", "metric": "loss"},
        {"kind": "bounds", "metric": "grad_norm", "min": 0.0},
        {"kind": "jump", "metric": "loss"},
    ]
    new = gate(monitors=rules)
    new.load_state_dict(old.state_dict())
    assert any(decide(new, 0.5, update).result == "freeze" for update in range(80, 90))


def test_an_absent_metric_is_only_missed_where_nobody_said_so():
    watch = gate()
    assert watch.decide({"loss": 2.0}, update=1, armed=True, absent=("grad_norm",)).result == "allow"


def test_an_impossible_value_never_enters_the_statistics():
    watch = gate()
    for update in range(1, 60):
        decide(watch, 2.0, update)
    before = watch.state_dict()["monitors"]["jump loss"]
    decide(watch, math.nan, 60)
    assert watch.state_dict()["monitors"]["jump loss"] == before


def test_a_monitor_that_raises_is_a_monitor_error_with_its_cause(monkeypatch):
    watch = gate()

    def broken(value, *, at, armed):
        raise ZeroDivisionError

    monkeypatch.setattr(watch._monitors[0], "read", broken)
    with pytest.raises(MonitorError, match="monitor of loss failed at update 1") as caught:
        decide(watch, 2.0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class TestSkip:
    def skipping(self):
        return gate(freeze={"on_trip": "skip", "skip_at_most": {"updates": 2, "per": 10}})

    def test_drops_a_batch_at_most_so_often_and_then_freezes(self):
        watch = self.skipping()
        results = [decide(watch, math.nan if update in {3, 5, 7} else 2.0, update).result for update in range(1, 8)]
        assert results == ["allow", "allow", "skip", "allow", "skip", "allow", "freeze"]

    def test_an_old_skip_is_forgotten(self):
        watch = self.skipping()
        results = [decide(watch, math.nan, update).result for update in (1, 2, 12)]
        assert results == ["skip", "skip", "skip"]

    def test_a_jump_is_never_skipped(self):
        watch = self.skipping()
        steady(watch)
        results = [decide(watch, 0.5, update).result for update in range(80, 90)]
        assert "skip" not in results
        assert "freeze" in results


def frozen_at(watch, *, level=0.5):
    """How many readings of another level it takes."""
    return next(update for update in range(80, 120) if decide(watch, level, update).result == "freeze")


class TestStrictness:
    def test_a_share_of_the_reach_takes_fewer_readings(self):
        tight = steady(gate())
        tight.adjust(share=0.5, waived="")
        assert frozen_at(tight) < frozen_at(steady(gate()))

    def test_a_share_of_one_is_the_usual_reach_again(self):
        watch = steady(gate())
        watch.adjust(share=0.5, waived="")
        watch.adjust(share=1.0, waived="")
        assert frozen_at(watch) == frozen_at(steady(gate()))

    def test_strictness_is_no_part_of_the_state(self):
        tight = steady(gate())
        tight.adjust(share=0.5, waived="jump:loss")
        loose = gate()
        loose.load_state_dict(tight.state_dict())
        assert frozen_at(loose) == frozen_at(steady(gate()))

    def test_a_waived_rule_warns_and_holds_no_promotion_up(self):
        watch = steady(gate())
        watch.adjust(share=1.0, waived="jump:loss")
        decisions = [decide(watch, 0.5, update) for update in range(80, 100)]
        assert {decision.result for decision in decisions} == {"allow"}
        assert any(signal.reason.startswith("waived: loss fell") for d in decisions for signal in d.signals)
        assert watch.holding == ()

    def test_what_is_impossible_is_not_waived(self):
        watch = steady(gate())
        watch.adjust(share=1.0, waived="bounds:loss")
        assert decide(watch, math.nan, 80).result == "freeze"
        watch.adjust(share=1.0, waived="jump:loss")
        assert decide(watch, 1e9, 81).result == "freeze"  # one reading that is absurd is no new level

    def test_a_level_that_was_accepted_is_the_new_one(self):
        watch = steady(gate())
        frozen_at(watch)
        watch.relearn("jump:loss")
        assert {decide(watch, 0.5 + update % 5 / 50, update).result for update in range(100, 200)} == {"allow"}
