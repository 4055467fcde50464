"""May these weights become the actor of the next cycle?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from loopguard import monitors
from loopguard.errors import MonitorError
from loopguard.gates.updates import waived
from loopguard.types import Decision, Signal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loopguard.policy.schema import PanelMetric, Promotion


class PromotionGate:
    """Compares the panel of a candidate with the panel of the last promoted weights, upwards as well as downwards.

    A gain beyond what the policy allows in one cycle freezes the loop just as a loss does: a capability that appears
    at once is either a bug or something that a person should look at before it acts. Where a metric is a share of a
    number of problems, evidence that it has got worse is gathered over cycles as well, since a loss that each cycle may
    have adds up.

    One gate lives as long as a run; its state travels with the snapshots.
    """

    def __init__(self, promotion: Promotion) -> None:
        self._share = 1.0
        self._waived = ""
        self._metrics = {metric.metric: metric for metric in promotion.panel}
        counted = [metric for metric in promotion.panel if metric.problem_count is not None]
        self._monitors = {
            metric.metric: monitors.build(
                "eprocess",
                metric=metric.metric,
                good=metric.good,
                problems=metric.problem_count,
                every=float(promotion.false_alarm_every * len(counted)),
            )
            for metric in counted
        }

    def adjust(self, *, share: float, waived: str) -> None:
        """How strict the next decisions are: this share of every change that is allowed, and a rule that trips nothing.

        Neither is part of the gate's state. A value outside of its domain cannot be waived.
        """
        self._share, self._waived = share, waived
        for monitor in self._monitors.values():
            monitor.tighten(share)

    def relearn(self, rule: str) -> None:
        """What a monitor tripped over was accepted by people: it is the new level."""
        for metric, monitor in self._monitors.items():
            if f"eprocess:{metric}" == rule:
                monitor.rebase()

    def decide(self, panel: Mapping[str, float], *, previous: Mapping[str, float] | None, cycle: int) -> Decision:
        """Judge a panel. Without a `previous` one (the first promotion of a run) only the domains are checked.

        A deny means that evidence of a loss is there and not yet enough. Raises MonitorError where a monitor fails.
        """
        missing = sorted(self._metrics.keys() - panel.keys())
        unknown = sorted(panel.keys() - self._metrics.keys())
        if missing:
            return _freeze("missing", f"the panel lacks {', '.join(missing)}")
        if unknown:
            return _freeze("unknown", f"the guard policy does not know {', '.join(unknown)}: add it to promotion.panel")
        signals = [
            self._pass(_judge(metric, panel[name], previous, self._share)) for name, metric in self._metrics.items()
        ]
        if not any(signal.level == "trip" for signal in signals):
            # A value outside of its domain is no evidence of anything, so these come second.
            signals += map(self._pass, self._evidence(panel, cycle))
        if trips := tuple(signal for signal in signals if signal.level == "trip"):
            return _freeze(f"{trips[0].monitor}:{trips[0].metric}", "; ".join(s.reason for s in trips), trips)
        if holding := tuple(signal for signal in signals if signal.holds):
            return held(holding)
        if all(signal.level in ("ok", "warn") for signal in signals):
            reason = (
                "the first panel of the run" if previous is None else "every metric moved less than the policy allows"
            )
            if waives := [signal.reason for signal in signals if self._is_waived(signal)]:
                reason = "; ".join(waives)
            return Decision(result="allow", gate="promotion", rule="panel", reason=reason)
        return _freeze("unjudged", "a metric of the panel could not be judged", tuple(signals))

    def _pass(self, signal: Signal) -> Signal:
        return waived(signal) if self._is_waived(signal) and signal.level != "ok" else signal

    def _is_waived(self, signal: Signal) -> bool:
        return (
            self._waived == f"{signal.monitor}:{signal.metric}" and signal.level != "ok" and signal.monitor != "domain"
        )

    def _evidence(self, panel: Mapping[str, float], cycle: int) -> list[Signal]:
        found = []
        for monitor in self._monitors.values():
            try:
                signal = monitor.read(panel[monitor.metric], at=cycle)
            except Exception as error:
                raise MonitorError(f"the monitor of {monitor.metric} failed at cycle {cycle}: {error!r}") from error
            if signal is not None:
                found.append(signal)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the monitors have seen."""
        return {"monitors": {name: monitor.state_dict() for name, monitor in self._monitors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there. A monitor that has no state there, or one of other settings, begins to learn."""
        monitors.restore(self._monitors, state["monitors"])


def held(holding: tuple[Signal, ...]) -> Decision:
    """Not sure enough to freeze, and too doubtful to act on: the last promoted actor stays for another cycle."""
    reason = "; ".join(signal.reason for signal in holding)
    return Decision(result="deny", gate="promotion", rule="held", reason=reason, signals=holding)


def _judge(rule: PanelMetric, value: float, previous: Mapping[str, float] | None, share: float) -> Signal:
    if not math.isfinite(value):
        return _trip("domain", rule, value, None, None, None, f"{rule.metric} is {value}, not a finite number")
    if (rule.min is not None and value < rule.min) or (rule.max is not None and value > rule.max):
        reason = f"{rule.metric} is {value:.4g}, outside its domain"
        return _trip("domain", rule, value, rule.min, rule.max, None, reason)
    if previous is None:
        return Signal(level="ok", monitor="change", metric=rule.metric, value=value, at=0)
    old = previous.get(rule.metric)
    if old is None:
        return _trip("change", rule, value, None, None, None, f"{rule.metric} has no value at the last promotion")
    up, down = (rule.max_loss, rule.max_gain) if rule.good == "down" else (rule.max_gain, rule.max_loss)
    up, down = share * up, share * down
    low, high = old - down, old + up
    if low <= value <= high:
        return Signal(level="ok", monitor="change", metric=rule.metric, value=value, at=0, low=low, high=high)
    direction: Literal["up", "down"] = "up" if value > old else "down"
    word = "moved" if rule.good == "none" else "gained" if direction == rule.good else "lost"
    limit = up if direction == "up" else down
    reason = (
        f"{rule.metric} {word} {abs(value - old):.3g} in one cycle, from {old:.4g} to {value:.4g}; "
        f"the policy allows {limit:.3g}{' in probation' if share < 1 else ''}"
    )
    return _trip("change", rule, value, low, high, direction, reason)


def _trip(
    monitor: str,
    rule: PanelMetric,
    value: float,
    low: float | None,
    high: float | None,
    direction: Literal["up", "down"] | None,
    reason: str,
) -> Signal:
    return Signal(
        level="trip",
        monitor=monitor,
        metric=rule.metric,
        value=value,
        at=0,
        low=low,
        high=high,
        direction=direction,
        reason=reason,
    )


def _freeze(rule: str, reason: str, signals: tuple[Signal, ...] = ()) -> Decision:
    return Decision(result="freeze", gate="promotion", rule=rule, reason=reason, signals=signals)
