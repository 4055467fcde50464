"""Write `report.html`: one file that a person can open years later, without a network and without a script.

The same log gives the same bytes, wherever its folder lies: no time of writing, no path, no random id. Every text in it
was written by somebody else, perhaps by the model, and is escaped twice over: control and bidirectional characters by
us, HTML by jinja2.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from loopguard.audit import blobs, query, read, redact
from loopguard.audit.events import number, printable
from loopguard.audit.verify import OK, UNANCHORED, WARN, Verification, verify
from loopguard.errors import AuditTamperedError
from loopguard.types import CONTAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from loopguard.audit.events import Entry

MOST_POINTS = 2000
_MOST_CURVES = 8
_MOST_EXAMPLES = 12
_MOST_FORESEEN = 50
_MOST_CHECKPOINTS = 12
_MOST_ROLLBACKS = 40
_CODE_CHARS = 120

_CHART = (960.0, 200.0)
_SMALL = (250.0, 112.0)

Point = tuple[float, float]


def write_report(
    run_dir: Path,
    *,
    keys: Sequence[str] = (),
    anchors: Sequence[Path] = (),
    expect_head: str | None = None,
    without_payloads: bool = False,
) -> Path:
    """Verify the log, read it, and write `report.html` into the run directory. Gives its path.

    `keys`, `anchors`, `expect_head` and `without_payloads` are as `verify` takes them. A log that was altered gives a
    report too: up to the damage, and with the damage on top. UsageError where there is no log, or for keys and anchors
    that are none.
    """
    path = Path(run_dir) / "report.html"
    partial = path.with_name(".report.html")
    page = render(Path(run_dir), keys=keys, anchors=anchors, expect_head=expect_head, without_payloads=without_payloads)
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)  # noqa: PTH105 - the one call whose name says that a reader never sees half of it
    return path


def render(
    run_dir: Path,
    *,
    keys: Sequence[str] = (),
    anchors: Sequence[Path] = (),
    expect_head: str | None = None,
    without_payloads: bool = False,
) -> str:
    """The report as text. `keys`, `anchors`, `expect_head` and `without_payloads` are as `verify` takes them."""
    told = _Told(None if without_payloads else blobs.Reader(run_dir, handed_on=True))
    cut = told.read(read.entries(run_dir))
    verified = verify(run_dir, keys=keys, anchors=anchors, expect_head=expect_head, without_payloads=without_payloads)
    template = _environment().get_template("report.html.j2")
    return template.render(view=_View(told, verified, run_dir, cut))


@functools.cache
def clauses() -> list[Mapping[str, str]]:
    """The clause map: which records may serve as evidence for which clause, each with a version and a date."""
    found: list[Mapping[str, str]] = json.loads(Path(__file__).with_name("clauses.json").read_bytes())["clauses"]
    return found


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"amount": query.amount, "short": query.short, "when": query.when}
    environment.filters["sentence"] = _sentence
    return environment


def _shown(value: Any) -> Any:
    """What an expression of the template prints: text of strangers without its tricks."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return printable(value)
    return value


