"""`status`, `freeze`, `resume`: the brake, from any terminal, without loading what a training loop needs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loopguard.consent.statement import PolicyChange
    from loopguard.state import Request, Standing
    from loopguard.types import WayOn

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, such as runs/toolformer.")]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides. It goes into the audit log.")]


class Way(StrEnum):
    """What becomes of the frozen cycle."""

    rollback = "rollback"
    discard = "discard"
    accept = "accept"
    halt = "halt"


_DISPOSITION = "What becomes of the frozen cycle."
_WAIVE = "Let the rule that tripped trip nothing for so many cycles."
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in one sentence.")]


def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say where a run stands: running, stopped or frozen, and why.

    loopguard status runs/toolformer

    Exit codes: 0 not frozen, 2 not a run directory, 4 frozen, 6 the audit log cannot be read.
    """
    raise typer.Exit(tell_status(run_dir, as_json=as_json))


def tell_status(run_dir: Path, *, as_json: bool) -> int:
    """Print where a run stands; gives the exit code."""
    from loopguard.audit.events import printable
    from loopguard.state import run_facts, standing

    stands = standing(run_dir, glance=True)
    if as_json:
        print(json.dumps(dataclasses.asdict(stands), sort_keys=True))
        return 4 if stands.frozen else 0
    lines = [f"run       {stands.run}", f"state     {_state(stands)}", f"owner     {_owner(stands)}"]
    if run_facts(run_dir).get("mode") == "observe":
        lines.append("mode      observed: nothing is withheld")
    lines.append(f"promoted  {'nothing yet' if stands.cycle is None else f'cycle {stands.cycle}'}")
    if stands.hold:
        lines.append(f"hold      {stands.hold}")
    if stands.probation:
        lines.append(f"probation {stands.probation} more to be promoted under tightened thresholds")
    print("\n".join(map(printable, [*lines, *(_frozen_lines(run_dir, stands) if stands.frozen else ())])))
    return 4 if stands.frozen else 0


def _frozen_lines(run_dir: Path, stands: Standing) -> list[str]:
    # What a file says is a stranger's word: in a command that somebody may paste it is one word.
    folder, named = shlex.quote(str(run_dir)), shlex.quote(str(stands.freeze))
    lines = [
        f"freeze    {stands.freeze}{'' if stands.acknowledged else ' (latched, not yet acknowledged)'}",
        f"since     {stands.since or 'unknown'}",
        f"reason    {stands.reason}",
        f"why       loopguard audit why {folder} {named}",
    ]
    if stands.halted:
        return [*lines, "go on     it was halted for good: begin a new run"]
    if not stands.pending:
        return [*lines, f"go on     loopguard resume {folder} --by NAME --reason TEXT"]
    asked = f"asked     until {stands.expires}, {_approved(stands)}"
    return [*lines, asked, f"go on     loopguard approve {folder}"]


def freeze(
    run_dir: RunDir,
    by: By,
    reason: Reason,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to wait for the loop.")] = 10.0,
) -> None:
    """Stop updates, admission and promotion of a run, now. Anyone may.

    loopguard freeze runs/toolformer --by dana --reason "reward curve looks wrong"

    Exit codes: 0 frozen and acknowledged, 1 latched but not yet acknowledged, 2 not a run directory, 6 audit log.
    """
    from loopguard.audit.events import printable
    from loopguard.errors import UsageError
    from loopguard.state import run_facts, set_latch, standing, submit

    if run_facts(run_dir).get("mode") == "observe":
        raise UsageError(f"{run_dir} is only observed: nothing in it can be frozen. End its process to stop it")
    need_words(by, reason)
    if (stands := standing(run_dir)).frozen and stands.acknowledged and stands.pending is None:
        print(printable(f"{run_dir} is frozen already ({stands.freeze}): {stands.reason}"))
        return
    submit(run_dir, "freeze", by=by, reason=reason)
    set_latch(run_dir, freeze="requested", reason=f"{by} asked for it: {reason}")
    deadline = time.monotonic() + wait_s
    while True:
        if standing(run_dir).owner_pid is None:
            ingest(run_dir)
        stands = standing(run_dir)
        if stands.acknowledged and stands.frozen and stands.pending is None:
            print(printable(f"{run_dir} is frozen ({stands.freeze}): {stands.reason}"))
            return
        if time.monotonic() > deadline:
            print(
                f"{run_dir} is latched, not yet acknowledged: {_owner(stands)} has not come to a gate yet. "
                f"It cannot update, admit or promote when it does.",
                file=sys.stderr,
            )
            raise typer.Exit(1)
        time.sleep(0.1)


