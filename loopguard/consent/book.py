"""What a log says so far of a freeze, of the request to go on after it, and of who agreed.

A book is fed the records of one log, oldest first, and answers from them alone: the loop that counts approvals and the
auditor who checks them later ask the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from loopguard.consent.sshsig import (
    NAMESPACE,
    Key,
    KeyLineError,
    Signature,
    SignatureError,
    read_key,
    read_signature,
    stamp,
    verifies,
)
from loopguard.consent.statement import MOST_APPROVALS, SENTENCES, Code, RefusedError, Rule, Statement, read_time
from loopguard.types import NOTHING

if TYPE_CHECKING:
    from loopguard.audit.events import Entry

TYPES = (
    *("policy.loaded", "policy.adopted", "run.started", "freeze.requested", "freeze.entered"),
    *("resume.requested", "resume.applied", "run.halted", "approval.given", "approval.refused"),
)
"""The records that a book needs."""

CLOCK_SLACK_S = 1.0
"""A clock that is set while it runs jumps back by less than this, and nothing lives that shortly."""

_SAID = ("freeze", "reason", "disposition", "waives", "waives_cycles")
"""What the record of a resume repeats of its statement."""
_ACTS = ("cycle.started", "update.leased", "data.admitted")
# Of a log nearly all is about something else, and is to cost no more than these two looks.
_TAKEN = frozenset(TYPES)
_JUDGED = frozenset(("approval.given", "resume.applied", "run.halted", "policy.adopted", "policy.loaded", *_ACTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """One person's signature over one statement, checked."""

    person: str
    key: str
    """Fingerprint."""
    signature: str
    """As `ssh-keygen` wrote it."""

    def facts(self) -> dict[str, str]:
        """What records hold of it."""
        return {"person": self.person, "key": self.key, "signature": self.signature}


@dataclass(slots=True)
class Pending:
    """A request that waits for people. Lives until it is granted, refused or replaced."""

    request: str
    statement: Statement
    seq: int
    fault: Code | None = None
    """Why it cannot be granted whatever people sign."""
    approvals: list[Approval] = field(default_factory=list)

    @property
    def people(self) -> list[str]:
        """Who has approved so far."""
        return [approval.person for approval in self.approvals]


@dataclass(frozen=True, slots=True)
class Change:
    """Another guard policy that people agreed to, by name of both and until when."""

    old: str
    new: str
    before: str
    record: str
    """Hash of the `resume.applied` that says so."""


