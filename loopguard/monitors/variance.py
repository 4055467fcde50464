"""A metric must not begin to jump about from one reading to the next."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from statistics import median
from typing import Any, Literal

from loopguard.monitors.base import loaded, saved, unusable
from loopguard.monitors.chart import Chart, odds
from loopguard.types import Expectation, Signal

_SLACK = 1.85
_CHART = {"slack": _SLACK, "cap": 6.0, "start": 4.0, "first": 45.0, "least": 27.0}
_WINDOW = 96
_WARMUP = 48
_REFIT = 12
"""Readings between two looks at the usual step."""
_SUSPICIOUS = 6.0
_HOLDS = 0.5
_PULL = 4.0
"""In usual steps: a larger one enters the baseline as if it were so large."""
_FLOOR = 0.0003
"""The least usual step, as a share of the level."""
_RISE = 1.1
"""How much the usual step may grow from one look to the next, so that it does not follow what is to be found."""
_USABLE = 1e100


class Variance:
    """Trips when a metric moves more from reading to reading than it used to, wherever its level is.

    A step is the absolute difference of two readings in a row, which a trend hardly changes. The usual step is, over
    the last 96 of them, the standard deviation that their median, upper quartile, 90 % quantile or mean (each step no
    more than three) would have under normal noise, whichever is largest: bursts that belong to a run count as usual.
    The sum of `min(step / usual, 6) - 1.85` is a winsorised CUSUM (see `Chart`); in a calm run a step is 0.8 usual ones
    on average, so that it takes more than twice the noise to climb. Steps wait beside the baseline while the sum is
    above 6. A level that jumps is one step and a single outlier two: no limit is near.

    At the defaults noise that grows sixfold shows after 15 to 40 readings, and fourfold noise mostly within 80; what
    grows less may be taken in. False alarms: the limit is set for one in `every` readings from the run's own sums;
    there were none in 199,000 readings of real healthy runs. A metric that mostly stands still, as a reward before
    learning starts, has no usual step: it is judged from when most steps are not zero.

    Prefer `jump` for a level that goes somewhere.

    >>> import random
    >>> noise = random.Random(0)
    >>> variance = Variance(metric="loss")
    >>> spread = lambda at: 0.05 if at < 200 else 0.3
    >>> signals = [variance.read(2.0 + noise.gauss(0, spread(at)), at=at) for at in range(300)]
    >>> first = next(s for s in signals if s and s.level == "trip")
    >>> first.at, first.since
    (216, 200)

    Sources: von Neumann, Distribution of the ratio of the mean square successive difference to the variance (1941), for
    steps instead of deviations; Page, Continuous inspection schemes (1954), for the CUSUM.
    """

    immediate = False

    def __init__(self, *, metric: str, every: float = 100_000) -> None:
        if not every >= 100:
            raise ValueError(f"variance of {metric}: every is {every:g}; less than 100 leaves no room for noise")
        self.metric = metric
        self.every = every
        self._chart = Chart(**_CHART, every=every)
        self._seen = 0
        self._expected: list[Expectation] = []
        self.rebase()

    def tighten(self, share: float) -> None:
        """Let this share of the chart's limit be enough."""
        self._chart.share = share

    def rebase(self) -> None:
        """Start over with the next reading."""
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._aside: deque[float] = deque(maxlen=_WINDOW)
        self._last: float | None = None
        self._fresh = 0
        self._ready = False
        self._usual = 0.0
        self._quiet = -1.0
        """Steps up to here leave the sum at zero; below zero where none do."""
        self._chart.clear()

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take a value and judge its step; while not `armed`, and for the first 48 steps, only learn from it."""
        last = self._last
        if not -_USABLE < value < _USABLE:
            return unusable("variance", self.metric, value, at=at, because="variance cannot compare with anything")
        self._last = value
        if last is None:
            return None
        step = value - last if value > last else last - value
        if step <= self._quiet and armed:
            self._seen += 1
            self._steps.append(step)
            self._fresh += 1
            if self._fresh >= _REFIT:
                self._fit()
            return None
        if self._expected and self._excused(at):
            return None
        if not (self._ready and armed):
            self._learn(step)
            return None
        return self._judge(value, last, step, at)

    def _judge(self, value: float, last: float, step: float, at: int) -> Signal | None:
        self._seen += 1
        chart = self._chart
        chart.take(step / self._usual, at=at)
        self._quiet = -1.0 if chart.sum else _SLACK * self._usual
        if chart.sum > _SUSPICIOUS:
            self._aside.append(step)
            if chart.reached > 1.0:
                return self._climbing("trip", value, last, at)
            return self._climbing("warn", value, last, at) if chart.reached > _HOLDS else None
        if self._aside:
            for waiting in self._aside:
                self._learn(waiting)
            self._aside.clear()
        self._learn(min(step, _PULL * self._usual))
        return None

    def _learn(self, step: float) -> None:
        self._steps.append(step)
        self._fresh += 1
        if len(self._steps) >= _WARMUP and (self._fresh >= _REFIT or not self._ready):
            self._fit()

    def _fit(self) -> None:
        steps = sorted(self._steps)
        n = len(steps)
        self._fresh = 0
        self._ready = steps[n // 2] > 0.0
        if not self._ready:
            self._usual, self._quiet = 0.0, -1.0
            return
        # Quantiles and mean of |x - y| for independent normal x and y, in standard deviations of x - y.
        usual = max(steps[n // 2] / 0.674, steps[3 * n // 4] / 1.150, steps[9 * n // 10] / 1.645)
        most = 3.0 * usual
        below = bisect_right(steps, most)
        mean = (sum(steps[:below]) + most * (n - below)) / n / 0.798
        new = max(usual, mean, _FLOOR * abs(self._last or 0.0), 1e-12)
        self._usual = min(new, _RISE * self._usual) if self._usual else new
        self._quiet = -1.0 if self._chart.sum else _SLACK * self._usual
        self._chart.calibrate(self._seen)

    def limits(self) -> tuple[float | None, float | None]:
        """None: a single step is never enough."""
        return None, None

    def expect(self, expected: Expectation) -> None:
        """Take in that a change was announced: `lr` and `data` may change the noise, which is learned again after it.

        A step of the level, as at an `epoch`, needs no excuse here.
        """
        if expected.kind != "epoch":
            self._expected.append(expected)
            self._quiet = -1.0

    def _excused(self, at: int) -> bool:
        now = [each for each in self._expected if each.at <= at]
        if any(at < each.at + each.span for each in now):
            self._chart.clear()
            return True
        if now:
            last = self._last
            self.rebase()
            self._last = last
            self._expected = [each for each in self._expected if each not in now]
        return False

    def _climbing(self, level: Literal["warn", "trip"], value: float, last: float, at: int) -> Signal:
        chart = self._chart
        now = median(list(self._aside)[-15:])
        usual = 0.674 * self._usual
        verb = "moves" if level == "trip" else "may be moving"
        reason = (
            f"{self.metric} {verb} by {now:.3g} from one reading to the next where {usual:.3g} is usual, "
            f"since update {chart.since}; healthy runs do so {odds(chart.once_in)}"
        )
        reach = _PULL * self._usual
        return Signal(
            level=level, monitor="variance", metric=self.metric, value=value, at=at, low=last - reach,
            high=last + reach, score=now / usual, since=chart.since, once_in=chart.once_in, holds=level == "warn",
            reason=reason,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The steps, what waits beside them, the chart, and what is expected."""
        return {
            **{name: getattr(self, f"_{name}") for name in _KEPT},
            "steps": list(self._steps),
            "aside": list(self._aside),
            "chart": self._chart.state_dict(),
            "expected": saved(self._expected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        for name in _KEPT:
            setattr(self, f"_{name}", state[name])
        self._steps = deque(state["steps"], maxlen=_WINDOW)
        self._aside = deque(state["aside"], maxlen=_WINDOW)
        self._chart.load_state_dict(state["chart"])
        self._expected = loaded(state["expected"])


_KEPT = ("seen", "last", "fresh", "ready", "usual", "quiet")
