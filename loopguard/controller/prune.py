"""Remove old records from the front of the logs of a run that nobody owns, by a person with a name and a reason.

Refused where something could be lost by it: while the run is frozen or asked for something, while a check of the log
finds anything wrong, and for records that the guard policy says to keep. What a kept snapshot or checkpoint is vouched
for by stays. Guard policies, snapshots and capsules are not touched.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from loopguard.audit import prune as fronts
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import TAMPER, verify
from loopguard.consent.sshsig import stamp
from loopguard.controller.aftermath import counts
from loopguard.controller.directory import anchors, refuse_unlogged
from loopguard.errors import AuditTamperedError, DiskError, LoopFrozen, PolicyMismatchError, RunBusyError, UsageError
from loopguard.policy.load import load
from loopguard.state import CONTROLLER, FreezeState, run_facts, standing

if TYPE_CHECKING:
    from loopguard.audit.events import Entry
    from loopguard.audit.prune import Plan
    from loopguard.policy.schema import GuardPolicy


def plan(run_dir: Path, *, before: datetime, now: datetime) -> list[Plan]:
    """What could go of each stream: records of before a time. Writes nothing.

    Raises UsageError where the guard policy keeps records of that time or the run waits for something, LoopFrozen where
    it is frozen, RunBusyError where it is owned, AuditTamperedError where its log has findings.
    """
    facts = run_facts(run_dir)
    policy = _policy(run_dir, str(facts["policy"]))
    _refuse_too_young(run_dir, policy, before=before, now=now)
    _refuse_unless_at_rest(run_dir)
    found = verify(run_dir)
    if found.code >= TAMPER:
        raise AuditTamperedError(
            f"{run_dir}: the log has findings ({found.status}, {found.code}), and what is pruned can be looked at by "
            f"nobody: {found.findings[0]}"
        )
    refuse_unlogged(run_dir, str(facts["policy"]))  # another one may keep less
    names = [CONTROLLER, *(name for name in read.streams(run_dir) if name != CONTROLLER)]
    limit = stamp(before)
    try:
        return [fronts.plan(run_dir, name, before=limit, stays=_Stays(run_dir, name, policy)) for name in names]
    except OSError as error:
        raise DiskError(f"{error.filename or run_dir} cannot be read: {error.strerror or error}") from error


def prune(run_dir: Path, plans: list[Plan], *, by: str, reason: str) -> None:
    """Carry out what `plan` gave. All is recorded and summed up, and kept at the anchors, before anything goes.

    Raises as `plan`, and AuditWriteError and DiskError; what was recorded is finished by the next start then.
    """
    facts = run_facts(run_dir)
    policy = _policy(run_dir, str(facts["policy"]))
    chosen = [one for one in plans if one.body is not None]
    if not chosen:
        return
    # The controller's stream is the last to be summed up: its checkpoint commits to what the others recorded.
    chosen.sort(key=lambda one: one.stream == CONTROLLER)
    names = [*(one.stream for one in chosen if one.stream != CONTROLLER), CONTROLLER]
    with contextlib.ExitStack() as stack:
        logs = {
            name: stack.enter_context(
                AuditLog.open(
                    run_dir,
                    stream=name,
                    run_id=str(facts["id"]),
                    policy=str(facts["policy"]),
                    reserve_mib=policy.audit.reserve_mib,
                    anchors=anchors(policy) if name == CONTROLLER else (),
                )
            )
            for name in names
        }
        state = FreezeState(run_dir, logs[CONTROLLER])
        state.raise_if_frozen()  # somebody may have been faster than this lock
        if state.stirred():
            raise _waits(run_dir)
        if (run_dir / "state.json").exists():
            state.remember(cycle=None)  # the cache may name a record that goes
        for one in chosen:
            _refuse_if_outdated(run_dir, one)
        # Once before it is said: a disk or a required anchor that fails now must not leave a record that the next
        # start would carry out.
        _sum_up(logs)
        recorded = [(one, fronts.record(logs[one.stream], one, by=by, reason=reason)) for one in chosen]
        _sum_up(logs)
        for one, entry in recorded:
            _carry_out(run_dir, one, entry)


def _sum_up(logs: dict[str, AuditLog]) -> None:
    """A checkpoint of each log, kept where the guard policy says. Raises AuditWriteError."""
    for log in logs.values():
        log.checkpoint()
        log.require()  # an anchor that the guard policy requires may have failed


def _refuse_if_outdated(run_dir: Path, one: Plan) -> None:
    """Between the plan and the lock somebody else may have pruned. Raises RunBusyError."""
    gone = read.pruned_front(run_dir, one.stream)
    first = gone.last.seq + 1 if gone is not None else 1
    if one.body is not None and one.body["from"] != first:
        raise RunBusyError(f"{run_dir}: somebody else pruned stream {one.stream} just now: ask again")


def _carry_out(run_dir: Path, one: Plan, entry: Entry) -> None:
    try:
        fronts.carry_out(read.stream_dir(run_dir, one.stream), entry)
    except OSError as error:
        where = error.filename or run_dir
        raise DiskError(
            f"{where}: {error.strerror or error}. Record {entry.seq} of {one.stream} says what was to be pruned; the "
            "next start of the run finishes it"
        ) from error


def _policy(run_dir: Path, digest: str) -> GuardPolicy:
    loaded = load(run_dir / "policy" / f"{digest}.yaml")
    if loaded.digest != digest:
        raise PolicyMismatchError(
            [f"{loaded.path} is {loaded.digest[:12]} by what it says: somebody edited the guard policy of {run_dir}"]
        )
    return loaded.policy


def _refuse_too_young(run_dir: Path, policy: GuardPolicy, *, before: datetime, now: datetime) -> None:
    days = policy.audit.retain_days
    latest = now - timedelta(days=days)
    if before > latest:
        raise UsageError(
            f"{run_dir}: its guard policy keeps records for {days} days (audit.retain_days), so that those of "
            f"{latest:%Y-%m-%d} and later stay: ask for --keep-days {days} or more, or for --before "
            f"{latest:%Y-%m-%d} or earlier"
        )


def _refuse_unless_at_rest(run_dir: Path) -> None:
    for name in {CONTROLLER, *read.streams(run_dir)}:
        if (owner := read.owner(run_dir, name)) is not None:
            raise RunBusyError(f"{run_dir} is in use by process {owner} (stream {name}): end it first, then prune")
    stands = standing(run_dir)
    if stands.frozen:
        raise LoopFrozen(
            str(stands.freeze), f"{stands.reason}. What led to a freeze is not pruned before somebody resumed the run"
        )
    if any((run_dir / "requests").glob("*.json")):
        raise _waits(run_dir)


def _waits(run_dir: Path) -> UsageError:
    return UsageError(f"{run_dir}/requests holds what nobody has taken in yet: start the run once, then prune")


class _Stays:
    """Says of a record of one stream why it has to stay; the empty string where it may go."""

    def __init__(self, run_dir: Path, stream: str, policy: GuardPolicy) -> None:
        self._dir = run_dir
        self._policy = policy.freeze
        self._cycle = self._now = 0
        """That of the record at hand, and the last one."""
        for entry in read.entries(run_dir, stream, types=("cycle.started", "promotion.rolled_back")):
            number = entry.cycle if entry.type == "cycle.started" else entry.body.get("cycle")
            self._now = number if isinstance(number, int) else self._now
        promotions = read.entries(run_dir, stream, types=("promotion.applied",))
        self._promoted = max((entry.seq for entry in promotions), default=0)

    def __call__(self, entry: Entry) -> str:
        """What it vouches for is still there, and somebody may want to go back to it."""
        body = entry.body
        match entry.type:
            case "snapshot.written" if body.get("promoted"):
                name = str(body.get("snapshot"))
                if name.isalnum() and (self._dir / "snapshots" / name).is_dir():
                    return f"snapshot {name[:12]} of cycle {entry.cycle} is still there"
            case "checkpoint.saved":
                path = Path(str(body.get("checkpoint")))
                if not path.is_absolute() or "/body/checkpoint" in entry.redacted:
                    return f"the checkpoint {path} may still be there: the log does not say in which folder"
                if path.exists():
                    return f"the checkpoint {path} is still there"
            case "cycle.started" if entry.cycle is not None:
                self._cycle = entry.cycle
            case "freeze.entered":
                cycle = self._cycle if entry.cycle is None else entry.cycle
                if counts(str(body.get("gate")), cycle, now=self._now, policy=self._policy):
                    return f"{body.get('freeze')} still counts for freeze.halt_above of the guard policy"
            case "resume.applied" if entry.seq > self._promoted and body.get("disposition") in ("accept", "discard"):
                return f"the run goes on from what was decided about {body.get('freeze')}"
            case _:
                pass  # vouches for nothing that a run goes back to
        return ""


def day(text: str) -> datetime:
    """A date or a time in UTC, as people write it. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise UsageError(f"--before {text!r} is no date; expected one such as 2026-01-31") from None