class Book:
    """What the records fed so far come to. `hash_at` gives the hash of a record by its number.

    Without `hash_at`, feed every record: the book then keeps the hashes since the last freeze itself.
    """

    def __init__(self, *, hash_at: Callable[[int], str | None] | None = None) -> None:
        self.rule: Rule | None = None
        self.policy = ""
        self.freeze: str | None = None
        self.halted = False
        """Whether the run is at its end for good."""
        self.pending: Pending | None = None
        self.change: Change | None = None
        """A loosened policy that may still be adopted."""
        self.latest = ""
        """The latest time in any record so far."""
        self.asked: dict[str, Statement] = {}
        """Every statement of this log, by its nonce."""
        self.settled: set[str] = set()
        """Ids of requests and approvals that are dealt with."""
        self._granted: set[str] = set()
        """Nonces of statements that a run went on by."""
        self._entered: tuple[int, str] = (0, "")
        self._rule_of_freeze = ""
        self._hashes: dict[int, str] = {}
        self._hash_at = hash_at or self._hashes.get
        self._start_before: str | None = None
        """Where a loop has to start before anything goes on: until when."""
        self._overdue: str | None = None
        self._runs = False
        """Whether a loop started since the log was opened, and not only a command."""
        self._adopted: tuple[str, str, bool] | None = None
        """From which policy to which, and whether people agreed; until that one is loaded."""

    def begin(self, policy: Mapping[str, Any] | None) -> None:
        """Begin behind records that are gone, and left nothing under way: the body of the last `policy.loaded`."""
        if policy is not None:
            self._load(policy)
        self._runs = True  # whether a loop had started is gone with them; the next opening says it anew

    def quiet(self, *, at: str) -> bool:
        """Whether nothing is under way by now that a later record could rest on, but the rule itself."""
        change = self.change is not None and at <= self.change.before
        waits = (self.freeze, self.pending, self._start_before, self._overdue, self._adopted)
        return not change and all(one is None for one in waits)

    def feed(self, entry: Entry) -> None:
        """Take a record in."""
        if entry.type in _TAKEN:
            self._take(entry)
            self._tick(entry.ts)
        elif entry.type == "log.opened":
            self._runs = False
        if self.freeze is not None:  # also under no rule: the one that people sign by may be adopted while frozen
            self._hashes[entry.seq] = entry.hash

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case "policy.loaded":
                self._load(body)
            case "policy.adopted":
                self._adopted = str(body.get("from")), str(body.get("to")), self._agreed(entry)
            case "run.started":
                self._runs = True
                # The later of both: a clock that was set back makes nothing last longer.
                if self._start_before is not None and max(entry.ts, self.latest) > self._start_before:
                    self._overdue = self._start_before
                self._start_before = None
            case "freeze.requested":
                self._spoil("new_trip")
            case "freeze.entered":
                self._freeze(entry)
            case "resume.requested":
                self._ask(entry)
            case "resume.applied":
                self._go_on(entry)
            case "run.halted":
                self.halted, self.pending = True, None
            case "approval.given" if self.pending is not None and body.get("request") == self.pending.request:
                self.settled.add(str(body.get("approval")))
                self.pending.approvals.append(
                    Approval(**{name: str(body.get(name)) for name in ("person", "key", "signature")})
                )
            case "approval.refused":
                self._refuse(body)
            case _:
                pass  # every other record is about something else

    @property
    def overdue(self) -> str | None:
        """Until when the run should have been started after its resume, where it was started later."""
        return self._overdue

    def belongs_to(self, policy: str) -> bool:
        """Whether the run is under this guard policy, or was just about to be; of an empty log anything is true."""
        if self._adopted is not None and self._adopted[:2] == (self.policy, policy):
            return True
        return self.policy in ("", policy)

    def may_adopt(self, old: str, new: str, *, now: str) -> str | None:
        """Hash of the record by which people agreed to this change of policy; None where nobody did, or long ago."""
        change = self.change
        fits = change is not None and (change.old, change.new) == (old, new) and now <= change.before
        return change.record if change is not None and fits else None

    def fault(self, *, now: str, policy: str, target: str | None) -> Code | None:
        """Why the pending request cannot be granted now, whoever signs. `target` is None where it is not known."""
        pending = self.pending
        if pending is None:
            return "nothing_pending"
        statement = pending.statement
        if pending.fault is not None:
            return pending.fault
        if _earlier(now, self.latest):
            return "clock"  # before anything that asks what time it is
        if policy != statement.policy or self.policy != statement.policy:
            return "policy"
        if target is not None and target != statement.target:
            return "target"
        return "expired" if max(now, self.latest) >= statement.expires else None

    def judge(self, armored: str, *, now: str | None) -> Approval:
        """The approval in a text, for the request that waits. Raises RefusedError where it does not count.

        Without `now` nobody asks whether the key counts at that time. Whether the request itself still stands is asked
        with `fault`.
        """
        if self.rule is None or self.pending is None:
            raise RefusedError("nothing_pending")
        signature = _signature(armored)
        person, key = _whose(self.rule, signature)
        known = {"person": person, "key": key.fingerprint}
        if now is not None and not key.counts_at(now):
            raise RefusedError("key_expired", **known)
        if not _signed(signature, key, self.pending.statement):
            raise RefusedError(self._misplaced(signature, key), **known)
        if person == self.pending.statement.requester and not self.rule.requester_may_approve:
            raise RefusedError("requester", **known)
        if person in self.pending.people:
            raise RefusedError("same_person", **known)
        return Approval(person=person, key=key.fingerprint, signature=armored)

    def troubles(self, entry: Entry, *, owner: bool) -> Iterator[str]:
        """What is wrong with a record, before it is fed, as far as approvals go. `owner` says whose log it stands in.

        The log of a rank that follows holds the resumes without what led to them.
        """
        return self._troubles(entry, owner=owner) if entry.type in _JUDGED else iter(())

    def _troubles(self, entry: Entry, *, owner: bool) -> Iterator[str]:
        match entry.type:
            case "approval.given" if self.rule is not None and owner:
                yield from self._approval_troubles(entry)
            case "resume.applied" if self.rule is not None:
                yield from self._resume_troubles(entry, self.rule, owner=owner)
            case "run.halted" if self.rule is not None and entry.body.get("because") != "budget":
                yield from self._resume_troubles(entry, self.rule, owner=owner)
            case "policy.adopted" if self.rule is not None and entry.body.get("change") == "loosened":
                if not self._agreed(entry):
                    yield "a loosened guard policy was adopted, and no resume that people approved says so"
            case "policy.loaded" if self.rule is not None and owner:
                yield from self._policy_troubles(entry, self.rule)
            case kind if kind in _ACTS and owner and (self._overdue, self._start_before) != (None, None):
                yield f"the run went on, and was not started before {self._overdue or self._start_before}"
                self._overdue = self._start_before = None
            case _:
                pass  # every other record needs nobody's approval

    # What a record changes

    def _load(self, body: Mapping[str, Any]) -> None:
        if body.get("digest") != self.policy:
            self.change = None
        self.policy = str(body.get("digest"))
        self.rule = _rule(body)
        self._adopted = None

    def _freeze(self, entry: Entry) -> None:
        self._spoil("new_trip")
        self.freeze, self._entered = str(entry.body.get("freeze")), (entry.seq, entry.hash)
        self._rule_of_freeze = str(entry.body.get("rule"))
        self.change = self._start_before = self._overdue = None
        self._hashes.clear()

    def _ask(self, entry: Entry) -> None:
        body = entry.body
        self.settled.add(str(body.get("request")))
        if self.rule is None:
            return
        try:
            statement = Statement.read(body.get("statement"))
        except ValueError:
            return  # nothing that anybody could sign; what waits goes on waiting
        fault = self._unsound(statement, entry, self.rule)
        self.pending = Pending(str(body.get("request")), statement, entry.seq, fault)
        self.asked.setdefault(statement.nonce, statement)

    def _unsound(self, statement: Statement, entry: Entry, rule: Rule) -> Code | None:
        seq, entered = self._entered
        if self.halted:
            return "halted"
        if statement.nonce in self.asked:
            return "replayed"
        if self.freeze is None or statement.freeze != self.freeze:
            return "other_freeze"
        if statement.entered != entered:
            return "new_trip"
        if _earlier(entry.ts, self.latest):
            return "clock"  # before anything that asks what time it is
        told = tuple(entry.body.get(name) for name in ("by", "reason", "freeze"))
        asks = (statement.requester, statement.reason, statement.freeze)
        if statement.run != entry.log.rpartition("/")[0] or asks != told:
            return "malformed"
        window_s = (_moment(statement.expires) - _moment(statement.not_before)).total_seconds()
        if not 0 < window_s <= rule.within_s or _earlier(entry.ts, statement.not_before):
            return "malformed"
        if (statement.policy_change == "none") != (statement.policy == statement.next_policy):
            return "malformed"
        if statement.waives not in (NOTHING, self._rule_of_freeze):
            return "malformed"
        if statement.policy != self.policy:
            return "policy"
        if not seq <= statement.head_seq < entry.seq or self._hash_at(statement.head_seq) != statement.head_hash:
            return "head"
        return "expired" if entry.ts >= statement.expires else None

    def _go_on(self, entry: Entry) -> None:
        body = entry.body
        self.freeze = self.pending = None
        self._hashes.clear()
        self._start_before = body.get("execute_before") if isinstance(body.get("execute_before"), str) else None
        try:
            statement = Statement.read(body.get("statement"))
        except ValueError:
            return  # a resume without approvals: where the rule asks for them, `troubles` has said so
        self._granted.add(statement.nonce)
        if statement.policy_change == "loosened" and self.rule is not None:
            before = later(entry.ts, self.rule.execute_within_s)
            self.change = Change(statement.policy, statement.next_policy, before, entry.hash)

    def _refuse(self, body: Mapping[str, Any]) -> None:
        self.settled.add(str(body.get("approval")))
        # What refuses no single approval ends the request.
        if self.pending is not None and body.get("request") == self.pending.request and body.get("approval") is None:
            self.pending = None

    def _spoil(self, code: Code) -> None:
        if self.pending is not None and self.pending.fault is None:
            self.pending.fault = code

    def _tick(self, ts: str) -> None:
        if _earlier(ts, self.latest):
            self._spoil("clock")
        self.latest = max(ts, self.latest)

    def _agreed(self, entry: Entry) -> bool:
        old, new = str(entry.body.get("from")), str(entry.body.get("to"))
        return self.may_adopt(old, new, now=max(entry.ts, self.latest)) is not None

    # What is wrong

    def _misplaced(self, signature: Signature, key: Key) -> Code:
        """What a good signature over other bytes than those that wait is a signature of."""
        assert self.pending is not None
        for statement in self.asked.values():
            if statement != self.pending.statement and _signed(signature, key, statement):
                if statement.nonce in self._granted:
                    return "replayed"
                return "other_freeze" if statement.freeze != self.pending.statement.freeze else "superseded"
        return "wrong_bytes"

    def _approval_troubles(self, entry: Entry) -> Iterator[str]:
        """A list of who agreed is read by people who check no signature."""
        body = entry.body
        fault = self.pending.fault or ("clock" if _earlier(entry.ts, self.latest) else None) if self.pending else None
        if self.pending is None or body.get("request") != self.pending.request or fault:
            yield "an approval was counted for a request that did not wait"
            return
        try:
            # A key may run out before the record is written; who lets the run go on by it is judged again.
            given = self.judge(str(body.get("signature")), now=None)
        except RefusedError as error:
            yield f"an approval was counted that does not count ({error.code}): {error}"
            return
        told = {**given.facts(), "statement_sha256": self.pending.statement.digest}
        yield from (f"an approval of {given.person} says something else of its {name}" for name in _lies(body, told))

    def _resume_troubles(self, entry: Entry, rule: Rule, *, owner: bool) -> Iterator[str]:
        body = entry.body
        freeze, by = body.get("freeze"), body.get("by")
        verb = "resumed" if entry.type == "resume.applied" else "halted"
        if body.get("approval") != "signed":
            yield f"{freeze} was {verb} by {by} without the {rule.approvals} approvals that the guard policy asks for"
            return
        try:
            statement, judged = Statement.read(body.get("statement")), read_time(body.get("judged"))
            counted = count(rule, statement, body.get("approvals"), now=judged)
        except RefusedError as error:
            yield f"the resume of {freeze} names an approval that does not count ({error.code}): {error}"
            return
        except ValueError as error:
            yield f"the resume of {freeze} names no statement that people could sign: {error}"
            return
        told = {
            "by": statement.requester,
            **{name: getattr(statement, name) for name in _SAID},
            "statement_sha256": statement.digest,
            "approvals": [approval.facts() for approval in counted],
        }
        if lies := _lies(body, told):
            yield f"the resume of {freeze} is not what its approvals are about ({', '.join(lies)})"
        if _earlier(entry.ts, judged) or (owner and judged < self.latest):
            yield f"the approvals of {freeze} were judged at another time than the log tells"
        if owner and (self.pending is None or self.pending.statement != statement):
            yield f"the resume of {freeze} was never asked for in this log"
        elif owner and (code := self.fault(now=judged, policy=statement.policy, target=None)):
            yield f"the resume of {freeze} was not to be granted ({code}): {SENTENCES[code]}"
        goes_on = entry.type == "resume.applied"
        if goes_on == (statement.disposition == "halt"):
            yield f"{freeze} was {verb}, and people agreed to {statement.disposition}"
        if owner and goes_on and not self._starts_in_time(body.get("execute_before"), judged, rule):
            yield f"the resume of {freeze} does not say by when the run has to be started"

    def _starts_in_time(self, until: Any, judged: str, rule: Rule) -> bool:
        """Whether a resume says until when the run has to be started; it need not where a loop was there to go on."""
        if until is None:
            return self._runs
        try:
            lasts_s = (_moment(read_time(until)) - _moment(judged)).total_seconds()
        except ValueError:
            return False
        return 0 <= lasts_s <= rule.execute_within_s

    def _policy_troubles(self, entry: Entry, rule: Rule) -> Iterator[str]:
        digest, asks = str(entry.body.get("digest")), _rule(entry.body)
        if digest == self.policy:
            if asks != rule:
                yield f"guard policy {digest[:12]} has another rule about resumes than before under the same name"
            return
        old, new, agreed = self._adopted or ("", "", False)
        if (old, new) != (self.policy, digest):
            yield f"the guard policy became {digest[:12]}, and nobody adopted it"
        if not agreed and (asks is None or asks.weaker_than(rule)):
            yield f"guard policy {digest[:12]} asks for less than the one before it, and nobody approved that"


