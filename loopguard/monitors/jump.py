"""A metric must not leave its recent level suddenly, in either direction."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, Literal

from loopguard.types import Expectation, Signal

_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for normal noise."""
_FLOOR = 0.004
"""The least noise assumed, as a share of the level: a nearly constant curve is not infinitely sure of itself."""


class Jump:
    """Trips when the last few readings agree on a level far from the one before them.

    With `recent` the last `confirm` readings and `base` the `window` readings before those,

        d = median(recent) - median(base)
        z = d / max(1.4826 * MAD(base), 0.004 * |median(base)|)

    and the monitor trips when |z| > `threshold` and |d| > `min_change` * |median(base)|. Because both sides are
    medians, at least (confirm + 1) / 2 readings must agree: a single outlier is a warning and never a trip, and the
    first half of a jump cannot pull the base along. A fall counts as much as a rise, since a loss that drops too fast
    is how a leak of the labels looks.

    At the defaults a step of the level shows after 3 readings. False alarms: none in the 20,000 readings of normal
    noise around a falling level that its test runs; staircases at epoch boundaries look exactly like a jump. A slow
    drift passes unseen, because the base follows it. For a value that is impossible rather than unlikely, prefer
    `bounds`.

    >>> import random
    >>> noise = random.Random(0)
    >>> jump = Jump(metric="loss")
    >>> level = lambda at: 2.0 if at < 200 else 1.2
    >>> signals = [jump.read(level(at) + noise.gauss(0, 0.05), at=at) for at in range(300)]
    >>> next((s.at, s.since, s.direction) for s in signals if s and s.level == "trip")
    (202, 200, 'down')

    Source: the robust z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993), taken of a short
    median instead of a single value.
    """

    immediate = False

    def __init__(
        self,
        *,
        metric: str,
        threshold: float = 6.0,
        min_change: float = 0.25,
        window: int = 40,
        confirm: int = 5,
        warmup: int = 64,
    ) -> None:
        if window < 8:
            raise ValueError(f"jump of {metric}: window is {window}; it needs at least 8 readings to estimate spread")
        if confirm < 1:
            raise ValueError(f"jump of {metric}: confirm is {confirm}; it needs at least 1 reading")
        self.metric = metric
        self.threshold = threshold
        self.min_change = min_change
        self.window = window
        self.confirm = confirm
        self.warmup = warmup
        self._seen = 0
        self._readings: deque[tuple[int, float]] = deque(maxlen=window + confirm)

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take a value; trips only while `armed` and once `warmup` values and a full window are in."""
        self._seen += 1
        self._readings.append((at, value))
        if not armed or self._seen < self.warmup or len(self._readings) < self.window + self.confirm:
            return None
        values = [one for _, one in self._readings]
        base, now = values[: self.window], median(values[self.window :])
        level = median(base)
        noise = max(_TO_SIGMA * median(abs(value - level) for value in base), _FLOOR * abs(level), 1e-12)
        reach = max(self.threshold * noise, self.min_change * abs(level))
        judged = Signal(
            level="warn",
            monitor="jump",
            metric=self.metric,
            value=value,
            at=at,
            low=level - reach,
            high=level + reach,
            score=(now - level) / noise,
            reason=f"{self.metric}: one reading is far out, the others are not",
        )
        if abs(now - level) > reach:
            return self._trip(judged, level, now, reach)
        return judged if abs(value - level) > reach else None

    def _trip(self, judged: Signal, level: float, now: float, reach: float) -> Signal:
        recent = islice(self._readings, self.window, None)
        since = next(at for at, value in recent if abs(value - level) > reach)
        direction: Literal["up", "down"] = "up" if now > level else "down"
        sure = f"{abs(judged.score or 0):.1f} noise units, {abs(now - level) / max(abs(level), 1e-12):.0%}"
        reason = f"{self.metric} went {direction} from {level:.4g} to {now:.4g} ({sure}) since update {since}"
        return replace(judged, level="trip", since=since, direction=direction, reason=reason)

    def limits(self) -> tuple[float | None, float | None]:
        """Not yet."""
        return None, None

    def expect(self, expected: Expectation) -> None:
        """Not yet."""

    def rebase(self) -> None:
        """Start over."""
        self._seen = 0
        self._readings.clear()

    def state_dict(self) -> dict[str, Any]:
        """The readings in the window and how many were seen."""
        return {"seen": self._seen, "readings": [[at, value] for at, value in self._readings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that window."""
        self._seen = int(state["seen"])
        self._readings.clear()
        self._readings.extend((int(at), float(value)) for at, value in state["readings"])
