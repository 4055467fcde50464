"""Say whether an audit log is what was written, in one pass, without the lock, and without writing anything.

Three questions. `Chain`: does each record follow the one before it? `Grammar`: did what the records tell happen in an
order that the guard allows? `_Audit`: is it the log that others remember, by a checkpoint, a head or a commitment? The
writer asks the first one when it opens a log; `verify` asks all of them, of every stream of the run.

What a hash chain cannot say: that nothing was cut off its end, that nobody wrote the whole log anew, and who wrote it.
The first two take a head or a checkpoint that was kept elsewhere; without one a clean log is `unanchored`, never `ok`.
The last takes a key that the reader trusts; without one a log is consistent, and its authorship unproven.

Memory does not grow with the log: kept are the names of the checkpoints beside it, and the anchors that were handed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit import anchors as places
from loopguard.audit import blobs, notes, pruned, read
from loopguard.audit import keys as keyring
from loopguard.audit.events import (
    ABOUT_ANCHORS,
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
from loopguard.audit.segments import DamagedSegmentError, is_packed
from loopguard.audit.tree import Tree
from loopguard.consent.book import Book
from loopguard.errors import AuditError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

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
_TORN = re.compile(r"torn-\d{12}(-\d+)?\.bin", re.ASCII)
_STREAM = re.compile(r"\w[\w.-]*", re.ASCII)
_HEAD = re.compile(r"(?:([0-9]{1,15}):)?([0-9a-f]{64})")
_COUNT = range(1, 2**53)
_MOST_FINDINGS = 50
_MOST_LEAVES = 1000
_CACHE = "state.json"
_MOST_LOOKS = 3
"""How often a repeated number is looked up in the files; each time reads the whole log."""

_NO_KEY = "no key was given: consistent, authorship unproven"

SUMMARIES = {
    OK: "the chain is whole and its head is the one that was expected",
    WARN: "the chain is whole and its head is the one that was expected; there is something to know",
    UNANCHORED: "the chain is whole; its tail is not proven: it may have been cut, or the log written anew",
    TAMPER: "records were changed, removed, moved or repeated",
    TRUNCATED: "the log ends before a record that it once had",
    REPLACED: "the log was written anew: its records are not the ones that were noted",
    SPLICE: "records of another run or stream stand in this log",
    FORK: "there are two histories of this run",
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
class StreamFound:
    """What was found of one stream."""

    name: str
    records: int
    """Records that are unaltered, also where the chain around them is broken."""
    segments: int
    head: Head
    proven: int
    """Up to here something kept elsewhere, or the controller's stream, says what the records must be."""
    signed: int
    """Up to here the records are signed by a key that is trusted."""
    pruned: int
    """Up to here the records are gone, and the log says who removed them and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification found. `code` is the exit code of `audit verify`, `status` its name."""

    code: int
    status: str
    findings: list[str]
    notes: list[str]
    """What is worth knowing and nobody's fault; never changes the code."""
    keys: list[str]
    """The vkeys that were trusted."""
    anchors: list[str]
    """The heads and checkpoints kept elsewhere that were trusted, each with where it was found."""
    authorship: str
    """Who wrote the log, as far as that is proven; one sentence."""
    streams: list[StreamFound]
    """The one that was asked for, or the controller's; behind it the others that were verified with it."""

    @property
    def summary(self) -> str:
        """One sentence for people."""
        return SUMMARIES[self.code]

    @property
    def records(self) -> int:
        """Records of the first stream that are unaltered."""
        return self.streams[0].records

    @property
    def segments(self) -> int:
        """How many files the first stream has."""
        return self.streams[0].segments

    @property
    def head(self) -> Head:
        """The last record of the first stream; note it down elsewhere, as an anchor."""
        return self.streams[0].head