def resume(
    run_dir: RunDir,
    by: By,
    reason: Reason,
    disposition: Annotated[Way, typer.Option("--disposition", help=_DISPOSITION)] = Way.rollback,
    waive: Annotated[int, typer.Option("--waive", metavar="CYCLES", help=_WAIVE)] = 0,
    adopt_policy: Annotated[
        Path | None, typer.Option("--adopt-policy", metavar="FILE", help="Go on under this guard policy instead.")
    ] = None,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to wait for the loop.")] = 10.0,
) -> None:
    """Let weight updates go on after a freeze. The decision is written to the audit log under your name.

    As a rule the frozen cycle is rolled back: it begins again from the last promoted state. `discard` passes it over,
    `accept` goes on from the state at the freeze, and `halt` ends the run for good. Where the guard policy asks for
    approvals, this asks for them: what people have to sign is printed, and `loopguard approve` signs it.

    loopguard resume runs/toolformer --by dana --reason "bad shard 17 removed"

    Exit codes: 0 resumed (or halted), 1 was not frozen, not yet acknowledged, or refused, 2 bad usage, 3 policy, 4
    frozen: it waits for approvals, 6 the audit log does not verify.
    """
    from loopguard.audit.events import printable
    from loopguard.errors import UsageError
    from loopguard.state import standing

    need_words(by, reason)
    stands = standing(run_dir)
    if stands.halted:
        print(printable(f"{run_dir} was halted, and nothing lets it go on: {stands.reason}"), file=sys.stderr)
        raise typer.Exit(1)
    if not stands.frozen:
        print(f"{run_dir} is not frozen", file=sys.stderr)
        raise typer.Exit(1)
    deadline = time.monotonic() + wait_s
    _numbered(run_dir, until=deadline)
    way = _way_on(run_dir, disposition, waive)
    if stands.approvals_needed:
        _ask(run_dir, by=by, reason=reason, way=way, adopt_policy=adopt_policy, wait_s=wait_s)
        return
    if adopt_policy is not None:
        raise UsageError(
            f"{run_dir} resumes without approvals: leave --adopt-policy out, and start the run under {adopt_policy}"
        )
    _go_on(run_dir, by=by, reason=reason, way=way, until=deadline)


def _way_on(run_dir: Path, disposition: Way, waive: int) -> WayOn:
    """How the run is to go on. Raises UsageError where its freeze does not allow that."""
    from loopguard.state import entered, run_facts
    from loopguard.ways import way_on

    at_most = 0
    if waive:
        from loopguard.policy.load import load

        digest = run_facts(run_dir)["policy"]
        at_most = load(run_dir / "policy" / f"{digest}.yaml").policy.freeze.waive_at_most
    return way_on(run_dir, entered(run_dir).body, disposition=disposition.value, waive=waive, at_most=at_most)


