"""The tool gate: deny by default, and notice a model that probes the fence."""

import pytest

from loopguard.gates.tools import REFUSAL, Rollout, ToolGate
from loopguard.policy.schema import CallBudget, GuardPolicy
from loopguard.types import Outcome, ToolCall


def policy(**tools):
    rule = {"id": "calculator", "tool": "python", "then": "run", "sandbox": "offline", "refuse_patterns": ("import",)}
    return GuardPolicy.model_validate(
        {
            "apiVersion": "loopguard/v1",
            "name": "test",
            "tools": {"rules": (rule,)} | tools,
            "sandbox": {"profiles": {"offline": {"image": "loopguard/python:1"}}},
            "data": {"sources": ("human", "model")},
            "updates": {"loss_kind": "discrete", "monitors": ({"kind": "bounds", "metric": "loss"},)},
            "promotion": {"panel": ({"metric": "correct", "good": "up", "max_gain": 0.2, "max_loss": 0.2},)},
        }
    )


RATES = {"refused_share": 0.1, "contained_share": 0.2, "of_last_calls": 10}


def call(code, tool="python"):
    return ToolCall(id="c", tool=tool, code=code)


def outcome(status):
    return Outcome(call_id="c", status=status)


def test_what_no_rule_lets_run_is_refused():
    """The last branch denies."""
    gate = ToolGate(policy())
    assert gate.decide(call("print(1)")).result == "allow"
    assert gate.decide(call("print(1)", tool="browser")).rule == "default"
    assert gate.decide(call("import os")).result == "deny"


def test_a_refusal_tells_the_model_no_rule_and_no_path():
    assert not any(word in REFUSAL for word in ("calculator", "import", "/", "rule", "policy"))


def test_refusals_above_the_rate_freeze_as_soon_as_there_are_too_many():
    gate = ToolGate(policy(freeze_above=RATES))
    gate.decide(call("import os"))
    assert gate.trip() is None
    gate.decide(call("import os"))
    assert gate.trip().rule == "rate:refused"


def test_old_refusals_leave_the_window():
    gate = ToolGate(policy(freeze_above=RATES))
    for _ in range(5):
        gate.decide(call("import os"))
        for _ in range(10):
            gate.finished(outcome("ok"))
        assert gate.trip() is None


@pytest.mark.parametrize("status", ["timeout", "oom", "pids_limit", "output_limit", "disk_limit", "signal"])
def test_calls_that_run_into_a_wall_freeze_above_their_own_rate(status):
    gate = ToolGate(policy(freeze_above=RATES))
    for _ in range(3):
        gate.finished(outcome(status))
    assert gate.trip().rule == "rate:contained"


def test_failures_of_the_code_itself_are_not_counted():
    gate = ToolGate(policy(freeze_above=RATES))
    for _ in range(20):
        gate.finished(outcome("nonzero_exit"))
    assert gate.trip() is None


def test_without_a_rate_nothing_freezes():
    gate = ToolGate(policy())
    for _ in range(50):
        gate.decide(call("import os"))
    assert gate.trip() is None


def test_what_a_person_has_looked_at_is_counted_no_more():
    """After a resume the rate begins anew; it would trip at the next call again, for ever."""
    gate = ToolGate(policy(freeze_above=RATES))
    while gate.trip() is None:
        gate.decide(call("ls", tool="browser"))
    gate.forget()
    assert gate.trip() is None


class TestTheBudget:
    def rules(self, gate, count, **where):
        return [gate.decide(call("print(1)"), **where).rule for _ in range(count)]

    def test_each_cycle_has_its_own(self):
        """Calls outside of a cycle are one of their own; late calls of an earlier cycle do not give it a new one."""
        gate = ToolGate(policy(budget={"per_cycle": 2}))
        assert self.rules(gate, 3, cycle=1) == ["calculator", "calculator", "budget"]
        assert self.rules(gate, 3, cycle=2) == ["calculator", "calculator", "budget"]
        assert self.rules(gate, 1, cycle=1) == ["budget"]
        assert self.rules(gate, 3) == ["calculator", "calculator", "budget"]

    def test_a_refusal_for_want_of_budget_counts_towards_no_rate(self):
        gate = ToolGate(policy(budget={"per_cycle": 1}, freeze_above=RATES))
        assert self.rules(gate, 20)[-1] == "budget"
        assert gate.trip() is None

    def test_what_the_loop_calls_for_itself_and_what_a_rule_refuses_take_nothing(self):
        gate = ToolGate(policy(budget={"per_cycle": 1}))
        assert self.rules(gate, 5, spends=False) == ["calculator"] * 5
        gate.decide(call("import os"))
        assert self.rules(gate, 2) == ["calculator", "budget"]

    def test_a_cycle_that_starts_again_has_the_whole_of_it(self):
        gate = ToolGate(policy(budget={"per_cycle": 1}))
        assert self.rules(gate, 2, cycle=1) == ["calculator", "budget"]
        gate.forget()
        assert self.rules(gate, 2, cycle=1) == ["calculator", "budget"]

    def test_a_refused_call_takes_from_neither_of_two_budgets(self):
        """A rollout that has come to its end takes nothing from the cycle that others share."""
        whole = policy()
        tools = whole.tools.model_copy(update={"budget": CallBudget(per_cycle=3, per_rollout=1)})
        gate, first, second = ToolGate(whole.model_copy(update={"tools": tools})), Rollout(), Rollout()
        assert self.rules(gate, 4, rollout=first) == ["calculator", "budget", "budget", "budget"]
        assert self.rules(gate, 2, rollout=second) == ["calculator", "budget"]
        assert self.rules(gate, 2) == ["calculator", "budget"]
