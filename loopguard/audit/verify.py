"""Say whether an audit log is what was written, in one pass, without the lock, and without writing anything.

Two questions. `Chain`: does each record follow the one before it? `Grammar`: did what the records tell happen in an
order that the guard allows? The writer asks the first one when it opens a log; `verify` asks both.

What a hash chain cannot say: that nothing was cut off its end, and that nobody wrote the whole log anew. Both take a
head that was noted elsewhere (`expect_head`); without one a clean log is `unanchored`, never `ok`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.audit.events import (
    GENESIS,
    MAX_LINE_BYTES,
    BadLineError,
    Entry,
    Head,
    UnknownFormatError,
    decode,
    is_digest,
    printable,
)
from loopguard.consent.book import Book
from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, WARN, UNANCHORED, TAMPER, TRUNCATED, REPLACED, SPLICE, FORK, PROTOCOL, APPROVAL, MISSING, UNREADABLE = (
    0, 10, 20, 30, 31, 32, 33, 34, 40, 41, 42, 50,
)  # fmt: skip

STATUS = {
    OK: "ok",
    WARN: "warn",
    UNANCHORED: "unanchored",
    TAMPER: "tamper",
    TRUNCATED: "truncated",
    REPLACED: "replaced",
    SPLICE: "splice",
    FORK: "fork",
    PROTOCOL: "protocol",
    APPROVAL: "approval",
    MISSING: "missing",
    UNREADABLE: "unreadable",
}

_BREAKS = (TAMPER, TRUNCATED, REPLACED, SPLICE, FORK)
_TORN = re.compile(r"torn-\d{12}(-\d+)?\.bin")
_MOST_FINDINGS = 50
_MOST_LOOKS = 3
"""How often a repeated number is looked up in the files; each time reads the whole log."""

SUMMARIES = {
    OK: "the chain is whole and its head is the one that was expected",
    WARN: "the chain is whole and its head is the one that was expected; there is something to know",
    UNANCHORED: (
        "the chain is whole; without an expected head nobody can say that the tail was not cut "
        "or the log not written anew"
    ),
    TAMPER: "records were changed, removed, moved or repeated",
    TRUNCATED: "the log ends before a record that it once had",
    REPLACED: "the log was written anew: a record is not the one that was noted",
    SPLICE: "records of another run or stream stand in this log",
    FORK: "two histories of this run stand in this log",
    PROTOCOL: "the chain is whole, and it tells of something that nothing in it allows",
    APPROVAL: "the chain is whole, and a resume or a change of policy lacks the approvals that it needs",
    MISSING: "the log, or a file or stream that it names, is not there",
    UNREADABLE: "the log cannot be read",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, with the code that it alone would give."""

    code: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification found. `code` is the exit code of `audit verify`, `status` its name."""

    code: int
    status: str
    records: int
    """Records that are unaltered, also where the chain around them is broken."""
    segments: int
    head: Head
    """The last record of the chain; note it down elsewhere, as an anchor."""
    findings: list[str]
    notes: list[str]
    """What is worth knowing and nobody's fault; never changes the code."""

    @property
    def summary(self) -> str:
        """One sentence for people."""
        return SUMMARIES[self.code]


def verify(run_dir: Path, *, expect_head: str | None = None, stream: str = read.CONTROLLER) -> Verification:
    """Check the log of a run directory or of a copy of one.

    `expect_head` is a head noted earlier, `SEQ:HASH` or the hash alone. Raises UsageError where it is neither; what is
    wrong with the log is never an exception.
    """
    anchor = _anchor(expect_head)
    audit = _Audit(Path(run_dir), stream, anchor)
    try:
        audit.run()
    except OSError as error:
        audit.find(UNREADABLE, f"{error.filename or run_dir}: {error.strerror}")
    return audit.result()


@dataclass(frozen=True, slots=True)
class _Anchor:
    seq: int | None
    hash: str
    origin: str
    """Who says so, for the finding."""


