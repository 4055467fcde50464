"""Guard policies: what a file may say (`schema`), how it is read (`source`, `explain`), what follows (`decide`).

    from loopguard.policy import load
    loaded = load(Path("policies/default.yaml"))     # PolicyError names every problem with its line and column

pydantic and ruamel.yaml stay in here.
"""

from __future__ import annotations

from loopguard.policy.decide import decide
from loopguard.policy.diff import Change, changes, compare
from loopguard.policy.findings import Finding
from loopguard.policy.load import LoadedPolicy, check, digest, examine, load, shipped
from loopguard.policy.schema import GuardPolicy

__all__ = [
    "Change",
    "Finding",
    "GuardPolicy",
    "LoadedPolicy",
    "changes",
    "check",
    "compare",
    "decide",
    "digest",
    "examine",
    "load",
    "shipped",
]
