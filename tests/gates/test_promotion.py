"""The promotion gate: too good freezes like too bad."""

import math

import pytest

from loopguard.gates.promotion import PromotionGate
from loopguard.policy.schema import Promotion

PANEL = (
    {"metric": "correct", "good": "up", "min": 0.0, "max": 1.0, "max_gain": 0.2, "max_loss": 0.1},
    {"metric": "loss", "good": "down", "min": 0.0, "max_gain": 0.5, "max_loss": 0.3},
)
OLD = {"correct": 0.5, "loss": 2.0}


def decide(previous=OLD, **panel):
    return PromotionGate(Promotion.model_validate({"panel": PANEL})).decide(OLD | panel, previous=previous, cycle=1)


def test_small_moves_are_promoted():
    assert decide(correct=0.65, loss=1.8).result == "allow"


@pytest.mark.parametrize(
    ("panel", "direction", "word"),
    [
        ({"correct": 0.71}, "up", "gained"),
        ({"correct": 0.39}, "down", "lost"),
        ({"loss": 1.4}, "down", "gained"),
        ({"loss": 2.4}, "up", "lost"),
    ],
)
def test_a_move_beyond_the_policy_freezes_in_either_direction(panel, direction, word):
    decision = decide(**panel)
    assert decision.result == "freeze"
    assert decision.signals[0].direction == direction
    assert word in decision.reason


def test_the_limit_itself_is_allowed():
    assert decide(correct=0.5 + 0.2).result == "allow"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.01, -0.01])
def test_a_value_outside_the_domain_freezes_also_without_a_previous_panel(value):
    assert decide(previous=None, correct=value).rule == "domain:correct"


def test_the_first_panel_of_a_run_is_the_baseline():
    assert decide(previous=None, correct=0.99).result == "allow"


def test_a_missing_and_an_unknown_metric_freeze():
    gate = PromotionGate(Promotion.model_validate({"panel": PANEL}))
    assert gate.decide({"correct": 0.5}, previous=OLD, cycle=1).rule == "missing"
    assert gate.decide(OLD | {"zeal": 1.0}, previous=OLD, cycle=1).rule == "unknown"


def test_a_metric_that_the_last_promotion_did_not_have_freezes():
    """The last branch: what cannot be compared is not promoted."""
    assert decide(previous={"loss": 2.0}).rule == "change:correct"


class TestEvidenceOverCycles:
    """Where a metric is a share of problems, losses that each cycle may have add up."""

    PANEL = ({**PANEL[0], "problems": 400}, PANEL[1])

    def gate(self):
        return PromotionGate(Promotion.model_validate({"panel": self.PANEL}))

    def walk(self, gate, shares):
        """What is decided about each share, against the last one that was promoted."""
        decisions, previous = [], None
        for cycle, share in enumerate(shares):
            panel = OLD | {"correct": share}
            decisions.append(gate.decide(panel, previous=previous, cycle=cycle))
            previous = panel if decisions[-1].allowed else previous
        return decisions

    def test_a_share_that_sinks_a_little_in_each_cycle_freezes_though_no_cycle_lost_too_much(self):
        decisions = self.walk(self.gate(), [0.6, 0.61, 0.6, *(0.6 - 0.03 * step for step in range(1, 8))])
        frozen = next(decision for decision in decisions if decision.result == "freeze")
        assert frozen.rule == "eprocess:correct"
        assert all(decision.result in ("allow", "deny") for decision in decisions[: decisions.index(frozen)])

    def test_before_it_is_sure_it_denies(self):
        decisions = self.walk(self.gate(), [0.6, 0.61, 0.6, *(0.6 - 0.03 * step for step in range(1, 8))])
        held = [decision for decision in decisions if decision.rule == "held"]
        assert held
        assert {decision.result for decision in held} == {"deny"}

    def test_a_share_that_only_wavers_is_promoted(self):
        shares = [0.6, 0.62, 0.59, 0.61, 0.58, 0.6, 0.63, 0.59, 0.61, 0.6]
        assert {decision.result for decision in self.walk(self.gate(), shares)} == {"allow"}

    def test_it_goes_on_where_it_was(self):
        first, second = self.gate(), self.gate()
        self.walk(first, [0.6, 0.61, 0.6, 0.57])
        second.load_state_dict(first.state_dict())
        panel = OLD | {"correct": 0.5}
        one, other = (gate.decide(panel, previous=OLD | {"correct": 0.57}, cycle=9) for gate in (first, second))
        assert one == other


class TestStrictness:
    def gate(self, **strict):
        gate = PromotionGate(Promotion.model_validate({"panel": PANEL}))
        gate.adjust(**{"share": 1.0, "waived": "", **strict})
        return gate

    def test_a_share_makes_every_change_that_is_allowed_smaller(self):
        assert self.gate(share=0.5).decide(OLD | {"correct": 0.59}, previous=OLD, cycle=1).allowed
        decision = self.gate(share=0.5).decide(OLD | {"correct": 0.61}, previous=OLD, cycle=1)
        assert decision.result == "freeze"
        assert "allows 0.1 in probation" in decision.reason

    def test_a_waived_change_passes_and_the_reason_says_what_passed(self):
        decision = self.gate(waived="change:correct").decide(OLD | {"correct": 0.9}, previous=OLD, cycle=1)
        assert decision.allowed
        assert decision.reason.startswith("waived: correct gained 0.4")

    def test_nothing_else_passes_with_it(self):
        gate = self.gate(waived="change:correct")
        assert gate.decide(OLD | {"correct": 0.9, "loss": 9.0}, previous=OLD, cycle=1).rule == "change:loss"
        assert gate.decide(OLD | {"correct": 1.1}, previous=OLD, cycle=1).rule == "domain:correct"

    def test_what_is_outside_of_its_domain_is_not_waived(self):
        assert (
            self.gate(waived="domain:correct").decide(OLD | {"correct": 1.1}, previous=OLD, cycle=1).result == "freeze"
        )
