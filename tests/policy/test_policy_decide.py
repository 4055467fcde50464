"""Tool calls: deny overrides, order never matters, and what no rule lets run is denied."""

import dataclasses
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import small

from loopguard.policy.decide import decide
from loopguard.policy.schema import GuardPolicy, Tools
from loopguard.types import ToolCall

RUN = {"id": "calculator", "tool": "python", "then": "run", "sandbox": "offline"}
SHELL = {"id": "shell", "tool": "sh", "then": "run", "sandbox": "offline"}
SHORT = RUN | {"max_code_bytes": 4}
FENCED = RUN | {"refuse_patterns": ["^import", "__", "eval"]}
DENY = {"id": "never", "tool": "python", "then": "deny"}


def policy(*rules):
    return small(tools__rules=list(rules))


def call(code="print(1)", tool="python"):
    return ToolCall(id="c1", tool=tool, code=code)


LETS = "rule calculator lets python run in sandbox offline"
NFKC_DUNDER = "\uff3f\uff3fclass\uff3f\uff3f"
STYLED_EVAL = "\U0001d4eeval('1')"

TABLE = [
    ([RUN], call(), "allow", "calculator", LETS),
    ([RUN], call(tool="sh"), "deny", "default", "no rule lets the tool 'sh' run"),
    ([RUN], call(tool="Python"), "deny", "default", "no rule lets the tool 'Python' run"),
    ([RUN], call(tool=""), "deny", "default", "no rule lets the tool '' run"),
    ([RUN, SHELL], call(tool="sh"), "allow", "shell", "rule shell lets sh run in sandbox offline"),
    ([RUN, SHELL, DENY], call(), "deny", "never", "rule never denies python"),
    ([DENY, SHELL, RUN], call(), "deny", "never", "rule never denies python"),
    ([DENY, SHELL, RUN], call(tool="sh"), "allow", "shell", "rule shell lets sh run in sandbox offline"),
    ([SHORT], call("1234"), "allow", "calculator", LETS),
    ([SHORT], call("12345"), "deny", "calculator", "the code is 5 bytes long; rule calculator takes at most 4"),
    ([SHORT], call("äöü"), "deny", "calculator", "the code is 6 bytes long; rule calculator takes at most 4"),
    ([FENCED], call("import os"), "deny", "calculator", "the code matches '^import', which rule calculator refuses"),
    ([FENCED], call("x\nimport os"), "allow", "calculator", LETS),
    ([FENCED], call("a.__b"), "deny", "calculator", "the code matches '__', which rule calculator refuses"),
    ([FENCED], call(NFKC_DUNDER), "deny", "calculator", "the code matches '__', which rule calculator refuses"),
    ([FENCED], call(STYLED_EVAL), "deny", "calculator", "the code matches 'eval', which rule calculator refuses"),
    ([RUN], call("'\ud800'"), "deny", "calculator", "the code is not valid text: it holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("rules", "the_call", "result", "rule", "reason"), TABLE)
def test_table(rules, the_call, result, rule, reason):
    decision = decide(policy(*rules), the_call)
    assert (decision.gate, decision.result, decision.rule, decision.reason) == ("tool", result, rule, reason)
    assert decision.facts == ({"sandbox": "offline"} if result == "allow" else {})


@pytest.mark.parametrize("changes", [{"tools": None}, {"tools__rules": []}, {"tools": None, "sandbox": None}])
def test_a_policy_without_tools_refuses_every_call(changes):
    decision = decide(small(**changes), call())
    assert (decision.result, decision.rule) == ("deny", "default")
    assert decision.reason == "no rule lets the tool 'python' run"


def test_the_last_branch_denies_also_where_a_policy_was_made_without_checks():
    """A rule that wants to run a call but names no sandbox that exists must not let it run."""
    sound = small()
    rule = sound.tools.rules[0].model_copy(update={"sandbox": "gone"})
    broken = sound.model_copy(update={"tools": Tools.model_construct(rules=(rule,), freeze_above=None)})
    decision = decide(broken, call())
    assert (decision.result, decision.rule) == ("deny", "default")


def test_a_rule_that_says_something_new_denies():
    """A later `then` that this code does not know is a refusal and not a permission."""
    sound = small()
    rule = sound.tools.rules[0].model_copy(update={"then": "hold"})
    broken = sound.model_copy(update={"tools": Tools.model_construct(rules=(rule,), freeze_above=None)})
    assert decide(broken, call()).result == "deny"


def test_a_hostile_name_stays_on_one_printable_line():
    decision = decide(small(), call(tool="\x1b[2J\u202e\n" + "x" * 500))
    assert decision.reason.isprintable()
    assert decision.reason.isascii()
    assert len(decision.reason) < 300


def test_decisions_are_values_without_a_clock_or_a_file():
    assert [*inspect.signature(decide).parameters] == ["policy", "call"]
    assert decide(small(), call()) == decide(small(), call())


TOOLS = ["python", "sh", "sql"]
PATTERNS = ["a", "b+", "^c", "__", r"\d"]


@st.composite
def rule_lists(draw):
    """Sound lists of rules: one sandbox for each tool that runs, and any number of denies."""
    rules = []
    for tool in draw(st.lists(st.sampled_from(TOOLS), unique=True, min_size=1)):
        extra = {}
        if draw(st.booleans()):
            extra["max_code_bytes"] = draw(st.integers(1, 8))
        if patterns := draw(st.lists(st.sampled_from(PATTERNS), unique=True)):
            extra["refuse_patterns"] = patterns
        rules.append({"id": f"run-{tool}", "tool": tool, "then": "run", "sandbox": "offline"} | extra)
    running = [rule["tool"] for rule in rules]
    for n, tool in enumerate(draw(st.lists(st.sampled_from(TOOLS), max_size=3))):
        if set(running) - {rule["tool"] for rule in rules if rule["then"] == "deny"} - {tool}:
            rules.append({"id": f"deny-{n}", "tool": tool, "then": "deny"})
    return rules


CALLS = st.builds(
    ToolCall,
    id=st.just("c"),
    tool=st.sampled_from([*TOOLS, "other"]),
    code=st.text("abc_1 \n\uff3f", max_size=12),
)


@given(rules=rule_lists(), the_call=CALLS, data=st.data())
def test_the_order_of_rules_and_patterns_never_matters(rules, the_call, data):
    shuffled = data.draw(st.permutations(rules))
    for i, rule in enumerate(shuffled):
        if patterns := rule.get("refuse_patterns"):
            shuffled[i] = rule | {"refuse_patterns": data.draw(st.permutations(patterns))}
    assert decide(policy(*rules), the_call) == decide(policy(*shuffled), the_call)


@given(rules=rule_lists(), the_call=CALLS)
def test_a_deny_of_the_tool_always_wins(rules, the_call):
    if any(rule["then"] == "deny" and rule["tool"] == the_call.tool for rule in rules):
        assert not decide(policy(*rules), the_call).allowed


@given(rules=rule_lists(), the_call=CALLS)
def test_nothing_runs_without_a_rule_that_says_so(rules, the_call):
    decision = decide(policy(*rules), the_call)
    if decision.allowed:
        (rule,) = [rule for rule in rules if rule["id"] == decision.rule]
        assert (rule["tool"], rule["then"], rule["sandbox"]) == (the_call.tool, "run", decision.facts["sandbox"])


def test_a_policy_cannot_be_changed_after_it_was_loaded():
    loaded = small()
    assert isinstance(loaded, GuardPolicy)
    with pytest.raises(ValueError, match="frozen"):
        loaded.tools.rules[0].then = "deny"
    with pytest.raises(dataclasses.FrozenInstanceError):
        decide(loaded, call()).result = "allow"
