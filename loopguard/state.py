"""Whether weights may change right now, and how that survives anything.

Frozen means: the latch file is there, or the audit log says so, or the cache beside them contradicts the log. Stopping
is cheap and open to anyone; going on takes a logged resume with a name and a reason. Nothing else removes the latch.

This module needs neither torch nor pydantic, so that `status`, `freeze` and `resume` answer at once from any terminal.
"""

from __future__ import annotations

import json
import os
import stat
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from loopguard.approvals import Approvals, book
from loopguard.audit import read
from loopguard.audit.events import MAX_DEPTH, Head, canonical, depth, printable
from loopguard.audit.redact import clean
from loopguard.consent.book import Book, count, later
from loopguard.errors import AuditError, AuditWriteError, DiskError, LoopFrozen, UsageError
from loopguard.snapshots import replace_durably, sync_directory, writing
from loopguard.snapshots.files import make_directory, write_synced
from loopguard.types import NOTHING, ROLL_BACK, WayOn
from loopguard.ways import unacceptable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loopguard.approvals import Consent
    from loopguard.audit.events import Entry
    from loopguard.audit.log import AuditLog
    from loopguard.consent.statement import Statement
    from loopguard.types import Decision, Signal

CONTROLLER = "controller"
"""The stream of the process that owns the run."""

HaltCause = Literal["decision", "budget"]
RequestKind = Literal["freeze", "resume", "approval", "note", "erase"]
_TURNS = ("freeze.entered", "resume.applied", "run.halted")
_ANCHOR = "anchor"
"""In a latch, in place of a freeze: a required anchor failed."""
_SIGNAL = "signal"
"""In a latch, in place of a freeze: the process of the run was sent the signal that freezes it."""
_NEXT = ("resume (rolls back, unless another disposition is asked for)", "read the report")
_HALTED = "halted for good: "
_MAX_REQUEST_BYTES = 64 * 1024
"""A larger file in `requests/` is none of ours. Escaped, so much still fits into a record."""
_MOST_LEVELS = MAX_DEPTH // 2
"""Of a request: what it asks people to sign is recorded as it came, also where it is no statement."""
_MOST_CHARS = 2000
"""Of the reason of a freeze: one that no record could hold would keep the freeze out of the log."""
_ALWAYS_TOLD = ("update", "restored", "capsule", "capsule_digest")
"""Of a freeze, also where the rest is too much for a record."""
_MOST_SIGNALS = 100
"""So many of them are told then."""
_UNKNOWN_RESUME = "the controller's stream says that the run goes on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands, as the files of its directory tell it."""

    run: str
    frozen: bool
    halted: bool
    """Whether that is for good: nothing lets this run go on."""
    freeze: str | None
    reason: str
    since: str | None
    """When the freeze was entered, RFC 3339."""
    hold: str
    """Why no cycle begins for now; the empty string where that is not so."""
    probation: int
    """How many cycles under tightened thresholds are left, as far as the loop has told."""
    acknowledged: bool
    """False while the latch is set but no owner has recorded the freeze yet."""
    epoch: int
    cycle: int | None
    """The last promoted cycle."""
    owner_pid: int | None
    """The living process that owns the run; 0 for one that has only just taken it."""
    pending: str | None
    """The request that waits for approvals."""
    approved_by: tuple[str, ...]
    """Who has approved it so far."""
    approvals_needed: int
    """How many people a resume takes; 0 where one name and a reason are enough."""
    expires: str | None
    """Until when the request waits, RFC 3339."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A wish from outside the process that owns a run. Immutable once it is there."""

    id: str
    kind: RequestKind
    by: str
    reason: str
    freeze: str | None
    """The freeze that a resume is meant for; another one is not lifted by it."""
    statement: Any = None
    """What people have to sign before a resume; None where the guard policy asks for no approvals."""
    signature: str | None = None
    """Of an approval."""
    way: WayOn = ROLL_BACK
    """How a resume wants the run to go on."""
    commitments: tuple[str, ...] = ()
    """The payloads that are to be erased."""
    consent: Consent | None = None
    """By which people a resume was approved; nothing that a file in `requests/` can say."""


