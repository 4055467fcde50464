"""May this optimizer step move the weights?"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from loopguard import monitors
from loopguard.errors import MonitorError
from loopguard.types import Decision, Signal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loopguard.policy.schema import Freeze, Updates

ROUNDING = -1e-6
"""A discrete log-loss may come out this far below zero by rounding alone (pytorch/pytorch#2866 saw -1e-12)."""


class UpdateGate:
    """Feeds the readings of each update to the monitors of a guard policy and decides about that update.

    One gate lives as long as a run; its state travels with the snapshots, so that a loop which goes back to a snapshot
    judges the next update as it would have judged it then.
    """

    def __init__(self, updates: Updates, freeze: Freeze) -> None:
        self._monitors = [_build(rule, loss_kind=updates.loss_kind) for rule in updates.monitors]
        self._skip = freeze.skip_at_most if freeze.on_trip == "skip" else None
        self._skipped_at: deque[int] = deque()

    def decide(self, readings: Mapping[str, float], *, update: int, armed: bool) -> Decision:
        """Judge one update.

        `readings` holds one value for each metric of this update. While not `armed` only the monitors that need no
        history can trip. A watched metric that is missing freezes. Raises MonitorError where a monitor fails.
        """
        signals = []
        for monitor in self._in_order():
            value = readings.get(monitor.metric)
            if value is None:
                return self._freeze(
                    f"missing:{monitor.metric}", f"no reading of {monitor.metric} at update {update}", ()
                )
            try:
                signal = monitor.read(value, at=update, armed=armed)
            except Exception as error:
                raise MonitorError(f"the monitor of {monitor.metric} failed at update {update}: {error!r}") from error
            if signal is None:
                continue
            if signal.level == "trip":
                return self._tripped(signal, update, immediate=monitor.immediate)
            signals.append(signal)
        return Decision(
            result="allow",
            gate="update",
            rule="default",
            reason="every monitor is quiet",
            signals=tuple(signals),
        )

    def _in_order(self) -> list[monitors.Monitor]:
        # Immediate monitors first: a value that is impossible never enters the statistics of the others.
        return sorted(self._monitors, key=lambda monitor: not monitor.immediate)

    def _tripped(self, signal: Signal, update: int, *, immediate: bool) -> Decision:
        if immediate and self._may_skip(update):
            self._skipped_at.append(update)
            return Decision(result="skip", gate="update", rule=_rule(signal), reason=signal.reason, signals=(signal,))
        return self._freeze(_rule(signal), signal.reason, (signal,), withheld_in_time=immediate)

    def _may_skip(self, update: int) -> bool:
        if self._skip is None:
            return False
        while self._skipped_at and self._skipped_at[0] <= update - self._skip.per:
            self._skipped_at.popleft()
        return len(self._skipped_at) < self._skip.updates

    def _freeze(
        self, rule: str, reason: str, signals: tuple[Signal, ...], *, withheld_in_time: bool = True
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
        return {"monitors": [m.state_dict() for m in self._monitors], "skipped_at": list(self._skipped_at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        for monitor, saved in zip(self._monitors, state["monitors"], strict=True):
            monitor.load_state_dict(saved)
        self._skipped_at = deque(state["skipped_at"])


def _build(rule: Any, *, loss_kind: str) -> monitors.Monitor:
    settings = rule.model_dump(exclude={"kind"})
    if rule.kind == "bounds" and rule.metric == "loss" and loss_kind == "discrete" and settings["min"] is None:
        settings["min"] = ROUNDING
    return monitors.build(rule.kind, **settings)


def _rule(signal: Signal) -> str:
    return f"{signal.monitor}:{signal.metric}"
