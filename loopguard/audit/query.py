"""What an audit log tells: the cycles, the freezes, and why each of them happened.

Reads once from front to back and keeps counts, not records. Whether the log can be believed is for `verify` to say.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit import pruned, read
from loopguard.audit.events import number, printable
from loopguard.consent.book import Book
from loopguard.errors import UsageError
from loopguard.types import CONTAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loopguard.audit.events import Entry

_MOST_CHARS = 320
"""Of a line of `why`: about four lines of a terminal. The log has the rest."""
_MOST_PEOPLE = 6


@dataclass(slots=True, kw_only=True)
class CycleTold:
    """One pass through a cycle. A cycle that was frozen and started again has several of them."""

    number: int
    attempt: int
    started: str
    calls: int = 0
    refused: int = 0
    lost: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How the calls that ran came back, by status."""
    proposed: int | None = None
    kept: int | None = None
    admitted: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """Records held back, by reason."""
    own_share: float | None = None
    first_update: int | None = None
    last_update: int | None = None
    updates: int = 0
    withheld: int = 0
    skipped: int = 0
    panel: dict[str, float] = field(default_factory=dict)
    decision: str = ""
    """What the promotion gate said; empty before it was asked."""
    result: str = "not finished"

    @property
    def contained(self) -> int:
        """Calls that ran into a wall of the sandbox."""
        return sum(count for status, count in self.outcomes.items() if status in CONTAINED)

    def facts(self) -> dict[str, Any]:
        """For machines: JSON values only."""
        names = (*self.__slots__, "contained")
        values = {name: getattr(self, name) for name in names}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}


@dataclass(slots=True, kw_only=True)
class Freeze:
    """One freeze, with what led to it and what ended it."""

    id: str
    entered: Entry
    promoted: Entry | None
    """The promotion of the actor that stays; None where nothing had been promoted."""
    cycle: CycleTold | None
    undone: tuple[int, int] | None
    """The updates that a restored snapshot took back."""
    resumed: Entry | None = None
    halted: Entry | None = None
    """What ended the run for good, where that was in this freeze."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The body of `freeze.entered`."""
        return self.entered.body

    @property
    def signal(self) -> Mapping[str, Any] | None:
        """The signal that tripped first."""
        signals = signals_of(self.body)
        return next((signal for signal in signals if signal.get("level") == "trip"), signals[0] if signals else None)

    @property
    def next(self) -> list[str]:
        """What the freeze says a person may do."""
        steps = self.body.get("next")
        return [str(step) for step in steps] if isinstance(steps, list) else []

    def facts(self) -> dict[str, Any]:
        """For machines: what the records hold."""
        ended = dict(self.resumed.body) | {"ts": self.resumed.ts} if self.resumed else None
        halted = dict(self.halted.body) | {"ts": self.halted.ts} if self.halted else None
        told = {"id": self.id, "ts": self.entered.ts, "cycle": self.entered.cycle, **self.body}
        return told | {"resumed": ended, "halted": halted}


