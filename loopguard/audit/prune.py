"""Remove the front of a log: which of it may go, the record that stands for it, and the removal itself.

Whole closed segments go, oldest first, and never a record that the run still rests on. In this order, so that a crash
costs nothing: `log.pruned` is on disk and in a checkpoint; its line is on disk beside the log; then the files go. The
next start of the log finishes what a crash left. Who may ask for it, and for how much, is not decided here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loopguard.audit import read, segments
from loopguard.audit.compress import sync_folder
from loopguard.audit.events import BadLineError, Entry, Head, decode, encode, fields_of
from loopguard.audit.pruned import FILE, RECORD, Pruned, State
from loopguard.audit.tree import Tree
from loopguard.audit.verify import Grammar
from loopguard.consent.book import Book
from loopguard.errors import AuditTamperedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loopguard.audit.log import AuditLog
    from loopguard.audit.pruned import Front

_RESTED_ON = (
    *("policy.loaded", "run.started", "model.attached", "cycle.started", "update.leased"),
    *("promotion.decided", "promotion.applied", "probation.began"),
)
"""Of each of these the last one stays: the next start reads there what it goes on from."""
_MOST_CALLS = 1000
"""In flight behind the last record that goes; more of them would not fit into a record."""
_MOST_SEGMENTS = 2000
"""At once, for the same reason; whoever has more asks again."""
_LOUD = "a freeze, a request or a change of policy was under way there, or too many calls were in flight"
_MANY = f"no more than {_MOST_SEGMENTS:,} segments go at once: prune again"
_TORN = re.compile(r"torn-\d{12}(-\d+)?\.bin", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What of one stream can go."""

    stream: str
    body: dict[str, Any] | None
    """What the record will say, but by whom and why; None where nothing can go."""
    held: str
    """Why no more can go although it is old enough; the empty string where all that is can."""
    kept: int = 0
    """How many records are left."""

    @property
    def records(self) -> int:
        """How many records go."""
        return self.body["through"] - self.body["from"] + 1 if self.body else 0


@dataclass(slots=True)
class _Cut:
    """What is known at the end of a closed segment."""

    body: dict[str, Any]
    latest: str
    """The latest time in any record so far: a clock may have gone back."""
    quiet: bool
    """Whether nothing is under way that could not be said in the record."""


def plan(run_dir: Path, stream: str, *, before: str, stays: Callable[[Entry], str]) -> Plan:
    """What of a stream can go: whole closed segments with nothing in them that is of `before` or later.

    `stays` says of a record why it has to stay, or the empty string. Reads the whole log, and writes nothing. Raises
    AuditTamperedError, OSError.
    """
    gone = read.pruned_front(run_dir, stream)
    walk = _Walk(gone, stays)
    paths = read.segments(run_dir, stream)
    cuts = []
    for path in paths:
        walk.segment(path)
        if path != paths[-1]:
            cuts.append(walk.cut(before))
    old = [cut for cut in cuts if cut.latest < before]
    limit, why = walk.limit()
    free = [cut for cut in old[:_MOST_SEGMENTS] if cut.quiet and cut.body["through"] < limit]
    held = ""
    if old and (not free or free[-1] is not old[-1]):
        held = why if old[-1].body["through"] >= limit else _LOUD if len(old) <= _MOST_SEGMENTS else _MANY
        held = f"records up to {old[-1].body['through']} are old enough, but {held}"
    body = free[-1].body if free else None
    return Plan(stream=stream, body=body, held=held, kept=walk.head.seq - (body["through"] if body else walk.gone))


def record(log: AuditLog, planned: Plan, *, by: str, reason: str) -> Entry:
    """Record that the front goes; it is on disk after this. Raises AuditWriteError."""
    body = {**(planned.body or {}), "by": by, "reason": reason}
    return log.append(RECORD, body, actor={"kind": "person", "id": by})


def carry_out(folder: Path, entry: Entry) -> None:
    """Remove what a recorded pruning is about. Raises OSError, and AuditTamperedError where it does not fit the log."""
    gone = Pruned.of(entry)
    _check(folder, gone)
    line, _ = encode(fields_of(entry))
    partial = folder / f".{FILE}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(line)
        file.flush()
        os.fsync(fd)
    partial.replace(folder / FILE)
    sync_folder(folder)
    _remove(folder, gone)


def finish(folder: Path, front: Front) -> None:
    """Carry out what a crash left of a pruning that the log tells of. Raises as `carry_out`."""
    if front.unfinished is not None:
        carry_out(folder, front.unfinished.entry)
    elif front.pruned is not None:
        _remove(folder, front.pruned)


def _check(folder: Path, gone: Pruned) -> None:
    """The kept part begins with a segment of its own, and its first record names the last one that goes."""
    first = next(iter(segments.found(folder, behind=gone.last.seq)), None)
    line = next(iter(read.raw_lines(first)), None) if first and segments.first_seq(first) == gone.last.seq + 1 else None
    try:
        fits = line is not None and decode(line.data).prev == gone.last.hash
    except BadLineError:
        fits = False
    if not fits:
        what = f"record {gone.entry.seq} says that records 1-{gone.last.seq} were pruned"
        raise AuditTamperedError(f"{folder}: {what}, and no segment begins behind them: nothing was removed")