def verify(
    run_dir: Path,
    *,
    expect_head: str | None = None,
    keys: Iterable[str] = (),
    anchors: Iterable[Path] = (),
    stream: str | None = None,
    without_payloads: bool = False,
) -> Verification:
    """Check the log of a run directory or of a copy of one: all of its streams, or the one that is named.

    `expect_head` is a head noted earlier, `SEQ:HASH` or the hash alone, of the named stream or the controller's. `keys`
    are vkeys (or files with one) whose signatures are trusted, `anchors` files, folders or repositories with log
    checkpoints that were kept elsewhere. With `without_payloads` the reader knows that the payloads of tool calls did
    not come along, and they are not missed. Raises UsageError where one of them is not what it should be; what is wrong
    with the log is never an exception.
    """
    run_dir = Path(run_dir)
    trusted = keyring.trusted(keys)
    lead = stream or read.CONTROLLER
    names, trouble = [lead], None
    expected = _expected(expect_head)
    try:
        if (odd := read.no_file(run_dir)) is not None:
            alone = _Audit(run_dir, lead, [], trusted, without_payloads=without_payloads)
            alone.find(UNREADABLE, f"{odd}: is neither a file nor a folder")
            return _result([alone], trusted)
        names += [name for name in read.streams(run_dir) if name != lead] if stream is None else []
    except OSError as error:
        trouble = f"{error.filename or run_dir}: {error.strerror}"
    cut: list[str] = []
    marks = _kept(run_dir, names, anchors, trusted, cut)
    marks[lead] += expected
    audits = [_Audit(run_dir, name, marks[name], trusted, without_payloads=without_payloads) for name in names]
    others = {audit.stream: audit for audit in audits[1:]}
    audits[0].leads = True
    for text in cut:
        audits[0].note(text)
    if trouble is not None:
        audits[0].find(UNREADABLE, trouble)
    _run(audits[0], others, alone=stream is not None)
    return _result([audits[0], *others.values()], trusted)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """What a log must hold at some record, and who says so."""

    seq: int | None
    """None where only a hash was noted."""
    origin: str
    hash: str = ""
    """Of the record; empty where a root is known instead."""
    root: bytes = b""
    proves: bool = False
    """Whether it was kept elsewhere, so that agreeing with it means something."""
    signers: tuple[str, ...] = ()
    """The trusted keys that signed it."""


def _expected(text: str | None) -> list[_Mark]:
    if text is None:
        return []
    match = _HEAD.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"expected head {text!r} is not SEQ:HASH or HASH; copy it from an earlier `audit verify`")
    seq = int(match[1]) if match[1] else None
    return [_Mark(seq=seq, hash=match[2], origin="the expected head", proves=True)]


def _kept(
    run_dir: Path,
    names: Sequence[str],
    anchors: Iterable[Path],
    trusted: Sequence[keyring.VerifierKey],
    cut: list[str],
) -> dict[str, list[_Mark]]:
    """What was kept elsewhere of each stream; `cut` gets the lines that were passed over.

    Of other runs there may be checkpoints as well, in the same place.
    """
    marks: dict[str, list[_Mark]] = {name: [] for name in names}
    found = [(place, places.read(Path(place), run_dir=run_dir, told=cut)) for place in anchors]
    try:
        logs = {_log_of(run_dir, name): name for name in names}
    except OSError:
        return marks  # whose log it is cannot be read: the verification of the stream says so
    for place, kept in found:
        ours = [one for one in kept if one.note.checkpoint.origin in logs]
        if not ours:
            origins = ", ".join(sorted({one.note.checkpoint.origin for one in kept}))
            ask = f"--anchors {place} holds nothing of {', '.join(sorted(logs))}, only of {origins}"
            raise UsageError(printable(f"{ask}: name the anchors of this run"))
        for one in ours:
            marks[logs[one.note.checkpoint.origin]].append(_mark_of(one, trusted))
    return marks


def _mark_of(kept: places.Kept, trusted: Sequence[keyring.VerifierKey]) -> _Mark:
    checkpoint = kept.note.checkpoint
    try:
        signers = kept.note.signers(trusted)
    except notes.BadNoteError as error:
        raise UsageError(f"{kept.place}: {error}; it is forged or damaged, take it out") from error
    return _Mark(
        seq=checkpoint.size,
        root=checkpoint.root,
        origin=kept.place,
        # Who trusts a key does not want to be shown what others could have written.
        proves=not trusted or bool(signers),
        signers=tuple(map(str, signers)),
    )


