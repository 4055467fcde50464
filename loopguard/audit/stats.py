"""A run in numbers: how often what happened, how much was refused, how long it stood still.

Reads once from front to back and keeps counts. Times are those that the log holds, so that the same log gives the same
numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.audit.query import whole
from loopguard.types import CONTAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from loopguard.audit.events import Entry

_COUNTED = {
    "update.withheld": "withheld",
    "update.skipped": "skipped",
    "promotion.applied": "promoted",
    "promotion.rolled_back": "rolled_back",
    "freeze.entered": "freezes",
    "freeze.foreseen": "foreseen",
    "resume.applied": "resumes",
    "tool.lost": "lost",
}


@dataclass(slots=True, kw_only=True)
class Stats:
    """What a log comes to. Fed record by record; good for one reading."""

    run: str = ""
    first: str = ""
    last: str = ""
    types: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    """Calls that the tool gate decided about."""
    refused: int = 0
    lost: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How the calls that ran came back, by status."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Refused calls, by the rule that refused them."""
    admitted: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """Records held back, by reason."""
    updates: int = 0
    """Updates that were applied, also those that were undone later."""
    withheld: int = 0
    skipped: int = 0
    overflows: int = 0
    promotions_asked: int = 0
    promoted: int = 0
    rolled_back: int = 0
    freezes: int = 0
    foreseen: int = 0
    resumes: int = 0
    frozen_s: float = 0.0
    """Time between a freeze and its resume, or the last record."""
    frozen_since: str | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Stats:
        """What these records come to."""
        stats = cls()
        for entry in entries:
            stats.feed(entry)
        return stats

    @property
    def span_s(self) -> float:
        """Seconds from the first record to the last."""
        return _seconds(self.first, self.last)

    @property
    def stood_still_s(self) -> float:
        """Seconds for which the run was frozen, up to the last record."""
        return self.frozen_s + (_seconds(self.frozen_since, self.last) if self.frozen_since else 0.0)

    @property
    def contained(self) -> int:
        """Calls that ran into a wall of the sandbox."""
        return sum(count for status, count in self.outcomes.items() if status in CONTAINED)

    def per_hour(self, count: int) -> float | None:
        """How many that is in an hour of the run; None where it lasted no time."""
        return count * 3600 / self.span_s if self.span_s > 0 else None

    def feed(self, entry: Entry) -> None:
        """Take in the next record."""
        body = entry.body
        self.run = entry.log.rpartition("/")[0]
        self.first, self.last = self.first or entry.ts, entry.ts
        self.types[entry.type] += 1
        if (name := _COUNTED.get(entry.type)) is not None:
            setattr(self, name, getattr(self, name) + 1)
        match entry.type:
            case "tool.decided":
                self._decided(body)
            case "tool.finished":
                self.outcomes[str(body.get("status"))] += 1
            case "data.admitted":
                self.admitted += whole(body.get("admitted"))
            case "data.quarantined":
                self.quarantined[str(body.get("reason"))] += whole(body.get("count"))
            case "update.applied":
                self.updates += whole(body.get("to")) - whole(body.get("from")) + 1
                self.overflows += whole(body.get("overflows"))
            case "update.overflowed":
                self.overflows += whole(body.get("count"))
            case "promotion.decided":
                self.promotions_asked += 1
            case "freeze.entered":
                self.frozen_since = self.frozen_since or entry.ts
            case "resume.applied" if self.frozen_since:
                self.frozen_s += _seconds(self.frozen_since, entry.ts)
                self.frozen_since = None
            case _:
                pass  # its type was counted

    def _decided(self, body: Mapping[str, Any]) -> None:
        self.calls += 1
        if body.get("result") != "allow":
            self.refused += 1
            self.refusals[str(body.get("rule"))] += 1

    def facts(self) -> dict[str, Any]:
        """For machines: JSON values only."""
        return {
            "run": self.run,
            "first": self.first,
            "last": self.last,
            "span_s": self.span_s,
            "records": self.types.total(),
            "types": {
                kind: {"count": count, "per_hour": self.per_hour(count)} for kind, count in sorted(self.types.items())
            },
            "calls": {
                "decided": self.calls,
                "allowed": self.calls - self.refused,
                "refused": self.refused,
                "refused_by_rule": dict(self.refusals),
                "outcomes": dict(self.outcomes),
                "contained": self.contained,
                "lost": self.lost,
            },
            "data": {"admitted": self.admitted, "quarantined": dict(self.quarantined)},
            "updates": {
                "applied": self.updates,
                "withheld": self.withheld,
                "skipped": self.skipped,
                "overflows": self.overflows,
            },
            "promotions": {
                "asked": self.promotions_asked,
                "applied": self.promoted,
                "rolled_back": self.rolled_back,
            },
            "freezes": {
                "entered": self.freezes,
                "resumed": self.resumes,
                "foreseen": self.foreseen,
                "frozen": self.frozen_since is not None,
                "frozen_s": self.stood_still_s,
            },
        }


def stats(run_dir: Path) -> Stats:
    """Count the controller's log of a run directory. UsageError where there is none."""
    return Stats.of(read.entries(run_dir))


def _seconds(first: str, last: str) -> float:
    """Between two times of a log; 0 where one is none, or they run backward."""
    try:
        return max(0.0, (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
