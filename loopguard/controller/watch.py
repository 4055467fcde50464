"""Judge a run without stopping it: what its gate would have said of each update, had there been one.

Nothing in here writes or steps. A run is judged while it goes on or, with the same result, from its log afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopguard.audit.events import number
from loopguard.errors import MonitorError
from loopguard.gates.updates import UpdateGate
from loopguard.policy.schema import Freeze
from loopguard.policy.suggest import FALSE_ALARM_EVERY, Suggestion
from loopguard.types import Decision, Expectation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from loopguard.audit.events import Entry
    from loopguard.policy.suggest import Metric
    from loopguard.types import Signal

MOST_FINDINGS = 200
"""Freezes that are kept and recorded; more of them are counted."""

TYPES = (
    *("run.started", "model.attached", "cycle.started", "update.expected", "update.applied", "eval.finished"),
    *("tool.observed", "tool.decided"),
)
"""The records that a run is judged from, or that say what its policy needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An update that would have frozen the run. Of several in a row by one rule, the first."""

    update: int
    rule: str
    reason: str
    signals: tuple[Signal, ...] = ()

    @property
    def metric(self) -> str:
        """What tripped, or was missing."""
        return self.rule.partition(":")[2]


class Watch:
    """What a run has shown, and where it would have been frozen. One lives as long as one observation.

    It asks the very gate that the suggested policy makes. After a freeze that it foresees, the monitors of that metric
    begin to learn anew, so that the rest of the run can be judged; without that, a level that stays would trip for
    ever.
    """

    def __init__(self) -> None:
        self.seen = Suggestion()
        self.findings: list[Finding] = []
        self.repeats = 0
        """Updates that tripped by the same rule as the one before."""
        self.left_out = 0
        """Findings beyond those that are kept."""
        self.last = 0
        """The number of the last update."""
        self.cycle = 0
        """The number of the cycle that began last."""
        self._announced: list[Expectation] = []
        self._given_up: set[str] = set()
        """Metrics that were there and stopped coming: said once."""
        self._tripped: tuple[str, int] = ("", 0)
        self._gate = self._build()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Watch:
        """Judge a run from its records."""
        watch = cls()
        for entry in entries:
            watch.replay(entry)
        return watch

    def replay(self, entry: Entry) -> None:
        """Take in a record of the log; those that do not bear on the judgement change nothing."""
        body = entry.body
        match entry.type:
            case "run.started":
                self.begin()
            case "model.attached":
                self.attached(body)
            case "tool.observed" | "tool.decided":
                self.seen.tools[str(body["tool"])] = None
            case "cycle.started":
                self.cycle = entry.cycle or 0
            case "update.expected":
                self.expect(Expectation(kind=body["kind"], at=body["at"], span=body["span"]))
            case "update.applied":
                for update, readings in _updates(body):
                    self.take(readings, update=update, armed=self.cycle > 0, absent=body.get("absent", ()))
            case "eval.finished":
                self.measured(
                    {name: value for name, raw in body["panel"].items() if (value := number(raw)) is not None}
                )
            case _:
                return

    def attached(self, facts: Mapping[str, Any]) -> None:
        """Take in whose loop it is: `trainer` names the class of a framework's, `by_reward` says how it trains."""
        self.seen.tolerant = bool(facts.get("trainer"))
        by_reward = bool(facts.get("by_reward"))
        if by_reward != self.seen.by_reward:
            self.seen.by_reward = by_reward
            self._gate = self._build()

    def begin(self) -> None:
        """A process took the run up. Its weights need not be those of before, so every level is learned anew."""
        self._announced.clear()
        self._gate = self._build()

    def expect(self, expected: Expectation) -> None:
        """Take in an announced change."""
        self._announced.append(expected)
        self._gate.expect(expected)

    def measured(self, panel: Mapping[str, float]) -> None:
        """Take in an evaluation."""
        self.seen.measured(panel)

    def take(
        self, readings: Mapping[str, float], *, update: int, armed: bool, absent: Collection[str] = ()
    ) -> tuple[Decision, Finding | None]:
        """Judge one update; gives what the gate says, and the finding where it is a new one."""
        self.last = update
        absent = {*absent, *self._given_up}
        if self.seen.tolerant:
            absent |= self.seen.metrics.keys() - {"loss"}
        if self.seen.gave_up(readings, absent=absent):
            self._join([])
        try:
            decision = self._gate.decide(readings, update=update, armed=armed, absent=absent)
        except MonitorError as error:
            decision = Decision(result="freeze", gate="update", rule="monitor_error", reason=str(error))
        finding = None if decision.allowed else self._found(decision, update)
        if ready := self.seen.take(readings, update=update, armed=armed, absent=absent):
            self._join(ready)
        return decision, finding

    @property
    def expected_by_chance(self) -> float:
        """How many times a healthy run of this length freezes, as far as the monitors' calibration holds."""
        return self.seen.updates / FALSE_ALARM_EVERY

    def _found(self, decision: Decision, update: int) -> Finding | None:
        rule = decision.rule
        self._forget(rule)
        before, self._tripped = self._tripped, (rule, update)
        if before == (rule, update - 1):
            self.repeats += 1
            return None
        if len(self.findings) >= MOST_FINDINGS:
            self.left_out += 1
            return None
        finding = Finding(update=update, rule=rule, reason=decision.reason, signals=decision.signals)
        self.findings.append(finding)
        return finding

    def _forget(self, rule: str) -> None:
        """Let the monitors of the metric that tripped start over."""
        kind, _, metric = rule.partition(":")
        if kind == "missing":
            self._given_up.add(metric)
            return
        state = self._gate.state_dict()
        kept = {name: one for name, one in state["monitors"].items() if metric and name.partition(" ")[2] != metric}
        self._gate.load_state_dict({**state, "monitors": kept})

    def _build(self) -> UpdateGate:
        return UpdateGate(self.seen.section(self.seen.live()), Freeze())

    def _join(self, ready: list[Metric]) -> None:
        """Watch metrics of which it is now decided how, as if that had been so since their first reading."""
        before, self._gate = self._gate, self._build()
        names = {metric.name for metric in self.seen.metrics.values()}
        for expected in self._announced:
            self._gate.expect(expected)
        early: dict[int, tuple[dict[str, float], bool]] = {}
        for metric in ready:
            for update, value, armed in metric.early:
                early.setdefault(update, ({}, armed))[0][metric.name] = value
        for update, (readings, armed) in sorted(early.items()):
            # Whatever tripped was said when it came, and the loss and the norm may be of those that did not.
            self._gate.decide(readings, update=update, armed=armed, absent=names | {"loss", "grad_norm"})
        state = self._gate.state_dict()
        self._gate.load_state_dict({**state, "monitors": {**state["monitors"], **before.state_dict()["monitors"]}})


def _updates(body: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """The updates of a record, each with the readings that it had."""
    for offset in range(body["to"] - body["from"] + 1):
        values = ((name, number(column[offset])) for name, column in body["readings"].items())
        yield body["from"] + offset, {name: value for name, value in values if value is not None}