class Story:
    """A run as its log tells it. Fed record by record; good for one reading."""

    def __init__(self) -> None:
        self.run = ""
        self.policy_name = ""
        self.policy = ""
        self.command: list[str] = []
        self.seed: Any = None
        self.first: Entry | None = None
        self.last: Entry | None = None
        self.cycles: list[CycleTold] = []
        self.freezes: list[Freeze] = []
        self._pruned = 0
        """Freezes among the records that were pruned, by what the log says of them."""
        self.book = Book()
        """Whose approvals a resume takes, and what waits for them."""
        self._ended = ""
        self._promoted: Entry | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Story:
        """The story that these records tell."""
        story = cls()
        for entry in entries:
            story.feed(entry)
        return story

    @property
    def frozen(self) -> Freeze | None:
        """The freeze in force."""
        return self.freezes[-1] if self.freezes and self.freezes[-1].resumed is None else None

    @property
    def pruned_freezes(self) -> int:
        """How many freezes there were in records that are gone."""
        return self._pruned if self.first is not None and self.first.seq > 1 else 0

    @property
    def unfrozen(self) -> str:
        """What a run did of which the log tells no freeze."""
        count = self.pruned_freezes
        times = "once" if count == 1 else f"{count:,} times"
        return f"froze {times} in records that were pruned, and not since" if count else "has never frozen"

    @property
    def state(self) -> str:
        """`frozen`, `halted`, `finished`, `interrupted` or `running`, which also a log says that ends in the middle."""
        if self.frozen is not None:
            return "halted" if self.frozen.halted else "frozen"
        return self._ended or "running"

    def feed(self, entry: Entry) -> None:
        """Take in the next record."""
        self.first = self.first or entry
        self.last = entry
        self.book.feed(entry)
        self.run = entry.log.rpartition("/")[0]
        self.policy = entry.policy
        body = entry.body
        match entry.type:
            case "policy.loaded":
                self.policy_name = str(body.get("name", ""))
            case pruned.RECORD:
                with contextlib.suppress(pruned.BadPrunedError):
                    self._pruned = pruned.Pruned.of(entry).state.freezes
            case "run.started":
                self._ended = ""
                command = body.get("command")
                self.command = [str(word) for word in command] if isinstance(command, list) else []
                self.seed = body.get("seed")
            case "run.finished" | "run.interrupted":
                self._ended = entry.type.removeprefix("run.")
            case "cycle.started":
                self._start(entry)
            case "freeze.entered":
                self._freeze(entry)
            case "resume.applied" if self.frozen and not self.frozen.halted:
                self.frozen.resumed = entry
            case "run.halted" if self.frozen:
                self.frozen.halted = entry
            case _:
                self._in_cycle(entry)

    def _start(self, entry: Entry) -> None:
        number = entry.cycle or 0
        attempt = 1 + sum(cycle.number == number for cycle in self.cycles)
        self.cycles.append(CycleTold(number=number, attempt=attempt, started=entry.ts))

    def _freeze(self, entry: Entry) -> None:
        if self.frozen and self.frozen.id == entry.body.get("freeze"):
            return  # said twice; the first word counts
        cycle = self._cycle_of(entry)
        undone = None
        if entry.body.get("restored") and cycle and cycle.first_update is not None and cycle.last_update is not None:
            undone = (cycle.first_update, cycle.last_update)
        freeze = str(entry.body.get("freeze", f"record-{entry.seq}"))
        self.freezes.append(Freeze(id=freeze, entered=entry, promoted=self._promoted, cycle=cycle, undone=undone))

    def _cycle_of(self, entry: Entry) -> CycleTold | None:
        """The pass a record belongs to; batches of updates do not say their cycle and belong to the one under way."""
        if not self.cycles:
            return None
        if entry.cycle is None:
            return self.cycles[-1]
        return next((cycle for cycle in reversed(self.cycles) if cycle.number == entry.cycle), None)

    def _in_cycle(self, entry: Entry) -> None:
        if entry.type == "promotion.applied":
            self._promoted = entry
        cycle = self._cycle_of(entry)
        if cycle is not None:
            _count(cycle, entry.type, entry.body)


def _count(cycle: CycleTold, kind: str, body: Mapping[str, Any]) -> None:
    match kind:
        case "tool.decided":
            cycle.calls += 1
            cycle.refused += body.get("result") != "allow"
        case "tool.finished":
            cycle.outcomes[str(body.get("status"))] += 1
        case "tool.lost":
            cycle.lost += 1
        case "data.admitted" | "data.refused":
            cycle.proposed = _sum(cycle.proposed, body.get("proposed"))
            cycle.kept = _sum(cycle.kept, body.get("kept"))
            cycle.admitted += whole(body.get("admitted")) if kind == "data.admitted" else 0
            cycle.own_share = number(body.get("own_share"))
        case "data.quarantined":
            cycle.quarantined[str(body.get("reason"))] += whole(body.get("count"))
        case "update.applied":
            first, last = whole(body.get("from")), whole(body.get("to"))
            cycle.first_update = first if cycle.first_update is None else cycle.first_update
            cycle.last_update = last
            cycle.updates += last - first + 1
        case "update.withheld":
            cycle.withheld += 1
        case "update.skipped":
            cycle.skipped += 1
        case "eval.finished":
            cycle.panel = panel_of(body)
        case "promotion.decided":
            cycle.decision = str(body.get("result"))
        case "cycle.finished":
            cycle.result = str(body.get("result"))
        case _:
            pass  # nothing to count