def _sentence(text: str) -> str:
    """Text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Curve:
    """The readings of one metric, in the order of the log."""

    kept: list[list[Point]] = field(default_factory=list)
    undone: list[list[Point]] = field(default_factory=list)
    withheld: list[Point] = field(default_factory=list)
    open: list[Point] = field(default_factory=list)
    """Since the last promotion; a restored snapshot would undo these."""

    def settle(self, *, kept: bool) -> None:
        if self.open:
            (self.kept if kept else self.undone).append(self.open)
            self.open = []


@dataclass(slots=True)
class _Example:
    """Calls that ended alike, with one of them to look at."""

    how: str
    count: int = 0
    code: str = ""
    cycle: int | None = None


@dataclass(slots=True)
class _Tool:
    """How the calls of one tool ended."""

    allowed: int = 0
    refused: int = 0
    contained: int = 0
    lost: int = 0


class _Told:
    """The story of a run and what the charts need beside it."""

    def __init__(self, payloads: blobs.Reader | None) -> None:
        self.story = query.Story()
        self.curves: defaultdict[str, _Curve] = defaultdict(_Curve)
        self.panels: list[tuple[int, dict[str, float], bool]] = []
        self.starts: list[tuple[float, int]] = []
        self.freezes: list[tuple[float, query.Freeze]] = []
        self.observed = False
        """Whether the run was only watched."""
        self.foreseen: list[Mapping[str, Any]] = []
        """Where it would have frozen then: what the log says of each."""
        self.examples: dict[str, _Example] = {}
        self.people: list[Entry] = []
        self.promotions: list[tuple[float, str]] = []
        """Where the actor changed, and how."""
        self.rollbacks: list[Entry] = []
        self.checkpoints: deque[Entry] = deque(maxlen=_MOST_CHECKPOINTS)
        """The last ones that the framework saved or loaded: a trainer saves hundreds."""
        self.all_checkpoints = 0
        self.tools: defaultdict[str, _Tool] = defaultdict(_Tool)
        self._update = 0
        self._codes: dict[str, tuple[str, _Code]] = {}
        """Tool and code of the calls under way."""
        self._payloads = payloads
        """What lies apart; None where it is left out."""

    def read(self, entries: Iterable[Entry]) -> str:
        """Take in all records; where one was altered, stop there and say so."""
        try:
            for entry in entries:
                self.feed(entry)
        except AuditTamperedError as error:
            return str(error)
        finally:
            for curve in self.curves.values():
                curve.settle(kept=True)
        return ""

    def feed(self, entry: Entry) -> None:
        self.story.feed(entry)
        body = entry.body
        match entry.type:
            case "run.started":
                self.observed = body.get("mode") == "observe"
            case "freeze.foreseen":
                self.foreseen.append(body)
            case "eval.finished" if self.observed:
                self.panels.append((entry.cycle or 0, query.panel_of(body), True))
            case "cycle.started":
                self.starts.append((self._update + 0.5, entry.cycle or 0))
            case "update.applied":
                self._applied(body)
            case "update.withheld":
                self._withheld(body)
            case "promotion.decided":
                self.panels.append((entry.cycle or 0, query.panel_of(body), body.get("result") == "allow"))
            case "promotion.applied":
                self._settle(kept=True)
                self.promotions.append((self._update, f"cycle {entry.cycle} was promoted"))
            case "promotion.rolled_back":
                self.promotions.append((self._update, f"{body.get('by')} went back to cycle {body.get('cycle')}"))
                self.rollbacks.append(entry)
            case "checkpoint.saved" | "checkpoint.loaded":
                self.checkpoints.append(entry)
                self.all_checkpoints += 1
            case "snapshot.restored" | "update.settled" | "promotion.settled":
                self._restored(entry)
            case "freeze.entered":
                at = number(body.get("update"))
                self.freezes.append((self._update if at is None else at, self.story.freezes[-1]))
            case "tool.decided" | "tool.finished" | "tool.lost":
                self._call(entry)
            case (
                "resume.applied"
                | "approval.given"
                | "policy.adopted"
                | "freeze.requested"
                | "note.added"
                | "blob.erased"
            ):
                self.people.append(entry)
            case _:
                pass  # the story has it

    def _restored(self, entry: Entry) -> None:
        self.rollbacks.append(entry)
        if entry.type != "promotion.settled":
            self._settle(kept=False)

    def _settle(self, *, kept: bool) -> None:
        for curve in self.curves.values():
            curve.settle(kept=kept)

    def _applied(self, body: Mapping[str, Any]) -> None:
        first = query.whole(body.get("from"))
        self._update = query.whole(body.get("to"))
        for metric, values in _lists(body.get("readings")):
            points = ((first + step, value) for step, value in enumerate(values))
            self.curves[metric].open += [(at, value) for at, value in points if math.isfinite(value)]

    def _withheld(self, body: Mapping[str, Any]) -> None:
        at = number(body.get("update"))
        for metric, values in _lists(body.get("readings")):
            self.curves[metric].withheld += [(at or 0, value) for value in values]

    def _call(self, entry: Entry) -> None:
        body = entry.body
        call = str(body.get("call"))
        if entry.type == "tool.decided":
            tool, code = str(body.get("tool")), _Code.of(entry)
            if body.get("result") == "allow":
                self.tools[tool].allowed += 1
                self._codes[call] = tool, code
                return
            self.tools[tool].refused += 1
            how = f"refused by {body.get('rule')}: {body.get('reason')}"
        else:
            tool, code = self._codes.pop(call, ("unknown", _Code()))
            status = str(body.get("status"))
            if entry.type == "tool.lost":
                self.tools[tool].lost += 1
                how = f"lost: {body.get('reason')}"
            elif status in CONTAINED:
                self.tools[tool].contained += 1
                how = f"contained: {status}"
            else:
                return
        if how not in self.examples:
            self.examples[how] = _Example(how, code=code.text(self._payloads), cycle=entry.cycle)
        self.examples[how].count += 1


@dataclass(frozen=True, slots=True)
class _Code:
    """The code of a call as its record has it."""

    head: str = ""
    commitment: str = ""
    """Where it lies apart; it is looked up for those that are shown alone."""

    @classmethod
    def of(cls, entry: Entry) -> _Code:
        apart = [one.commitment for one in blobs.named(entry) if one.member == "code"]
        return cls(str(entry.body.get("code_head", "")), *apart)

    def text(self, payloads: blobs.Reader | None) -> str:
        """What a report quotes. It is handed on, so that secrets that lie apart stay there."""
        if not self.commitment:
            return self.head[:_CODE_CHARS]
        if payloads is None:
            return "(left out)"
        return redact.head(payloads.text(self.commitment, most=redact.WINDOW_CHARS))[0][:_CODE_CHARS]


def _lists(readings: Any) -> Iterator[tuple[str, list[float]]]:
    """Readings by metric; a single value is a list of one, what is no number is NaN and drawn as such."""
    if not isinstance(readings, dict):
        return
    for metric, raw in readings.items():
        values = raw if isinstance(raw, list) else [raw]
        yield metric, [math.nan if (value := number(item)) is None else value for item in values]


# -- drawing -----------------------------------------------------------------------------------------------------------


def thin(points: Sequence[Point], *, most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, with the lowest and the highest of each stretch kept where they were."""
    if len(points) <= most:
        return list(points)
    buckets = most // 2
    kept: list[Point] = []
    for bucket in range(buckets):
        stretch = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round values between two ends, for an axis."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= raw)
    first = math.ceil(low / step - 1e-9)
    return [(first + count) * step for count in range(most + 2) if (first + count) * step <= high + step * 1e-9]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values lie on a drawing. SVG counts down from the top."""

    left: float
    right: float
    top: float
    bottom: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        span = self.high_x - self.low_x or 1.0
        return round(self.left + (value - self.low_x) / span * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        span = self.high_y - self.low_y or 1.0
        share = min(1.0, max(0.0, (value - self.low_y) / span))
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def path(self, points: Sequence[Point]) -> str:
        placed = [f"{self.x(x):g} {self.y(y):g}" for x, y in points]
        # A single point still shows, as a line of no length with round ends.
        return f"M{'L'.join(placed if len(placed) > 1 else placed * 2)}"

    def holds(self, value: float) -> bool:
        return self.low_y <= value <= self.high_y


@dataclass(frozen=True, slots=True)
class Mark:
    """A sign on a drawing, with what it says when pointed at."""

    x: float
    y: float
    text: str
    kind: str = ""
    y2: float = 0.0


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing in numbers; the template gives it colours."""

    name: str
    width: float
    height: float
    frame: _Frame
    last: str
    kept: tuple[str, ...]
    undone: tuple[str, ...]
    marks: tuple[Mark, ...]
    ranges: tuple[Mark, ...]
    freezes: tuple[Mark, ...]
    cycles: tuple[Mark, ...]
    promotions: tuple[Mark, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]