def _anchor(text: str | None) -> _Anchor | None:
    if text is None:
        return None
    seq, _, digest = text.strip().rpartition(":")
    if not is_digest(digest) or (seq and not seq.isdecimal()):
        raise UsageError(f"expected head {text!r} is not SEQ:HASH or HASH; copy it from an earlier `audit verify`")
    return _Anchor(int(seq) if seq else None, digest, "the expected head")


class Chain:
    """Whether each record follows the one before it. Lives for one pass; remembers one record.

    After a break it goes on from what stands there, so that one edit gives one finding.
    """

    def __init__(self, stream: str, twins: Callable[[int], set[str]], *, log: str | None = None) -> None:
        self.log = log
        """`RUN_ID/STREAM`, which every record must carry; None until the first one says it."""
        self.head = Head(0, GENESIS)
        self.records = 0
        self._stream = stream
        self._twins = twins
        self._seq = 0
        self._prev: str | None = GENESIS
        self._epoch = 0
        self._looks = 0

    def feed(self, line: read.Line) -> tuple[Entry | None, Finding | None]:
        """The record in a line (None where it holds none), and what is wrong with it or its place."""
        try:
            entry = decode(line.data)
        except UnknownFormatError as error:
            return None, Finding(UNREADABLE, f"{line.place}: the record {error}")
        except BadLineError as error:
            return None, self._unreadable(line, str(error))
        self.records += 1
        finding = self._placed(entry, line.place)
        if entry.seq > self._seq:
            self._seq, self._prev = entry.seq, entry.hash
            self.head = Head(entry.seq, entry.hash)
        self._epoch = max(self._epoch, entry.epoch)
        return entry, finding

    def _unreadable(self, line: read.Line, why: str) -> Finding:
        # Count it as the record that belongs here, so that its neighbours are judged by what they say.
        self._seq, self._prev = self._seq + 1, None
        return Finding(TAMPER, f"{line.place}: record {self._seq} {why}")

    def _placed(self, entry: Entry, place: str) -> Finding | None:
        if self.log is None and entry.log.endswith(f"/{self._stream}"):
            self.log = entry.log
        if entry.log != self.log:
            home = self.log or f"a stream {self._stream!r}"
            return Finding(SPLICE, printable(f"{place}: record {entry.seq} belongs to {entry.log}, not to {home}"))
        expected = self._seq + 1
        if entry.seq > expected:
            gone = f"record {expected} is" if entry.seq == expected + 1 else f"records {expected}-{entry.seq - 1} are"
            return Finding(TAMPER, f"{place}: record {entry.seq} stands where {expected} belongs; {gone} gone")
        if entry.seq < expected:
            return self._again(entry, place)
        if self._prev is not None and entry.prev != self._prev:
            return Finding(
                TAMPER, f"{place}: record {entry.seq} does not follow record {entry.seq - 1} (its prev differs)"
            )
        if entry.epoch < self._epoch:
            return Finding(
                FORK,
                f"{place}: record {entry.seq} goes back from epoch {self._epoch} to {entry.epoch}: old state wrote on",
            )
        return None

    def _again(self, entry: Entry, place: str) -> Finding:
        self._looks += 1
        if self._looks <= _MOST_LOOKS and self._twins(entry.seq) - {entry.hash}:
            return Finding(
                FORK, f"{place}: there are two different records {entry.seq}: two writers, or a restored copy"
            )
        return Finding(TAMPER, f"{place}: record {entry.seq} stands behind record {self._seq}: moved or repeated")


def twins(run_dir: Path, stream: str) -> Callable[[int], set[str]]:
    """A second look at the files, for the rare case of a repeated number: the hashes of all records that carry it."""

    def look(seq: int) -> set[str]:
        member = f',"seq":{seq},"ts":'.encode("ascii")
        found = set()
        for line in read.lines(run_dir, stream):
            if member in line.data:
                try:
                    entry = decode(line.data)
                except BadLineError:
                    continue
                if entry.seq == seq:
                    found.add(entry.hash)
        return found

    return look


