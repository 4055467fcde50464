"""Lints: what loads and is most likely not meant. None of them keeps a policy from loading."""

import pytest
from policy_kit import SMALL, WITHOUT_TOOLS, cases, edited

from loopguard.policy.load import load


@pytest.mark.parametrize(("edits", "said"), cases("lints.txt"))
def test_one_thing_that_is_not_meant_gives_one_lint(findings, tmp_path, edits, said):
    assert findings(*edits) == said
    (tmp_path / "p.yaml").write_text(edited(*edits))
    assert load(tmp_path / "p.yaml").policy.name == "small"


def test_a_sound_policy_has_none(findings):
    assert findings(text=SMALL) == []


@pytest.mark.parametrize("lines", ["", "tools: {rules: []}\n", "tools: {rules: []}\nsandbox: {profiles: {}}\n"])
def test_neither_has_one_without_tools(findings, lines):
    """Nobody probes a fence behind which there is nothing."""
    assert findings(text=WITHOUT_TOOLS + lines) == []


@pytest.mark.parametrize(
    "lines",
    [
        "egress: {allow: [{host: api.example.org, port: 443}]}",
        "egress: {allow: [{host: api.example.org, port: 443, secret_headers: {X-Key: KEY}}]}",
        "mode: episode\n      background: true",
        "mode: episode",
        "privileges: strict",
        "queue: 0",
    ],
)
def test_what_costs_nobody_anything_has_none(findings, lines):
    assert findings(("      limits:", f"      {lines}\n      limits:")) == []


def test_a_file_without_new_keys_gets_no_new_lint(findings):
    """A default that does not fit is cut in silence: nobody who passes no files has to write about them."""
    assert findings(("tmpfs: 16MiB", "tmpfs: 1MiB")) == []


@pytest.mark.parametrize("pattern", ["__", r"\bimport\b", r"\bopen\s*\(", "(ab)+", "a+b+", r"\(a+\)+", "(a|b)*c"])
def test_flat_patterns_have_none(findings, pattern):
    assert findings(("max_code_bytes: 400", f"max_code_bytes: 400\n      refuse_patterns: ['{pattern}']")) == []


@pytest.mark.parametrize("pattern", ["(a+)+", r"(\w*)*$", "([a-z]+){2,}", "(?:x*y)*"])
def test_nested_repeats_have_one(findings, pattern):
    (said,) = findings(("max_code_bytes: 400", f"max_code_bytes: 400\n      refuse_patterns: ['z{pattern}']"))
    assert "repeats a repeat" in said