def _go_on(run_dir: Path, *, by: str, reason: str, way: WayOn, until: float) -> None:
    """One name and a reason are enough."""
    from loopguard.audit.events import printable
    from loopguard.state import standing, submit

    deadline = until
    freeze = _numbered(run_dir, until=deadline).freeze
    request = submit(run_dir, "resume", by=by, reason=reason, freeze=freeze, way=way)
    while True:
        ended = ingest(run_dir) if standing(run_dir).owner_pid is None else None
        if (stands := standing(run_dir)).halted:
            print(printable(f"{run_dir} is halted by {by}: it goes on no more"))
            return
        if why := _left_frozen(run_dir, request.id):
            print(printable(f"{run_dir}: {why}"), file=sys.stderr)
            raise typer.Exit(1)
        if not (stands := standing(run_dir)).frozen:
            if other := _ended_otherwise(run_dir, request):
                print(printable(f"{run_dir} goes on, and not by this request: {other}"), file=sys.stderr)
                raise typer.Exit(1)
            if ended is not None:
                print(f"{run_dir} may go on: {ended} ended by {by}. Run the same command again.")
            else:
                print(f"{run_dir} goes on: {freeze} ended by {by}")
            return
        if time.monotonic() >= deadline:
            print(f"{run_dir}: the request is there, {_owner(stands)} has not taken it up yet", file=sys.stderr)
            raise typer.Exit(1)
        time.sleep(0.1)


def _ended_otherwise(run_dir: Path, request: Request) -> str:
    """By whom, and how, the freeze of a request ended where somebody else was faster; else the empty string."""
    from loopguard.audit import read
    from loopguard.types import WayOn

    for entry in read.entries(run_dir, types=("resume.applied",)):
        body = entry.body
        if body.get("freeze") == request.freeze:
            asked = (request.by, request.reason, request.way)
            if asked == (body.get("by"), body.get("reason"), WayOn.read(body)):
                return ""
            return f"{body.get('by')} ended {request.freeze} before: {body.get('reason')} ({body.get('disposition')})"
    return ""


def _left_frozen(run_dir: Path, request: str) -> str:
    """Why a loop that took the request in did not act on it; the empty string where it did, or has not come to it."""
    from loopguard.audit import read

    asked = False
    for entry in read.entries(run_dir, types=("resume.requested", "note.added")):
        asked = asked or entry.body.get("request") == request
        if asked and entry.type == "note.added" and entry.body.get("by") == "loopguard":
            return str(entry.body.get("text"))
    return ""


def _numbered(run_dir: Path, *, until: float) -> Standing:
    """The freeze in force, once it is recorded: a latch alone has no number that a resume could be meant for."""
    from loopguard.state import standing

    while not (stands := standing(run_dir)).acknowledged:
        if stands.owner_pid is None:
            ingest(run_dir)
        elif time.monotonic() >= until:
            print(
                f"{run_dir} is latched, not yet acknowledged: {_owner(stands)} has not come to a gate", file=sys.stderr
            )
            raise typer.Exit(1)
        else:
            time.sleep(0.1)
    return stands


def _ask(run_dir: Path, *, by: str, reason: str, way: WayOn, adopt_policy: Path | None, wait_s: float) -> None:
    """Several people have to agree: leave the request, and print what they sign."""
    from loopguard.approvals import ask
    from loopguard.audit.events import printable
    from loopguard.state import standing, submit

    next_policy, change = _other_policy(run_dir, adopt_policy)
    now = datetime.now(UTC)
    statement = ask(run_dir, by=by, reason=reason, now=now, next_policy=next_policy, change=change, way=way)
    request = submit(run_dir, "resume", by=by, reason=reason, freeze=statement.freeze, statement=statement)
    if not settle(run_dir, request.id, wait_s=wait_s):
        print(f"{run_dir}: {_owner(standing(run_dir))} takes the request up at its next gate", file=sys.stderr)
    elif (why := refusal(run_dir, request.id)) is not None:
        print(printable(f"{run_dir} stays frozen: {why}"), file=sys.stderr)
        raise typer.Exit(1)
    # Exactly what is signed, so that it can be kept in a file and signed elsewhere.
    print(statement.signed_bytes().decode("ascii"), end="")
    needed = standing(run_dir).approvals_needed
    people = f"{needed} people have" if needed > 1 else "one person has"
    print(
        f"{run_dir} stays frozen ({statement.freeze}): {people} to approve until {statement.expires}", file=sys.stderr
    )
    print(f"approve   loopguard approve {run_dir} --key ~/.ssh/id_ed25519", file=sys.stderr)
    raise typer.Exit(4)


