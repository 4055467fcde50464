"""A metric must not leave its recent level suddenly and stay away."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

from loopguard.monitors.base import loaded, saved, unusable
from loopguard.monitors.chart import Chart, odds
from loopguard.types import Expectation, Signal

Good = Literal["down", "up", "none"]

_LARGE = {"slack": 3.0, "cap": 7.0, "start": 2.0, "first": 13.0, "least": 13.0}
"""For changes of five noise units and more: a single reading adds 4 at most, so that it takes four that agree."""
_LEAST_SLACK = 1.25
_SMALL = {"slack": _LEAST_SLACK, "cap": 4.0, "start": 2.0, "first": 27.0, "least": 18.0}
"""For changes of two noise units and more, on the worse side: 12 readings that agree at first, 7 in a calm run."""

_REFIT = 8
"""Readings between two looks at level and noise."""
_SUSPICIOUS = 3.0
"""A chart's sum from which on readings wait beside the baseline instead of entering it."""
_HOLDS = 0.5
"""The share of its limit from which on a chart asks that nothing be promoted."""
_OUTLIER = 5.0
"""In noise units: a single reading that is worth a note."""
_PULL = 3.0
"""In noise units: a reading further out enters the baseline as if it were so far out."""
_FLOOR = 0.002
"""The least noise assumed, as a share of the level: a nearly constant curve is not infinitely sure of itself."""
_FLOOR_BETTER = 0.01
"""The same below a loss: a fall of less than some 4 % is no leak of labels that anybody would stop a run for."""
_MEMORY = 0.5
"""The least noise assumed, as a share of what has been typical."""
_OUTER_NOISE, _OUTER_LEVEL, _OUTER_SPAN = 100.0, 20.0, 3.0
"""The outer limit is the largest of: so many noise units, levels, and widths of what was seen lately."""
_RELEARN = 5
"""Readings after an announced change that make a level."""
_YOUNG = 0.4
"""Noise estimated from few readings is taken for so much larger, less as the window fills."""
_USABLE = 1e100
"""Larger values would overflow in the arithmetic below; `bounds` is the monitor for them."""


