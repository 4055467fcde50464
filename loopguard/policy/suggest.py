"""Which monitors suit the metrics that a run has shown, and why the others are left out.

Every choice is made from a metric's name and its first readings, and is never taken back: so a run that is observed is
judged, from update to update, by the very rules that are suggested when it has ended. What is learned later (a range, a
metric that never moved) only narrows what these rules cannot trip on in this run.

Here is no file and no gate. `draft` writes the policy; the controller asks the gate.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loopguard.policy.schema import Updates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from loopguard.policy.schema import Good

YOUNG = 24
"""Readings of a metric before it is decided how to watch it. No monitor that needs history can trip sooner."""

FALSE_ALARM_EVERY = 100_000

LossKind = Literal["discrete", "surrogate"]

_NAME = re.compile(r"[A-Za-z0-9][\w./-]{0,63}", re.ASCII)
_MOST_RULES = 100
_KEPT_FREE = 5
"""For the loss and the gradient norm."""
_IDLE = (
    (re.compile(r"(^|[/_])(num_tokens|num_input_tokens_seen|epoch|global_step|step|total_flos|samples)$"), "it counts"),
    (re.compile(r"learning_rate|(^|[/_])lr($|[/_])"), "the schedule sets it"),
    (
        re.compile(r"(_|^|/)(time|runtime|duration|latency)(_|$|/)|_per_second|throughput|_ms$"),
        "it tells of the machine",
    ),
    (re.compile(r"memory|(^|[/_])(gpu|vram|cpu)($|[/_])"), "it tells of the machine"),
)
"""Names that say nothing about the health of a run."""

_BESIDE = re.compile(
    r"(^|[/_])(std|min|max|var)($|[/_])|^clip_ratio/|^sampling/|^frac_|^logps/|^logits/|^rewards/(chosen|rejected)$"
    r"|terminated|clipped"
)
"""Metrics that stand beside others which say more."""

_DOWN = re.compile(r"loss|perplexity|(^|[/_])(ppl|nll|wer|cer|bpb)($|[/_])|error_rate")
_UP = re.compile(r"reward|accurac|(^|[/_])(acc|score|correct|f1|bleu|em)($|[/_])|(pass|win|success)_rate|pass@")
_SHARE = re.compile(r"accurac|(^|[/_])(acc|share|frac|correct)($|[/_])|(pass|win|success|error)_rate|failure_frequency")
_GROWS = re.compile(r"(^|[/_])(approx_)?kl($|[/_])")
"""Of these only a level that grows fourfold at once is worth a freeze: less freezes runs that are sound."""
_NEVER_NEGATIVE = re.compile(r"grad_norm|entropy|perplexity|length|(^|[/_])ppl($|[/_])")

_RL = re.compile(r"GRPO|RLOO|PPO|OnlineDPO|Reinforce|NashMD|XPO", re.IGNORECASE)


def trains_by_reward(trainer: type) -> bool:
    """Whether a trainer is one whose loss is a policy-gradient surrogate, by the names of its class and its bases."""
    return any(_RL.search(cls.__name__) for cls in trainer.__mro__)


def direction(metric: str) -> Good:
    """Which way a metric of that name is better; none where its name does not say."""
    name = metric.lower()
    if idle(name) or _BESIDE.search(name):
        return "none"
    if _DOWN.search(name):
        return "down"
    return "up" if _UP.search(name) else "none"


def idle(metric: str) -> str:
    """Why a metric of that name says nothing about the health of a run, or the empty string."""
    return next((why for pattern, why in _IDLE if pattern.search(metric.lower())), "")


def domain(metric: str, *, low: float, high: float) -> dict[str, float]:
    """`min` and `max` of a metric that its name gives it, as far as the values from `low` to `high` agree."""
    name = metric.lower()
    if _SHARE.search(name) and low >= 0 and high <= 1:
        return {"min": 0, "max": 1}
    return {"min": 0} if _NEVER_NEGATIVE.search(name) and low >= 0 else {}


@dataclass(slots=True)
class Metric:
    """What a run has shown of one metric: its range, its largest moves, its first readings."""

    name: str
    first: int
    """The update that brought its first reading."""
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    rise: float = 0.0
    """The largest from one reading to the next; so is `fall`."""
    fall: float = 0.0
    strange: int | None = None
    """The first update at which it was no finite number."""
    missed: bool = False
    """Whether an update had none of it and nobody had said so, before it was decided how to watch it."""
    early: list[tuple[int, float, bool]] = field(default_factory=list)
    """Update, value, and whether monitors were armed; the first ones."""
    rules: tuple[dict[str, Any], ...] | None = None
    """How it is watched; None until that is decided."""
    why_not: str = ""
    """Why it is watched less than it could be, or not at all."""
    _last: float | None = None

    def take(self, value: float, *, update: int, armed: bool) -> None:
        """Take in a reading."""
        self.count += 1
        if len(self.early) < YOUNG:
            self.early.append((update, value, armed))
        if not math.isfinite(value):
            self.strange = update if self.strange is None else self.strange
            return
        self.low, self.high = min(self.low, value), max(self.high, value)
        if self._last is not None:
            self.rise, self.fall = max(self.rise, value - self._last), max(self.fall, self._last - value)
        self._last = value

    @property
    def stands_still(self) -> bool:
        """Whether its first readings are mostly one value, so that it has no noise to measure by."""
        values = sorted(value for _, value, _ in self.early if math.isfinite(value))
        n = len(values)
        return n > 1 and values[n // 10] == values[9 * n // 10]


class Suggestion:
    """The rules that suit a run, as they become clear. Lives as long as the run is observed; fed update by update."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        """In the order in which they showed up."""
        self.panel: dict[str, Metric] = {}
        """What evaluations measured."""
        self.evaluations = 0
        self.updates = 0
        self.by_reward = False
        """Whether the trainer is one whose loss is a policy-gradient surrogate."""
        self.tools: dict[str, None] = {}
        """The names of the tools that it has, in the order in which they showed up."""
        self.tolerant = False
        """Whether a framework hands the metrics in, and knows itself which of them an update has none of."""
        self._awaited: Counter[str] = Counter()
        """How many updates had none of a metric that was never seen, and said so."""

    def take(
        self, readings: Mapping[str, float], *, update: int, armed: bool, absent: Collection[str] = ()
    ) -> list[Metric]:
        """Take in the readings of an update; gives the metrics of which it is now decided how to watch them."""
        self.updates += 1
        # By name, since that is the order in which a log holds them, and the rules stand in the order of the metrics.
        for name, value in sorted(readings.items()):
            if name not in self.metrics:
                missed = self._awaited[name] < self.updates - 1 and not self.tolerant
                self.metrics[name] = Metric(name, first=update, missed=missed)
            self.metrics[name].take(value, update=update, armed=armed)
        self._awaited.update(name for name in absent if name not in self.metrics)
        due = [metric for metric in self.metrics.values() if metric.rules is None]
        for metric in due:
            if metric.name not in readings and metric.name not in absent and not self.tolerant:
                metric.missed = True
        ready = [metric for metric in due if metric.count >= YOUNG]
        for metric in ready:
            metric.rules, metric.why_not = self._fitting(metric, self._taken())
        return ready

    def gave_up(self, readings: Mapping[str, float], *, absent: Collection[str] = ()) -> bool:
        """Whether metrics have stopped coming that never moved; from now on they are not watched.

        This can be taken back, for once: nothing could have tripped on one value, and of one that never moved the draft
        has no monitor that would miss it.
        """
        gone = [
            metric
            for name, metric in self.metrics.items()
            if metric.rules and name not in _ALWAYS and name not in readings and name not in absent
            if metric.low == metric.high
        ]
        for metric in gone:
            metric.rules, metric.why_not = (), _MISSED
        return bool(gone)

    def measured(self, panel: Mapping[str, float]) -> None:
        """Take in an evaluation."""
        self.evaluations += 1
        for name, value in panel.items():
            self.panel.setdefault(name, Metric(name, first=self.evaluations)).take(
                value, update=self.evaluations, armed=True
            )

    @property
    def calls_tools(self) -> bool:
        """Whether the run has tools: it said so, or its trainer reports on them."""
        return bool(self.tools) or any(name.startswith("tools/") for name in self.metrics)

    @property
    def loss_kind(self) -> LossKind:
        """Surrogate for a trainer that trains by reward, and where the loss was negative right from the start."""
        return "surrogate" if self.by_reward or self.negative_at is not None else "discrete"

    @property
    def negative_at(self) -> int | None:
        """The first update with a negative loss, among those that decide what kind of loss it is."""
        loss = self.metrics.get("loss")
        return next((at for at, value, _ in loss.early if value < -1e-6), None) if loss else None

    def rules(self) -> list[dict[str, Any]]:
        """The rules of the suggested policy, the loss and the gradient norm first."""
        return [rule for _, some, _ in self.plan() for rule in some]

    def plan(self) -> Iterator[tuple[Metric, Sequence[dict[str, Any]], str]]:
        """Of each metric how it should be watched, and why not more than that."""
        always = [self.metrics.get(name) or Metric(name, first=0) for name in ("loss", "grad_norm")]
        taken = self._taken()
        for metric in (*always, *(metric for name, metric in self.metrics.items() if name not in _ALWAYS)):
            rules, why = metric.rules, metric.why_not
            if rules is None:
                rules, why = self._fitting(metric, taken)
                taken += 0 if metric.name in _ALWAYS else len(rules)
            if metric.name == "grad_norm" and self.updates and not metric.count:
                yield metric, (), "no update had it; where one is no number, it is stopped all the same"
            elif metric.name not in _ALWAYS and metric.count > 1 and metric.low == metric.high:
                yield metric, (), f"it never moved: {metric.low:g} in each of {metric.count:,} updates"
            else:
                yield metric, [self._narrowed(rule, metric) for rule in rules], why

    def live(self) -> list[dict[str, Any]]:
        """The rules to judge the next update by: those that are decided, and what needs no history."""
        decided = {name: metric.rules for name, metric in self.metrics.items() if metric.rules is not None}
        always = [*(decided.get("loss") or (_bounds("loss"),)), *(decided.get("grad_norm") or ())]
        return [*always, *(rule for name, some in decided.items() if name not in _ALWAYS for rule in some)]

    def section(self, rules: Sequence[dict[str, Any]]) -> Updates:
        """The section `updates` of a guard policy with these rules."""
        young = "loss" not in self.metrics or self.metrics["loss"].rules is None
        # A negative loss is no fault while it is open which kind it is.
        kind = "density" if young and not self.by_reward else self.loss_kind
        return Updates.model_validate(
            {"loss_kind": kind, "false_alarm_every": FALSE_ALARM_EVERY, "monitors": tuple(rules)}
        )

    def _taken(self) -> int:
        """How many rules are decided, with those that the loss and the gradient norm may come to."""
        decided = (metric.rules or () for name, metric in self.metrics.items() if name not in _ALWAYS)
        return _KEPT_FREE + sum(map(len, decided))

    def _fitting(self, metric: Metric, taken: int) -> tuple[tuple[dict[str, Any], ...], str]:
        rules, why = self._watched(metric)
        if metric.name in _ALWAYS or taken + len(rules) <= _MOST_RULES:
            return rules, why
        return (), f"a policy holds {_MOST_RULES} monitors, and those before it took them"

    def _watched(self, metric: Metric) -> tuple[tuple[dict[str, Any], ...], str]:
        name = metric.name
        if name == "grad_norm" and metric.missed:
            return (), _MISSED
        if name == "grad_norm":
            return (_bounds(name),), "that of an honest run jumps now and then"
        if name == "loss":
            return self._loss(metric)
        if why := _never(metric):
            return (), why
        if metric.stands_still:
            return (_bounds(name),), "it stood still at first, and there is no noise to measure a jump by"
        if twin := self._twin(metric):
            return (), f"it is the same as {twin}"
        better = direction(name)
        if _GROWS.search(name.lower()):
            return (
                _bounds(name),
                _jump(name, better, min_change=3.0),
            ), "it grows in healthy runs, and its noise with it"
        if better == "none":
            return (_bounds(name), _jump(name, better, min_change=0.25), _rule("variance", name)), ""
        return (_bounds(name), _jump(name, better), _rule("drift", name, good=better), _rule("variance", name)), ""

    def _twin(self, metric: Metric) -> str:
        """A metric with the same first readings and a shorter name, or the empty string."""
        for other in self.metrics.values():
            shorter = (len(other.name), other.name) < (len(metric.name), metric.name)
            if shorter and other.early == metric.early and not _never(other):
                return other.name
        return ""

    def _loss(self, metric: Metric) -> tuple[tuple[dict[str, Any], ...], str]:
        bounds, variance = _bounds("loss"), _rule("variance", "loss")
        if metric.stands_still:
            return (bounds,), "it stood still at first, and there is no noise to measure a jump by"
        if self.by_reward:
            return (bounds, variance), "the loss of a policy gradient has no level that means anything"
        if self.loss_kind == "surrogate":
            return (bounds, _jump("loss", "none"), variance), ""
        return (bounds, _rule("jump", "loss"), _rule("drift", "loss"), variance), ""

    def _narrowed(self, rule: dict[str, Any], metric: Metric) -> dict[str, Any]:
        if rule["kind"] != "bounds" or metric.name == "loss" or not metric.low <= metric.high:
            return rule
        return {**rule, **domain(metric.name, low=metric.low, high=metric.high)}


_ALWAYS = ("loss", "grad_norm")
_MISSED = "not every update had it: hand it in with each, or name it in cycle.update(absent=...)"


def _never(metric: Metric) -> str:
    name = metric.name
    if not _NAME.fullmatch(name):
        return "a policy cannot name it: letters, digits, '_', '.', '/' and '-', at most 64"
    if why := idle(name):
        return why
    if metric.strange is not None:
        return f"it was not a number at update {metric.strange}"
    if metric.missed:
        return _MISSED
    if _BESIDE.search(name.lower()):
        return "it moves with others that say more"
    return ""


def _rule(kind: str, metric: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "metric": metric, **settings}


def _bounds(metric: str) -> dict[str, Any]:
    return _rule("bounds", metric, **({"min": 0} if metric == "grad_norm" else {}))


def _jump(metric: str, better: Good, **settings: Any) -> dict[str, Any]:
    return _rule("jump", metric, good=better, **settings)
