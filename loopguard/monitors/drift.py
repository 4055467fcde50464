"""A metric must not get worse slowly."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from typing import Any, Literal

from loopguard.monitors.base import loaded, saved, unusable
from loopguard.types import Expectation, Signal

_KEPT_BLOCKS = 20
"""How far back the best block is looked for: with 25 readings each, 500 readings."""
_RECENT = 6
"""Blocks over which a metric must not be recovering."""
_EARLIER = 3
"""Blocks before those that there must be at least."""
_MOVES = 5.0
"""A distance of so many usual moves from block to block is the least that counts."""
_USABLE = 1e100


class Drift:
    """Trips when a metric has crept away from its own best, too slowly for `jump`, whose baseline follows.

    Readings are gathered into blocks of `block`; of each block the median m counts. With `best` the best median of the
    last 20 blocks without the latest six, noise the median of the blocks' own spread (IQR / 1.349), and

        reach = max(1.2533 * noise / sqrt(block) * (sqrt(2 ln every) + 1.7),    what chance can do
                    5 * median |m - m before|,                                 what this metric does anyway
                    min_change * |best|)                                       what a person would care about

    it trips when the latest two blocks are both worse than `best` by more than `reach` and the latest six are not
    recovering. sqrt(2 ln every) is where the largest of `every` normal values lies, and 1.7 how far the best of 15
    blocks lies on the good side of their level, both in standard errors of a block's median.

    At the defaults a ramp to 15 % over 400 readings shows after some 150. False alarms: in independent noise less than
    one in `every` readings; readings that follow each other are covered by the second term, and only as far as the run
    has shown it. Metrics that grow in healthy runs, as the norm of the gradient does, should not be watched for drift.
    A drift that is slower than the metric improves by itself cannot be seen by anyone.

    >>> import random
    >>> noise = random.Random(0)
    >>> drift = Drift(metric="loss")
    >>> level = lambda at: 2.0 + max(0, at - 300) * 0.3 / 400
    >>> signals = [drift.read(level(at) + noise.gauss(0, 0.05), at=at) for at in range(800)]
    >>> first = next(s for s in signals if s and s.level == "trip")
    >>> first.at, first.since
    (449, 300)

    Source: the rule of thumb of a person who compares this hour with the best hour of the day. Page and Hinkley's test
    (1970) is the classic for this question, but cannot be told that a loss is supposed to fall.
    """

    immediate = False

    def __init__(
        self,
        *,
        metric: str,
        good: Literal["down", "up"] = "down",
        every: float = 100_000,
        min_change: float = 0.03,
        block: int = 25,
    ) -> None:
        if good not in {"down", "up"}:
            raise ValueError(f"drift of {metric}: good is {good!r}; it is down or up, since worse needs a direction")
        if block < 8:
            raise ValueError(f"drift of {metric}: block is {block}; it needs at least 8 readings to estimate spread")
        if not every >= 100:
            raise ValueError(f"drift of {metric}: every is {every:g}; less than 100 leaves no room for noise")
        if not min_change >= 0:
            raise ValueError(f"drift of {metric}: min_change is {min_change:g}; it cannot be negative")
        self.metric = metric
        self.good = good
        self.every = every
        self.min_change = min_change
        self.block = block
        self._sign = -1.0 if good == "up" else 1.0
        self._chance = 1.2533 / math.sqrt(block) * (math.sqrt(2 * math.log(every)) + 1.7)
        self._expected: list[Expectation] = []
        self._share = 1.0
        self.rebase()

    def tighten(self, share: float) -> None:
        """Let this share of the reach be enough."""
        self._share = share

    def rebase(self) -> None:
        """Start over with the next reading."""
        self._values: list[float] = []
        self._begun = 0
        self._blocks: deque[tuple[float, float, int]] = deque(maxlen=_KEPT_BLOCKS)
        """Of each: the median with the sign that makes more worse, the spread, and its first reading."""

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take a value; judges once a block is full, from nine blocks on."""
        if not -_USABLE < value < _USABLE:
            return unusable("drift", self.metric, value, at=at, because="drift cannot compare with anything")
        if self._expected and self._excused(at):
            return None
        values = self._values
        if not values:
            self._begun = at
        values.append(value)
        if len(values) < self.block:
            return None
        self._close()
        return self._judge(value, at) if armed and len(self._blocks) >= _EARLIER + _RECENT else None

    def _close(self) -> None:
        ordered = sorted(self._values)
        n = len(ordered)
        spread = (ordered[3 * n // 4] - ordered[n // 4]) / 1.349
        self._blocks.append((self._sign * ordered[n // 2], spread, self._begun))
        self._values = []

    def _judge(self, value: float, at: int) -> Signal | None:
        blocks = list(self._blocks)
        middles = [middle for middle, _, _ in blocks]
        best = min(middles[:-_RECENT])
        noise = sorted([spread for _, spread, _ in blocks])[len(blocks) // 2]
        moves = sorted([abs(after - before) for before, after in pairwise(middles)])[len(blocks) // 2 - 1]
        reach = self._share * max(self._chance * noise, _MOVES * moves, self.min_change * abs(best), 1e-12)
        recent = middles[-_RECENT:]
        if min(recent[-2:]) <= best + reach or recent[-1] < recent[0]:
            return None
        # From the last block on that was as good as the best, give or take a third of what would trip.
        last_good = max(i for i, middle in enumerate(middles) if middle <= best + reach / 3)
        since = blocks[min(last_good + 1, len(blocks) - 1)][2]
        score = (recent[-1] - best) / max(1.2533 * noise / math.sqrt(self.block), 1e-12)
        now, then, limit = (self._sign * each for each in (recent[-1], best, best + reach))
        reason = (
            f"{self.metric} has drifted from {then:.4g} at its best to {now:.4g} "
            f"({abs(now - then) / max(abs(then), 1e-12):.1%} worse) since about update {since}, and is not coming back"
        )
        return Signal(
            level="trip", monitor="drift", metric=self.metric, value=value, at=at,
            low=limit if self.good == "up" else None, high=None if self.good == "up" else limit,
            score=self._sign * score, since=since, direction="down" if self.good == "up" else "up",
            once_in=self.every, reason=reason,
        )  # fmt: skip

    def limits(self) -> tuple[float | None, float | None]:
        """None: a single reading is never enough."""
        return None, None

    def expect(self, expected: Expectation) -> None:
        """Take in that a change was announced: no reading of its span counts, and the best is looked for after it."""
        self._expected.append(expected)

    def _excused(self, at: int) -> bool:
        now = [each for each in self._expected if each.at <= at]
        if now:
            self.rebase()
        self._expected = [each for each in self._expected if at < each.at + each.span]
        return any(each in self._expected for each in now)

    def state_dict(self) -> dict[str, Any]:
        """The blocks, the readings of the block under way, and what is expected."""
        return {
            "values": list(self._values),
            "begun": self._begun,
            "blocks": [list(block) for block in self._blocks],
            "expected": saved(self._expected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self._values = list(state["values"])
        self._begun = int(state["begun"])
        self._blocks = deque(((middle, spread, at) for middle, spread, at in state["blocks"]), maxlen=_KEPT_BLOCKS)
        self._expected = loaded(state["expected"])