@dataclass(slots=True)
class Grammar:
    """Whether what was done was allowed before it was done. Holds what is in flight, nothing more."""

    frozen: str | None = None
    calls: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    """Calls in flight when an earlier process ended."""
    lease: tuple[int, int] | None = None
    promotion: str | None = None
    """The digest of the weights that a promotion decision allows."""

    def feed(self, entry: Entry) -> Iterator[str]:
        """What this record did that no record allowed."""
        match entry.type:
            case "log.opened":
                self.orphans, self.calls, self.lease = self.calls, set(), None
            case "freeze.entered":
                # A lease is of one epoch, and a decision of before a freeze allows nothing after it.
                self.frozen, self.lease, self.promotion = str(entry.body.get("freeze")), None, None
            case "resume.applied":
                yield from self._resume(entry.body)
            case "tool.decided" if entry.body.get("result") == "allow":
                self.calls.add(str(entry.body.get("call")))
            case "tool.finished" | "tool.lost":
                yield from self._call_ended(entry.body)
            case "data.admitted" if self.frozen:
                yield f"data was admitted while frozen ({self.frozen})"
            case "update.leased":
                self._extend_lease(entry.body)
            case "update.settled":
                self.lease = None
            case "update.applied":
                yield from self._applied(entry.body)
            case "promotion.decided":
                allowed = entry.body.get("result") == "allow"
                self.promotion = str(entry.body.get("weights")) if allowed else None
            case "promotion.applied":
                yield from self._promoted(entry.body)
            case _:
                pass  # every other record only tells

    def _resume(self, body: Any) -> Iterator[str]:
        if self.frozen is None:
            yield "a resume where nothing was frozen"
        elif str(body.get("freeze")) != self.frozen:
            yield f"a resume of {body.get('freeze')!r} while {self.frozen!r} was in force"
        if not body.get("by") or not body.get("reason"):
            yield "a resume without a name or a reason"
        self.frozen = None

    def _call_ended(self, body: Any) -> Iterator[str]:
        call = str(body.get("call"))
        if call not in self.calls and call not in self.orphans:
            yield f"call {call!r} ran without a decision that allows it"
        self.calls.discard(call)
        self.orphans.discard(call)

    def _extend_lease(self, body: Any) -> None:
        span = _span(body)
        if span and self.lease and self.lease[0] <= span[0] <= self.lease[1] + 1:
            span = (self.lease[0], max(self.lease[1], span[1]))
        self.lease = span

    def _applied(self, body: Any) -> Iterator[str]:
        if self.frozen:
            yield f"updates were applied while frozen ({self.frozen})"
        span = _span(body)
        if span is None:
            yield "updates were applied without saying which"
        elif self.lease is None or not self.lease[0] <= span[0] <= span[1] <= self.lease[1]:
            leased = f"the lease is {self.lease[0]}-{self.lease[1]}" if self.lease else "there is no lease"
            yield f"updates {span[0]}-{span[1]} were applied outside a lease ({leased})"

    def _promoted(self, body: Any) -> Iterator[str]:
        if self.frozen:
            yield f"a promotion was applied while frozen ({self.frozen})"
        weights = str(body.get("actor"))
        if self.promotion is None:
            yield "a promotion was applied without a decision that allows it"
        elif weights != self.promotion:
            yield f"weights {weights[:12]} were promoted where {self.promotion[:12]} were allowed"
        self.promotion = None


def _span(body: Any) -> tuple[int, int] | None:
    first, last = body.get("from"), body.get("to")
    if type(first) is not int or type(last) is not int or first > last:
        return None
    return first, last