def _sum(so_far: int | None, more: Any) -> int | None:
    return so_far if more is None else (so_far or 0) + whole(more)


def whole(value: Any) -> int:
    """A recorded count; zero for what is none, since whether a record makes sense is not a reader's to say."""
    return value if type(value) is int else 0


def signals_of(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The signals in a record."""
    signals = body.get("signals")
    return [signal for signal in signals if isinstance(signal, dict)] if isinstance(signals, list) else []


def panel_of(body: Mapping[str, Any]) -> dict[str, float]:
    """The capability metrics in a record, by name."""
    panel = body.get("panel")
    if not isinstance(panel, dict):
        return {}
    return {name: value for name, raw in panel.items() if (value := number(raw)) is not None}


def story(run_dir: Path) -> Story:
    """Read the controller's log of a run directory. UsageError where there is none."""
    return Story.of(read.entries(run_dir))


def cycles(run_dir: Path) -> list[CycleTold]:
    """Every pass through a cycle, in the order of the log."""
    return story(run_dir).cycles


def freezes(run_dir: Path) -> list[Freeze]:
    """Every freeze, oldest first."""
    return story(run_dir).freezes


def why(run_dir: Path, freeze_id: str | None = None) -> str:
    """About a dozen lines that explain a freeze, the last one where none is named, to somebody who never saw the run.

    Raises UsageError for a freeze that the log does not have; the message names those that it has.
    """
    told = story(run_dir)
    return "\n".join(explain(_find(told, freeze_id, run_dir), str(run_dir), book=told.book))


def why_facts(run_dir: Path, freeze_id: str | None = None) -> dict[str, Any]:
    """What `why` says, for machines: the records, what was undone, which actor stays, and who may resume.

    Raises UsageError, as `why` does.
    """
    told = story(run_dir)
    freeze = _find(told, freeze_id, run_dir)
    promoted = freeze.promoted
    actor = {"cycle": promoted.cycle, "weights": promoted.body.get("actor")} if promoted is not None else None
    resume = None if freeze.resumed else _rule_facts(told.book)
    undone = list(freeze.undone) if freeze.undone else None
    passed = freeze.cycle.facts() if freeze.cycle else None
    return freeze.facts() | {"run": told.run, "undone": undone, "actor": actor, "pass": passed, "resume": resume}


def _rule_facts(book: Book) -> dict[str, Any]:
    rule, pending = book.rule, book.pending
    if rule is None:
        return {"approvals": 0, "people": [], "pending": None}
    waits = {"by": pending.statement.requester, "approved_by": pending.people} if pending is not None else None
    return {"approvals": rule.approvals, "people": sorted(rule.people), "pending": waits}


def _find(told: Story, freeze_id: str | None, run_dir: Path) -> Freeze:
    found = told.freezes
    if told.frozen is None and freeze_id is None and read.latched(run_dir):
        look = f"`loopguard status {shlex.quote(str(run_dir))}` says what the latch holds"
        raise UsageError(f"{run_dir} is latched, and no process has recorded the freeze yet: {look}")
    if not found:
        raise UsageError(f"{run_dir} {told.unfrozen}: its log holds no freeze to explain")
    if freeze_id is None:
        return found[-1]
    for freeze in found:
        if freeze.id == freeze_id:
            return freeze
    known = ", ".join(freeze.id for freeze in found)
    raise UsageError(f"{run_dir} has no freeze {printable(freeze_id)!r}; it has {printable(known)}")


def explain(freeze: Freeze, run_dir: str, *, book: Book) -> list[str]:
    """The lines of `why`; commands name the run directory as it is given here, `book` says who may resume."""
    body, folder = freeze.body, shlex.quote(run_dir)
    where = f"in cycle {freeze.entered.cycle}" if freeze.entered.cycle is not None else "outside a cycle"
    # What a log says is a stranger's word: in a command that somebody may paste it is one word.
    capsule = shlex.quote(f"{run_dir}/{body['capsule']}") if body.get("capsule") else ""
    rows = [
        ("", f"freeze {freeze.id}, {where}, at {when(freeze.entered.ts)}"),
        ("tripped", f"{body.get('gate')} gate, rule {body.get('rule')}: {body.get('reason')}"),
        ("value", value_told(freeze)),
        ("since", since_told(freeze)),
        ("before it", before_told(freeze)),
        ("weights", weights_told(freeze)),
        ("actor", actor_told(freeze)),
        ("evidence", capsule),
        ("replay", f"loopguard reproduce {capsule} -m MODULE" if capsule else ""),
        ("resumed", resumed_told(freeze)),
        ("halted", halted_told(freeze)),
        *([] if freeze.resumed or freeze.halted else _ways_on(freeze, folder, book)),
    ]
    return [_line(label, text) for label, text in rows if text]


def _line(label: str, text: str) -> str:
    """One line, short enough that a dozen of them stay on a screen, and safe to show."""
    shown = printable(text)
    cut = shown if len(shown) <= _MOST_CHARS else f"{shown[:_MOST_CHARS]}... (cut; the log has all of it)"
    return f"{label:<9} {cut}" if label else cut


def _ways_on(freeze: Freeze, folder: str, book: Book) -> list[tuple[str, str]]:
    """What a resume goes back to, who may say so, and with which commands."""
    asks = f"loopguard resume {folder} --by NAME --reason TEXT"
    approves = f"loopguard approve {folder} --key FILE"
    rows = [("goes back", back_told(freeze)), ("who", who_told(book)), ("look", f"loopguard audit report {folder}")]
    if book.rule is None:
        return [*rows, ("go on", asks)]
    return [*rows, ("go on", approves if book.pending is not None else f"{asks}, then {approves}")]


def back_told(freeze: Freeze) -> str:
    """What the run goes on from, once somebody resumes it, or went on from since somebody did."""
    way = freeze.resumed.body.get("disposition") if freeze.resumed is not None else "rollback"
    if way == "accept":
        return f"a resume goes on from the state at {freeze.id}"
    again = f"; cycle {freeze.entered.cycle} begins again" if freeze.entered.cycle is not None else ""
    if way == "discard":
        again = f"; cycle {freeze.entered.cycle} is passed over" if again else ""
    if freeze.promoted is None:
        return f"a resume goes on from the state that the run began with{again}"
    return f"a resume goes on from what was promoted in cycle {freeze.promoted.cycle}{again}"


def who_told(book: Book) -> str:
    """Whose word it takes to let the run go on, and who has given it."""
    rule, pending = book.rule, book.pending
    if rule is None:
        return "anybody with a name and a reason; nothing resumes by itself"
    names = sorted(rule.people)
    more = f" and {len(names) - _MOST_PEOPLE} more" if len(names) > _MOST_PEOPLE else ""
    told = f"{rule.approvals} of {', '.join(names[:_MOST_PEOPLE]) or 'nobody'}{more} have to sign"
    told += "" if rule.requester_may_approve else "; whoever asks does not count"
    if pending is None:
        return told
    given = f"approved by {' and '.join(pending.people)}" if pending.people else "approved by nobody yet"
    return f"{told}; {pending.statement.requester} asked, {given}"


def value_told(freeze: Freeze) -> str:
    """The value that tripped against the range that was expected, and by how much; empty where no monitor spoke."""
    signal = freeze.signal
    if signal is None:
        return ""
    score = number(signal.get("score"))
    by = f" (score {amount(score)})" if score is not None else ""
    far = f", {margin}" if (margin := margin_told(signal)) else ""
    return f"{signal.get('metric')} {amount(signal.get('value'))}, expected {expected(signal)}{by}{far}"


def margin_told(signal: Mapping[str, Any]) -> str:
    """How far a value lies outside of its expected range; empty where it does not, or where that is no number."""
    value, low, high = (number(signal.get(key)) for key in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return ""
    if low is not None and value < low:
        return f"{amount(low - value)} too low"
    return f"{amount(value - high)} too high" if high is not None and value > high else ""


def expected(signal: Mapping[str, Any]) -> str:
    """The range a signal's monitor expected."""
    low, high = signal.get("low"), signal.get("high")
    if low is not None and high is not None:
        return f"{amount(low)} to {amount(high)}"
    if low is not None:
        return f"at least {amount(low)}"
    return f"at most {amount(high)}" if high is not None else "a finite number"


def since_told(freeze: Freeze) -> str:
    """Since which update it looks wrong."""
    since = (freeze.signal or {}).get("since")
    update = freeze.body.get("update")
    if since is not None and since != update:
        return f"update {since} looks wrong first" + (f"; update {update} tripped" if update is not None else "")
    return f"update {update} tripped" if update is not None else ""


def before_told(freeze: Freeze) -> str:
    """What the cycle had done until then."""
    cycle = freeze.cycle
    if cycle is None:
        return ""
    calls = f"{cycle.calls:,} calls ({cycle.refused:,} refused, {cycle.contained:,} contained)"
    data = f"{cycle.admitted:,} records admitted, {sum(cycle.quarantined.values()):,} quarantined"
    return f"{calls}, {data}, {cycle.updates:,} updates"


def weights_told(freeze: Freeze) -> str:
    """What happened to the weights."""
    body, parts = freeze.body, []
    if body.get("gate") == "update" and body.get("update") is not None:
        parts.append(f"update {body['update']} was withheld")
    if body.get("restored"):
        if freeze.undone:
            first, last = freeze.undone
            parts.append(f"updates {first}-{last} were undone")
        parts.append(f"weights are back at snapshot {short(body['restored'])}")
    elif parts and freeze.cycle and freeze.cycle.last_update is not None:
        parts.append(f"weights stay as after update {freeze.cycle.last_update}")
    return ", ".join(parts) or "no update was stopped or undone: weights are as they were"


def actor_told(freeze: Freeze) -> str:
    """Which actor stays."""
    promoted = freeze.promoted
    if promoted is None:
        return "nothing was promoted yet: the actor is the one the run began with"
    return f"that of cycle {promoted.cycle} stays (weights {short(promoted.body.get('actor'))})"


def resumed_told(freeze: Freeze) -> str:
    """Who let the loop go on, when and why; empty while it is frozen."""
    entry = freeze.resumed
    if entry is None:
        return ""
    lasted = duration(freeze.entered.ts, entry.ts)
    told = f"by {entry.body.get('by')} after {lasted}: {entry.body.get('reason')} ({entry.body.get('disposition')})"
    if entry.body.get("waives_cycles"):
        told += f", {entry.body.get('waives')} waived for {amount(entry.body.get('waives_cycles'))} cycles"
    people = approved_by(entry)
    return f"{told}, approved by {' and '.join(people)}" if people else told


def halted_told(freeze: Freeze) -> str:
    """Who or what ended the run for good, and why; empty where nobody did."""
    entry = freeze.halted
    if entry is None:
        return ""
    told = (
        f"for good by {entry.body.get('by')} after {duration(freeze.entered.ts, entry.ts)}: {entry.body.get('reason')}"
    )
    people = approved_by(entry)
    return f"{told}, approved by {' and '.join(people)}" if people else told


def approved_by(entry: Entry) -> list[str]:
    """Who approved a resume; empty where one name was enough."""
    given = entry.body.get("approvals")
    return [str(each.get("person")) for each in given if isinstance(each, dict)] if isinstance(given, list) else []


def amount(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    parsed = number(value)
    return printable(str(value)) if parsed is None else f"{parsed:.4g}"


def short(digest: Any) -> str:
    """The first characters of a digest, enough to tell it from its neighbours."""
    return printable(str(digest))[:12]


def when(ts: str) -> str:
    """A record's time for people, in UTC and whole seconds."""
    return f"{ts[:10]} {ts[11:19]} UTC"


def duration(first: str, last: str) -> str:
    """The time between two records."""
    try:
        seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    except ValueError:
        return "an unknown time"
    return lasting(seconds)


def lasting(seconds: float) -> str:
    """A time span as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
