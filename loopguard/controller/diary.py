"""The audit log of a run that is observed: written like any other, and never a reason to stop.

Here the log is not the permission to act, so nothing waits for it. Readings are written in batches, every 64 updates or
ten seconds, whichever comes first; a process that is killed loses the batch at hand, and a machine that loses its power
what the system had not written yet.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from loopguard.errors import AuditError
from loopguard.state import signal_facts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from loopguard.audit.log import AuditLog
    from loopguard.types import Signal

_LEASE = 64
_MOST_READINGS = 4000
"""In one record, whose body holds 256 KiB."""
_BATCH_S = 10.0
_NOTES = 50


class Diary:
    """Keeps the account of one observed run. The first failure is said on standard error, and kept in `trouble`."""

    def __init__(self, log: AuditLog, *, quiet: bool) -> None:
        self.trouble = ""
        """Why the log is incomplete, or the empty string."""
        self._log = log
        self._quiet = quiet
        self._leased_to = 0
        self._entered: list[tuple[int, Mapping[str, float]]] = []
        self._count = 0
        self._absent: set[str] = set()
        self._notes: list[dict[str, Any]] = []
        self._unnoted = 0
        self._overflows = 0
        self._since = time.monotonic()

    def write(self, kind: str, body: Mapping[str, Any], *, cycle: int | None = None, sync: bool = False) -> None:
        """Write a record behind all that was entered, as far as the disk takes it."""
        self.flush()
        self._append(kind, body, cycle=cycle, sync=sync)

    def enter(
        self,
        update: int,
        readings: Mapping[str, float],
        *,
        absent: Collection[str] = (),
        signals: Iterable[Signal] = (),
    ) -> None:
        """An update was applied."""
        if update > self._leased_to:
            self.flush()
            # The permission of a guard. Here it allows nothing, and says which updates a log that breaks off may lack.
            self._leased_to = update + _LEASE - 1
            self._append("update.leased", {"from": update, "to": self._leased_to})
        self._entered.append((update, readings))
        self._count += len(readings)
        self._absent.update(absent)
        for signal in signals:
            if len(self._notes) < _NOTES:
                self._notes.append(signal_facts(signal))
            else:
                self._unnoted += 1
        if self._count >= _MOST_READINGS or time.monotonic() - self._since >= _BATCH_S:
            self.flush()

    def overflowed(self) -> None:
        """A gradient scaler took no step."""
        self._overflows += 1

    def flush(self) -> None:
        """Write what was entered. A metric that an update had none of is null there."""
        self._since = time.monotonic()
        entered, overflows = self._entered, self._overflows
        if not entered:
            if overflows:
                self._overflows = 0
                self._append("update.overflowed", {"count": overflows})
            return
        names = dict.fromkeys(name for _, readings in entered for name in readings)
        body = {
            "from": entered[0][0],
            "to": entered[-1][0],
            "readings": {name: [readings.get(name) for _, readings in entered] for name in names},
            "notes": self._notes,
            "notes_left_out": self._unnoted,
            "overflows": overflows,
        }
        if self._absent:
            body["absent"] = sorted(self._absent)
        self._entered, self._notes, self._absent = [], [], set()
        self._count = self._unnoted = self._overflows = 0
        self._append("update.applied", body)

    def close(self, end: str | None, body: Mapping[str, Any]) -> None:
        """End the log, with a last record where there is one to write.

        The space that a log keeps free for a last record is left alone where the disk failed: taking it would set aside
        the readings that were not synced yet, and they are worth more here than the word that the run has ended.
        """
        self.flush()
        if end is not None:
            self._append(end, body, sync=True)
        with contextlib.suppress(AuditError, OSError):
            self._log.close()

    def _append(self, kind: str, body: Mapping[str, Any], *, cycle: int | None = None, sync: bool = False) -> None:
        if self._log.degraded:
            return
        try:
            self._log.append(kind, body, cycle=cycle, sync=sync)
        except (AuditError, OSError) as error:
            self._failed(str(error).partition(". Nothing goes on")[0])

    def _failed(self, why: str) -> None:
        if self.trouble:
            return
        self.trouble = why
        if not self._quiet:
            sys.stderr.write(f"loopguard: {why}; the run goes on, and its audit log is incomplete from here\n")