def _remove(folder: Path, gone: Pruned) -> None:
    """Oldest first, both forms of each segment, and what crashes had set aside in those days."""
    old = [path for path in segments.every(folder) if segments.first_seq(path) <= gone.last.seq]
    torn = [folder / name for name in gone.torn if _TORN.fullmatch(name)]
    found = [path for path in (*old, *torn) if path.exists()]
    for path in found:
        path.unlink(missing_ok=True)
    if found:
        sync_folder(folder)


@dataclass(slots=True)
class _Walk:
    """One reading of a log, with what a record about its front would have to say at any point."""

    before: Pruned | None
    stays: Callable[[Entry], str]
    head: Head = field(init=False)
    first: int = field(init=False)
    tree: Tree = field(init=False)
    epoch: int = 0
    key: str = ""
    freezes: int = 0
    policy: Any = None
    since: str = ""
    latest: str = ""
    bytes: int = 0
    files: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    grammar: Grammar = field(default_factory=Grammar)
    book: Book = field(default_factory=Book)
    rested_on: dict[str, int] = field(default_factory=dict)
    snapshots: deque[int] = field(default_factory=lambda: deque(maxlen=2))
    """The last two promotions that came to disk: one of them is what the run goes on from."""
    vouched: tuple[int, str] | None = None
    """The first record that has to stay, and why."""

    def __post_init__(self) -> None:
        gone = self.before
        self.head, self.tree = (gone.last, gone.tree) if gone is not None else (Head(0, ""), Tree())
        self.first = self.head.seq + 1
        if gone is not None:
            state = gone.state
            self.epoch, self.key, self.freezes, self.policy = gone.epoch, state.key, state.freezes, state.policy
            self.grammar.begin(state)
            self.book.begin(state.policy)

    @property
    def gone(self) -> int:
        """The last record that is gone already."""
        return self.first - 1

    def segment(self, path: Path) -> None:
        self.files.append(segments.name(segments.first_seq(path)))
        for line in read.raw_lines(path):
            if line.complete:
                self.bytes += len(line.data) + 1
                self.digest.update(line.data + b"\n")
                self.take(_entry(line))

    def take(self, entry: Entry) -> None:
        self.head = Head(entry.seq, entry.hash)
        self.tree = self.tree.grown(bytes.fromhex(entry.hash))
        self.epoch = max(self.epoch, entry.epoch)
        self.since, self.latest = self.since or entry.ts, max(self.latest, entry.ts)
        for _ in self.grammar.feed(entry):
            pass  # whether that was allowed is for `verify` to say
        self.book.feed(entry)
        if entry.type in _RESTED_ON:
            self.rested_on[entry.type] = entry.seq
        match entry.type:
            case "log.opened":
                key = entry.body.get("key")
                self.key = key if isinstance(key, str) else ""
            case "log.recovered":
                self.torn.append(str(entry.body.get("file")))
            case "policy.loaded":
                self.policy = dict(entry.body)
            case "freeze.entered":
                self.freezes += 1
            case "snapshot.written" if entry.body.get("promoted"):
                self.snapshots.append(entry.seq)
            case _:
                pass  # nothing that a later record rests on
        if self.vouched is None and (why := self.stays(entry)):
            self.vouched = entry.seq, f"record {entry.seq} stays: {why}"

    def limit(self) -> tuple[int, str]:
        """The first record that has to stay, and why."""
        holds = [(seq, f"record {seq} stays: it is the last {kind}") for kind, seq in self.rested_on.items()]
        holds += [(seq, f"record {seq} stays: it is of a snapshot that the run goes on from") for seq in self.snapshots]
        holds += [self.vouched] if self.vouched else []
        return min(holds, default=(self.head.seq + 1, ""))

    def cut(self, before: str) -> _Cut:
        """What the record would say if everything up to here went."""
        grammar = self.grammar
        calls, orphans = sorted(grammar.calls), sorted(grammar.orphans)
        state = State(
            calls=tuple(calls),
            orphans=tuple(orphans),
            lease=grammar.lease,
            promotion=grammar.promotion,
            policy=self.policy,
            key=self.key,
            freezes=self.freezes,
        )
        body = {
            "from": self.first,
            "through": self.head.seq,
            "hash": self.head.hash,
            "epoch": self.epoch,
            "edge": [node.hex() for node in self.tree.edge],
            "digest": self.digest.copy().hexdigest(),
            "bytes": self.bytes,
            "segments": list(self.files),
            "torn": list(self.torn),
            "since": self.since,
            "until": self.latest,
            "before": before,
            "state": state.facts(),
        }
        quiet = grammar.frozen is None and self.book.quiet(at=self.latest) and len(calls) + len(orphans) <= _MOST_CALLS
        return _Cut(body, self.latest, quiet)


def _entry(line: read.Line) -> Entry:
    try:
        return decode(line.data)
    except BadLineError as error:
        raise AuditTamperedError(f"{line.place}: the record {error}. `loopguard audit verify` says more") from error