def _log_of(run_dir: Path, stream: str) -> str:
    """The name that all records of a stream carry, by `run.json`, or by the log itself where there is none.

    Raises OSError.
    """
    run = _json(run_dir / "run.json").get("id")
    if isinstance(run, str):
        return f"{run}/{stream}"
    for path in read.segments(run_dir, stream):
        with contextlib.suppress(BadLineError, DamagedSegmentError):
            for line in read.raw_lines(path):
                log = decode(line.data).log
                return log if log.endswith(f"/{stream}") else f"/{stream}"
    return f"/{stream}"


class Chain:
    """Whether each record follows the one before it. Lives for one pass; remembers one record.

    After a break it goes on from what stands there, so that one edit gives one finding.
    """

    def __init__(self, stream: str, twins: Callable[[int], set[str]], *, log: str | None = None) -> None:
        self.log = log
        """`RUN_ID/STREAM`, which every record must carry; None until the first one says it."""
        self.head = Head(0, GENESIS)
        self._tree: Tree | None = Tree()
        self._leaves: list[bytes] = []
        """Of the last records, which are not in the tree yet: many at once cost less."""
        self.records = 0
        self._stream = stream
        self._twins = twins
        self._seq = 0
        self._prev: str | None = GENESIS
        self._epoch = 0
        self._looks = 0

    @property
    def tree(self) -> Tree | None:
        """Over all records so far; None from the first break on."""
        if self._tree is not None and self._leaves:
            self._tree, self._leaves = self._tree.grown(*self._leaves), []
        return self._tree

    def begin(self, gone: pruned.Pruned) -> None:
        """Begin behind records that were pruned."""
        if self.log is None and gone.entry.log.endswith(f"/{self._stream}"):
            self.log = gone.entry.log
        self.head, self._tree, self._epoch = gone.last, gone.tree, gone.epoch
        self._seq, self._prev = gone.last.seq, gone.last.hash

    def feed(self, line: read.Line) -> tuple[Entry | None, Finding | None]:
        """The record in a line (None where it holds none), and what is wrong with it or its place."""
        try:
            entry = decode(line.data)
        except UnknownFormatError as error:
            return None, Finding(UNREADABLE, f"{line.place}: the record {error}")
        except BadLineError as error:
            return None, self._unreadable(line, str(error))
        self.records += 1
        finding = self._placed(entry, line)
        if finding is not None:
            self._tree = None
        elif self._tree is not None:
            self._leaves.append(bytes.fromhex(entry.hash))
            if len(self._leaves) >= _MOST_LEAVES:
                self._tree = self.tree
        if entry.seq > self._seq:
            self._seq, self._prev = entry.seq, entry.hash
            self.head = Head(entry.seq, entry.hash)
        if entry.epoch > self._epoch:
            self._epoch = entry.epoch
        return entry, finding

    def _unreadable(self, line: read.Line, why: str) -> Finding:
        # Count it as the record that belongs here, so that its neighbours are judged by what they say.
        self._seq, self._prev, self._tree = self._seq + 1, None, None
        return Finding(TAMPER, f"{line.place}: record {self._seq} {why}")

    def _placed(self, entry: Entry, line: read.Line) -> Finding | None:
        if self.log is None and entry.log.endswith(f"/{self._stream}"):
            self.log = entry.log
        if entry.log != self.log:
            home = self.log or f"a stream {self._stream!r}"
            return Finding(SPLICE, printable(f"{line.place}: record {entry.seq} belongs to {entry.log}, not to {home}"))
        expected = self._seq + 1
        if entry.seq > expected:
            gone = f"record {expected} is" if entry.seq == expected + 1 else f"records {expected}-{entry.seq - 1} are"
            return Finding(TAMPER, f"{line.place}: record {entry.seq} stands where {expected} belongs; {gone} gone")
        if entry.seq < expected:
            return self._again(entry, line)
        if self._prev is not None and entry.prev != self._prev:
            return Finding(
                TAMPER, f"{line.place}: record {entry.seq} does not follow record {entry.seq - 1} (its prev differs)"
            )
        if entry.epoch < self._epoch:
            return Finding(
                FORK,
                f"{line.place}: record {entry.seq} goes back from epoch {self._epoch} to {entry.epoch}: "
                "old state wrote on",
            )
        return None

    def _again(self, entry: Entry, line: read.Line) -> Finding:
        self._looks += 1
        if self._looks <= _MOST_LOOKS and self._twins(entry.seq) - {entry.hash}:
            return Finding(
                FORK, f"{line.place}: there are two different records {entry.seq}: two writers, or a restored copy"
            )
        return Finding(TAMPER, f"{line.place}: record {entry.seq} stands behind record {self._seq}: moved or repeated")


