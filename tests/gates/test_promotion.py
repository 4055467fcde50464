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
