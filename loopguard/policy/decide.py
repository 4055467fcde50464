"""May this call run, and where? A pure function of the guard policy and the call."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from loopguard.types import Decision

if TYPE_CHECKING:
    from loopguard.policy.schema import GuardPolicy, ToolRule
    from loopguard.types import ToolCall


def decide(policy: GuardPolicy, call: ToolCall) -> Decision:
    """Judge one call.

    A deny overrides every run, whatever the order of the rules, and what no rule lets run is denied. The reason is one
    sentence for the audit log; a model must not see it. `facts` of an allowed call names the sandbox profile.
    """
    # By id, so that of several refusals the same one is named however the file is sorted.
    rules = sorted((rule for rule in policy.tools.rules if rule.tool == call.tool), key=lambda rule: rule.id)
    for rule in rules:
        if objection := _objection(rule, call):
            return _deny(rule.id, objection)
    for rule in rules:
        if rule.then == "run" and rule.sandbox in policy.sandbox.profiles:
            reason = f"rule {rule.id} lets {rule.tool} run in sandbox {rule.sandbox}"
            facts = {"sandbox": rule.sandbox}
            return Decision(result="allow", gate="tool", rule=rule.id, reason=reason, facts=facts)
    return _deny("default", f"no rule lets the tool {_short(call.tool)} run")


def _objection(rule: ToolRule, call: ToolCall) -> str:
    """Why this rule refuses the call; empty where it does not."""
    if rule.then != "run":
        return f"rule {rule.id} denies {rule.tool}"
    try:
        code_bytes = len(call.code.encode("utf-8"))
    except UnicodeEncodeError:
        return "the code is not valid text: it holds half of a surrogate pair"
    if rule.max_code_bytes is not None and code_bytes > rule.max_code_bytes:
        return f"the code is {code_bytes} bytes long; rule {rule.id} takes at most {rule.max_code_bytes}"
    # Python reads full-width and styled letters in names as plain ones, so the patterns look at both spellings.
    spellings = {call.code, unicodedata.normalize("NFKC", call.code)}
    for pattern in sorted(rule.refuse_patterns):
        if any(re.search(pattern, spelling) for spelling in spellings):
            return f"the code matches {_short(pattern)}, which rule {rule.id} refuses"
    return ""


def _deny(rule: str, reason: str) -> Decision:
    return Decision(result="deny", gate="tool", rule=rule, reason=reason)


def _short(text: str) -> str:
    """Text of unknown origin, printable and on one line."""
    return ascii(text) if len(text) <= 80 else f"{text[:80]!a}..."