def _curve_chart(name: str, curve: _Curve, told: _Told) -> Chart:
    width, height = _CHART
    kept = [point for stretch in curve.kept for point in stretch]
    undone = [point for stretch in curve.undone for point in stretch]
    everything = kept + undone or [(at, 0.0) for at, _ in curve.withheld]
    low, high = _range(kept or undone, undone + curve.withheld)
    edge = [x for x, _ in everything] + [x for x, _ in curve.withheld]
    frame = _Frame(56, width - 14, 22, height - 24, min(edge), max(edge), low, high)
    share = max(1, len(everything))
    return Chart(
        name=name,
        width=width,
        height=height,
        frame=frame,
        last=query.amount(kept[-1][1]) if kept else "",
        kept=tuple(_paths(frame, _joined(curve.kept), share)),
        undone=tuple(_paths(frame, curve.undone, share)),
        marks=tuple(_withheld_mark(frame, x, y) for x, y in curve.withheld),
        ranges=tuple(_range_marks(frame, name, told)),
        freezes=(
            *(Mark(frame.x(x), frame.top, freeze.id) for x, freeze in told.freezes if x >= frame.low_x),
            *_foreseen_marks(frame, name, told.foreseen),
        ),
        cycles=tuple(_cycle_marks(frame, told.starts)),
        promotions=tuple(_promotion_marks(frame, told.promotions)),
        x_ticks=tuple(Mark(frame.x(x), frame.bottom, f"{x:,.0f}") for x in ticks(frame.low_x, frame.high_x, most=8)),
        y_ticks=tuple(Mark(frame.left, frame.y(y), f"{y:.4g}") for y in ticks(low, high, most=6)),
    )


