"""`audit`: read, explain and verify the record of a run. Nothing here writes to a log."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loopguard.audit.events import Entry
    from loopguard.audit.query import CycleTold, Freeze
    from loopguard.audit.verify import Verification

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, or a copy of one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfType = Annotated[str | None, typer.Option("--type", metavar="T", help="Only this type, or one group, such as tool.")]
OfCycle = Annotated[int | None, typer.Option("--cycle", metavar="N", help="Only records of this cycle.")]

app = typer.Typer(
    help="Read, explain and verify the audit log of a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def show(run_dir: RunDir, as_json: AsJson = False, type_: OfType = None, cycle: OfCycle = None) -> None:
    """Print the records of a run, oldest first; with --json exactly the lines that the log holds.

    loopguard audit show runs/toolformer --type freeze --cycle 3

    Exit codes: 0 printed, 2 no log there or no such type, 6 a record was altered.
    """
    from loopguard.audit import read
    from loopguard.audit.events import canonical, fields_of

    types = _types(type_)
    for entry in read.entries(run_dir, types=types):
        if cycle is None or entry.cycle == cycle:
            print(canonical(fields_of(entry)) if as_json else _line(entry))


@app.command()
def freezes(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List the freezes of a run and who let each of them go on.

    loopguard audit freezes runs/toolformer

    Exit codes: 0 listed, also where there is none; 2 no log there; 6 a record was altered.
    """
    from loopguard.audit import query

    found = query.freezes(run_dir)
    if as_json:
        print(json.dumps([freeze.facts() for freeze in found], sort_keys=True))
        return
    if not found:
        print(f"{run_dir} has never frozen", file=sys.stderr)
        return
    _table(["freeze", "when", "cycle", "gate", "rule", "ended by", "reason"], [_freeze_row(freeze) for freeze in found])