def twins(run_dir: Path, stream: str) -> Callable[[int], set[str]]:
    """A second look at the files, for the rare case of a repeated number: the hashes of all records that carry it."""

    def look(seq: int) -> set[str]:
        member = f',"seq":{seq},"ts":'.encode("ascii")
        found = set()
        with contextlib.suppress(DamagedSegmentError, AuditError):  # said where it is read in its turn
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
    halted: bool = False
    calls: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    """Calls in flight when an earlier process ended, however many starts ago."""
    lease: tuple[int, int] | None = None
    promotion: str | None = None
    """The digest of the weights that a promotion decision allows."""

    def begin(self, state: pruned.State) -> None:
        """Begin behind records that were pruned, with what they left under way."""
        self.calls, self.orphans = set(state.calls), set(state.orphans)
        self.lease, self.promotion = state.lease, state.promotion

    def feed(self, entry: Entry) -> Iterator[str]:
        """What this record did that no record allowed."""
        match entry.type:
            case "log.opened":
                self.orphans |= self.calls
                self.calls, self.lease = set(), None
            case "freeze.entered":
                # A lease is of one epoch, and a decision of before a freeze allows nothing after it.
                self.frozen, self.lease, self.promotion = str(entry.body.get("freeze")), None, None
            case "resume.applied":
                yield from self._resume(entry.body)
            case "run.halted":
                yield from self._named(entry.body, "halt")
                self.halted = True
            case "tool.decided" if entry.body.get("result") == "allow":
                self.calls.add(str(entry.body.get("call")))
            case "tool.finished" | "tool.lost":
                yield from self._call_ended(entry.body)
            case "data.admitted" if self.frozen is not None:
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
        yield from self._named(body, "resume")
        if self.halted:
            yield "a resume of a run that was halted"
        else:
            self.frozen = None

    def _named(self, body: Any, word: str) -> Iterator[str]:
        if self.frozen is None:
            yield f"a {word} where nothing was frozen"
        elif str(body.get("freeze")) != self.frozen:
            yield f"a {word} of {body.get('freeze')!r} while {self.frozen!r} was in force"
        if not body.get("by") or not body.get("reason"):
            yield f"a {word} without a name or a reason"

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
        if self.frozen is not None:
            yield f"updates were applied while frozen ({self.frozen})"
        span = _span(body)
        if span is None:
            yield "updates were applied without saying which"
        elif self.lease is None or not self.lease[0] <= span[0] <= span[1] <= self.lease[1]:
            leased = f"the lease is {self.lease[0]}-{self.lease[1]}" if self.lease else "there is no lease"
            yield f"updates {span[0]}-{span[1]} were applied outside a lease ({leased})"

    def _promoted(self, body: Any) -> Iterator[str]:
        if self.frozen is not None:
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


def _run(lead: _Audit, others: dict[str, _Audit], *, alone: bool) -> None:
    """Read the first stream, and the others beside it: each up to where the first one says that it stood."""
    with lead.reading():
        for entry, line in lead.walk():
            if entry.type == "streams.committed" and not alone and not lead.broken:
                _commit(lead, others, entry, line.place)
    for other in others.values():
        other.finish()
    lead.finish()


def _commit(lead: _Audit, others: dict[str, _Audit], entry: Entry, place: str) -> None:
    streams = entry.body.get("streams")
    for name, told in streams.items() if isinstance(streams, dict) else ():
        head = _head(told)
        if head is None or not _STREAM.fullmatch(name) or name == lead.stream:
            lead.find(PROTOCOL, f"{place}: record {entry.seq}: what it says of stream {name} is no head")
        elif name in others or read.segments(lead.run_dir, name):
            if name not in others:  # it was begun after the streams were listed
                others[name] = _Audit(lead.run_dir, name, [], lead.trusted, without_payloads=lead.without_payloads)
            others[name].committed(head, f"record {entry.seq} of stream {lead.stream}")
        elif name not in lead.gone:
            lead.gone.add(name)
            lead.find(MISSING, f"{place}: record {entry.seq}: stream {name} had {head.seq} records, and is not there")