def count(rule: Rule, statement: Statement, given: Any, *, now: str) -> list[Approval]:
    """The approvals in a record, all of which have to count: enough people, none twice, each over this statement.

    Raises RefusedError for the first that does not, ValueError where there are too few.
    """
    if not isinstance(given, Sequence) or len(given) > MOST_APPROVALS:
        raise ValueError(f"it names no approvals, or more than {MOST_APPROVALS}")
    counted: list[Approval] = []
    for each in given:
        armored = each.get("signature") if isinstance(each, Mapping) else None
        signature = _signature(armored if isinstance(armored, str) else "")
        person, key = _whose(rule, signature)
        known = {"person": person, "key": key.fingerprint}
        if not key.counts_at(now):
            raise RefusedError("key_expired", **known)
        if not _signed(signature, key, statement):
            raise RefusedError("wrong_bytes", **known)
        if person == statement.requester and not rule.requester_may_approve:
            raise RefusedError("requester", **known)
        if person in [one.person for one in counted]:
            raise RefusedError("same_person", **known)
        counted.append(Approval(person=person, key=key.fingerprint, signature=str(armored)))
    if len(counted) < rule.approvals:
        raise ValueError(f"{len(counted)} of {rule.approvals} people approved")
    return counted


def later(moment: str, seconds: float) -> str:
    """A recorded time and so many seconds; the end of all times where that lies behind it."""
    try:
        return stamp(_moment(moment) + timedelta(seconds=seconds))
    except OverflowError:
        return stamp(datetime.max.replace(tzinfo=UTC))


