"""May this call run, and where?"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loopguard.policy.decide import decide
from loopguard.types import Decision, Outcome, Signal, ToolCall

if TYPE_CHECKING:
    from loopguard.policy.schema import GuardPolicy

REFUSAL = "This call is not permitted."
"""All that a model is told. It names no rule and no path, so that a refusal teaches nothing about the fence."""

Fate = Literal["refused", "contained", "free"]


@dataclass(slots=True)
class Rollout:
    """What the budget knows of one rollout."""

    calls: int = 0
    """How many calls of it may run or have run."""


class ToolGate:
    """Decides each call by the guard policy and watches how many are refused or run into a wall.

    Thread-safe. A loop whose model suddenly probes the fence is not a loop to go on with, so the policy may freeze it
    above a share of refused or of contained calls.
    """

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._rates = policy.tools.freeze_above
        self._fates: deque[Fate] = deque(maxlen=self._rates.of_last_calls if self._rates else 1)
        self._share = 1.0
        self._budget = policy.tools.budget
        self._calls: Counter[int | None] = Counter()
        """How many calls of each cycle may run or have run."""
        self._lock = threading.Lock()

    def adjust(self, *, share: float) -> None:
        """How strict the gate is from now on: this share of the refused and contained calls that are allowed."""
        self._share = share

    def decide(
        self, call: ToolCall, *, cycle: int | None = None, rollout: Rollout | None = None, spends: bool = True
    ) -> Decision:
        """Judge one call; a refusal by a rule counts towards the rate at once.

        An allowed call that `spends` counts against the budget of its cycle (None: of all that is outside of a cycle)
        and of its rollout. A refusal for want of budget counts towards no rate: a model that works on is not one that
        probes.
        """
        decision = decide(self._policy, call)
        if not decision.allowed:
            self._count("refused")
        elif spends and (spent := self._spend(cycle, rollout)):
            return Decision(result="deny", gate="tool", rule="budget", reason=spent)
        return decision

    def _spend(self, cycle: int | None, rollout: Rollout | None) -> str:
        """Take one call from the budget; why there is none left, or the empty string."""
        if (budget := self._budget) is None:
            return ""
        with self._lock:
            if budget.per_cycle is not None and self._calls[cycle] >= budget.per_cycle:
                return f"{budget.per_cycle} calls of this cycle were let run, which is all that the policy allows"
            if rollout is not None and budget.per_rollout is not None and rollout.calls >= budget.per_rollout:
                return f"{budget.per_rollout} calls of this rollout were let run, which is all that the policy allows"
            self._calls[cycle] += 1
            if rollout is not None:
                rollout.calls += 1
        return ""

    def finished(self, outcome: Outcome) -> None:
        """Count what became of a call that ran."""
        self._count("contained" if outcome.contained else "free")

    def forget(self) -> None:
        """Begin to count anew: a person has looked at what was counted, and let the loop go on."""
        with self._lock:
            self._fates.clear()
            self._calls.clear()  # the cycle starts again

    def _count(self, fate: Fate) -> None:
        with self._lock:
            self._fates.append(fate)

    def trip(self) -> Decision | None:
        """A freeze where a share is above what the policy allows.

        The shares are of `of_last_calls` also while fewer calls were made: early on it takes as many as later.
        """
        if self._rates is None:
            return None
        with self._lock:
            counts = Counter(self._fates)
        of = self._rates.of_last_calls
        limits: dict[Fate, float] = {"refused": self._rates.refused_share, "contained": self._rates.contained_share}
        for fate, allowed in limits.items():
            share, limit = counts[fate] / of, self._share * allowed
            if share > limit:
                reason = f"{counts[fate]} of the last {of} tool calls were {fate}; the policy allows {limit:.1%}"
                signal = Signal(
                    level="trip", monitor="rate", metric=f"{fate}_share", value=share, at=0, high=limit, direction="up"
                )
                return Decision(result="freeze", gate="tool", rule=f"rate:{fate}", reason=reason, signals=(signal,))
        return None