def _head(told: Any) -> Head | None:
    seq, digest = (told.get("seq"), told.get("hash")) if isinstance(told, dict) else (None, None)
    if type(seq) is int and seq in _COUNT and isinstance(digest, str) and is_digest(digest):
        return Head(seq, digest)
    return None


def _result(audits: Sequence[_Audit], trusted: Sequence[keyring.VerifierKey]) -> Verification:
    code = _gravest([audit.code() for audit in audits])
    found = [finding for audit in audits for finding in audit.findings]
    texts = [finding.text for finding in sorted(found, key=lambda finding: finding.code != code)]
    if hidden := sum(audit.hidden for audit in audits):
        texts.append(f"and {hidden} more findings")
    lead, *others = audits
    told = [text for audit in audits for text in (*audit.notes, *(audit.unproven() if code < TAMPER else ()))]
    return Verification(
        code=code,
        status=STATUS[code],
        findings=texts,
        notes=[*told, *(_hint(lead) if not trusted else ())],
        keys=[str(key) for key in trusted],
        anchors=[text for audit in audits for text in audit.trusted_anchors()],
        authorship=_authorship(lead, trusted, code),
        streams=[audit.facts() for audit in (lead, *others)],
    )


def _gravest(codes: Sequence[int]) -> int:
    """Unreadable wins; then the first broken stream, since what others say may follow from it; then the largest."""
    if UNREADABLE in codes:
        return UNREADABLE
    return next((code for code in codes if code in _BREAKS), max(codes))


def _authorship(lead: _Audit, trusted: Sequence[keyring.VerifierKey], code: int) -> str:
    if code in {*_BREAKS, UNREADABLE}:
        return "not judged, since the log is not whole"
    if not trusted:
        return _NO_KEY
    if not lead.signers:
        return f"unproven: no checkpoint of this log is signed by {', '.join(key.name for key in trusted)}"
    rest = "" if lead.signed_to >= lead.tail else "; what follows is not"
    return f"records 1-{lead.signed_to} are signed by {', '.join(lead.signers)}{rest}"


def _hint(lead: _Audit) -> list[str]:
    return [
        f"the log says that {key} signs it: where you know that key from elsewhere, pass --key" for key in lead.named
    ]


