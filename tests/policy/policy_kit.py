"""A small policy, and ways to bend it, for the tests beside this file."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from loopguard.policy.schema import GuardPolicy
from loopguard.policy.source import parse

SMALL = """\
apiVersion: loopguard/v1
name: small
tools:
  rules:
    - id: calculator
      tool: python
      then: run
      sandbox: offline
      max_code_bytes: 400
  freeze_above: {refused_share: 0.1, contained_share: 0.1, of_last_calls: 20}
sandbox:
  profiles:
    offline:
      image: loopguard/python:1
      limits:
        wall: 2s
        memory: 128MiB
        pids: 32
        cpus: 1.0
        tmpfs: 16MiB
data:
  sources: [human, model]
  max_own_share: 0.5
updates:
  loss_kind: discrete
  monitors:
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
    - {kind: jump, metric: loss}
    - {kind: drift, metric: loss}
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.1}
"""

KEYS = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKZIC8qPFHdci/uLJzW7/ENIUqh/TNspKTxxffonb55U",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIH+ZcwkDDhL3kyaBPD1bGINkO3tpwL/macOig39fa29j",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFFPB+xbYcA1cEfkHDcOLy0kVHjhrq9T4gExQbqIHhWZ",
)
"""Public keys whose private halves nobody has."""

RESUME = {"approvals": 1, "people": {"dana": [KEYS[0]], "eli": [KEYS[1]], "fay": [KEYS[2]]}}


WITHOUT_TOOLS = SMALL[: SMALL.index("tools:")] + SMALL[SMALL.index("data:") :]
"""The same policy for a loop that calls no tool."""


def edited(*edits: tuple[str, str], text: str = SMALL) -> str:
    """The text with each (old, new) replaced once; an edit that changes nothing is a mistake of the test."""
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def small(**changes: Any) -> GuardPolicy:
    """The small policy with values set by place: `small(tools__rules__0__then="deny")`; None takes a key out."""
    said = copy.deepcopy(parse(SMALL, "small").data)
    for place, value in changes.items():
        *way, last = [int(step) if step.isdigit() else step for step in place.split("__")]
        section = said
        for step in way:
            section = section[step] if isinstance(section, list) else section.setdefault(step, {})
        if value is None:
            del section[last]
        else:
            section[last] = value
    return GuardPolicy.model_validate_json(json.dumps(said))


def cases(name: str) -> list[tuple[list[tuple[str, str]], list[str]]]:
    """The (edits, lines said) of a text file beside this one."""
    found = []
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for block in re.split(r"\n{2,}", re.sub(r"(?m)^#.*\n", "", text).strip("\n")):
        lines = block.splitlines()
        said = [line.strip() for line in lines if re.match(r"    \d+:\d+: ", line)]
        edits = [tuple(map(_unescaped, line.split(" => "))) for line in lines[: len(lines) - len(said)]]
        assert said, block
        assert all(len(edit) == 2 for edit in edits), block
        found.append((edits, said))
    return found


def _unescaped(text: str) -> str:
    return "" if text == "(nothing)" else text.encode("ascii").decode("unicode_escape")
