"""The share of problems that a model solves must not fall below what was accepted."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

from loopguard.monitors.base import loaded, saved, unusable
from loopguard.types import Expectation, Signal

_WORSE = (-0.25, -0.5, -1.0, -2.0)
"""The rates that a fall is looked for at, as distances in log-odds from the rate that was accepted."""
_POOL = 8
"""Evaluations that make the accepted rate."""
_LAG = 8
"""The latest evaluations, which do not: a fall has so many to show itself before it could be taken in."""
_FIRST = 3
"""Evaluations before the first that is judged."""
_ONE_AT_MOST = 0.4
"""What a single evaluation may say, as a share of the limit: it takes three that agree."""
_HOLDS = 0.5


class EProcess:
    """Trips when evaluations over a known number of problems say that the model solves fewer of them than before.

    An evaluation solves k of `problems`. From the eight evaluations before the latest eight (at the start, from the
    first three) comes p, the lower confidence bound of their common rate, by Chernoff at 4 / `every`. For each of
    four lower rates q, the likelihood ratio

        e = (q / p)^k * ((1 - q) / (1 - p))^(problems - k)

    is at most 1 on average as long as the true rate is p or more, whatever it does otherwise. The evidence for q is
    M <- max(1, M) * min(e, every^0.4), and the monitor trips when the mean of the four M reaches `every`.

    False alarms: a guarantee, and no estimate. As long as no bound is above the true rate, the first trip comes after
    `every` evaluations or more on average; and a bound is wrong for one pool of evaluations in `every` / 4. It needs
    that problems are solved independently of each other and that the true rate does not fall. It may rise.

    With 100 problems a rate of 64 % that falls to 39 % trips at the third or fourth evaluation. A fall that has not
    shown after eight evaluations is taken in: `drift` is for those. One bad evaluation is at most 0.4 of what is
    needed. Gains are no business of this monitor.

    Prefer `jump` where the number of problems is not known.

    >>> import random
    >>> coin = random.Random(0)
    >>> solved = lambda rate: sum(coin.random() < rate for _ in range(100)) / 100
    >>> passes = EProcess(metric="pass_at_1", problems=100)
    >>> signals = [passes.read(solved(0.6 if at < 50 else 0.4), at=at) for at in range(60)]
    >>> first = next(s for s in signals if s and s.level == "trip")
    >>> first.at, first.since
    (54, 50)

    Sources: Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection (2024);
    Ville, Étude critique de la notion de collectif (1939).
    """

    immediate = False

    def __init__(
        self,
        *,
        metric: str,
        problems: int,
        good: Literal["up", "down"] = "up",
        every: float = 100_000,
    ) -> None:
        if problems < 1:
            raise ValueError(f"eprocess of {metric}: problems is {problems}; a score over no problem says nothing")
        if good not in {"up", "down"}:
            raise ValueError(
                f"eprocess of {metric}: good is {good!r}; it is up for a pass rate, down for an error rate"
            )
        if not every >= 100:
            raise ValueError(f"eprocess of {metric}: every is {every:g}; less than 100 leaves no room for noise")
        self.metric = metric
        self.problems = problems
        self.good = good
        self.every = every
        self._limit = math.log(every)
        self._share = 1.0
        self._expected: list[Expectation] = []
        self.rebase()

    def tighten(self, share: float) -> None:
        """Let this share of the evidence, in nats, be enough."""
        self._share = share

    def rebase(self) -> None:
        """Start over with the next evaluation."""
        self._solved: deque[int] = deque(maxlen=_POOL + _LAG)
        self._evidence = [0.0] * len(_WORSE)
        """Of each rate, the logarithm of what speaks for it."""
        self._since: list[int | None] = [None] * len(_WORSE)
        self._ratios: list[tuple[float, float]] = []
        """Of each rate, what a solved and an unsolved problem say, in logarithms."""
        self._age = 0
        self._bound = 0.0

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take the share of problems solved in one evaluation, 0 to 1."""
        if not 0.0 <= value <= 1.0:
            return unusable("eprocess", self.metric, value, at=at, because="is no share of problems")
        if self._expected and self._excused(at):
            return None
        solved = round(value * self.problems)
        if self.good == "down":
            solved = self.problems - solved
        signal = self._judge(value, solved, at) if armed and len(self._solved) >= _FIRST else None
        self._solved.append(solved)
        return signal

    def _judge(self, value: float, solved: int, at: int) -> Signal | None:
        # The bound may be renewed at any time, as long as this does not depend on what the next evaluation says.
        if not self._ratios or self._age >= _POOL:
            self._renew()
        self._age += 1
        limit = self._share * self._limit
        most = _ONE_AT_MOST * limit
        unsolved = self.problems - solved
        for i, (each, other) in enumerate(self._ratios):
            gain = min(solved * each + unsolved * other, most)
            self._evidence[i] = max(0.0, self._evidence[i]) + gain
            if self._evidence[i] <= 0.0:
                self._since[i] = None
            elif self._since[i] is None:
                self._since[i] = at
        if max(self._evidence) < _HOLDS * limit:
            return None
        total = self._total()
        if total < _HOLDS * limit:
            return None
        return self._signal("trip" if total >= limit else "warn", value, at, total)

    def _total(self) -> float:
        """The logarithm of the mean evidence."""
        top = max(self._evidence)
        return top + math.log(sum(math.exp(one - top) for one in self._evidence) / len(_WORSE))

    def _renew(self) -> None:
        """The lower confidence bound of the accepted rate, and the ratios that follow from it."""
        known = list(self._solved)
        pool = known[: max(_FIRST, min(_POOL, len(known) - _LAG))]
        n = len(pool) * self.problems
        rate, enough = sum(pool) / n, math.log(self.every / 4) / n
        low, high = 0.0, rate
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if _divergence(rate, middle) > enough else (low, middle)
        self._bound = min(max(low, 1e-6), 1 - 1e-6)
        odds = math.log(self._bound / (1 - self._bound))
        rates = [1 / (1 + math.exp(-(odds + shift))) for shift in _WORSE]
        self._ratios = [(math.log(q / self._bound), math.log((1 - q) / (1 - self._bound))) for q in rates]
        self._age = 0

    def limits(self) -> tuple[float | None, float | None]:
        """None: a single evaluation is never enough."""
        return None, None

    def expect(self, expected: Expectation) -> None:
        """Take in that a change was announced: after one of `data` the accepted rate is learned again."""
        if expected.kind == "data":
            self._expected.append(expected)

    def _excused(self, at: int) -> bool:
        now = [each for each in self._expected if each.at <= at]
        if now:
            self.rebase()
        self._expected = [each for each in self._expected if at < each.at + each.span]
        return any(each in self._expected for each in now)

    def _signal(self, level: Literal["warn", "trip"], value: float, at: int, total: float) -> Signal:
        strongest = max(range(len(_WORSE)), key=lambda i: self._evidence[i])
        since = self._since[strongest]
        bound = self._bound if self.good == "up" else 1 - self._bound
        side = "below" if self.good == "up" else "above"
        verb = "is" if level == "trip" else "may be"
        reason = (
            f"{self.metric} {verb} {side} the {bound:.3g} that was accepted, since evaluation {since}: "
            f"by chance alone so much evidence comes at most once in {math.exp(min(total, 100.0)):,.0f} evaluations"
        )
        return Signal(
            level=level, monitor="eprocess", metric=self.metric, value=value, at=at,
            low=bound if self.good == "up" else None, high=None if self.good == "up" else bound,
            score=total, since=since, direction="down" if self.good == "up" else "up",
            once_in=math.exp(min(total, 100.0)), holds=level == "warn", reason=reason,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The evaluations that the bound comes from, the evidence, and what is expected."""
        return {
            "solved": list(self._solved),
            "evidence": list(self._evidence),
            "since": list(self._since),
            "ratios": [list(pair) for pair in self._ratios],
            "age": self._age,
            "bound": self._bound,
            "expected": saved(self._expected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self._solved = deque(state["solved"], maxlen=_POOL + _LAG)
        self._evidence, self._since = list(state["evidence"]), list(state["since"])
        self._ratios = [(each, other) for each, other in state["ratios"]]
        self._age, self._bound = int(state["age"]), float(state["bound"])
        self._expected = loaded(state["expected"])


def _divergence(rate: float, other: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats."""
    total = 0.0
    if rate > 0:
        total += rate * math.log(rate / other) if other > 0 else math.inf
    if rate < 1:
        total += (1 - rate) * math.log((1 - rate) / (1 - other)) if other < 1 else math.inf
    return total