def _lies(body: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """The members of a record that are not what they have to be."""
    return [name for name, value in told.items() if body.get(name) != value]


def _rule(body: Mapping[str, Any]) -> Rule | None:
    """What `policy.loaded` says of resumes. A rule that cannot be read is one that nobody can satisfy."""
    if body.get("resume") is None:
        return None
    try:
        return Rule.read(body["resume"])
    except ValueError:
        return Rule(approvals=1, people={}, requester_may_approve=False, within_s=0, execute_within_s=0)


def _signature(armored: str) -> Signature:
    try:
        signature = read_signature(armored)
    except SignatureError as error:
        raise RefusedError("unreadable", more=str(error)) from error
    if signature.namespace != NAMESPACE:
        raise RefusedError("namespace", key=signature.fingerprint)
    return signature


def _whose(rule: Rule, signature: Signature) -> tuple[str, Key]:
    for person, lines in rule.people.items():
        for line in lines:
            try:
                key = read_key(line)
            except KeyLineError:
                continue  # no policy that loads has such a line, and a log that does makes it nobody's key
            if key.blob == signature.key:
                return person, key
    raise RefusedError("unknown_key", key=signature.fingerprint)


def _signed(signature: Signature, key: Key, statement: Statement) -> bool:
    try:
        return verifies(signature, key, statement.signed_bytes())
    except SignatureError as error:
        raise RefusedError("algorithm", key=key.fingerprint, more=str(error)) from error


def _earlier(one: str, other: str) -> bool:
    """Whether a time is before another one by more than a clock that is set may jump."""
    return bool(other) and (_moment(other) - _moment(one)).total_seconds() > CLOCK_SLACK_S


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)  # a log may hold anything; before every time, it makes nothing last
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
