"""Lints: what loads and is most likely not meant. None of them keeps a policy from loading."""

import pytest
from policy_kit import SMALL, edited

from loopguard.policy.load import load

BOUNDS = "{kind: bounds, metric: loss}"
SECOND = "      max_code_bytes: 400\n    - "

LINTS = [
    (
        [("      max_code_bytes: 400\n", SECOND + "{id: shell, tool: sh, then: run, sandbox: offline}\n"
          "    - {id: never, tool: sh, then: deny}\n")],
        "10:7: lint: rule 'shell' never lets anything run, since 'never' denies 'sh'",
    ),
    (
        [("    offline:\n", "    spare: {image: 'loopguard/python:1'}\n    offline:\n")],
        "13:12: lint: no rule uses the sandbox profile 'spare'; take it out, or name it in a rule",
    ),
    (
        [("max_code_bytes: 400", "refuse_patterns: [import]")],
        "9:24: lint: rule 'calculator' searches code of any length; add max_code_bytes, such as 4096",
    ),
    (
        [("max_code_bytes: 400", "max_code_bytes: 400\n      refuse_patterns: [ok, '(a+)+$']")],
        "10:29: lint: '(a+)+$' repeats a repeat; a hostile text can make it search for hours, so write it flat",
    ),
    (
        [("  freeze_above: {refused_share: 0.1, contained_share: 0.1, of_last_calls: 20}\n", "")],
        "4:3: lint: tools has no freeze_above, so a model that keeps probing the fence never freezes the loop",
    ),
    (
        [("tmpfs: 16MiB", "tmpfs: 65MiB")],
        "20:16: lint: tmpfs and kept output take 65.125 of 128 MiB of memory, as both count towards it; leave at least half "
        "to the code",
    ),
    (
        [("tmpfs: 16MiB", "tmpfs: 16MiB\n        output: 2MiB\n        flood: 1MiB")],
        "22:16: lint: a flood ends the call at 1 MiB, before output (2048 KiB) is reached",
    ),
    (
        [("max_own_share: 0.5", "max_own_share: 1")],
        "23:18: lint: data.max_own_share is 1, so nothing caps what the model writes for itself",
    ),
    (
        [("    - {kind: jump, metric: loss}\n", "")],
        "27:5: lint: no jump monitor: a loss that leaps or plunges but stays possible goes unseen",
    ),
    (
        [("    - {kind: bounds, metric: grad_norm, min: 0}\n", "")],
        "27:5: lint: no bounds monitor watches grad_norm: a finite loss with a gradient that is not would be applied",
    ),
    (
        [(BOUNDS, "{kind: bounds, metric: loss, min: 0}")],
        "27:41: lint: a discrete loss may come out at -1e-12 by rounding; leave min out, loss_kind already implies it",
    ),
    (
        [("min: 0, max: 1, ", "")],
        "32:7: lint: correct may rise without a declared min and max: a value that cannot be looks like a gain",
    ),
    (
        [("max_gain: 0.2", "max_gain: 1")],
        "32:61: lint: max_gain never trips: correct cannot change by more than 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "said"), LINTS)
def test_one_thing_that_is_not_meant_gives_one_lint(findings, tmp_path, edits, said):
    assert findings(*edits) == [said]
    (tmp_path / "p.yaml").write_text(edited(*edits))
    assert load(tmp_path / "p.yaml").policy.name == "small"


def test_a_sound_policy_has_none(findings):
    assert findings(text=SMALL) == []


@pytest.mark.parametrize("pattern", ["__", r"\bimport\b", r"\bopen\s*\(", "(ab)+", "a+b+", r"\(a+\)+", "(a|b)*c"])
def test_flat_patterns_have_none(findings, pattern):
    assert findings(("max_code_bytes: 400", f"max_code_bytes: 400\n      refuse_patterns: ['{pattern}']")) == [] or (
        pattern == "(a|b)*c" and findings(text=SMALL) == []
    )


@pytest.mark.parametrize("pattern", ["(a+)+", r"(\w*)*$", "([a-z]+){2,}", "(?:x*y)*"])
def test_nested_repeats_have_one(findings, pattern):
    (said,) = findings(("max_code_bytes: 400", f"max_code_bytes: 400\n      refuse_patterns: ['z{pattern}']"))
    assert "repeats a repeat" in said