@app.command()
def cycle(
    run_dir: RunDir,
    number: Annotated[int | None, typer.Argument(metavar="[N]", help="Only this cycle.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Say what happened in each cycle of a run, or in one: calls, data, updates, panel, result.

    loopguard audit cycle runs/toolformer 3

    Exit codes: 0 printed, 2 no log there or no such cycle, 6 a record was altered.
    """
    from loopguard.audit import query
    from loopguard.errors import UsageError

    told = query.cycles(run_dir)
    picked = [one for one in told if number is None or one.number == number]
    if number is not None and not picked:
        known = ", ".join(str(known) for known in sorted({one.number for one in told})) or "none"
        raise UsageError(f"{run_dir} has no cycle {number}; it has {known}")
    if as_json:
        print(json.dumps([one.facts() for one in picked], sort_keys=True))
    elif number is None:
        _table(_CYCLE_COLUMNS, [_cycle_row(one) for one in picked])
    else:
        print("\n\n".join("\n".join(_cycle_lines(one)) for one in picked))


@app.command()
def why(
    run_dir: RunDir,
    freeze: Annotated[
        str | None, typer.Argument(metavar="[FREEZE]", help="A freeze, such as f1; else the last.")
    ] = None,
) -> None:
    """Explain a freeze in about ten lines: what tripped, what was undone, which actor stays, what to do.

    loopguard audit why runs/toolformer f1

    Exit codes: 0 explained, 2 no log there or no such freeze, 6 a record was altered.
    """
    from loopguard.audit import query

    print(query.why(run_dir, freeze))


@app.command()
def verify(
    run_dir: RunDir,
    expect_head: Annotated[
        str | None, typer.Option("--expect-head", metavar="HASH", help="A head noted earlier, SEQ:HASH or HASH.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that nobody changed the log of a run, and that nothing happened in it that was not allowed.

    loopguard audit verify runs/toolformer --expect-head 1051:1f51e92704ba...

    Exit codes: 0 ok and anchored, 2 bad usage, 10 warning, 20 whole but unanchored, 30 tampered, 31 truncated,
    32 replaced, 33 spliced, 34 forked, 40 something happened that was not allowed, 42 missing, 50 unreadable.
    """
    from loopguard.audit.verify import verify as check

    result = check(run_dir, expect_head=expect_head)
    print(json.dumps(_verification_facts(result), sort_keys=True) if as_json else _verification_text(run_dir, result))
    raise typer.Exit(result.code)


@app.command()
def report(run_dir: RunDir) -> None:
    """Write report.html into the run directory: curves, cycles, and a card for each freeze, in one file.

    loopguard audit report runs/toolformer

    Exit codes: 0 written, 2 no log there.
    """
    from loopguard.audit.report import write_report

    print(write_report(run_dir))


def _types(wanted: str | None) -> list[str] | None:
    """The record types of an option: one type, or all of a group."""
    from loopguard.audit.events import TYPES
    from loopguard.errors import UsageError

    if wanted is None:
        return None
    types = [name for name in TYPES if wanted in {name, name.partition(".")[0]}]
    if not types:
        groups = sorted({name.partition(".")[0] for name in TYPES})
        raise UsageError(
            f"--type {wanted!r} is no record type; expected a group ({', '.join(groups)}) or one of its types"
        )
    return types


def _line(entry: Entry) -> str:
    from loopguard.audit.events import printable

    body = " ".join(f"{key}={_value(value)}" for key, value in entry.body.items())
    cycle = "-" if entry.cycle is None else str(entry.cycle)
    return printable(f"{entry.seq:>6}  {entry.ts[:19]}Z  cycle {cycle:<3} {entry.type:<18} {body}")


def _value(value: Any) -> str:
    from loopguard.audit.events import is_digest
    from loopguard.audit.query import short

    if isinstance(value, str):
        return short(value) if is_digest(value) else value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _freeze_row(freeze: Freeze) -> list[str]:
    from loopguard.audit.query import when

    body = freeze.body
    ended = str(freeze.resumed.body.get("by")) if freeze.resumed else "FROZEN"
    where = "-" if freeze.entered.cycle is None else str(freeze.entered.cycle)
    told = [freeze.id, when(freeze.entered.ts), where, body.get("gate"), body.get("rule"), ended, body.get("reason")]
    return [str(item) for item in told]


_CYCLE_COLUMNS = ["cycle", "result", "calls", "refused", "contained", "admitted", "quarantined", "updates", "panel"]


def _cycle_row(told: CycleTold) -> list[str]:
    from loopguard.audit.query import amount

    counts = (told.calls, told.refused, told.contained, told.admitted, sum(told.quarantined.values()), told.updates)
    panel = " ".join(f"{name}={amount(value)}" for name, value in sorted(told.panel.items()))
    again = " again" if told.attempt > 1 else ""
    return [f"{told.number}{again}", told.result, *(f"{count:,}" for count in counts), panel or "-"]


def _cycle_lines(told: CycleTold) -> list[str]:
    from loopguard.audit.events import printable
    from loopguard.audit.query import amount, when

    outcomes = ", ".join(f"{count:,} {status}" for status, count in told.outcomes.most_common())
    held = ", ".join(f"{count:,} {reason}" for reason, count in told.quarantined.most_common())
    panel = ", ".join(f"{name} {amount(value)}" for name, value in sorted(told.panel.items()))
    span = f" ({told.first_update}-{told.last_update})" if told.updates else ""
    kept = f"{told.kept:,} of {told.proposed:,} kept, " if told.kept is not None and told.proposed is not None else ""
    again = f", attempt {told.attempt}" if told.attempt > 1 else ""
    rows = [
        ("", f"cycle {told.number}{again}: {told.result}, from {when(told.started)}"),
        ("calls", f"{told.calls:,}, {told.refused:,} refused, {told.lost:,} lost"),
        ("outcomes", outcomes),
        ("data", f"{kept}{told.admitted:,} admitted"),
        ("held back", held),
        ("updates", f"{told.updates:,} applied{span}, {told.withheld:,} withheld, {told.skipped:,} skipped"),
        ("panel", panel),
        ("promotion", told.decision),
    ]
    return [printable(f"{label:<9} {text}" if label else text) for label, text in rows if text]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need to be; text of strangers cannot break out of its cell."""
    from loopguard.audit.events import printable

    cells = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _verification_facts(result: Verification) -> dict[str, Any]:
    return {
        "code": result.code,
        "status": result.status,
        "records": result.records,
        "segments": result.segments,
        "head": {"seq": result.head.seq, "hash": result.head.hash},
        "findings": result.findings,
        "notes": result.notes,
    }


def _verification_text(run_dir: Path, result: Verification) -> str:
    """What was found, and last of all the head, for a person to note down."""
    segments = f"{result.segments:,} segment{'' if result.segments == 1 else 's'}"
    lines = [
        f"{result.status.upper()} ({result.code}): {result.summary}",
        *(f"finding: {text}" for text in result.findings),
        *(f"note: {text}" for text in result.notes),
        f"{result.records:,} records in {segments} are unaltered",
    ]
    if result.code in {10, 20}:
        lines.append("note this head down elsewhere; from then on it can be checked with")
        lines.append(f"  loopguard audit verify {shlex.quote(str(run_dir))} --expect-head {result.head}")
    return "\n".join([*lines, f"head {result.head}"])
