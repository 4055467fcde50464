"""`status`, `freeze`, `resume`: the brake, from any terminal, without loading what a training loop needs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, such as runs/toolformer.")]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides. It goes into the audit log.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in one sentence.")]


def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say where a run stands: running, stopped or frozen, and why.

    loopguard status runs/toolformer

    Exit codes: 0 not frozen, 2 not a run directory, 4 frozen, 6 the audit log cannot be read.
    """
    from loopguard.state import run_facts, standing

    stands = standing(run_dir)
    if as_json:
        print(json.dumps(dataclasses.asdict(stands), sort_keys=True))
    else:
        owner = f"process {stands.owner_pid}" if stands.owner_pid else "nobody"
        print(f"run       {stands.run}")
        print(f"state     {'FROZEN' if stands.frozen else 'running' if stands.owner_pid else 'stopped'}")
        print(f"owner     {owner}")
        if run_facts(run_dir).get("mode") == "observe":
            print("mode      observed: nothing is withheld")
        print(f"promoted  {'nothing yet' if stands.cycle is None else f'cycle {stands.cycle}'}")
        if stands.frozen:
            print(f"freeze    {stands.freeze}{'' if stands.acknowledged else ' (latched, not yet acknowledged)'}")
            print(f"since     {stands.since or 'unknown'}")
            print(f"reason    {stands.reason}")
            print(f"why       loopguard audit why {run_dir} {stands.freeze}")
            print(f"go on     loopguard resume {run_dir} --by NAME --reason TEXT")
    raise typer.Exit(4 if stands.frozen else 0)


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
    from loopguard.errors import UsageError
    from loopguard.state import run_facts, set_latch, standing, submit

    if run_facts(run_dir).get("mode") == "observe":
        raise UsageError(f"{run_dir} is only observed: nothing in it can be frozen. End its process to stop it")
    need_words(by, reason)
    if (stands := standing(run_dir)).frozen and stands.acknowledged:
        print(f"{run_dir} is frozen already ({stands.freeze}): {stands.reason}")
        return
    submit(run_dir, "freeze", by=by, reason=reason)
    set_latch(run_dir, freeze="requested", reason=f"{by} asked for it: {reason}")
    deadline = time.monotonic() + wait_s
    while True:
        if standing(run_dir).owner_pid is None:
            _ingest(run_dir)
        if (stands := standing(run_dir)).acknowledged and stands.frozen:
            print(f"{run_dir} is frozen ({stands.freeze}): {stands.reason}")
            return
        if time.monotonic() > deadline:
            print(
                f"{run_dir} is latched, not yet acknowledged: process {stands.owner_pid} has not come to a gate yet. "
                f"It cannot update, admit or promote when it does.",
                file=sys.stderr,
            )
            raise typer.Exit(1)
        time.sleep(0.1)


def resume(
    run_dir: RunDir,
    by: By,
    reason: Reason,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to wait for the loop.")] = 10.0,
) -> None:
    """Let weight updates go on after a freeze. The decision is written to the audit log under your name.

    The frozen cycle is rolled back: the run goes on from its last promoted state.

    loopguard resume runs/toolformer --by dana --reason "bad shard 17 removed"

    Exit codes: 0 resumed, 1 was not frozen or not yet acknowledged, 2 bad usage, 6 the audit log does not verify.
    """
    from loopguard.state import standing, submit

    need_words(by, reason)
    stands = standing(run_dir)
    if not stands.frozen:
        print(f"{run_dir} is not frozen", file=sys.stderr)
        raise typer.Exit(1)
    if stands.owner_pid is None:
        ended = _ingest(run_dir, resume=(by, reason))
        print(f"{run_dir} may go on: {ended or stands.freeze} ended by {by}. Run the same command again.")
        return
    submit(run_dir, "resume", by=by, reason=reason, freeze=stands.freeze)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if not standing(run_dir).frozen:
            print(f"{run_dir} goes on: {stands.freeze} ended by {by}")
            return
        time.sleep(0.1)
    print(f"{run_dir}: the request is there, process {stands.owner_pid} has not taken it up yet", file=sys.stderr)
    raise typer.Exit(1)


def need_words(by: str, reason: str) -> None:
    """Raises UsageError where a name or a reason is empty."""
    from loopguard.errors import UsageError

    for option, text in (("--by", by), ("--reason", reason)):
        if not text.strip():
            raise UsageError(f"{option} is empty: the audit log needs to know {'who' if option == '--by' else 'why'}")


def _ingest(run_dir: Path, *, resume: tuple[str, str] | None = None) -> str | None:
    """Nobody owns the run: take its lock for a moment, record what was asked, and let go."""
    from loopguard.audit.log import AuditLog
    from loopguard.errors import RunBusyError
    from loopguard.state import CONTROLLER, FreezeState, run_facts

    facts = run_facts(run_dir)
    try:
        log = AuditLog.open(run_dir, stream=CONTROLLER, run_id=facts["id"], policy=facts["policy"])
    except RunBusyError:
        return None  # An owner has just started; it takes the request up itself.
    try:
        state = FreezeState(run_dir, log)
        state.take_requests()
        return state.resume(by=resume[0], reason=resume[1]) if resume and state.frozen else None
    finally:
        log.close()