class FreezeState:
    """Whether weights may change right now.

    One state lives as long as the process that owns the run, and survives it: it is read back from the latch and from
    the audit log. `freeze` stops updates, admission and promotion; only `resume`, with a name and a reason, lets them
    go on.

    Of several ranks, one owns the run. The others hold a state that `follows`: it says of a freeze what the owner says,
    records it in the stream of its own rank, and leaves the cache, the requests and the removal of the latch to it.
    """

    def __init__(self, run_dir: Path, log: AuditLog, *, follows: str | None = None, policy: str | None = None) -> None:
        """`policy` is the digest of the guard policy in force; leave it out where that is what the log was opened with.

        Whoever opens the log without having read the policy says here what its file comes to.
        """
        self._dir = run_dir
        self._log = log
        self._latches = read.latches(run_dir)
        self._follows = follows
        """The stream of a rank that does not own the run."""
        self._approvals = (
            Approvals(run_dir, log, policy=log.policy if policy is None else policy) if not follows else None
        )
        self.hold = ""
        """Why no cycle begins for now, for the cache."""
        self.probation = _count(_cache(run_dir).get("probation"))
        """How many cycles it still lasts, for the cache; a freeze ends it."""
        self._needed: int | None = None
        """How many people a resume takes; None until somebody asks."""
        turns = list(read.entries(run_dir, CONTROLLER, types=_TURNS))
        gone = read.pruned_front(run_dir, CONTROLLER)
        self._count = sum(entry.type == "freeze.entered" for entry in turns) + (gone.state.freezes if gone else 0)
        self._freeze, self._reason = _told(turns)
        self._halted = _halted(turns)
        if follows is not None:
            # The owner may be about to settle what is there: it tells in `follow`.
            self._freeze, self._reason = None, ""
        elif self._latched:
            self._adopt_latch(turns[-1] if turns else None)
        elif contradiction := _contradiction(run_dir):
            self._enter(rule="cache", gate="audit", reason=contradiction)

    @property
    def frozen(self) -> bool:
        """Whether anything says frozen: this process, or a latch that somebody set beside it."""
        return self._freeze is not None or self._latched

    @property
    def _latched(self) -> bool:
        return any(latch.exists() for latch in self._latches)

    @property
    def halted(self) -> bool:
        """Whether the run is at its end for good."""
        return self._halted

    @property
    def freeze_id(self) -> str:
        """The freeze in force, or the empty string."""
        return self._freeze or ""

    @property
    def reason(self) -> str:
        """Why it is frozen, in one sentence, or the empty string."""
        return self._reason

    @property
    def count(self) -> int:
        """How many freezes this run has had, so that all ranks give the next one the same id."""
        return self._count

    def follow(self, *, count: int, freeze: str, reason: str) -> None:
        """Take over where the owner of the run stands, and bring the own stream up to it."""
        self._count, self._freeze, self._reason = count, freeze or None, reason
        turns = list(read.entries(self._dir, self._stream, types=_TURNS))
        told, _ = _told(turns)
        if told is not None and told != self._freeze:
            # It was resumed while this rank was not there.
            resumes = [
                entry
                for entry in read.entries(self._dir, CONTROLLER, types=("resume.applied",))
                if entry.body["freeze"] == told
            ]
            body = dict(resumes[-1].body) if resumes else {"freeze": told, "by": "loopguard", "reason": _UNKNOWN_RESUME}
            self._log.append("resume.applied", body, actor=resumes[-1].actor if resumes else None)
        if self._freeze is not None and told != self._freeze:
            self._log.append("freeze.entered", self._told_of(gate="operator", rule="rank 0", reason=reason))

    def raise_if_frozen(self) -> None:
        """Raise LoopFrozen where the loop may not go on."""
        if self.frozen:
            raise LoopFrozen(self.freeze_id, self.reason)

    def latch(self, reason: str) -> str:
        """Set the latch, durably, and give the freeze its id. The first reason stays if it is set already."""
        if self._freeze is None:
            self._count += 1
            self._freeze, self._reason = f"f{self._count}", reason
            set_latch(self._dir, freeze=self._freeze, reason=reason)
            if self._follows is None:
                self._name_latch(self._freeze)
            self._log.epoch += 1
        return self._freeze

    def _name_latch(self, freeze: str) -> None:
        """Let a latch that was set from outside name the freeze that takes it up.

        Else a start after a kill between a resume and the latch's removal would take it for another freeze.
        """
        latch = _read_latch(self._dir)
        if latch["freeze"] != freeze:
            there = next(place for place in self._latches if place.exists())
            with suppress(DiskError):  # it stands all the same, and a full disk must not keep the freeze from going on
                replace_durably(there, json.dumps(latch | {"freeze": freeze}, sort_keys=True).encode() + b"\n")

    def freeze(self, decision: Decision, *, cycle: int | None, facts: Mapping[str, Any]) -> str:
        """Latch and record a freeze; gives its id. `facts` are what else the record should hold.

        Raises AuditWriteError where the record could not be written; latch and process are frozen all the same.
        """
        return self._enter(
            gate=decision.gate,
            rule=decision.rule,
            reason=decision.reason,
            cycle=cycle,
            facts={"signals": [signal_facts(signal) for signal in decision.signals], **facts},
        )

    def resume(
        self,
        *,
        by: str,
        reason: str,
        way: WayOn = ROLL_BACK,
        consent: Consent | None = None,
        starts_later: bool = False,
    ) -> str:
        """Record that a person lets the loop go on, then remove the latch. Gives the id of the freeze that ended.

        With `starts_later` no loop is there to go on at once, and an approved resume holds until a time. Raises
        UsageError, and leaves everything as it is, where the guard policy asks for approvals that `consent` lacks, and
        where the run was halted.
        """
        if self._halted:
            raise UsageError(f"{self._dir} was halted: begin a new run")
        ended = self._freeze or ""
        body = {"freeze": ended, "by": by, "reason": reason, **way.facts()}
        body |= self._consented(consent, starts_later=starts_later)
        self._log.append("resume.applied", body, actor={"kind": "person", "id": by})
        if self._follows is None:
            self._unlatch()
        self._freeze, self._reason = None, ""
        self.remember(cycle=None)
        return ended

    def halt(self, *, by: str, reason: str, because: HaltCause, consent: Consent | None = None) -> None:
        """Record that this run goes on no more. The latch stays, and so does the freeze.

        Raises UsageError where people decide about it and `consent` lacks their approvals.
        """
        body = {"freeze": self._freeze or "", "by": by, "reason": reason, "because": because}
        if because == "decision":
            body |= WayOn(disposition="halt").facts() | self._consented(consent, starts_later=False)
        self._log.append("run.halted", body, actor={"kind": "person", "id": by} if because == "decision" else None)
        self._halted, self._reason = True, f"{_HALTED}{reason}"
        self.remember(cycle=None)

    def _consented(self, consent: Consent | None, *, starts_later: bool) -> dict[str, Any]:
        """What the record says of approvals. Raises UsageError where they do not suffice."""
        rule = book(self._dir).rule
        if rule is None:
            return {"approval": "none"}
        if consent is None:
            raise UsageError(f"{self._dir} resumes with the approvals of {rule.approvals}: see `loopguard approve`")
        facts = consent.facts()
        try:
            count(rule, consent.statement, facts["approvals"], now=consent.judged)
        except ValueError as error:
            raise UsageError(f"{self._dir}: the approvals do not suffice: {error}") from error
        before = later(consent.judged, rule.execute_within_s) if starts_later else None
        return facts | {"execute_before": before}

    def overdue(self) -> str:
        """A sentence where this start comes after the time that an approved resume gave it; else the empty string."""
        until = book(self._dir).overdue
        return (
            f"the resume was approved for a start before {until}, and nobody started the run until now" if until else ""
        )

    def freeze_unwritable(self, reason: str) -> None:
        """Freeze although the log takes no records: spend its reserve on a last one, and latch."""
        self._reason = reason
        if self._freeze is None:
            self._count += 1
            self._freeze = f"f{self._count}"
        body: dict[str, Any] = {"freeze": self._freeze, "gate": "audit", "rule": "unwritable", "reason": reason}
        body |= {"epoch": self._log.epoch, "signals": [], "update": None, "restored": None, "capsule": None}
        try:
            self._log.append_last("freeze.entered", {**body, "next": list(_NEXT)})
        finally:
            set_latch(self._dir, freeze=self._freeze, reason=reason)

    def stirred(self) -> bool:
        """Whether somebody outside asked for something, or set the latch: a look that costs next to nothing."""
        if self._freeze is None and self._latched:
            return True
        if self._follows is not None:
            return False
        try:
            with os.scandir(self._dir / "requests") as entries:
                return any(entry.name.endswith(".json") for entry in entries)
        except FileNotFoundError:
            return False

    def requests(self) -> Iterator[Request]:
        """Take in what was asked from outside, oldest first; each request is handed out once, after it was recorded.

        Where a resume takes approvals, what is handed out is the resume that enough people agreed to.
        """
        for path in sorted((self._dir / "requests").glob("*.json")):
            request = _read_request(path)
            if request is None:
                self._log.append("note.added", {"by": "loopguard", "text": f"{path.name} is not a request; set aside"})
            else:
                yield from self._take_in(request)
            _set_aside(path)

    def _take_in(self, request: Request) -> Iterator[Request]:
        approvals = self._approvals
        assert approvals is not None  # requests are for the owner of a run
        if request.kind == "erase":
            # It stops nothing and lets nothing go on, so that it ends no request that waits for approvals.
            self._log.erase(request.commitments, by=request.by, reason=request.reason)
            return
        if approvals.settled(request.id):
            return
        body: dict[str, Any] = {"request": request.id, "by": request.by, "reason": request.reason}
        body["freeze"] = request.freeze
        if request.kind == "approval":
            consent = approvals.take(request.id, signature=request.signature or "")
            if consent is not None:
                asked = consent.statement
                yield Request(
                    id=request.id,
                    kind="resume",
                    by=asked.requester,
                    reason=asked.reason,
                    freeze=asked.freeze,
                    way=asked.way,
                    consent=consent,
                )
        elif request.kind == "resume" and approvals.needed:
            approvals.ask(request.id, by=request.by, body=body | {"statement": request.statement})
        else:
            body |= request.way.facts() if request.kind == "resume" else {}
            if not self._recorded(request):
                self._log.append(f"{request.kind}.requested", body, actor={"kind": "person", "id": request.by})
            approvals.drop()  # a freeze that somebody asks for ends what waits
            yield request

    def _recorded(self, request: Request) -> bool:
        """Whether a process has recorded a request and died before it could act on it, or set it aside."""
        told = read.entries(self._dir, CONTROLLER, types=(f"{request.kind}.requested",))
        return any(entry.body.get("request") == request.id for entry in told)

    def take_requests(self) -> str | None:
        """Settle every request where no loop is alive to do it; gives the freeze that a resume among them ended."""
        ended = None
        for request in self.requests():
            if request.kind == "freeze" and not self._freeze:
                self._enter(gate="operator", rule="request", reason=f"{request.by} asked for it: {request.reason}")
            elif request.kind == "resume" and self.lifts(request):
                ended = self._act_on(request)
        return ended

    def _act_on(self, request: Request) -> str | None:
        facts: dict[str, Any] = {"by": request.by, "reason": request.reason, "consent": request.consent}
        if request.way.disposition == "halt":
            self.halt(because="decision", **facts)
            return None
        if request.way.disposition == "accept" and (why := unacceptable(self._dir, self.freeze_id)):
            self.stay_frozen(why)
            return None
        return self.resume(way=request.way, starts_later=True, **facts)

    def stay_frozen(self, why: str) -> None:
        """Record why a resume that was asked for is not acted on."""
        self._log.append("note.added", {"by": "loopguard", "text": f"the run stays frozen: {why}"})

    def lifts(self, request: Request) -> bool:
        """Whether a resume request is meant for the freeze in force, and waives no more than what tripped there."""
        if self._freeze is None or self._halted or request.freeze not in {None, self._freeze}:
            return False
        return request.way.waives in (NOTHING, entered(self._dir).body.get("rule"))

    def remember(self, *, cycle: int | None, undone: bool = False) -> None:
        """Write the cache from which `status` answers: where the log stood, and what it said.

        Without a `cycle` the promoted one stays as it is known, unless promotions were `undone` down to none.
        """
        if self._follows is not None:
            return
        self._log.sync()  # the cache must not name a record that a power cut could take back
        path = self._dir / "state.json"
        if cycle is None and not undone:
            cycle = _cache(self._dir).get("cycle")
        body = {
            "stream": CONTROLLER,
            "seq": self._log.head.seq,
            "hash": self._log.head.hash,
            "frozen": self._freeze is not None,
            "freeze": self._freeze,
            "reason": clean(self._reason),
            "cycle": cycle,
            "hold": self.hold,
            "probation": self.probation,
            "approvals": self._approvals_needed(),
        }
        replace_durably(path, json.dumps(body, sort_keys=True).encode() + b"\n")

    def tell(self, *, hold: str | None = None, probation: int | None = None) -> None:
        """Let `status` say from now on why no cycle begins, or how long a probation lasts; the rest stays."""
        hold, probation = self.hold if hold is None else hold, self.probation if probation is None else probation
        self.hold, self.probation = hold, probation
        cache = _cache(self._dir)
        if (hold, probation) == (str(cache.get("hold") or ""), _count(cache.get("probation"))):
            return
        self.remember(cycle=None)

    def _approvals_needed(self) -> int | None:
        """For the cache of a run that goes on; of a frozen one the log is asked each time."""
        if self._needed is None and self._freeze is None and self._approvals is not None:
            # Once: it reads the log, and no other policy is loaded while this process lives.
            self._needed = self._approvals.needed
        return self._needed

    def _adopt_latch(self, turn: Entry | None) -> None:
        latch = _read_latch(self._dir)
        if self._freeze is not None:
            return
        if turn is not None and turn.body["freeze"] == latch["freeze"]:
            # The resume is in the log and the process died before it took the latch away.
            self._unlatch()
            return
        # Somebody set the latch, or this run died between the latch and its record.
        self._enter(rule="latch", gate="operator", reason=latch["reason"])

    def _unlatch(self) -> None:
        for latch in self._latches:
            if latch.exists():
                with writing(latch):
                    latch.unlink(missing_ok=True)
                    sync_directory(latch.parent)

    def _enter(
        self,
        *,
        gate: str,
        rule: str,
        reason: str,
        cycle: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        freeze = self.latch(reason)
        # All ranks give the reason that they agreed on, which is more than the one who latched knew.
        self._reason, self.probation = reason, 0
        body = self._told_of(gate=gate, rule=rule, reason=reason)
        told = dict(facts or {})
        try:
            self._log.append("freeze.entered", body | told, cycle=cycle)
        except AuditWriteError:
            raise
        except AuditError:
            # More than a record holds, as of thousands of metrics. The capsule has it, and the freeze comes first.
            kept = {name: told[name] for name in _ALWAYS_TOLD if name in told}
            # First those that forbid a waiver: they must not get lost among many that do not.
            signals = sorted(told.get("signals", ()), key=lambda signal: not signal["at_once"])[:_MOST_SIGNALS]
            self._log.append("freeze.entered", body | kept | {"signals": signals}, cycle=cycle)
        self.remember(cycle=None)
        return freeze

    def _told_of(self, *, gate: str, rule: str, reason: str) -> dict[str, Any]:
        body: dict[str, Any] = {"freeze": self._freeze, "gate": gate, "rule": rule, "reason": _brief(reason)}
        return body | {
            "epoch": self._log.epoch,
            "signals": [],
            "update": None,
            "restored": None,
            "capsule": None,
            "next": list(_NEXT),
        }

    @property
    def _stream(self) -> str:
        return self._follows or CONTROLLER


def signal_facts(signal: Signal) -> dict[str, Any]:
    """What a record says of a signal."""
    return {
        "level": signal.level,
        "monitor": signal.monitor,
        "metric": signal.metric,
        "value": signal.value,
        "low": signal.low,
        "high": signal.high,
        "score": signal.score,
        "since": signal.since,
        "direction": signal.direction,
        "once_in": signal.once_in,
        "at_once": signal.at_once,
        "holds": signal.holds,
        "reason": signal.reason,
    }


def set_latch(run_dir: Path, *, freeze: str, reason: str) -> None:
    """Freeze a run directory by its latch alone. Anyone may; a latch that is there already stays as it is.

    It appears whole or not at all, also where several processes set it at once. Where the run directory takes nothing,
    it is set in the second place that the guard policy names. Raises DiskError where no place takes it.
    """
    places = read.latches(run_dir)
    if any(latch.exists() for latch in places):
        return
    body = {
        "freeze": freeze,
        "reason": _brief(clean(reason)),
        "ts": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    data = json.dumps(body, sort_keys=True).encode() + b"\n"
    for latch in places[:-1]:
        try:
            _write_latch(latch, data)
        except DiskError:
            continue
        return
    _write_latch(places[-1], data)


def bring_latch(run_dir: Path) -> None:
    """Take a latch from the second place, which is about to change, into the run directory. Raises DiskError."""
    here, *elsewhere = read.latches(run_dir)
    for latch in elsewhere:
        if latch.exists():
            with writing(here):
                data = latch.read_bytes()
            if not here.exists():
                _write_latch(here, data)
            with writing(latch):
                latch.unlink(missing_ok=True)
                sync_directory(latch.parent)


def _write_latch(latch: Path, data: bytes) -> None:
    partial = latch.parent / f".latch-{uuid.uuid4().hex}"
    with writing(latch):
        write_synced(partial, data)
        partial.rename(latch)
        sync_directory(latch.parent)


def anchor_lost(run_dir: Path, reason: str) -> None:
    """Freeze a run whose audit log could not be kept where its guard policy requires. Raises DiskError."""
    set_latch(run_dir, freeze=_ANCHOR, reason=reason)


def latch_reason(run_dir: Path) -> str:
    """Why the latch is set, for a freeze that takes it up: what this process left there, or that it was set outside."""
    latch = _read_latch(run_dir)
    return latch["reason"] if latch["freeze"] in (_ANCHOR, _SIGNAL) else "the latch was set from outside"


def signalled(run_dir: Path, name: str) -> None:
    """Freeze a run whose process was sent a signal. Raises DiskError."""
    set_latch(run_dir, freeze=_SIGNAL, reason=f"somebody sent the process signal {name}")


def entered(run_dir: Path) -> Entry:
    """The record of the last freeze. Raises UsageError where nothing ever froze."""
    freezes = list(read.entries(run_dir, CONTROLLER, types=("freeze.entered",)))
    if not freezes:
        raise UsageError(f"{run_dir}: its log tells of no freeze")
    return freezes[-1]


def submit(
    run_dir: Path,
    kind: RequestKind,
    *,
    by: str,
    reason: str,
    freeze: str | None = None,
    way: WayOn | None = None,
    statement: Statement | None = None,
    signature: str | None = None,
    commitments: Sequence[str] = (),
) -> Request:
    """Leave a request for the process that owns the run. It appears whole or not at all, and is on disk after this.

    `way` is how a resume wants the run to go on, `statement` what it asks people to sign, `signature` an approval.
    `commitments` is what is to be erased. Secrets in the reason do not reach the disk. Raises UsageError where there is
    more to say than a request holds; a freeze is never refused for that, and says less.
    """
    by, reason = clean(by), clean(reason)
    if kind == "freeze":
        by, reason = _brief(by), _brief(reason)
    folder = run_dir / "requests"
    make_directory(folder)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    body: dict[str, Any] = {"kind": kind, "by": by, "reason": reason, "freeze": freeze}
    if way is not None:
        body |= way.facts()
    if statement is not None:
        body["statement"] = statement.facts()
    if signature is not None:
        body["signature"] = signature
    if commitments:
        body["commitments"] = list(commitments)
    text = json.dumps(body, sort_keys=True) + "\n"
    if len(text) > _MAX_REQUEST_BYTES:
        raise UsageError(
            f"the request to {kind} has {len(text):,} bytes, and {_MAX_REQUEST_BYTES:,} are read: give a shorter reason"
        )
    partial = folder / f".{name}"
    partial.write_text(text, encoding="utf-8")
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    (folder / f"{name}.json").hardlink_to(partial)
    partial.unlink()
    sync_directory(folder)
    return Request(
        id=name,
        kind=kind,
        by=by,
        reason=reason,
        freeze=freeze,
        statement=body.get("statement"),
        signature=signature,
        way=way or ROLL_BACK,
        commitments=tuple(commitments),
    )


def waiting(run_dir: Path, kind: RequestKind) -> list[Request]:
    """The requests of a kind that nobody has taken in yet, oldest first."""
    read_ones = [_read_request(path) for path in sorted((run_dir / "requests").glob("*.json"))]
    return [request for request in read_ones if request is not None and request.kind == kind]


def standing(run_dir: Path, *, glance: bool = False) -> Standing:
    """Where a run stands, from its files alone. Raises UsageError where `run_dir` is not a run directory.

    With `glance` the cache is believed where it says that the run goes on and the log has the record that it names. So
    it is instant, and good for a look; whoever decides something reads the log.
    """
    facts = run_facts(run_dir)
    if glance and (seen := _glance(run_dir, facts["id"])) is not None:
        return seen
    # A run that is just starting has its directory first, and then its log.
    turns = list(read.entries(run_dir, CONTROLLER, types=_TURNS)) if read.segments(run_dir, CONTROLLER) else []
    freeze, reason = _told(turns)
    since = turns[-1].ts if freeze else None
    acknowledged = True
    if freeze is None and read.latched(run_dir):
        latch = _read_latch(run_dir)
        freeze, reason, since, acknowledged = latch["freeze"], latch["reason"], latch["ts"], False
    if freeze is None and (contradiction := _contradiction(run_dir)):
        freeze, reason = "unrecorded", contradiction
    tail, owner = read.last(run_dir, CONTROLLER), read.owner(run_dir, CONTROLLER)
    told = book(run_dir)
    pending = told.pending if told.pending is not None and told.pending.fault is None else None
    return Standing(
        run=facts["id"],
        frozen=freeze is not None,
        halted=_halted(turns),
        freeze=freeze,
        reason=reason,
        since=since,
        hold=_hold(_cache(run_dir), owner) if freeze is None else "",
        probation=_count(_cache(run_dir).get("probation")),
        acknowledged=acknowledged,
        epoch=tail.epoch if tail else 0,
        cycle=_cache(run_dir).get("cycle"),
        owner_pid=owner,
        pending=pending.request if pending else None,
        approved_by=tuple(pending.people) if pending else (),
        approvals_needed=told.rule.approvals if told.rule else 0,
        expires=pending.statement.expires if pending else None,
    )


def _glance(run_dir: Path, run: str) -> Standing | None:
    """Where a run stands by its cache and by what was recorded since; None where that does not say that it goes on."""
    cache = _cache(run_dir)
    seq, needed = cache.get("seq"), cache.get("approvals")
    if cache.get("frozen") is not False or type(seq) is not int or type(needed) is not int:
        return None
    types = (*_TURNS, "policy.loaded")
    told = read.since(run_dir, CONTROLLER, Head(seq, str(cache.get("hash"))), types=types)
    if told is None or any(entry.type in _TURNS for entry in told) or read.latched(run_dir):
        return None
    since = Book()
    for entry in told:
        since.feed(entry)
    if told:
        needed = since.rule.approvals if since.rule else 0
    tail, owner = read.last(run_dir, CONTROLLER), read.owner(run_dir, CONTROLLER)
    return Standing(
        run=run,
        frozen=False,
        halted=False,
        freeze=None,
        reason="",
        since=None,
        hold=_hold(cache, owner),
        probation=_count(cache.get("probation")),
        acknowledged=True,
        epoch=tail.epoch if tail else 0,
        cycle=cache.get("cycle"),
        owner_pid=owner,
        pending=None,
        approved_by=(),
        approvals_needed=needed,
        expires=None,
    )


def run_facts(run_dir: Path) -> dict[str, Any]:
    """What `run.json` says. Raises UsageError where there is none or it cannot be read."""
    path = run_dir / "run.json"
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{run_dir} is not a run directory: it has no run.json. Name one, such as runs/toolformer"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    for name in ("id", "policy"):
        if not isinstance(facts, dict) or not isinstance(facts.get(name), str):
            raise UsageError(f"{path}: is not the description of a run; it has no {name}")
    return dict(facts)


def _told(turns: Sequence[Entry]) -> tuple[str | None, str]:
    """The freeze in force, and why."""
    halts = [turn for turn in turns if turn.type == "run.halted"]
    if halts:
        return str(halts[0].body["freeze"]), f"{_HALTED}{halts[0].body['reason']}"  # whatever somebody wrote after it
    if not turns or turns[-1].type == "resume.applied":
        return None, ""
    return str(turns[-1].body["freeze"]), str(turns[-1].body["reason"])


def _halted(turns: Sequence[Entry]) -> bool:
    return any(turn.type == "run.halted" for turn in turns)


def _count(value: Any) -> int:
    return value if type(value) is int else 0


def _hold(cache: Mapping[str, Any], owner: int | None) -> str:
    """Why no cycle begins. A process that was killed waits for nothing."""
    return str(cache.get("hold") or "") if owner is not None else ""


def _cache(run_dir: Path) -> dict[str, Any]:
    try:
        cache = json.loads(_small(run_dir / "state.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _contradiction(run_dir: Path) -> str:
    """A sentence where the cache and the log cannot both be true, else the empty string."""
    path = run_dir / "state.json"
    if not path.exists():
        return ""
    cache = _cache(run_dir)
    if not cache:
        return f"{path.name} cannot be read"
    seq = cache.get("seq")
    entry = read.at(run_dir, CONTROLLER, seq) if type(seq) is int else None
    if entry is None or entry.hash != cache.get("hash"):
        return printable(f"{path.name} names record {seq!r} with a hash that the log does not have"[:200])
    return ""


def _read_latch(run_dir: Path) -> dict[str, str]:
    unreadable = {"freeze": "unrecorded", "reason": "the latch is set", "ts": ""}
    try:
        latch = json.loads(_small(next(place for place in read.latches(run_dir) if place.exists())))
    except (StopIteration, OSError, ValueError, RecursionError):
        return unreadable
    return unreadable | {k: _brief(str(v)) for k, v in latch.items()} if isinstance(latch, dict) else unreadable


def _small(path: Path) -> bytes:
    """What a file of the run directory says that anybody may have put there.

    Raises OSError, and ValueError for what is too long or no file: a pipe would keep a loop from its gates for ever.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path} is no file")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        data = file.read(_MAX_REQUEST_BYTES + 1)
    if len(data) > _MAX_REQUEST_BYTES:
        raise ValueError(f"{path} has more than {_MAX_REQUEST_BYTES:,} bytes")
    return data


def _brief(text: str) -> str:
    if len(text) > _MOST_CHARS:
        text = clean(text)  # first: of a secret that is cut nobody knows that it is one
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."


def _read_request(path: Path) -> Request | None:
    try:
        body = json.loads(_small(path))
        size = len(clean(canonical(body)))  # what stands for a secret may be longer than it was
        kind, by, reason, freeze = body["kind"], str(body["by"]), str(body["reason"]), body.get("freeze")
        statement, signature = body.get("statement"), body.get("signature")
        way = WayOn.read(body)
        commitments = tuple(map(str, body.get("commitments", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if kind not in get_args(RequestKind) or size > _MAX_REQUEST_BYTES or depth(body) > _MOST_LEVELS:
        return None
    if kind == "erase" and not (by.strip() and reason.strip() and commitments):
        return None
    return Request(
        id=path.stem,
        kind=kind,
        by=by,
        reason=reason,
        freeze=freeze,
        statement=statement,
        signature=str(signature) if signature is not None else None,
        way=way,
        commitments=commitments,
    )


def _set_aside(path: Path) -> None:
    done = path.parent / "done"
    done.mkdir(exist_ok=True)
    path.rename(done / path.name)
    sync_directory(path.parent)