def _joined(stretches: Sequence[list[Point]]) -> list[list[Point]]:
    """Stretches that follow one another, as one line each."""
    lines: list[list[Point]] = []
    for stretch in stretches:
        if lines and lines[-1][-1][0] < stretch[0][0]:
            lines[-1] = lines[-1] + stretch
        else:
            lines.append(stretch)
    return lines


def _paths(frame: _Frame, stretches: Sequence[list[Point]], total: int) -> Iterator[str]:
    for stretch in stretches:
        most = max(4, MOST_POINTS * len(stretch) // total)
        yield frame.path(thin(stretch, most=most))


def _range(main: Sequence[Point], others: Sequence[Point]) -> tuple[float, float]:
    """What the vertical axis shows: all that was kept, and the rest as far as it does not squash it."""
    values = [y for _, y in main] or [0.0]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    near = [y for _, y in others if math.isfinite(y) and low - span <= y <= high + span]
    low, high = min([low, *near]), max([high, *near])
    pad = ((high - low) or span) * 0.06
    return low - pad, high + pad


def _withheld_mark(frame: _Frame, x: float, y: float) -> Mark:
    text = f"withheld: {query.amount(y)} at update {x:,.0f}"
    if math.isfinite(y):
        inside = frame.holds(y)
        return Mark(frame.x(x), frame.y(y), text if inside else f"{text} (off this scale)", "in" if inside else "off")
    return Mark(frame.x(x), frame.top + 6, text, "off")


def _foreseen_marks(frame: _Frame, metric: str, foreseen: Sequence[Mapping[str, Any]]) -> Iterator[Mark]:
    """The first freeze that would have been, on every curve, and of the others those of this metric."""
    for count, body in enumerate(foreseen[:_MOST_FORESEEN]):
        if count == 0 or str(body.get("rule")).partition(":")[2] == metric:
            yield Mark(frame.x(number(body.get("update")) or 0), frame.top, "would freeze" if count == 0 else "")


def _range_marks(frame: _Frame, metric: str, told: _Told) -> Iterator[Mark]:
    """The range that was expected where a freeze tripped on this metric; an open one would only cover the freeze."""
    foreseen = ((number(body.get("update")) or 0, body) for body in told.foreseen[:_MOST_FORESEEN])
    for x, body in (*((x, freeze.body) for x, freeze in told.freezes), *foreseen):
        for signal in query.signals_of(body):
            if signal.get("metric") != metric:
                continue
            low, high = number(signal.get("low")), number(signal.get("high"))
            if low is not None and high is not None:
                yield Mark(frame.x(x), frame.y(high), f"expected {query.expected(signal)}", y2=frame.y(low))
            break


def _cycle_marks(frame: _Frame, starts: Sequence[tuple[float, int]]) -> Iterator[Mark]:
    shown = -math.inf
    for at, cycle in starts:
        x = frame.x(max(at, frame.low_x))
        if at <= frame.high_x and x - shown >= 22:
            yield Mark(x, frame.top, str(cycle))
            shown = x


def _promotion_marks(frame: _Frame, promotions: Sequence[tuple[float, str]]) -> Iterator[Mark]:
    shown = -math.inf
    for at, text in promotions:
        x = frame.x(min(max(at, frame.low_x), frame.high_x))
        if x - shown >= 6:
            yield Mark(x, frame.bottom, text)
            shown = x


def _panel_chart(name: str, told: _Told) -> Chart:
    width, height = _SMALL
    points = [(cycle, panel[name], ok) for cycle, panel, ok in told.panels if name in panel]
    finite = [(float(cycle), value) for cycle, value, _ in points if math.isfinite(value)]
    promoted = [(float(cycle), value) for cycle, value, ok in points if ok and math.isfinite(value)]
    low, high = _range(finite, ())
    cycles = [cycle for cycle, _, _ in told.panels]
    frame = _Frame(46, width - 12, 12, height - 22, min(cycles), max(cycles), low, high)
    marks = (
        Mark(frame.x(cycle), frame.y(value), f"cycle {cycle}: {query.amount(value)}", "ok" if ok else "no")
        for cycle, value, ok in points
    )
    return Chart(
        name=name,
        width=width,
        height=height,
        frame=frame,
        last=query.amount(promoted[-1][1]) if promoted else "",
        kept=(frame.path(promoted),) if promoted else (),
        undone=(),
        marks=tuple(marks),
        ranges=(),
        freezes=(),
        cycles=(),
        promotions=(),
        x_ticks=tuple(
            Mark(frame.x(x), frame.bottom, f"{x:g}") for x in ticks(frame.low_x, frame.high_x) if x == int(x)
        ),
        y_ticks=tuple(Mark(frame.left, frame.y(y), f"{y:.3g}") for y in ticks(low, high, most=5)),
    )


# -- what the template sees --------------------------------------------------------------------------------------------


class _View:
    """Everything that the template prints, ready to print."""

    def __init__(self, told: _Told, verification: Verification, run_dir: Path, cut: str) -> None:
        self.told = told
        self.story = told.story
        self.verification = verification
        self._run_dir = run_dir
        self.findings = [without(run_dir, text) for text in verification.findings]
        self.notes = [without(run_dir, text) for text in verification.notes]
        self.cut = without(run_dir, cut)
        self.mood = _mood(verification.code)
        # Beside the log on purpose: a latch that nobody acknowledged yet freezes too.
        self.latched = read.latched(run_dir) and self.story.frozen is None
        self.state = "frozen" if self.latched else self.story.state

    @property
    def totals(self) -> list[tuple[str, str, str]]:
        """(label, value, mood) of the tiles."""
        cycles = self.story.cycles
        promoted = sum(cycle.result == "promoted" for cycle in cycles)
        refused, contained = sum(cycle.refused for cycle in cycles), sum(cycle.contained for cycle in cycles)
        waiting = self.story.frozen is not None
        return [
            ("promoted cycles", f"{promoted:,}", ""),
            ("updates applied", f"{sum(cycle.updates for cycle in cycles):,}", ""),
            ("tool calls", f"{sum(cycle.calls for cycle in cycles):,}", ""),
            ("refused", f"{refused:,}", ""),
            ("contained", f"{contained:,}", ""),
            ("quarantined", f"{sum(sum(cycle.quarantined.values()) for cycle in cycles):,}", ""),
            ("freezes", f"{len(self.story.freezes):,}", "bad" if waiting else ""),
            *([("pruned freezes", f"{gone:,}", "")] if (gone := self.story.pruned_freezes) else []),
            *([("foreseen freezes", f"{len(self.told.foreseen):,}", "")] if self.told.observed else []),
        ]

    @property
    def foreseen(self) -> list[tuple[str, str, str, str]]:
        """(update, rule, reason, value and expected range) of each freeze that would have been, oldest first."""
        rows = []
        for body in self.told.foreseen[:_MOST_FORESEEN]:
            signal = next(iter(query.signals_of(body)), None)
            value = f"{query.amount(signal.get('value'))}, expected {query.expected(signal)}" if signal else ""
            rows.append((query.amount(body.get("update")), str(body.get("rule")), str(body.get("reason")), value))
        return rows

    @property
    def curves(self) -> list[Chart]:
        """Loss and gradient norm first, then the others by name."""
        known = {"loss": 0, "grad_norm": 1}
        names = sorted(self.told.curves, key=lambda name: (known.get(name, 2), name))
        drawn = [name for name in names if _drawable(self.told.curves[name])]
        return [_curve_chart(name, self.told.curves[name], self.told) for name in drawn[:_MOST_CURVES]]

    @property
    def panels(self) -> list[Chart]:
        """One small chart for each capability metric."""
        names = sorted({name for _, panel, _ in self.told.panels for name in panel})
        return [_panel_chart(name, self.told) for name in names]

    @property
    def panel_names(self) -> list[str]:
        """The columns of the table of cycles."""
        return sorted({name for cycle in self.story.cycles for name in cycle.panel})

    @property
    def freezes(self) -> list[query.Freeze]:
        """The newest first."""
        return list(reversed(self.story.freezes))

    def rows(self, freeze: query.Freeze) -> list[tuple[str, str]]:
        """The lines of a freeze's card."""
        rows = [
            ("value", query.value_told(freeze)),
            ("since", query.since_told(freeze)),
            ("before it", query.before_told(freeze)),
            ("weights", query.weights_told(freeze)),
            ("actor", query.actor_told(freeze)),
            ("evidence", self._evidence(freeze)),
            ("frozen for", self._frozen_for(freeze)),
            *self._ended(freeze),
            ("approvals", self._approved(freeze)),
        ]
        return [(label, text) for label, text in rows if text]

    def _ended(self, freeze: query.Freeze) -> list[tuple[str, str]]:
        if freeze.halted:
            return [("halted", query.halted_told(freeze))]
        back = query.back_told(freeze).removeprefix("a resume goes on ")
        if freeze.resumed is None:
            return [("goes back", back)]
        return [("resumed", query.resumed_told(freeze)), ("went on", back)]

    def _evidence(self, freeze: query.Freeze) -> str:
        capsule, trouble = freeze.body.get("capsule"), freeze.body.get("capsule_trouble")
        told = f"capsule {capsule}, to be replayed with loopguard reproduce" if capsule else ""
        return told or (f"no capsule: {trouble}" if trouble else "")

    def _frozen_for(self, freeze: query.Freeze) -> str:
        if freeze.resumed:
            return query.duration(freeze.entered.ts, freeze.resumed.ts)
        last = self.story.last
        if freeze.halted:
            return "for good"
        return f"{query.duration(freeze.entered.ts, last.ts)} when the log ends, and not resumed" if last else ""

    def _approved(self, freeze: query.Freeze) -> str:
        """Who signed a resume, or the end, and with which keys; before it, who has to."""
        ended = freeze.resumed or freeze.halted
        if ended is None:
            return f"nobody yet: {query.who_told(self.story.book)}"
        if ended.body.get("because") == "budget":
            return ""
        given = ended.body.get("approvals")
        signed = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
        names = [f"{each.get('person')} (key {each.get('key')})" for each in signed]
        return " and ".join(names) or "no approvals: one name and a reason were enough"

    @property
    def clauses(self) -> list[Mapping[str, str]]:
        """The clause map, as it came with this version."""
        return clauses()

    @property
    def trusted(self) -> list[tuple[str, list[str]]]:
        """What the verification rests on, by kind; nothing where nothing was given."""
        anchors = [without(self._run_dir, anchor) for anchor in self.verification.anchors]
        return [("keys trusted", self.verification.keys), ("anchors trusted", anchors)]

    @property
    def rollbacks(self) -> list[tuple[Entry, str, str]]:
        """(record, to what, why) of each time that weights went back, the newest first."""
        return [_rollback(entry) for entry in reversed(self.told.rollbacks[-_MOST_ROLLBACKS:])]

    @property
    def tools(self) -> list[tuple[str, _Tool]]:
        """By name; a tool that was only ever refused is among them."""
        return sorted(self.told.tools.items())

    @property
    def statuses(self) -> list[str]:
        """Every way in which calls came back, the good one first."""
        seen = {status for cycle in self.story.cycles for status in cycle.outcomes}
        return sorted(seen, key=lambda status: (status != "ok", status in CONTAINED, status))

    def bar(self, cycle: query.CycleTold) -> list[tuple[str, str, float]]:
        """(status, mood, percent) of one cycle's calls."""
        parts = [(status, _status_mood(status), cycle.outcomes[status]) for status in self.statuses]
        parts.append(("refused", "bad", cycle.refused))
        total = sum(count for _, _, count in parts)
        return [(name, mood, round(100 * count / total, 2)) for name, mood, count in parts if count]

    @property
    def examples(self) -> list[_Example]:
        """The most frequent ways in which calls were stopped."""
        ranked = sorted(self.told.examples.values(), key=lambda example: (-example.count, example.how))
        return ranked[:_MOST_EXAMPLES]

    @property
    def quarantine(self) -> list[tuple[str, int, str]]:
        """(reason, records, cycles) of what was held back."""
        counts: Counter[str] = Counter()
        cycles: defaultdict[str, list[int]] = defaultdict(list)
        for cycle in self.story.cycles:
            counts.update(cycle.quarantined)
            for reason in cycle.quarantined:
                cycles[reason].append(cycle.number)
        return [(reason, count, _spans(cycles[reason])) for reason, count in sorted(counts.items(), key=_by_count)]

    def person(self, entry: Entry) -> tuple[str, str, str]:
        """(who, did what, said what) of a record that a person caused."""
        body = entry.body
        who = str(body.get("by") or entry.actor.get("id", ""))
        did = entry.type.replace(".", " ")
        if entry.type == "policy.adopted":
            approved = ", approved" if body.get("approved") else ""
            return (
                who,
                did,
                f"{query.short(body.get('from'))} to {query.short(body.get('to'))}, {body.get('change')}{approved}",
            )
        if entry.type == "approval.given":
            return who, did, f"with key {body.get('key')}"
        return who, did, str(body.get("reason") or body.get("text") or "")


def _rollback(entry: Entry) -> tuple[Entry, str, str]:
    body = entry.body
    match entry.type:
        case "promotion.rolled_back":
            back = f"snapshot {query.short(body.get('to'))} of cycle {body.get('cycle')}"
            return entry, back, f"{body.get('by')}: {body.get('reason')}"
        case "update.settled":
            span = f"updates {body.get('from')}-{body.get('to')} were permitted, and a crash left no record of them"
            return entry, f"snapshot {query.short(body.get('restored'))}", span
        case "promotion.settled":
            done = "completed" if body.get("applied") else "undone"
            return (
                entry,
                f"snapshot {query.short(body.get('snapshot'))}",
                f"a promotion that a crash had cut was {done}",
            )
        case _:
            return entry, f"snapshot {query.short(body.get('snapshot'))}", str(body.get("because"))


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _drawable(curve: _Curve) -> bool:
    return bool(curve.kept or curve.undone or curve.withheld)


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    ordered = sorted(set(numbers))
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _status_mood(status: str) -> str:
    if status == "ok":
        return "good"
    return "bad" if status in CONTAINED else "warn"


def _mood(code: int) -> str:
    if code == OK:
        return "good"
    return "warn" if code in {WARN, UNANCHORED} else "bad"


def without(run_dir: Path, text: str) -> str:
    """A finding without the place of the folder, so that a copy gives the same report."""
    return text.replace(f"{run_dir}/", "")
