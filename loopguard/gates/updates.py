"""May this optimizer step move the weights?"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loopguard import monitors
from loopguard.errors import MonitorError
from loopguard.types import Decision, Expectation, Signal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loopguard.policy.schema import Freeze, Updates

ROUNDING = -1e-6
"""A discrete log-loss may come out this far below zero by rounding alone (pytorch/pytorch#2866 saw -1e-12)."""

OVERFLOW = Decision(
    result="allow",
    gate="update",
    rule="overflow",
    reason="the gradients do not fit into half precision: the scaler takes no step and lowers its scale",
)


class UpdateGate:
    """Feeds the readings of each update to the monitors of a guard policy and decides about that update.

    One gate lives as long as a run; its state travels with the snapshots, so that a loop which goes back to a snapshot
    judges the next update as it would have judged it then.
    """

    def __init__(self, updates: Updates, freeze: Freeze) -> None:
        rules = updates.monitors
        statistical = sum(rule.kind != "bounds" for rule in rules)
        # One rate for the run, shared: each of m monitors may cry wolf m times as seldom.
        every = float(updates.false_alarm_every * max(statistical, 1))
        self._named = {
            f"{rule.kind} {rule.metric}": _build(rule, loss_kind=updates.loss_kind, every=every) for rule in rules
        }
        self._optional: set[monitors.Monitor] = set()
        if "bounds grad_norm" not in self._named:
            # Whatever a policy leaves out: a gradient that is not a number never reaches the weights.
            self._named["bounds grad_norm"] = monitors.build("bounds", metric="grad_norm")
            self._optional.add(self._named["bounds grad_norm"])
        self._monitors = list(self._named.values())
        # Immediate monitors first: a value that is impossible never enters the statistics of the others.
        self._in_order = sorted(self._monitors, key=lambda monitor: not monitor.immediate)
        self._skip = freeze.skip_at_most if freeze.on_trip == "skip" else None
        self._skipped_at: deque[int] = deque()
        self._warnings: dict[str, Signal] = {}
        self._waived = ""

    def adjust(self, *, share: float, waived: str) -> None:
        """How strict the next decisions are: the share of their reach that trips monitors, and the rule that may not.

        Neither is part of the gate's state. A waived rule goes on being told of as a warning; what needs no history,
        such as a value that is not a number, cannot be waived.
        """
        for monitor in self._monitors:
            monitor.tighten(share)
        self._waived = waived

    def relearn(self, rule: str) -> None:
        """What a monitor tripped over was accepted by people: it is the new level."""
        for monitor in self._monitors:
            if f"{type(monitor).__name__.lower()}:{monitor.metric}" == rule:
                monitor.rebase()

    @property
    def skips(self) -> bool:
        """Whether an impossible value costs its batch, and not the run."""
        return self._skip is not None

    @property
    def holding(self) -> tuple[Signal, ...]:
        """Warnings of the last update that nothing should be promoted under."""
        return tuple(signal for signal in self._warnings.values() if signal.holds)

    def decide(
        self,
        readings: Mapping[str, float],
        *,
        update: int,
        armed: bool,
        absent: Collection[str] = (),
    ) -> Decision:
        """Judge one update.

        `readings` holds one value for each metric of this update. While not `armed` only the monitors that need no
        history can trip. A watched metric that is missing freezes, unless `absent` names it. Raises MonitorError where
        a monitor fails.
        """
        warnings: dict[str, Signal] = {}
        for monitor in self._in_order:
            value = readings.get(monitor.metric)
            if value is None:
                if monitor.metric in absent or monitor in self._optional:
                    continue
                return self._freeze(f"missing:{monitor.metric}", _missing(monitor.metric, update, readings))
            try:
                signal = monitor.read(value, at=update, armed=armed)
            except Exception as error:
                raise MonitorError(f"the monitor of {monitor.metric} failed at update {update}: {error!r}") from error
            if signal is None or signal.level == "ok":
                continue
            if _rule(signal) == self._waived and not (monitor.immediate or signal.at_once):
                signal = waived(signal)
            if signal.level == "warn":
                warnings[_rule(signal)] = signal
                continue
            # A trip, and whatever else a monitor might say: stop.
            return self._tripped(signal, update, immediate=monitor.immediate)
        self._warnings = warnings
        return Decision(
            result="allow",
            gate="update",
            rule="default",
            reason="every monitor is quiet" if not warnings else "no monitor is sure",
            signals=tuple(warnings.values()),
        )

    def skipped(self, update: int) -> None:
        """A batch was dropped, perhaps by another rank: it counts against the bound all the same."""
        if update not in self._skipped_at:
            self._skipped_at.append(update)

    def limits(self, *, armed: bool) -> dict[str, tuple[float | None, float | None]]:
        """For each metric the range outside of which the next value alone stops its update, as far as is known now.

        While not `armed` only the monitors that need no history have one.
        """
        ranges: dict[str, tuple[float | None, float | None]] = {}
        for monitor in self._monitors:
            low, high = monitor.limits() if armed or monitor.immediate else (None, None)
            lowest, highest = ranges.get(monitor.metric, (None, None))
            ranges[monitor.metric] = (_tighter(max, lowest, low), _tighter(min, highest, high))
        return ranges

    def expect(self, expected: Expectation) -> None:
        """Tell every monitor of an announced change."""
        for monitor in self._monitors:
            monitor.expect(expected)

    def _tripped(self, signal: Signal, update: int, *, immediate: bool) -> Decision:
        if immediate and self._may_skip(update):
            self._skipped_at.append(update)
            return Decision(result="skip", gate="update", rule=_rule(signal), reason=signal.reason, signals=(signal,))
        return self._freeze(_rule(signal), signal.reason, (signal,), withheld_in_time=signal.at_once)

    def _may_skip(self, update: int) -> bool:
        if self._skip is None:
            return False
        while self._skipped_at and self._skipped_at[0] <= update - self._skip.per:
            self._skipped_at.popleft()
        return len(self._skipped_at) < self._skip.updates

    def _freeze(
        self, rule: str, reason: str, signals: tuple[Signal, ...] = (), *, withheld_in_time: bool = True
    ) -> Decision:
        return Decision(
            result="freeze",
            gate="update",
            rule=rule,
            reason=reason,
            signals=signals,
            facts={"withheld_in_time": withheld_in_time},
        )

    def state_dict(self) -> dict[str, Any]:
        """What the monitors have seen, and which updates were skipped."""
        return {
            "monitors": {name: monitor.state_dict() for name, monitor in self._named.items()},
            "skipped_at": list(self._skipped_at),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there. A monitor that has no state there, or one of other settings, begins to learn."""
        monitors.restore(self._named, state["monitors"])
        self._skipped_at = deque(state["skipped_at"])
        self._warnings = {}


def waived(signal: Signal) -> Signal:
    """What becomes of a trip, or of a doubt, that people let pass."""
    return replace(signal, level="warn", holds=False, reason=f"waived: {signal.reason}")


def _build(rule: Any, *, loss_kind: str, every: float) -> monitors.Monitor:
    settings = rule.model_dump(exclude={"kind"})
    if "good" in settings:
        settings["good"] = rule.better
    if rule.kind == "bounds":
        if rule.metric == "loss" and loss_kind == "discrete" and settings["min"] is None:
            settings["min"] = ROUNDING
        return monitors.build("bounds", **settings)
    return monitors.build(rule.kind, every=every, **settings)


def _tighter(choose: Any, one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return float(choose(one, other))


def _missing(metric: str, update: int, readings: Collection[str]) -> str:
    there = ", ".join(sorted(readings)) or "nothing"
    return (
        f"no reading of {metric} at update {update}, and the guard policy watches it; reported were {there}. "
        "Correct the policy, or hand it in with cycle.update(readings=...)"
    )


def _rule(signal: Signal) -> str:
    return f"{signal.monitor}:{signal.metric}"
