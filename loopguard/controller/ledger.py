"""Which updates may be applied, and which were, with their readings: the audit log's account of the optimizer.

Permission comes first and is durable: one record, a lease, permits the next few updates, since one sync for each would
cost more than the guard. Results follow in batches. What a crash leaves between the two is settled by the next start.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from loopguard.state import signal_facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopguard.audit.log import AuditLog
    from loopguard.types import Signal

_NOTES = 100
"""Warnings of monitors that one record holds; more of them are counted."""


class Ledger:
    """The account of one run's updates. Lives as long as its guard; `last` goes back with a rollback."""

    def __init__(self, log: AuditLog, *, lease: int, last: int) -> None:
        self.last = last
        """The number of the last update."""
        self._log = log
        self._lease = lease
        self._leased_to = 0
        self._entered: list[tuple[int, dict[str, float]]] = []
        self._notes: list[dict[str, Any]] = []
        self._overflows = 0

    def permit(self, update: int, *, cycle: int) -> None:
        """Have it on disk that this update may be applied. Raises AuditWriteError; then it must not be."""
        if update > self._leased_to:
            self.flush()
            to = update + self._lease - 1
            self._log.append("update.leased", {"from": update, "to": to}, cycle=cycle)
            self._leased_to = to

    def end_lease(self) -> None:
        """Later updates need a lease of their own; a lease ends with its cycle."""
        self._leased_to = self.last

    def go_to(self, update: int) -> None:
        """The run stands at this update again."""
        self.last = self._leased_to = update

    def enter(self, update: int, readings: dict[str, float], signals: Iterable[Signal] = ()) -> None:
        """An update was applied. It is durable with the next control record."""
        self.last = update
        self._entered.append((update, readings))
        self._notes.extend(signal_facts(signal) for signal in signals)

    def enter_overflow(self) -> None:
        """A gradient scaler took no step, and no number was used up."""
        self._overflows += 1

    def flush(self) -> None:
        """Record what was entered since the last time."""
        if not self._entered:
            if self._overflows:
                self._log.append("update.overflowed", {"count": self._overflows}, sync=False)
                self._overflows = 0
            return
        readings: dict[str, list[float]] = defaultdict(list)
        for _, values in self._entered:
            for metric, value in values.items():
                readings[metric].append(value)
        body: dict[str, Any] = {
            "from": self._entered[0][0],
            "to": self._entered[-1][0],
            "readings": dict(readings),
            "notes": self._notes[:_NOTES],
            "notes_left_out": max(0, len(self._notes) - _NOTES),
            "overflows": self._overflows,
        }
        self._entered.clear()
        self._notes.clear()
        self._overflows = 0
        self._log.append("update.applied", body, sync=False)
