"""A sum that climbs while readings agree that something changed, and how high it may climb before that is believed.

What `jump` and `variance` have in common. It knows no metric; it is shown scores.
"""

from __future__ import annotations

import math
from typing import Any

_RATE = 0.01
"""How often the sum of a healthy run is assumed to peak above `start`, per reading."""
_RATE_WEIGHT = 300.0
"""In readings: how many of the run's own weigh as much as that assumption."""
_STEEP_WEIGHT = 3.0
"""In peaks: how many of the run's own weigh as much as what is assumed of their heights."""


class Chart:
    """A winsorised CUSUM whose limit comes from the run's own sum.

    The sum gains `min(score, cap) - slack` with each reading and never falls below zero. `cap` bounds what one reading
    can do, so that a limit above n * (cap - slack) takes more than n readings that agree.

    Between two zeros the sum has one peak. Such excursions are independent of each other even where the readings are
    not, and the heights of their peaks fall off exponentially, so that a healthy run passes

        limit = start + ln(rate * every) / steep,    rate = peaks above `start` per reading
                                                     steep = 1 / mean height of a peak above `start`

    once in `every` readings. Both numbers start from an assumption that makes the limit `first` at an `every` of
    100,000, and move towards what this run shows. A calm run brings its limit down, as far as `least`, since few peaks
    tell little about the tail. A restless one does not bring it up: it would buy silence about real changes.
    """

    def __init__(self, *, slack: float, cap: float, start: float, first: float, least: float, every: float) -> None:
        self.slack = slack
        self.cap = cap
        self.start = start
        self.every = every
        self.share = 1.0
        """Of the limit, that is enough for a trip."""
        self._assumed = math.log(_RATE * 100_000) / (first - start)
        self._first = start + math.log(max(2.0, _RATE * every)) / self._assumed
        self._least = min(least, self._first)
        self.sum = 0.0
        self.since: int | None = None
        """The reading with which the sum left zero."""
        self._peak = 0.0
        self._peaks = 0
        self._excess = 0.0
        self.calibrate(0)

    def take(self, score: float, *, at: int) -> None:
        """Add the score of one reading."""
        new = self.sum + min(score, self.cap) - self.slack
        if new <= 0.0:
            if self._peak > self.start:
                self._peaks += 1
                self._excess += self._peak - self.start
            self.clear()
            return
        if self.since is None:
            self.since = at
        if new > self._peak:
            self._peak = new
        self.sum = new

    def calibrate(self, seen: int) -> None:
        """Set the limit by the peaks so far, among `seen` readings."""
        self._rate = (_RATE * _RATE_WEIGHT + self._peaks) / (_RATE_WEIGHT + seen)
        self._steep = (_STEEP_WEIGHT + self._peaks) / (_STEEP_WEIGHT / self._assumed + self._excess)
        own = self.start + math.log(max(1.0, self._rate * self.every)) / self._steep
        self.limit = min(self._first, max(self._least, own))

    @property
    def reached(self) -> float:
        """How far the sum has climbed towards what trips; above 1 it has passed it."""
        return self.sum / (self.share * self.limit)

    @property
    def once_in(self) -> float:
        """The sum of a healthy run gets as high as it is now once in so many readings."""
        return math.exp(min(100.0, max(0.0, self.sum - self.start) * self._steep)) / self._rate

    def clear(self) -> None:
        """Back to zero. Unlike in `take`, what was reached is not remembered as healthy."""
        self.sum = self._peak = 0.0
        self.since = None

    def state_dict(self) -> dict[str, Any]:
        """The sum, and what was learned of its peaks."""
        names = ("sum", "since", "limit", "peak", "peaks", "excess", "rate", "steep")
        return {name: getattr(self, name if hasattr(self, name) else f"_{name}") for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.sum, self.since, self.limit = float(state["sum"]), state["since"], float(state["limit"])
        self._peak, self._peaks, self._excess = float(state["peak"]), int(state["peaks"]), float(state["excess"])
        self._rate, self._steep = float(state["rate"]), float(state["steep"])


def odds(once_in: float) -> str:
    """How sure that is, in words."""
    if once_in >= 1e9:
        return "less than once in a billion readings"
    return f"once in {float(f'{once_in:.2g}'):,.0f} readings"