class _Audit:
    """One verification under way."""

    def __init__(self, run_dir: Path, stream: str, anchor: _Anchor | None) -> None:
        self.run_dir = run_dir
        self.stream = stream
        self.anchors = [anchor] if anchor else []
        self.anchor = anchor
        self.anchored_at: int | None = None
        self.findings: list[Finding] = []
        self.hidden = 0
        self.worst: int = OK
        self.broken: int = OK
        self.notes: list[str] = []
        self.segments = 0
        self.chain = Chain(stream, twins(run_dir, stream))
        self.grammar = Grammar()
        self.book = Book()
        self.policies: set[str] = set()
        self.clock: Entry | None = None

    def run(self) -> None:
        paths = read.segments(self.run_dir, self.stream)
        self.segments = len(paths)
        if not paths:
            self.find(MISSING, f"{read.stream_dir(self.run_dir, self.stream)}: there is no log here (no seg-*.jsonl)")
            return
        self._expect_run()
        self._expect_cache()
        for path in paths:
            self._segment(path, is_last=path == paths[-1])
        if self.grammar.calls:
            self.note(f"{len(self.grammar.calls)} allowed tool calls have no end yet")
        if self.chain.records == 0:
            self.find(MISSING, f"{paths[0]}: the log holds no record")
        for anchor in self.anchors:
            self._judge_anchor(anchor)

    def find(self, code: int, text: str) -> None:
        """Keep a finding; the first break of the chain names the class, since later ones may follow from it."""
        if code in _BREAKS and self.broken == OK:
            self.broken = code
        self.worst = max(self.worst, code)
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(Finding(code, printable(text)))
        else:
            self.hidden += 1

    def note(self, text: str) -> None:
        if len(self.notes) < _MOST_FINDINGS:
            self.notes.append(printable(text))

    def result(self) -> Verification:
        code = self._code()
        texts = [finding.text for finding in sorted(self.findings, key=lambda finding: finding.code != code)]
        if self.hidden:
            texts.append(f"and {self.hidden} more findings")
        if code < TAMPER and self.anchor and self.anchored_at is not None and self.anchored_at < self.chain.head.seq:
            self.note(f"records 1-{self.anchored_at} are anchored; what follows is not proven against a cut")
        return Verification(
            code=code,
            status=STATUS[code],
            records=self.chain.records,
            segments=self.segments,
            head=self.chain.head,
            findings=texts,
            notes=self.notes,
        )

    def _code(self) -> int:
        if self.worst >= UNREADABLE:
            return UNREADABLE
        if self.broken:
            return self.broken
        if self.worst >= PROTOCOL:
            return self.worst
        at_head = self.anchor is not None and self.anchored_at == self.chain.head.seq
        return self.worst if at_head else UNANCHORED

    def _segment(self, path: Path, *, is_last: bool) -> None:
        first = True
        for line in read.raw_lines(path):
            if not line.complete and is_last and read.looks_torn(line.data):
                self.find(
                    WARN, f"{line.place}: the last line is cut ({len(line.data)} bytes); the next start sets it aside"
                )
                return
            if not line.complete and len(line.data) >= MAX_LINE_BYTES:
                self.find(TAMPER, f"{line.place}: a line longer than any record; the rest of {path.name} was not read")
                return
            self._line(line, names_segment=first)
            first = False
        if first and not is_last:
            self.find(TAMPER, f"{path}: the segment is empty")

    def _line(self, line: read.Line, *, names_segment: bool) -> None:
        entry, finding = self.chain.feed(line)
        if finding:
            self.find(finding.code, finding.text)
        elif not line.complete:
            self.find(TAMPER, f"{line.place}: the record does not end its line")
        if entry is None:
            return
        if names_segment and entry.seq != read.first_seq(line.path) and not finding:
            self.find(TAMPER, f"{line.path}: the segment starts with record {entry.seq}, unlike its name")
        self._told(entry, line.place)

    def _told(self, entry: Entry, place: str) -> None:
        for anchor in self.anchors:
            if anchor.hash == entry.hash and anchor.seq in {None, entry.seq}:
                if anchor is self.anchor:
                    self.anchored_at = entry.seq
            elif anchor.seq == entry.seq:
                self.find(REPLACED, f"{place}: record {entry.seq} is not the one that {anchor.origin} names")
        self._clock(entry, place)
        self._policy(entry, place)
        self._recovered(entry, place)
        if not self.broken:
            self._allowed(entry, place)

    def _allowed(self, entry: Entry, place: str) -> None:
        """Judged up to the first break only: behind it, a missing permission may be what was cut out."""
        if entry.type == "log.opened" and self.grammar.calls:
            self.note(f"{place}: {len(self.grammar.calls)} allowed tool calls ended with their process")
        for trouble in self.grammar.feed(entry):
            self.find(PROTOCOL, f"{place}: record {entry.seq}: {trouble}")
        for trouble in self.book.troubles(entry, owner=self.stream == read.CONTROLLER):
            self.find(APPROVAL, f"{place}: record {entry.seq}: {trouble}")
        self.book.feed(entry)

    def _clock(self, entry: Entry, place: str) -> None:
        before, self.clock = self.clock, entry
        if before is None:
            return
        if entry.ts < before.ts:
            self.find(WARN, f"{place}: clock_back: record {entry.seq} is of {entry.ts}, after {before.ts}")
        elif entry.boot == before.boot and entry.mono_ns < before.mono_ns:
            self.find(WARN, f"{place}: clock_back: the monotonic clock of record {entry.seq} went back")

    def _policy(self, entry: Entry, place: str) -> None:
        digest = entry.policy
        if not digest or digest in self.policies:
            return
        self.policies.add(digest)
        file = self.run_dir / "policy" / f"{digest}.yaml"
        if not is_digest(digest):
            self.find(MISSING, f"{place}: the guard policy {digest!r} is not a digest")
        elif not file.is_file():
            self.find(MISSING, f"{file}: the guard policy that record {entry.seq} was decided under is not there")

    def _recovered(self, entry: Entry, place: str) -> None:
        if entry.type != "log.recovered":
            return
        count = entry.body.get("torn_bytes")
        self.find(WARN, f"{place}: record {entry.seq}: a cut last line of {count} bytes was set aside")
        name = str(entry.body.get("file"))
        file = read.stream_dir(self.run_dir, self.stream) / name
        if not _TORN.fullmatch(name) or not file.is_file():
            self.note(f"{place}: the bytes that were set aside are not kept here")
        elif _digest(file) != entry.body.get("digest"):
            self.find(TAMPER, f"{file}: is not what record {entry.seq} says was set aside")

    def _expect_run(self) -> None:
        """The log must belong to the run whose directory it lies in."""
        facts = _json(self.run_dir / "run.json")
        if isinstance(facts.get("id"), str):
            self.chain.log = f"{facts['id']}/{self.stream}"

    def _expect_cache(self) -> None:
        """`state.json` lies on the same disk and is no anchor; but a contradiction shows a change."""
        cache = _json(self.run_dir / "state.json")
        seq, digest = cache.get("seq"), cache.get("hash")
        if cache.get("stream") == self.stream and type(seq) is int and seq > 0 and isinstance(digest, str):
            self.anchors.append(_Anchor(seq, digest, "state.json"))

    def _judge_anchor(self, anchor: _Anchor) -> None:
        head = self.chain.head
        if anchor.seq is not None and anchor.seq > head.seq:
            self.find(
                TRUNCATED, f"{anchor.origin} is record {anchor.seq}; the log ends at {head.seq}: the tail was cut"
            )
        elif anchor.seq is None and self.anchored_at is None and anchor is self.anchor:
            self.find(TRUNCATED, f"no record has the hash of {anchor.origin}: the tail was cut, or the log replaced")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
