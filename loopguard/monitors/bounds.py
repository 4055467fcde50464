"""A metric must be a finite number inside its declared domain."""

from __future__ import annotations

import math
from typing import Any

from loopguard.types import Expectation, Signal


class Bounds:
    """Trips on the first reading that is not finite or lies outside [min, max].

    Needs no history and no warm-up, so the update that the reading belongs to is withheld before it moves a weight.
    False alarms: none, as long as the declared domain is true. Declare `min=0` only for quantities that cannot be
    negative: the negative log-likelihood of a discrete target is one, that of a density is not, and neither is a
    policy-gradient surrogate. Prefer `jump` for a value that is possible but unlikely.

    >>> bounds = Bounds(metric="loss", min=0.0)
    >>> bounds.read(2.3, at=1)
    >>> bounds.read(-0.2, at=2).reason
    'loss is -0.2, below its domain, which starts at 0'
    >>> bounds.read(float("nan"), at=3, armed=False).level
    'trip'
    """

    immediate = True

    def __init__(self, *, metric: str, min: float | None = None, max: float | None = None) -> None:  # noqa: A002 - as in the policy
        if min is not None and max is not None and min > max:
            raise ValueError(f"bounds of {metric}: min {min:g} is above max {max:g}")
        self.metric = metric
        self.min = min
        self.max = max

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Judge one value by itself; `armed` makes no difference."""
        if not (fault := self._fault(value)):
            return None
        return Signal(
            level="trip",
            monitor="bounds",
            metric=self.metric,
            value=value,
            at=at,
            low=self.min,
            high=self.max,
            since=at,
            at_once=True,
            direction=None if not math.isfinite(value) else ("down" if "below" in fault else "up"),
            reason=fault,
        )

    def _fault(self, value: float) -> str:
        if not math.isfinite(value):
            return f"{self.metric} is {value}, not a finite number"
        if self.min is not None and value < self.min:
            return f"{self.metric} is {value:g}, below its domain, which starts at {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{self.metric} is {value:g}, above its domain, which ends at {self.max:g}"
        return ""

    def limits(self) -> tuple[float | None, float | None]:
        """The domain."""
        return self.min, self.max

    def expect(self, expected: Expectation) -> None:
        """An announced change makes nothing possible that is impossible."""

    def tighten(self, share: float) -> None:
        """Nothing: what is impossible is so at any time."""

    def rebase(self) -> None:
        """Nothing: there is no level."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each reading is judged by itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state."""
        if state:
            raise ValueError(f"bounds of {self.metric} keeps no state, got {sorted(state)}")
