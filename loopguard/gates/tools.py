"""May this call run, and where?"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Literal

from loopguard.policy.decide import decide
from loopguard.types import Decision, Outcome, Signal, ToolCall

if TYPE_CHECKING:
    from loopguard.policy.schema import GuardPolicy

REFUSAL = "This call is not permitted."
"""All that a model is told. It names no rule and no path, so that a refusal teaches nothing about the fence."""

Fate = Literal["refused", "contained", "free"]


class ToolGate:
    """Decides each call by the guard policy and watches how many are refused or run into a wall.

    Thread-safe. A loop whose model suddenly probes the fence is not a loop to go on with, so the policy may freeze it
    above a share of refused or of contained calls.
    """

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._rates = policy.tools.freeze_above
        self._fates: deque[Fate] = deque(maxlen=self._rates.of_last_calls if self._rates else 1)
        self._lock = threading.Lock()

    def decide(self, call: ToolCall) -> Decision:
        """Judge one call; a refusal counts towards the rate at once."""
        decision = decide(self._policy, call)
        if not decision.allowed:
            self._count("refused")
        return decision

    def finished(self, outcome: Outcome) -> None:
        """Count what became of a call that ran."""
        self._count("contained" if outcome.contained else "free")

    def forget(self) -> None:
        """Begin to count anew: a person has looked at what was counted, and let the loop go on."""
        with self._lock:
            self._fates.clear()

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
        for fate, limit in limits.items():
            share = counts[fate] / of
            if share > limit:
                reason = f"{counts[fate]} of the last {of} tool calls were {fate}; the policy allows {limit:.1%}"
                signal = Signal(
                    level="trip", monitor="rate", metric=f"{fate}_share", value=share, at=0, high=limit, direction="up"
                )
                return Decision(result="freeze", gate="tool", rule=f"rate:{fate}", reason=reason, signals=(signal,))
        return None