def _other_policy(run_dir: Path, file: Path | None) -> tuple[str | None, PolicyChange]:
    """The digest of another guard policy, and whether it is looser than the one in force."""
    from loopguard.errors import UsageError
    from loopguard.policy.diff import compare
    from loopguard.policy.load import load
    from loopguard.state import run_facts

    if file is None:
        return None, "none"
    digest = run_facts(run_dir)["policy"]
    now, new = load(run_dir / "policy" / f"{digest}.yaml"), load(file)
    if new.digest == digest:
        raise UsageError(f"--adopt-policy {file} is the guard policy that {run_dir} has already")
    return new.digest, "loosened" if compare(now.policy, new.policy) == "loosened" else "tightened"


def settle(run_dir: Path, request: str, *, wait_s: float) -> bool:
    """Wait until somebody has taken a request or an approval in, or do so where nobody owns the run."""
    from loopguard.approvals import book
    from loopguard.state import standing

    deadline = time.monotonic() + wait_s
    while True:
        if standing(run_dir).owner_pid is None:
            ingest(run_dir)
        if request in book(run_dir).settled:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def refusal(run_dir: Path, about: str) -> str | None:
    """The sentence by which a request or an approval was refused; None where it was not."""
    from loopguard.audit import read

    for entry in read.entries(run_dir, types=("approval.refused",)):
        body = entry.body
        if about == (body.get("approval") or body.get("request")):
            return f"{body.get('reason')} ({body.get('code')})"
    return None


def need_words(by: str, reason: str) -> None:
    """Raises UsageError where a name or a reason is empty."""
    from loopguard.errors import UsageError

    for option, text in (("--by", by), ("--reason", reason)):
        if not text.strip():
            raise UsageError(f"{option} is empty: the audit log needs to know {'who' if option == '--by' else 'why'}")


def ingest(run_dir: Path) -> str | None:
    """Nobody owns the run: take its lock for a moment, record what was asked, and let go.

    Gives the freeze that ended. A process that owns the run by now takes the requests in itself.
    """
    from loopguard.audit.log import AuditLog
    from loopguard.errors import RunBusyError
    from loopguard.state import CONTROLLER, FreezeState, run_facts

    facts = run_facts(run_dir)
    try:
        log = AuditLog.open(run_dir, stream=CONTROLLER, run_id=facts["id"], policy=facts["policy"])
    except RunBusyError:
        return None
    try:
        return FreezeState(run_dir, log, policy=_policy_found(run_dir, facts["policy"])).take_requests()
    finally:
        log.close()


def _policy_found(run_dir: Path, digest: str) -> str:
    """What the policy of the run directory comes to, which somebody may have edited; approvals are for one digest."""
    from loopguard.approvals import book
    from loopguard.errors import PolicyError

    if book(run_dir).rule is None:
        return digest  # nobody signs anything, and reading a policy takes half a second
    from loopguard.policy.load import load

    try:
        return load(run_dir / "policy" / f"{digest}.yaml").digest
    except (PolicyError, OSError):
        return ""  # no policy that anybody could have signed


def _state(stands: Standing) -> str:
    if stands.halted:
        return "HALTED"
    if stands.frozen:
        return f"FROZEN, a resume waits for {_approved(stands)}" if stands.pending else "FROZEN"
    return "stopped" if stands.owner_pid is None else "running"


def _owner(stands: Standing) -> str:
    if stands.owner_pid is None:
        return "nobody"
    return f"process {stands.owner_pid}" if stands.owner_pid else "a process that is just starting"


def _approved(stands: Standing) -> str:
    people = f" ({', '.join(stands.approved_by)})" if stands.approved_by else ""
    return f"{len(stands.approved_by)} of {stands.approvals_needed} approvals{people}"
