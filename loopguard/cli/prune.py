"""`audit prune`: the one command of its group that removes anything, and never without a record of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import datetime

    from loopguard.audit.prune import Plan

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory that no process owns.")]


def prune(
    run_dir: RunDir,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides. It goes into the audit log.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in one sentence.")],
    keep_days: Annotated[
        int | None, typer.Option("--keep-days", metavar="N", min=1, help="Keep the records of the last N days.")
    ] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="DATE", help="Remove records from before this day, UTC.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove old records from the front of the log of a run, in whole files; a record says what went, by whom and why.

    loopguard audit prune runs/toolformer --keep-days 400 --by dana --reason "retention schedule 7"

    The rest goes on being verified. Guard policies, snapshots and capsules stay. `audit.retain_days` of the guard
    policy says what cannot be pruned.

    Exit codes: 0 pruned, 1 nothing could go, 2 bad usage, or the guard policy keeps records of that time, 3 policy,
    4 the run is frozen, 6 the log has findings or cannot be written, 7 a process owns the run.
    """
    from datetime import UTC, datetime

    from loopguard.cli.freeze import need_words
    from loopguard.controller import prune as pruning

    need_words(by, reason)
    now = datetime.now(UTC)
    plans = pruning.plan(run_dir, before=_moment(keep_days, before, now=now), now=now)
    going = any(one.body for one in plans)
    if not dry_run:
        pruning.prune(run_dir, plans, by=by, reason=reason)
    if as_json:
        print(json.dumps([_facts(one) for one in plans], sort_keys=True))
    else:
        print("\n".join(_told(one, dry_run=dry_run) for one in plans))
        if going and not dry_run:
            print(f"look      loopguard audit verify {run_dir}", file=sys.stderr)
    raise typer.Exit(0 if going else 1)


def _moment(keep_days: int | None, before: str | None, *, now: datetime) -> datetime:
    from datetime import timedelta

    from loopguard.controller.prune import day
    from loopguard.errors import UsageError

    if (keep_days is None) == (before is None):
        raise UsageError("say either --keep-days N or --before DATE: which records may go")
    try:
        return day(before) if before is not None else now - timedelta(days=keep_days or 0)
    except OverflowError:
        raise UsageError(f"--keep-days {keep_days} reaches behind the beginning of all times") from None


def _facts(one: Plan) -> dict[str, object]:
    return {"stream": one.stream, "pruned": one.records, "kept": one.kept, "held": one.held, "record": one.body}


def _told(one: Plan, *, dry_run: bool) -> str:
    from loopguard.audit.events import printable

    held = f"; {one.held}" if one.held else ""
    if one.body is None:
        return printable(f"{one.stream}: nothing goes{held or ': no closed segment is that old'}")
    verb = "would go" if dry_run else "are pruned"
    span = f"{one.body['from']}-{one.body['through']} ({one.body['since'][:10]} to {one.body['until'][:10]})"
    files = f"{len(one.body['segments']):,} segments of {one.body['bytes']:,} bytes"
    return printable(f"{one.stream}: records {span}, {files}, {verb}; {one.kept:,} records are kept{held}")
