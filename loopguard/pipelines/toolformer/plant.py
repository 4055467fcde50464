"""Which fault to plant, and in which cycle: `nan@2`. Needs no torch, so that a misspelling is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from loopguard.errors import UsageError

FAULTS = ("nan", "negative-loss", "label-leak", "answer-leak", "verifier-bug", "gain", "tool-escape")
"""Every fault that can be planted; `faults` says what each stands for."""


@dataclass(frozen=True, slots=True)
class Plant:
    """Which fault, in which cycle."""

    fault: str
    cycle: int

    def __str__(self) -> str:
        return f"{self.fault}@{self.cycle}"


def parse_plant(text: str) -> Plant:
    """`nan@2` as a Plant. Raises UsageError, with a guess at what was meant."""
    fault, at, cycle = text.partition("@")
    if fault not in FAULTS:
        near = get_close_matches(fault, FAULTS, n=1)
        guess = f" Did you mean '{near[0]}{at}{cycle}'?" if near else ""
        raise UsageError(f"--plant {text}: {fault!r} is no fault; expected one of {', '.join(FAULTS)}.{guess}")
    if not at:
        raise UsageError(f"--plant {text}: the cycle is missing; expected FAULT@CYCLE, such as {fault}@2")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", cycle):
        raise UsageError(
            f"--plant {text}: the cycle is {cycle!r}; expected a whole number from 1 up, such as {fault}@2"
        )
    return Plant(fault, int(cycle))
