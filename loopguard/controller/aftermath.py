"""What a resume leaves behind: cycles that are not begun again, a waived rule, a probation, a state to go on from.

All of it follows from the log, so that a loop that is started again stands where one that waited does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.types import NOTHING, WayOn
from loopguard.ways import accepted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loopguard.audit.events import Entry
    from loopguard.policy.schema import Freeze

TYPES = (
    *("cycle.started", "freeze.entered", "resume.applied", "promotion.applied", "promotion.settled"),
    *("promotion.rolled_back", "probation.began", "probation.ended"),
)
_BY_ITSELF = frozenset({"tool", "data", "update", "promotion"})
"""The gates whose freezes use up the budget. Those of people, of a disk and of a start are nobody's habit."""


class Aftermath:
    """Where a run stands between its resumes. Lives as long as its guard."""

    def __init__(self, freeze: Freeze) -> None:
        self._policy = freeze
        self.over = -1
        """The last cycle that is passed over."""
        self.owed: tuple[str, WayOn] | None = None
        """A freeze whose disposition no learner has heard of yet, or has to hear of again after a start."""
        self.probation = 0
        """How many cycles it still lasts."""
        self.told = False
        """Whether the log says that it began."""
        self._frozen: tuple[str, int | None] = ("", None)
        self._waived = (NOTHING, -1)
        self._cycle = 0
        self._open: int | None = None
        """The cycle that began and was not promoted: what a freeze is about that no gate brought about."""
        self._before: tuple[int, tuple[str, WayOn] | None, int] | None = None
        """What the last promotion changed, and which cycle's that was: it may not have reached the disk."""
        self._itself = False
        """Whether the last freeze is one that uses up the budget."""
        self._freezes: list[int] = []

    @classmethod
    def of(cls, entries: Iterable[Entry], freeze: Freeze) -> Aftermath:
        """Read the log of a run."""
        found = cls(freeze)
        for entry in entries:
            found._take(entry)
        return found

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case "cycle.started" if entry.cycle is not None:
                self.begin(entry.cycle)
            case "freeze.entered":
                self.froze(str(body["freeze"]), gate=str(body.get("gate")), cycle=entry.cycle)
            case "resume.applied":
                self.resumed(WayOn.read(body))
            case "promotion.applied":
                self._count_promoted()  # whether that ends a probation is what the log says
            case "promotion.settled" if not body["applied"] and entry.cycle is not None:
                self.unpromoted(entry.cycle)
            case "promotion.rolled_back":
                self._went_back(int(body["cycle"]))
            case "probation.began":
                self.told, self.probation = True, int(body["cycles"]) if self._policy.probation else 0
            case "probation.ended":
                self.told = False
            case _:
                return

    def facts(self) -> dict[str, Any]:
        """All of it, for another rank: its own log may lack what happened while it was not there."""
        return {name: value for name, value in vars(self).items() if name != "_policy"}

    def load(self, facts: dict[str, Any]) -> None:
        """Stand where rank 0 stands."""
        vars(self).update(facts)

    def begin(self, cycle: int) -> None:
        """A cycle begins."""
        self._cycle = self._open = cycle

    def froze(self, freeze: str, *, gate: str, cycle: int | None) -> None:
        """A freeze was recorded."""
        self._frozen, self._before = (freeze, self._open if cycle is None else cycle), None
        self.probation, self.told = 0, False
        self._itself = gate in _BY_ITSELF
        if self._itself:
            self._freezes.append(self._cycle if cycle is None else cycle)

    def resumed(self, way: WayOn) -> None:
        """The last freeze is lifted."""
        freeze, cycle = self._frozen
        if way.disposition == "discard" and cycle is not None:
            self.over = max(self.over, cycle)
        begins = max(self.over + 1, self._cycle + (self._open is None))
        cycles = min(way.waives_cycles, self._policy.waive_at_most)
        self._waived = (way.waives, begins + cycles - 1) if cycles else (NOTHING, -1)
        self.owed = (freeze, way) if way.disposition in ("accept", "discard") else None
        self.probation = self._policy.probation.cycles if self._policy.probation else 0
        self.told = False

    def promoted(self) -> bool:
        """A cycle was promoted; says whether that ends a probation."""
        self._count_promoted()
        return self.ends()

    def unpromoted(self, cycle: int) -> None:
        """The promotion of this cycle did not reach the disk: all is as before it, but for what the log says."""
        if self._before is not None and self._before[0] == cycle:
            self._open, self.owed, self.probation = self._before
            self._before = None

    def ends(self) -> bool:
        """Whether the log has to say that a probation ended; asked once, since it is told then."""
        ended = self.told and not self.probation
        self.told = self.told and not ended
        return ended

    def _count_promoted(self) -> None:
        self._before = self._cycle, self.owed, self.probation
        self.owed = None  # from here on it is the promoted state that the run goes on from
        self.probation = max(0, self.probation - 1)
        self._open = None

    def _went_back(self, cycle: int) -> None:
        """A person went back to an earlier promotion: what was decided about later cycles is about none that comes."""
        self._cycle, self._open = cycle, None
        self.owed, self._before, self.over, self._waived = None, None, -1, (NOTHING, -1)

    @property
    def cycle(self) -> int:
        """The cycle at hand, or the last one."""
        return self._cycle

    @property
    def spent(self) -> str:
        """Why the run may not be let go on any more, in one sentence; the empty string where it may."""
        budget = self._policy.halt_above
        if budget is None or not self._itself:
            return ""
        lately = sum(cycle > self._cycle - budget.cycles for cycle in self._freezes)
        if lately <= budget.freezes:
            return ""
        return (
            f"the run froze {lately} times within {budget.cycles} cycles, and the guard policy stops it for good above "
            f"{budget.freezes}"
        )

    @property
    def strictness(self) -> tuple[float, str]:
        """For the cycle at hand: which share of every reach is enough for a trip, and which rule trips nothing."""
        share = self._policy.probation.tighten if self._policy.probation and self.probation else 1.0
        rule, until = self._waived
        return share, rule if self._cycle <= until else ""


def counts(gate: str, cycle: int, *, now: int, policy: Freeze) -> bool:
    """Whether a freeze at this gate, in this cycle, uses up the budget of a run that has come to cycle `now`."""
    budget = policy.halt_above
    return budget is not None and gate in _BY_ITSELF and cycle > now - budget.cycles


def suspect_state(run_dir: Path, freeze: str) -> tuple[str, Any]:
    """The state at a freeze, and its name. Raises UsageError where it cannot be gone on with."""
    told = [one for one in read.entries(run_dir, types=("freeze.entered",)) if one.body.get("freeze") == freeze]
    capsule = accepted(run_dir, told[-1].body if told else {"freeze": freeze})
    return str(capsule.suspect), capsule.suspect_state()