class _Audit:
    """The verification of one stream, under way."""

    def __init__(
        self,
        run_dir: Path,
        stream: str,
        marks: list[_Mark],
        trusted: Sequence[keyring.VerifierKey],
        *,
        without_payloads: bool,
    ) -> None:
        self.run_dir = run_dir
        self.stream = stream
        self.trusted = trusted
        self.without_payloads = without_payloads
        self.leads = False
        """Whether it is the one that speaks for the others, and has to be signed."""
        self.marks = marks
        self.by_seq: dict[int, list[_Mark]] = {}
        self.by_hash: dict[str, _Mark] = {}
        """Of heads that were noted without their number; what is still here was not found."""
        self.anchored_at = 0
        self.signed_to = 0
        self.signers: list[str] = []
        self.tail = 0
        """The last record that says more than where a checkpoint was kept."""
        self.findings: list[Finding] = []
        self.hidden = 0
        self.worst: int = OK
        self.broken: int = OK
        self.notes: list[str] = []
        self.named: list[str] = []
        """The keys that the log itself says sign it."""
        self.gone: set[str] = set()
        """Streams that were said to be missing."""
        self.segments = 0
        self.chain = Chain(stream, twins(run_dir, stream))
        self.grammar = Grammar()
        self.book = Book()
        self.payloads = blobs.Check(self._folder, left_out=without_payloads)
        self.policies: set[str] = set()
        self.clock: Entry | None = None
        self._key = ""
        """The key that signs from the last opening on."""
        self._committed = 0
        """The largest number that another stream gave for this one."""
        self._apart: list[_Mark] = []
        """Signed marks that this log contradicts."""
        self._beside: dict[int, Path] = {}
        self.front = pruned.Front()
        self._steps = self._read()
        self._begun = False

    def walk(self) -> Iterator[tuple[Entry, read.Line]]:
        """Every record, each judged before it is handed out, with its line."""
        return self._steps

    def committed(self, head: Head, origin: str) -> None:
        """Read on up to where another stream says that this one stood, and compare."""
        with self.reading():
            self._begin()
            while self.chain.head.seq < head.seq and next(self._steps, None) is not None:
                pass
        at, before, self._committed = self.chain.head, self._committed, max(head.seq, self._committed)
        if self.worst == UNREADABLE or self.broken == TRUNCATED or before <= head.seq < self.front.gone:
            return
        if at.seq < head.seq:
            end = f"it ends at {at.seq}: the tail was cut"
            self.find(TRUNCATED, f"{self._folder}: {origin} says that this stream had {head.seq} records; {end}")
        elif at.seq > head.seq and not self.broken:
            self.find(FORK, f"{self._folder}: {origin} goes back to record {head.seq} of this stream, behind {at.seq}")
        elif at.seq == head.seq and at.hash != head.hash:
            self.find(REPLACED, f"{self._folder}: record {head.seq} is not the one that {origin} names")
        else:
            self.anchored_at = max(self.anchored_at, head.seq)

    def finish(self) -> None:
        """Read what is left and judge the whole."""
        with self.reading():
            for _ in self._steps:
                pass
        if self.worst == UNREADABLE:
            return
        for code, text in self.payloads.finish():
            self.find(code, text)
        for text in self.payloads.notes():
            self.note(text)
        if self.grammar.calls:
            self.note(f"{len(self.grammar.calls)} allowed tool calls of {self.stream} have no end yet")
        if self.segments and self.chain.records == 0:
            self.find(MISSING, f"{self._folder}: the log holds no record")
        for mark in self.marks:
            if mark.root and not mark.proves:
                self.note(f"{mark.origin} is not signed by a key that is trusted: it proves nothing")
        if self.segments:
            self._judge_end()
        if self.broken == REPLACED and any((mark.seq or 0) <= self.signed_to for mark in self._apart):
            self.broken = FORK
            self.find(FORK, f"{self._folder}: trusted keys signed two different histories of it")

    def _judge_front(self) -> None:
        if trouble := self.front.judge():
            self.find(TAMPER, trouble)
        elif self.front.pruned is not None:
            self.find(WARN, self.front.pruned.told())
        if (unfinished := self.front.unfinished) is not None:
            self.note(f"{unfinished.told()}; the files are still there, and the next start removes them")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what the file system refuses into a finding."""
        try:
            yield
        except OSError as error:
            self.find(UNREADABLE, f"{error.filename or self._folder}: {error.strerror}")

    def _read(self) -> Iterator[tuple[Entry, read.Line]]:
        self._begin()
        paths = read.segments(self.run_dir, self.stream)
        if not paths:
            self.find(MISSING, f"{self._folder}: there is no log here (no seg-*.jsonl)")
        while paths:
            for path in paths:
                yield from self._segment(path, is_last=path == paths[-1])
            # Another stream may tell of a segment that was begun since.
            last = read.first_seq(paths[-1])
            paths = [path for path in read.segments(self.run_dir, self.stream) if read.first_seq(path) > last]
        self._judge_front()  # before anything says that records are missing behind the end

    def _begin(self) -> None:
        """What is known before the first record: what lies in the run directory, and where the log begins."""
        if self._begun:
            return
        self._begun = True
        # Before the records: a checkpoint that a living writer adds meanwhile must not seem to know of too many.
        self._expect_beside()
        self.front.read(self._folder)
        gone = self.front.pruned
        if gone is None:
            return
        self.chain.begin(gone)
        self.grammar.begin(gone.state)
        self.book.begin(gone.state.policy)
        self._key = gone.state.key
        self._forget(gone.last)

    def _forget(self, last: Head) -> None:
        """What others remember of records that are gone. Of the last one of them, hash and root are known."""
        place = str(self._folder / pruned.FILE)
        self._remembered(last, place)
        marks = [mark for seq in [seq for seq in self.by_seq if seq < last.seq] for mark in self.by_seq.pop(seq)]
        for mark in marks:
            self.note(f"{mark.origin} is of record {mark.seq}, which was pruned: it cannot be compared any more")
        beside = [size for size in self._beside if size < last.seq]
        for size in beside:
            del self._beside[size]
        if beside:
            self.note(f"{len(beside)} checkpoints beside the log are of pruned records: they cannot be compared")

    @property
    def _folder(self) -> Path:
        return read.stream_dir(self.run_dir, self.stream)

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
        """Keep what is worth knowing."""
        if len(self.notes) < _MOST_FINDINGS:
            self.notes.append(printable(text))

    def code(self) -> int:
        """The class of this stream alone."""
        if self.worst >= UNREADABLE:
            return UNREADABLE
        if self.broken:
            return self.broken
        if self.worst >= PROTOCOL:
            return self.worst
        signed = not self.trusted or self.signed_to >= self.tail or not self.leads
        return self.worst if self.anchored_at >= self.tail and signed else UNANCHORED

    def unproven(self) -> list[str]:
        """A sentence on the records behind the last that something else vouches for."""
        if not self.leads and not self.anchored_at:
            return [f"stream {self.stream}: nothing commits to it, so that it could be cut or replaced unseen"]
        if not 0 < self.anchored_at < self.tail:
            return []
        where = "" if self.leads else f"stream {self.stream}: "
        return [f"{where}records 1-{self.anchored_at} are anchored; what follows is not proven against a cut"]

    def trusted_anchors(self) -> list[str]:
        """What of this stream was kept elsewhere, for people: the largest one of each place."""
        largest: dict[str, int] = {}
        for mark in self.marks:
            if mark.proves and mark.origin != _CACHE:
                place = mark.origin.rpartition(":")[0] or mark.origin
                largest[place] = max(largest.get(place, 0), mark.seq or 0)
        return [f"{self.stream} up to record {seq or 'of that hash'}: {place}" for place, seq in largest.items()]

    def facts(self) -> StreamFound:
        """What was found."""
        return StreamFound(
            name=self.stream,
            records=self.chain.records,
            segments=self.segments,
            head=self.chain.head,
            proven=self.anchored_at,
            signed=self.signed_to,
            pruned=self.front.gone,
        )

    def _segment(self, path: Path, *, is_last: bool) -> Iterator[tuple[Entry, read.Line]]:
        self.segments += 1
        first = True
        for line in self._lines(path):
            # A compressed segment was closed: its last line was whole.
            if not line.complete and is_last and read.looks_torn(line.data) and not is_packed(line.path):
                self.find(
                    WARN, f"{line.place}: the last line is cut ({len(line.data)} bytes); the next start sets it aside"
                )
                return
            if not line.complete and len(line.data) >= MAX_LINE_BYTES:
                self.find(TAMPER, f"{line.place}: a line longer than any record; the rest of {path.name} was not read")
                return
            entry = self._line(line, names_segment=first)
            first = False
            if entry is not None:
                yield entry, line
        if first and not is_last:
            self.find(TAMPER, f"{path}: the segment is empty")

    def _lines(self, path: Path) -> Iterator[read.Line]:
        try:
            yield from read.raw_lines(path)
        except DamagedSegmentError as error:
            self.find(TAMPER, error.text)

    def _line(self, line: read.Line, *, names_segment: bool) -> Entry | None:
        entry, finding = self.chain.feed(line)
        if finding:
            self.find(finding.code, finding.text)
        elif not line.complete:
            self.find(TAMPER, f"{line.place}: the record does not end its line")
        if entry is None:
            return None
        if names_segment and entry.seq != read.first_seq(line.path) and not finding:
            self.find(TAMPER, f"{line.path}: the segment starts with record {entry.seq}, unlike its name")
        self._told(entry, line.place)
        return entry

    def _told(self, entry: Entry, place: str) -> None:
        # Whoever cut off that a required place failed would hide why the run froze.
        if entry.type not in ABOUT_ANCHORS or entry.body.get("required"):
            self.tail = entry.seq
        if entry.type == "log.opened":
            self._opened(entry)
        if entry.type == pruned.RECORD and (trouble := self.front.take(entry)):
            self.find(PROTOCOL, f"{place}: record {entry.seq}: {trouble}")
        self._remembered(entry, place)
        self._clock(entry, place)
        self._policy(entry, place)
        self._recovered(entry, place)
        for code, text in self.payloads.feed(entry, place):
            self.find(code, text)
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

    # What others remember of this stream

    def _opened(self, entry: Entry) -> None:
        """From here on the key counts that this opening names, and no other: not one before it, nor one after."""
        key = entry.body.get("key")
        self._key = key if isinstance(key, str) else ""
        if self._key and self._key not in self.named and len(self.named) < _MOST_FINDINGS:
            self.named.append(printable(self._key))

    def _remembered(self, entry: Entry | Head, place: str) -> None:
        for mark in self.by_seq.pop(entry.seq, ()):
            self._compare(mark, entry, place)
        if self.by_hash.pop(entry.hash, None) is not None:
            self.anchored_at = max(self.anchored_at, entry.seq)
        if (path := self._beside.pop(entry.seq, None)) is not None and self.chain.tree is not None:
            self._compare_beside(path, entry, place)

    def _compare(self, mark: _Mark, entry: Entry | Head, place: str) -> None:
        if mark.root and self.chain.tree is None:
            return  # behind a break, which says enough
        if mark.hash == entry.hash or (mark.root and self.chain.tree and self.chain.tree.root() == mark.root):
            self._agreed(mark, entry.seq)
            return
        if mark.signers:
            self._apart.append(mark)
        if mark.root:
            self.find(REPLACED, f"{place}: records 1-{entry.seq} are not the ones that {mark.origin} stands for")
        else:
            self.find(REPLACED, f"{place}: record {entry.seq} is not the one that {mark.origin} names")

    def _agreed(self, mark: _Mark, seq: int) -> None:
        if mark.proves:
            self.anchored_at = max(self.anchored_at, seq)
        if self._key in mark.signers:
            self.signed_to = max(self.signed_to, seq)
            name = self._key.partition("+")[0]
            self.signers += [name] if name not in self.signers else []
        elif mark.signers:
            signer = mark.signers[0]
            self.note(f"{mark.origin} is signed by {signer}, which was not the key of the log then: it proves nothing")

    def _compare_beside(self, path: Path, entry: Entry | Head, place: str) -> None:
        """A checkpoint that lies beside the log: no proof without a key, but one that contradicts the log is a sign."""
        try:
            note = notes.Note.parse(notes.read(path))
            signers = note.signers(self.trusted)
        except notes.BadNoteError as error:
            self.find(TAMPER, f"{path}: {error}")
            return
        checkpoint = note.checkpoint
        if checkpoint.origin != self.chain.log:
            self.find(SPLICE, f"{path}: is of {checkpoint.origin}, not of {self.chain.log}")
        elif checkpoint.size != entry.seq:
            self.find(TAMPER, f"{path}: stands for {checkpoint.size} records, unlike its name")
        else:
            mark = _Mark(seq=entry.seq, root=checkpoint.root, origin=str(path), signers=tuple(map(str, signers)))
            self._compare(mark, entry, place)

    def _expect_beside(self) -> None:
        """What lies in the run directory itself: whose log it is, its cache, and the checkpoints beside it."""
        facts = _json(self.run_dir / "run.json")
        if isinstance(facts.get("id"), str):
            self.chain.log = f"{facts['id']}/{self.stream}"
        cache = _json(self.run_dir / "state.json")
        seq, digest = cache.get("seq"), cache.get("hash")
        if cache.get("stream") == self.stream and type(seq) is int and seq in _COUNT and isinstance(digest, str):
            self.marks.append(_Mark(seq=seq, hash=digest, origin=_CACHE))
        for mark in self.marks:
            if mark.seq is None:
                self.by_hash[mark.hash] = mark
            else:
                self.by_seq.setdefault(mark.seq, []).append(mark)
        self._beside = dict(notes.stored(self._folder))

    def _judge_end(self) -> None:
        """What should stand behind the end of the log, or anywhere in it, and does not."""
        end = f"the log ends at {self.chain.head.seq}: the tail was cut"
        for mark in self.marks:
            if mark.seq is not None and mark.seq > self.chain.head.seq:
                self.find(TRUNCATED, f"{mark.origin} is record {mark.seq}; {end}")
        for mark in self.by_hash.values():
            if self.front.gone:
                self.note(f"no record that is left has the hash of {mark.origin}: it may be of one that was pruned")
                continue
            self.find(TRUNCATED, f"no record has the hash of {mark.origin}: the tail was cut, or the log replaced")
        for size, path in self._beside.items():
            if size > self.chain.head.seq:
                self.find(TRUNCATED, f"{path} was written when there were {size} records; {end}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