class Jump:
    """Trips when several readings agree on a level that the noise around the last one does not explain.

    The baseline is the last `window` readings. From it, every 8 readings, come a level, a trend (the difference of the
    medians of its last and first third, less what is uncertain about it) and the noise around both,

        noise = max(IQR / 1.349, (q90 - q10) / 2.563, half of what it typically was, 0.2 % of the level)

    where the second term keeps losses with two humps from looking like jumps. Few readings count as noisier, and below
    a loss the noise is 1 % of the level at least. On the worse side a reading is compared with the level of the last
    third, on the better side with the line carried on, so that neither a steady fall nor its end is a jump.

    The distance in noise units goes into two winsorised CUSUMs (see `Chart`): `min(z, 7) - 3`, which takes four
    readings that agree, and on the worse side `min(z, 4) - 1.25` for smaller changes, which takes longer. While a sum
    is above 3 the readings wait beside the baseline: it cannot learn the jump. They join it if the sum falls back to 0,
    so one outlier or a short run of them is a note and no trip.

    Where `good` is down, a fall counts like a rise: it is how a leak of the labels looks. It counts once a window is
    full, since every loss falls at the start. Where `good` is up, gains are noted; where it is none, both sides are
    worse. From half of its limit on a chart warns with `holds`: nothing should be promoted until it has passed.

    One reading trips at once where it is further from the level than 100 noise units, than 20 levels, and than three
    times the width of what was seen lately. `limits` has that as numbers.

    False alarms: the limits are set for one in `every` readings, from the run's own sums, and assume that what the run
    has shown is what it will show. In independent normal noise there was none in 2,000,000 readings; in 199,000
    readings of real healthy runs there were nine, and `docs/monitors.md` says what those were. What looks like a jump
    and is planned, as epochs and learning rates are, has to be announced to `expect`.

    Prefer `bounds` for values that are impossible, `drift` for a level that creeps away (the baseline follows it
    here), `variance` for a level that stays while the noise grows, and `eprocess` for a share of problems solved.

    >>> import random
    >>> noise = random.Random(0)
    >>> jump = Jump(metric="loss")
    >>> level = lambda at: 2.0 if at < 200 else 1.2
    >>> signals = [jump.read(level(at) + noise.gauss(0, 0.05), at=at) for at in range(300)]
    >>> first = next(s for s in signals if s and s.level == "trip")
    >>> first.at, first.since, first.direction
    (203, 200, 'down')

    Sources: Page, Continuous inspection schemes (1954), for the CUSUM; Tukey, Exploratory Data Analysis (1977), for the
    line through thirds; Huber, Robust Statistics (1981), for winsorising. The limit from excursions is our own use of
    the exponential tail that Lundberg's inequality gives to the maximum of a random walk with negative drift.
    """

    immediate = False

    def __init__(
        self,
        *,
        metric: str,
        good: Good = "down",
        every: float = 100_000,
        min_change: float = 0.0,
        window: int = 64,
        warmup: int = 24,
    ) -> None:
        if good not in {"down", "up", "none"}:
            raise ValueError(f"jump of {metric}: good is {good!r}; it is down, up or none")
        if warmup < 9:
            raise ValueError(f"jump of {metric}: warmup is {warmup}; it needs at least 9 readings to estimate spread")
        if window < warmup:
            raise ValueError(f"jump of {metric}: window is {window}; it cannot be shorter than warmup, {warmup}")
        if not every >= 100:
            raise ValueError(f"jump of {metric}: every is {every:g}; less than 100 leaves no room for noise")
        if not min_change >= 0:
            raise ValueError(f"jump of {metric}: min_change is {min_change:g}; it cannot be negative")
        self.metric = metric
        self.good = good
        self.every = every
        self.min_change = min_change
        """The least change of the level, as a share of it, that may trip."""
        self.window = window
        self.warmup = warmup
        worse = (Chart(**_LARGE, every=every), Chart(**_SMALL, every=every))
        self._up: tuple[Chart, ...]
        self._down: tuple[Chart, ...]
        if good == "down":
            self._up, self._down = worse, (Chart(**_LARGE, every=every),)
        elif good == "up":
            self._up, self._down = (), worse
        else:
            self._up, self._down = worse, (Chart(**_LARGE, every=every), Chart(**_SMALL, every=every))
        self._charts = (*self._up, *self._down)
        self._seen = 0
        self._fits = 0
        self._usual = 0.0
        """The logarithm of the noise, averaged over about two windows. Of a falling loss the arithmetic mean would
        remember the first noise far too long."""
        self._expected: list[Expectation] = []
        self._due = math.inf
        self._after = 0
        """Readings since the span of what was announced was over."""
        self.rebase()

    def tighten(self, share: float) -> None:
        """Let this share of each chart's limit be enough. The outer limit stays."""
        for chart in self._charts:
            chart.share = share

    def rebase(self) -> None:
        """Start over with the next reading. What was learned of the run's noise and sums stays."""
        self._base: deque[float] = deque(maxlen=self.window)
        self._aside: deque[float] = deque(maxlen=self.window)
        """Readings that wait beside the baseline."""
        self._fresh = 0
        self._ready = False
        self._full = False
        self._quiet = True
        self._level = self._high = self._low = 0.0
        self._sink = self._lift = 0.0
        """What an improvement under way does to its side from reading to reading."""
        self._noise = self._noise_below = self._least_noise = 1e-12
        self._width = 0.0
        self._reach = math.inf
        for chart in self._charts:
            chart.clear()

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take a value and judge it; while not `armed`, and for the first `warmup` values, only learn from it."""
        if self._ready and armed and at < self._due:
            self._seen += 1
            self._low += self._sink
            self._high += self._lift
            up = (value - self._high) / self._noise
            down = (self._low - value) / self._noise_below
            if self._quiet and up <= _LEAST_SLACK and down <= _LEAST_SLACK:
                # `_learn`, without the call: most readings end here.
                self._base.append(value)
                self._fresh += 1
                if self._fresh >= _REFIT:
                    self._fit()
                return None
            return self._judge(value, up, down, at)
        if not -_USABLE < value < _USABLE:
            return unusable("jump", self.metric, value, at=at, because="jump cannot compare with anything")
        if self._ready and armed:
            return self._announced(value, at)
        self._learn(value)
        return None

    def _judge(self, value: float, up: float, down: float, at: int) -> Signal | None:
        if not -_USABLE < value < _USABLE:
            return unusable("jump", self.metric, value, at=at, because="jump cannot compare with anything")
        if self._is_absurd(value):
            return self._absurd(value, at)
        if not self._full and self.good == "down":
            down = 0.0
        self._take(up, down, at)
        worst = self._worst()
        if worst is not None and worst.sum > _SUSPICIOUS:
            self._aside.append(value)
            if worst.reached > 1.0 and self._matters():
                return self._climbing("trip", worst, value, at)
            if worst.reached > _HOLDS:
                return self._climbing("warn", worst, value, at)
        else:
            self._rejoin()
            self._learn(min(max(value, self._low - _PULL * self._noise), self._high + _PULL * self._noise))
            self._width = max(self._width, abs(value - self._level))
        return self._note(value, up, down, at) if up > _OUTLIER or down > _OUTLIER else None

    def _take(self, up: float, down: float, at: int) -> None:
        quiet = True
        for chart in self._up:
            if chart.sum or up > chart.slack:
                chart.take(up, at=at)
                quiet = quiet and not chart.sum
        for chart in self._down:
            if chart.sum or down > chart.slack:
                chart.take(down, at=at)
                quiet = quiet and not chart.sum
        self._quiet = quiet

    def _worst(self) -> Chart | None:
        """The chart that is nearest to its limit, if any has left zero."""
        climbing = [chart for chart in self._charts if chart.sum]
        return max(climbing, key=lambda chart: chart.reached) if climbing else None

    def _matters(self) -> bool:
        """Whether the change is at least `min_change`; a smaller one is taken in as the new level."""
        if abs(self._lately() - self._level) >= self.min_change * abs(self._level):
            return True
        for chart in self._charts:
            chart.clear()
        self._quiet = True
        self._rejoin()
        return False

    def _lately(self) -> float:
        return median(list(self._aside)[-15:])

    def _rejoin(self) -> None:
        if self._aside:
            for value in self._aside:
                self._learn(value)
            self._aside.clear()

    def _learn(self, value: float) -> None:
        self._base.append(value)
        self._fresh += 1
        if self._fresh >= _REFIT if self._ready else len(self._base) >= self.warmup:
            self._fit()

    def _fit(self) -> None:
        """Level, trend and noise of the baseline."""
        self._fresh = 0
        values = list(self._base)
        n = len(values)
        third = n // 3
        first, last = sorted(values[:third])[third // 2], sorted(values[-third:])[third // 2]
        ordered = sorted(values)
        level = end = ordered[n // 2]
        trend = 0.0
        noise = _spread(ordered)
        rise = last - first
        unsure = 2.4 * noise / math.sqrt(n)
        if abs(rise) > unsure:
            trend = (rise - math.copysign(unsure, rise)) / (n - third)
            middle = (n - 1) / 2
            flat = sorted([value - trend * (i - middle) for i, value in enumerate(values)])
            noise = _spread(flat)
            end = flat[n // 2] + trend * middle
        if n >= self.warmup:
            self._fits += 1
            self._usual += (math.log(max(noise, 1e-100)) - self._usual) / min(self._fits, 15)
            self._least_noise = _MEMORY * math.exp(self._usual)
        noise *= 1 + _YOUNG * (self.window - n) / self.window
        self._noise = self._noise_below = max(noise, self._least_noise, _FLOOR * abs(level), 1e-12)
        if self.good == "down":
            self._noise_below = max(self._noise, _FLOOR_BETTER * abs(level))
        self._level = self._high = self._low = level
        self._sink = self._lift = 0.0
        if end < level:
            # Falling: below, the line carried on; above, what was reached of late, unless the fall is for the worse.
            self._low = min(end, last)
            if self.good != "up":
                self._high, self._sink = last, trend
        elif end > level:
            self._high = max(end, last)
            if self.good != "down":
                self._low, self._lift = last, trend
        self._full = self._full or n == self.window
        self._width *= 0.995
        width = max(self._width, ordered[-1] - ordered[0])
        self._reach = max(_OUTER_NOISE * self._noise, _OUTER_LEVEL * abs(level), _OUTER_SPAN * width)
        self._ready = True
        if self._fits % 4 == 0:
            for chart in self._charts:
                chart.calibrate(self._seen)

    def limits(self) -> tuple[float | None, float | None]:
        """The outer limit. None before the first `warmup` readings, and above where `good` is up."""
        if not self._ready:
            return None, None
        return self._level - self._reach, None if self.good == "up" else self._level + self._reach

    def _is_absurd(self, value: float) -> bool:
        distance = value - self._level
        return distance < -self._reach or (distance > self._reach and self.good != "up")

    def expect(self, expected: Expectation) -> None:
        """Take in that a change was announced.

        From `at` on, for `span` readings, an `epoch` excuses the better side and `lr` and `data` both; what is excused
        is not judged. Then the last readings make the new level, with the noise of before until `warmup` readings are
        in. The outer limit stays, and a side that is not excused is judged by the old level until it is quiet.
        """
        self._expected = sorted([*self._expected, expected], key=lambda each: each.at)
        self._due = self._expected[0].at

    def _announced(self, value: float, at: int) -> Signal | None:
        """Judge a value that an announced change may show in."""
        now = [each for each in self._expected if each.at <= at]
        if self._is_absurd(value):
            return self._absurd(value, at)
        self._seen += 1
        up = (value - self._high) / self._noise
        down = (self._low - value) / self._noise_below
        kinds = {each.kind for each in now}
        both = kinds != {"epoch"} or self.good == "none"
        self._take(0.0 if both or self.good == "up" else up, 0.0 if both or self.good == "down" else down, at)
        self._aside.append(value)
        worst = self._worst()
        if worst is not None and worst.sum > _SUSPICIOUS:
            if worst.reached > 1.0 and self._matters():
                return self._climbing("trip", worst, value, at)
            return self._climbing("warn", worst, value, at) if worst.reached > _HOLDS else None
        self._after += at >= max(each.at + each.span for each in now)
        if self._after >= _RELEARN:
            self._after = 0
            self._expected = [each for each in self._expected if each not in now]
            self._due = self._expected[0].at if self._expected else math.inf
            self._settle()
        return None

    def _settle(self) -> None:
        """The latest readings are the level now."""
        self._least_noise = max(self._least_noise, self._noise)
        self._base.clear()
        self._base.extend(list(self._aside)[1 - 2 * _RELEARN :])
        self._aside.clear()
        for chart in self._charts:
            chart.clear()
        self._quiet = True
        level = median(self._base)
        self._width = max(self._width, abs(level - self._level))
        self._level = self._high = self._low = level
        self._sink = self._lift = 0.0

    def _range(self) -> tuple[float | None, float | None]:
        low, high = self._low - _PULL * self._noise, self._high + _PULL * self._noise
        return low, None if self.good == "up" else high

    def _signal(self, level: Literal["warn", "trip"], value: float, at: int, **rest: Any) -> Signal:
        low, high = self._range()
        return Signal(level=level, monitor="jump", metric=self.metric, value=value, at=at, low=low, high=high, **rest)

    def _climbing(self, level: Literal["warn", "trip"], chart: Chart, value: float, at: int) -> Signal:
        rising = chart in self._up
        before = self._high if rising else self._low
        now = self._lately()
        score = (now - before) / (self._noise if rising else self._noise_below)
        sure, unsure = ("went up", "may be going up") if rising else ("fell", "may be falling")
        verb = sure if level == "trip" else unsure
        too_good = " (too good is a fault too, such as leaked labels)" if not rising and self.good == "down" else ""
        reason = (
            f"{self.metric} {verb} from {before:.4g} to {now:.4g}, {abs(score):.1f} times its noise, "
            f"since update {chart.since}{too_good}; healthy runs do so {odds(chart.once_in)}"
        )
        return self._signal(
            level, value, at, score=score, since=chart.since, direction="up" if rising else "down",
            once_in=chart.once_in, holds=level == "warn", reason=reason,
        )  # fmt: skip

    def _note(self, value: float, up: float, down: float, at: int) -> Signal:
        score, direction = (up, "up") if up > down else (-down, "down")
        reason = (
            f"{self.metric} is {value:.4g}, one reading {abs(score):.1f} times the noise {direction} from its level"
        )
        return self._signal("warn", value, at, score=score, since=at, direction=direction, reason=reason)

    def _absurd(self, value: float, at: int) -> Signal:
        low, high = self.limits()
        direction: Literal["up", "down"] = "up" if value > self._level else "down"
        score = (value - self._level) / self._noise
        reason = (
            f"{self.metric} is {value:.4g} where {self._level:.4g} is usual, {abs(score):.0f} times its noise away and "
            f"outside of {low:.4g} to {'anything' if high is None else f'{high:.4g}'}, the range of any single reading"
        )
        return Signal(
            level="trip", monitor="jump", metric=self.metric, value=value, at=at, low=low, high=high, score=score,
            since=at, direction=direction, at_once=True, reason=reason,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The baseline, what waits beside it, the charts, and what is expected."""
        return {
            **{name: getattr(self, f"_{name}") for name in _KEPT},
            "base": list(self._base),
            "aside": list(self._aside),
            "reach": self._reach if math.isfinite(self._reach) else None,
            "charts": [chart.state_dict() for chart in self._charts],
            "expected": saved(self._expected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        for name in _KEPT:
            setattr(self, f"_{name}", state[name])
        self._base = deque(state["base"], maxlen=self.window)
        self._aside = deque(state["aside"], maxlen=self.window)
        self._reach = math.inf if state["reach"] is None else state["reach"]
        for chart, kept in zip(self._charts, state["charts"], strict=True):
            chart.load_state_dict(kept)
        self._expected = loaded(state["expected"])
        self._due = self._expected[0].at if self._expected else math.inf


_KEPT = (
    "seen", "fits", "usual", "fresh", "ready", "full", "quiet",
    "level", "high", "low", "sink", "lift", "noise", "noise_below", "least_noise", "width", "after",
)  # fmt: skip


def _spread(ordered: list[float]) -> float:
    """Standard deviation of sorted values, as normal noise would have it, by the wider of two pairs of quantiles."""
    n = len(ordered)
    return max((ordered[3 * n // 4] - ordered[n // 4]) / 1.349, (ordered[9 * n // 10] - ordered[n // 10]) / 2.563)
