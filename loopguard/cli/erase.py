"""`audit erase`: have payloads of a run deleted, on a person's word, without a break in its log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from loopguard.cli.freeze import By, Reason, RunDir, ingest, need_words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_IN_A_REQUEST = 500
"""A request that is larger than 64 KiB is none."""


def erase(
    run_dir: RunDir,
    by: By,
    reason: Reason,
    commitments: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMITMENT]...", help="Payloads, as records name them.")
    ] = None,
    call: Annotated[list[str] | None, typer.Option("--call", metavar="ID", help="All that is kept of a call.")] = None,
    cycle: Annotated[int | None, typer.Option("--all-of-cycle", metavar="N", help="All of a cycle.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to wait for the loop.")] = 10.0,
) -> None:
    """Have payloads of tool calls deleted, with the salt without which nobody can guess them. It cannot be undone.

    loopguard audit erase runs/toolformer --call 4f1c --by dana --reason "holds a customer's address"

    The log stays whole: it records who had what erased, and why. A loop at work does it at its next gate.

    Exit codes: 0 erased, also before; 1 not yet taken up by the loop, or not deleted yet; 2 no such payload; 6 the
    audit log; 7 another rank is writing its log.
    """
    from loopguard.audit import blobs, read
    from loopguard.errors import UsageError
    from loopguard.state import CONTROLLER, run_facts

    run_facts(run_dir)
    need_words(by, reason)
    if not commitments and not call and cycle is None:
        raise UsageError("say what to erase: COMMITMENT..., --call ID or --all-of-cycle N; `loopguard audit show`")
    chosen = blobs.choose(run_dir, commitments=commitments or (), calls=call or (), cycle=cycle)
    if not chosen.count:
        raise UsageError(f"{run_dir}: no payload of cycle {cycle} lies apart from its log")
    for stream, wanted in chosen.here.items():
        if stream != CONTROLLER:
            _erase_in(run_dir, stream, wanted, by=by, reason=reason)
    if CONTROLLER in chosen.here and not _ask(run_dir, chosen.here[CONTROLLER], by=by, reason=reason, wait_s=wait_s):
        print(f"{run_dir}: the request is there, and the loop has not taken it up yet", file=sys.stderr)
        raise typer.Exit(1)
    left = [
        path
        for stream, wanted in chosen.here.items()
        for path in (blobs.path_of(read.stream_dir(run_dir, stream), one) for one in wanted)
        if path.exists()
    ]
    count = sum(map(len, chosen.here.values()))
    print(f"{run_dir}: {count - len(left):,} payloads erased, {len(chosen.erased):,} were erased before")
    if (run_dir / "report.html").exists():
        print(f"{run_dir}/report.html may still quote them: write it anew, or delete it", file=sys.stderr)
    if left:
        print(
            f"{left[0]} and so {len(left):,} in all could not be deleted: the next start tries again", file=sys.stderr
        )
        raise typer.Exit(1)


def _erase_in(run_dir: Path, stream: str, wanted: Sequence[str], *, by: str, reason: str) -> None:
    """In the stream of a rank, which takes no requests. Raises RunBusyError while that rank writes."""
    from loopguard.audit.log import AuditLog
    from loopguard.state import run_facts

    facts = run_facts(run_dir)
    with AuditLog.open(run_dir, stream=stream, run_id=facts["id"], policy=facts["policy"]) as log:
        log.erase(wanted, by=by, reason=reason)


def _ask(run_dir: Path, wanted: Sequence[str], *, by: str, reason: str, wait_s: float) -> bool:
    """Leave requests for whoever owns the run, or be that for a moment; says whether they were taken in."""
    from loopguard.audit import read
    from loopguard.state import CONTROLLER, submit

    names = {
        submit(run_dir, "erase", by=by, reason=reason, commitments=wanted[start : start + _IN_A_REQUEST]).id
        for start in range(0, len(wanted), _IN_A_REQUEST)
    }
    deadline = time.monotonic() + wait_s
    while True:
        if read.owner(run_dir, CONTROLLER) is None:
            ingest(run_dir)
        if not any((run_dir / "requests" / f"{name}.json").exists() for name in names):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
