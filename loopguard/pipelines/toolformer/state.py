"""What the loop itself has to remember between cycles. It travels with every snapshot of the guard.

Nothing random is kept: each cycle draws from generators that follow from the seed and the cycle's number alone, which
is what makes a run that was killed and started again equal to one that never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loopguard.errors import UsageError


@dataclass(slots=True, kw_only=True)
class Memory:
    """Admitted training data and the table of cycles. One memory lives as long as a run."""

    facts: dict[str, Any]
    """What the run was started with."""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Prompt and completion of every admitted record with a call: the people's, then the model's, in order."""
    people: int = 0
    """How many of them are people's."""
    lines: list[int] = field(default_factory=list)
    """Which plain lines were admitted, by their place in the task."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row for each promoted cycle."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "facts": self.facts,
            "calls": [list(call) for call in self.calls],
            "people": self.people,
            "lines": list(self.lines),
            "rows": [dict(row) for row in self.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to that. Raises UsageError where the run directory was started with other options."""
        for name, value in self.facts.items():
            if state["facts"].get(name) != value:
                raise UsageError(
                    f"this run directory was started with another {_NAMES.get(name, name)}"
                    f" ({_shown(state['facts'].get(name))}, now {_shown(value)}): "
                    "give the same options, or another --run-dir"
                )
        self.calls = [(prompt, completion) for prompt, completion in state["calls"]]
        self.people = state["people"]
        self.lines = list(state["lines"])
        self.rows = [dict(row) for row in state["rows"]]


_NAMES = {"data": "--data", "eval": "--eval", "model": "--model", "seed": "--seed", "control": "--control"}


def _shown(value: object) -> str:
    return "none" if value is None else str(value)[:12]
