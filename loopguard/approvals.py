"""Approvals of a resume, in a run directory: ask for them, find what waits, count them, record each step.

What counts is decided in `consent`, from the records of the log alone. Here is what that needs around it: the state of
the directory at the time of asking, and the records `resume.requested`, `approval.given` and `approval.refused`. Only
the process that holds the log writes them. Letting the run go on is the business of `state`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.audit.redact import clean
from loopguard.consent.book import TYPES, Approval, Book, count, later
from loopguard.consent.sshsig import stamp
from loopguard.consent.statement import Code, PolicyChange, RefusedError, Statement
from loopguard.errors import SnapshotError, UsageError
from loopguard.snapshots import SnapshotStore, capsule_digest
from loopguard.types import NOTHING, ROLL_BACK, WayOn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from loopguard.audit.log import AuditLog
    from loopguard.types import Disposition


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """Enough people agreed to one statement. Lives from the last approval to the record of the resume."""

    statement: Statement
    approvals: tuple[Approval, ...]
    judged: str
    """When they were counted."""

    def facts(self) -> dict[str, Any]:
        """What `resume.applied` holds of it."""
        return {
            "approval": "signed",
            "statement": self.statement.facts(),
            "statement_sha256": self.statement.digest,
            "approvals": [approval.facts() for approval in self.approvals],
            "judged": self.judged,
        }


def book(run_dir: Path, *, stream: str = read.CONTROLLER) -> Book:
    """What the log of a run says so far of its freezes and approvals; nothing, where a run has no log yet.

    Raises AuditTamperedError, AuditError.
    """

    def hash_at(seq: int) -> str | None:
        entry = read.at(run_dir, stream, seq)
        return entry.hash if entry else None

    found = Book(hash_at=hash_at)
    if (gone := read.pruned_front(run_dir, stream)) is not None:
        found.begin(gone.state.policy)
    for entry in read.entries(run_dir, stream, types=TYPES) if read.segments(run_dir, stream) else ():
        found.feed(entry)
    return found


def target(run_dir: Path, *, freeze: str, disposition: Disposition) -> str:
    """What a run goes on from: a snapshot, "nothing", or with `accept` the capsule of the freeze, by its digest.

    The empty string where nobody can say, which fits nothing.
    """
    if disposition == "accept":
        return capsule_digest(run_dir / "freezes" / freeze) or ""
    try:
        promoted = SnapshotStore(run_dir / "snapshots").promoted()
    except SnapshotError:
        return ""
    return promoted.snapshot if promoted else NOTHING


def ask(
    run_dir: Path,
    *,
    by: str,
    reason: str,
    now: datetime,
    next_policy: str | None = None,
    change: PolicyChange = "none",
    way: WayOn = ROLL_BACK,
) -> Statement:
    """What people have to sign so that this run may go on, as it stands now.

    `next_policy` is the digest of another guard policy that the run is to go on under, `change` what that one is.
    Raises UsageError where the run is not frozen by its log, resumes without approvals, or cannot go on in that way.
    """
    told = book(run_dir)
    if told.rule is None:
        raise UsageError(f"{run_dir}: its guard policy asks for no approvals")
    if told.freeze is None:
        raise UsageError(f"{run_dir} is latched, and no process has recorded the freeze yet: start it once, then ask")
    head = read.last(run_dir)
    entered = list(read.entries(run_dir, types=("freeze.entered",)))[-1]
    assert head is not None
    if not (goes_to := target(run_dir, freeze=told.freeze, disposition=way.disposition)):
        raise UsageError(
            f"{run_dir}/snapshots/promoted.json cannot be read: nobody can say what the run would go back to"
        )
    # As the records will hold them: a signature is over just what is recorded.
    by, reason = clean(by), clean(reason)
    begins = max(stamp(now), head.ts)
    return Statement(
        run=head.log.rpartition("/")[0],
        freeze=told.freeze,
        entered=entered.hash,
        head_seq=head.seq,
        head_hash=head.hash,
        disposition=way.disposition,
        target=goes_to,
        waives=way.waives,
        waives_cycles=way.waives_cycles,
        policy=told.policy,
        policy_change=change,
        next_policy=next_policy or told.policy,
        reason=reason,
        requester=by,
        not_before=begins,
        expires=later(begins, told.rule.within_s),
        nonce=secrets.token_hex(16),
    )


class Approvals:
    """Counts the approvals of one run, for the process that owns its log.

    `policy` is the digest of the guard policy in force, as it was read by whoever opened the log.
    """

    def __init__(self, run_dir: Path, log: AuditLog, *, policy: str) -> None:
        self._dir = run_dir
        self._log = log
        self._policy = policy
        pending = self.book().pending
        if pending is not None and len(pending.approvals) >= self.needed:
            self._refuse(RefusedError("interrupted"), request=pending.request)

    def book(self) -> Book:
        """What the log says by now."""
        return book(self._dir)

    @property
    def needed(self) -> int:
        """How many people have to agree; 0 where one name and a reason are enough."""
        rule = self.book().rule
        return rule.approvals if rule else 0

    def settled(self, request: str) -> bool:
        """Whether a request or an approval was dealt with before, by a process that died before it set it aside."""
        return request in self.book().settled

    def ask(self, request: str, *, by: str, body: Mapping[str, Any]) -> None:
        """Record a request to resume. It waits from then on, or is refused at once."""
        try:
            Statement.read(body.get("statement"))
            readable: Code | None = None
        except ValueError:
            readable = "no_statement" if body.get("statement") is None else "malformed"
        if readable is None and (before := self.book().pending) is not None:
            self._refuse(RefusedError("superseded"), request=before.request)
        self._log.append("resume.requested", body, actor={"kind": "person", "id": by})
        if readable is not None:
            self._refuse(RefusedError(readable), request=request)
        else:
            self.drop()

    def take(self, approval: str, *, signature: str) -> Consent | None:
        """Count an approval, or refuse it; gives the consent once enough people agreed. Every answer is recorded."""
        self.drop()
        told = self.book()
        waits = told.pending.request if told.pending else None
        try:
            given = told.judge(signature, now=self._now())
        except RefusedError as error:
            self._refuse(error, request=waits, approval=approval)
            return None
        assert told.pending is not None
        body: dict[str, Any] = {"request": waits, "approval": approval, **given.facts()}
        body |= {"statement_sha256": told.pending.statement.digest, "of": self.needed}
        self._log.append("approval.given", body, actor={"kind": "person", "id": given.person})
        return self._granted()

    def drop(self) -> bool:
        """Refuse the request that waits where it can not be granted any more; says whether that was so."""
        told = self.book()
        if told.pending is None:
            return False
        asked = told.pending.statement
        goes_to = target(self._dir, freeze=asked.freeze, disposition=asked.disposition)
        code = told.fault(now=stamp(self._log.now()), policy=self._policy, target=goes_to)
        if code is not None:
            more = f"the log has a time of {told.latest}; ask again after that" if code == "clock" else ""
            self._refuse(RefusedError(code, more=more), request=told.pending.request)
        return code is not None

    def _granted(self) -> Consent | None:
        told = self.book()
        if told.pending is None or told.rule is None or len(told.pending.approvals) < told.rule.approvals:
            return None
        if self.drop():
            return None
        statement = told.pending.statement
        judged = self._now()
        given = [approval.facts() for approval in told.pending.approvals]
        try:
            # Once more and all together: a key may have run out since its person signed.
            approvals = count(told.rule, statement, given, now=judged)
        except RefusedError as error:
            self._refuse(error, request=told.pending.request)
            return None
        return Consent(statement=statement, approvals=tuple(approvals), judged=judged)

    def _now(self) -> str:
        """The later of now and the last time in the log: a clock that was set back makes nothing last longer."""
        return max(stamp(self._log.now()), self.book().latest)

    def _refuse(self, error: RefusedError, *, request: str | None, approval: str | None = None) -> None:
        """Record it. What refuses no single approval ends the request."""
        body = {"request": request, "approval": approval, "code": error.code, "reason": str(error)}
        self._log.append("approval.refused", {**body, "person": error.person, "key": error.key})
