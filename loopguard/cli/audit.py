"""`audit`: read, explain, verify and prove the record of a run. Nothing here writes to a log; `prune`, `erase` do."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopguard.cli.erase import erase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loopguard.audit.blobs import Reader
    from loopguard.audit.events import Entry
    from loopguard.audit.query import CycleTold, Freeze
    from loopguard.audit.stats import Stats
    from loopguard.audit.verify import Verification

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, or a copy of one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfType = Annotated[str | None, typer.Option("--type", metavar="T", help="Only this type, or one group, such as tool.")]
OfCycle = Annotated[int | None, typer.Option("--cycle", metavar="N", help="Only records of this cycle.")]

Keys = Annotated[
    list[str] | None, typer.Option("--key", metavar="VKEY", help="A public key that is trusted, or a file with it.")
]

Anchors = Annotated[
    list[Path] | None,
    typer.Option("--anchors", metavar="PLACE", help="A file, folder or repository with kept checkpoints."),
]
ExpectHead = Annotated[
    str | None, typer.Option("--expect-head", metavar="HASH", help="A head noted earlier, SEQ:HASH or HASH.")
]

WithoutPayloads = Annotated[
    bool, typer.Option("--without-payloads", help="The payloads of calls did not come along; do not miss them.")
]

_HEAD_CHARS = 200
"""Of a payload, in the line of a record."""
_MOST = 8
"""Kinds of one thing in a line of `stats`; --json has all of them."""

app = typer.Typer(
    help="Read, explain and verify the audit log of a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(erase)


@app.command()
def show(run_dir: RunDir, as_json: AsJson = False, type_: OfType = None, cycle: OfCycle = None) -> None:
    """Print the records of a run, oldest first; with --json exactly the lines that the log holds.

    loopguard audit show runs/toolformer --type freeze --cycle 3

    Of a payload that lies apart its beginning is shown, or that it was erased.

    Exit codes: 0 printed, 2 no log there or no such type, 6 a record was altered.
    """
    _say_pruned(run_dir)
    from loopguard.audit import blobs, read

    types = _types(type_)
    payloads = blobs.Reader(run_dir)
    for entry in read.entries(run_dir, types=types):
        if cycle is None or entry.cycle == cycle:
            _print_record(entry, as_json=as_json, payloads=payloads)


@app.command()
def tail(
    run_dir: RunDir,
    count: Annotated[int, typer.Option("-n", metavar="N", min=0, help="How many of the newest records.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the newest records of a run, oldest first; with --follow also those to come, until it is interrupted.

    loopguard audit tail runs/toolformer -n 20 --follow

    Exit codes: 0 printed, 2 no log there, 6 a record was altered, 130 interrupted while it followed.
    """
    from loopguard.audit import blobs
    from loopguard.audit.tail import Tail

    watched, payloads = Tail(run_dir), blobs.Reader(run_dir)
    for entry in watched.newest(count):
        _print_record(entry, as_json=as_json, payloads=payloads)
    for entry in watched.follow() if follow else ():
        _print_record(entry, as_json=as_json, payloads=payloads)


@app.command()
def freezes(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List the freezes of a run and who let each of them go on.

    loopguard audit freezes runs/toolformer

    Exit codes: 0 listed, also where there is none; 2 no log there; 6 a record was altered.
    """
    _say_pruned(run_dir)
    from loopguard.audit import query

    told = query.story(run_dir)
    found = told.freezes
    if as_json:
        print(json.dumps([freeze.facts() for freeze in found], sort_keys=True))
        return
    if not found:
        print(f"{run_dir} {told.unfrozen}{_foreseen(run_dir)}", file=sys.stderr)
        return
    _table(["freeze", "when", "cycle", "gate", "rule", "ended by", "reason"], [_freeze_row(freeze) for freeze in found])


@app.command()
def approvals(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List who asked for a resume, who approved it with which key, what was refused and why, and what went on.

    loopguard audit approvals runs/toolformer

    Exit codes: 0 listed, also where there is none; 2 no log there; 6 a record was altered.
    """
    pruned = _say_pruned(run_dir)
    from loopguard.audit import read
    from loopguard.audit.events import canonical, fields_of

    types = ("resume.requested", "approval.given", "approval.refused", "resume.applied")
    found = list(read.entries(run_dir, types=types))
    if as_json:
        print(f"[{','.join(canonical(fields_of(entry)) for entry in found)}]")
    elif not found:
        since = " since" if pruned else ""
        print(f"{run_dir} was never asked to resume{since}", file=sys.stderr)
    else:
        _table(["when", "what", "who", "key", "says"], [_approval_row(entry) for entry in found])


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
    _say_pruned(run_dir)
    from loopguard.audit import blobs, query
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
        if (kept := blobs.choose(run_dir, cycle=number)).count:
            print(f"payloads  {kept.count:,} lie apart or did, {len(kept.erased):,} were erased")


@app.command()
def why(
    run_dir: RunDir,
    freeze: Annotated[
        str | None, typer.Argument(metavar="[FREEZE]", help="A freeze, such as f1; else the last.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a freeze on one screen: what tripped, what was undone, what it goes back to, who may resume and how.

    loopguard audit why runs/toolformer f1

    Exit codes: 0 explained, 2 no log there or no such freeze, 6 a record was altered.
    """
    _say_pruned(run_dir)
    from loopguard.audit import query

    print(json.dumps(query.why_facts(run_dir, freeze), sort_keys=True) if as_json else query.why(run_dir, freeze))


@app.command()
def stats(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Count what happened in a run, and how often in an hour: calls, data, updates, promotions, freezes, records.

    loopguard audit stats runs/toolformer

    Exit codes: 0 counted, 2 no log there, 6 a record was altered.
    """
    _say_pruned(run_dir)
    from loopguard.audit.stats import stats as count

    counted = count(run_dir)
    if as_json:
        print(json.dumps(counted.facts(), sort_keys=True))
        return
    print("\n".join(_stats_lines(counted)))
    print()
    rates = [[kind, f"{number:,}", _rate(counted, number)] for kind, number in sorted(counted.types.items())]
    _table(["record", "count", "an hour"], rates)


@app.command()
def verify(
    run_dir: RunDir,
    expect_head: ExpectHead = None,
    key: Keys = None,
    anchors: Anchors = None,
    without_payloads: WithoutPayloads = False,
    as_json: AsJson = False,
) -> None:
    """Check that nobody changed the log of a run, in any stream, and that nothing happened that was not allowed.

    loopguard audit verify runs/toolformer --key gpu7.vkey --anchors /mnt/other/anchors.jsonl

    A key says who wrote the log, a head or checkpoint kept elsewhere that nothing was cut off. Both have to come from
    elsewhere than the run; what was trusted is always printed.

    Exit codes: 0 ok and anchored, 2 bad usage, 10 warning, 20 whole but unanchored, 30 tampered, 31 truncated,
    32 replaced, 33 spliced, 34 forked, 40 something happened that was not allowed, 41 an approval does not hold,
    42 missing, 50 unreadable.
    """
    from loopguard.audit.verify import verify as check

    result = check(
        run_dir,
        expect_head=expect_head,
        keys=key or (),
        anchors=anchors or (),
        without_payloads=without_payloads,
    )
    print(json.dumps(_verification_facts(result), sort_keys=True) if as_json else _verification_text(run_dir, result))
    raise typer.Exit(result.code)


@app.command()
def prove(
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="[RUN_DIR]", help="A run directory.", show_default=False)
    ] = None,
    seq: Annotated[
        int | None, typer.Argument(metavar="[SEQ]", help="The number of the record.", show_default=False)
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Check a proof instead of making one.")
    ] = None,
    key: Keys = None,
) -> None:
    """Print a proof that one record is in the log of a run, or check one without the log.

    loopguard audit prove runs/toolformer 812 > record-812.json

    loopguard audit prove --check record-812.json --key gpu7.vkey

    Exit codes: 0 printed, or it holds and a trusted key signed it; 2 bad usage; 6 a record was altered; 20 it holds,
    and nothing says who made it; 30 it does not hold.
    """
    from loopguard.audit.proof import prove as make
    from loopguard.errors import UsageError

    if check is not None and run_dir is None and seq is None:
        raise typer.Exit(_check_proof(check, key or []))
    if check is not None or run_dir is None or seq is None or key:
        raise UsageError("give RUN_DIR and SEQ to make a proof, or --check FILE, and --key with it, to check one")
    print(json.dumps(make(run_dir, seq), sort_keys=True))


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who signs, such as gpu7 or example.org/training.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to put it; else where a loop looks for it.")
    ] = None,
) -> None:
    """Make a key that signs the checkpoints of audit logs, and print its public half, the vkey.

    loopguard audit keygen gpu7

    Keep the vkey where whoever can write to the runs cannot, and pass it to `audit verify` as --key.

    Exit codes: 0 made, 2 there is a key already, or no key can be kept there.
    """
    from loopguard.audit import keys

    path, public = keys.keygen(name, folder=out)
    print(public)
    print(f"the signing key is {path}; whoever reads it can sign as {name}", file=sys.stderr)
    if out is not None:
        print(f"a loop uses it with {keys.VARIABLE}={shlex.quote(str(path))}", file=sys.stderr)


@app.command()
def export(
    run_dir: RunDir,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="jsonl, csv, cloudevents, otlp or parquet.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A file; else standard output.")] = None,
) -> None:
    """Write every record of a run in a format of other tools: JSON lines, a table, CloudEvents, OpenTelemetry.

    loopguard audit export runs/toolformer --to csv --out records.csv

    jsonl is the log itself; csv is safe to open in a spreadsheet; cloudevents is one JSON array; otlp is OTLP/JSON
    logs, one batch a line; parquet needs pyarrow.

    Exit codes: 0 written, 2 no log there, no such format or no such place, 6 a record was altered: no file was written.
    """
    _say_pruned(run_dir)
    from loopguard.audit.export import export as write

    count = write(run_dir, to=to, out=out)
    if out is not None:
        print(f"{out}: {count:,} records", file=sys.stderr)


@app.command()
def report(
    run_dir: RunDir,
    expect_head: ExpectHead = None,
    key: Keys = None,
    anchors: Anchors = None,
    without_payloads: WithoutPayloads = False,
) -> None:
    """Write report.html into the run directory: the check, curves, cycles, and a card for each freeze, in one file.

    loopguard audit report runs/toolformer --key gpu7.vkey --anchors /mnt/other/anchors.jsonl

    What is trusted stands on top of the page, also where nothing is.

    Exit codes: 0 written, 2 no log there, or a key or an anchor that is none.
    """
    _say_pruned(run_dir)
    from loopguard.audit.report import write_report

    trusts: dict[str, Any] = {"keys": key or (), "anchors": anchors or (), "expect_head": expect_head}
    print(write_report(run_dir, **trusts, without_payloads=without_payloads))


@app.command()
def bundle(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.tar.gz", help="The file, outside of the run directory.")],
    expect_head: ExpectHead = None,
    key: Keys = None,
    anchors: Anchors = None,
    without_payloads: Annotated[
        bool, typer.Option("--without-payloads", help="Leave out what tool calls were given and gave back.")
    ] = False,
) -> None:
    """Pack what an auditor needs who has nothing of ours: log, guard policies, keys, anchors, report, a verifier.

    loopguard audit bundle runs/toolformer --out calc.tar.gz --key gpu7.vkey --anchors /mnt/other/anchors.jsonl

    A README in it says how to check it. Payloads of calls that the log keeps apart are in it. Quarantined records,
    snapshots and capsules stay where they are.

    Exit codes: 0 packed, also where the log does not verify: the check is printed; 2 no log there, or no such place.
    """
    _say_pruned(run_dir)
    from loopguard.audit.bundle import bundle as pack

    packed = pack(
        run_dir,
        out=out,
        keys=key or (),
        anchors=anchors or (),
        expect_head=expect_head,
        without_payloads=without_payloads,
    )
    found = packed.verification
    if packed.payloads:
        left_out = "--without-payloads leaves them out, and what is erased later stays in it"
        print(f"the bundle holds {packed.payloads:,} payloads of calls as they are: {left_out}", file=sys.stderr)
    if packed.living:
        print(f"{run_dir} is being written: the bundle holds it up to now", file=sys.stderr)
    print(f"{out}: {len(packed.names):,} files; {found.status} ({found.code}): {found.summary}")


def _say_pruned(run_dir: Path) -> bool:
    """One line where the front of the log is gone: what is printed next does not begin at the beginning."""
    from loopguard.audit import read
    from loopguard.errors import AuditTamperedError

    try:
        gone = read.pruned_front(run_dir)
    except AuditTamperedError as error:
        print(error, file=sys.stderr)  # an altered log can be looked at all the same, and has a report
        return False
    if gone is not None:
        print(gone.told(), file=sys.stderr)
    return gone is not None


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


def _print_record(entry: Entry, *, as_json: bool, payloads: Reader) -> None:
    """One record on a line of its own, at once: somebody may be watching."""
    from loopguard.audit.events import canonical, fields_of

    print(canonical(fields_of(entry)) if as_json else _line(entry, payloads), flush=True)


def _line(entry: Entry, payloads: Reader | None = None) -> str:
    from loopguard.audit import blobs
    from loopguard.audit.events import printable

    told = {key: _value(value) for key, value in entry.body.items()}
    if payloads is not None:
        # With the commitment in full: it is what `audit erase` takes.
        told |= {
            one.member: f"{one.commitment} {payloads.text(one.commitment, most=_HEAD_CHARS)}"
            for one in blobs.named(entry)
        }
    body = " ".join(f"{key}={text}" for key, text in told.items())
    cycle = "-" if entry.cycle is None else str(entry.cycle)
    return printable(f"{entry.seq:>6}  {entry.ts[:19]}Z  cycle {cycle:<3} {entry.type:<18} {body}")


def _value(value: Any) -> str:
    from loopguard.audit.events import is_digest
    from loopguard.audit.query import short

    if isinstance(value, str):
        return short(value) if is_digest(value) else value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _approval_row(entry: Entry) -> list[str]:
    from loopguard.audit.query import approved_by, when

    body = entry.body
    who = str(body.get("by") or body.get("person") or "-")
    says = str(body.get("reason") or "")
    match entry.type:
        case "resume.requested":
            what = f"asked for {body.get('freeze')}"
        case "approval.given":
            what, says = "approved", f"signed {str(body.get('statement_sha256'))[:12]}"
        case "approval.refused":
            what = f"refused: {body.get('code')}"
        case _:
            people = approved_by(entry)
            what = f"{body.get('freeze')} went on, {f'approved by {len(people)}' if people else 'approval: none'}"
    return [when(entry.ts), what, who, str(body.get("key") or "-"), says]


def _foreseen(run_dir: Path) -> str:
    """What to say of a run that was only watched and would have frozen; else nothing."""
    from loopguard.audit import read

    count = sum(1 for _ in read.entries(run_dir, types=("freeze.foreseen",)))
    look = f"loopguard audit show {shlex.quote(str(run_dir))} --type freeze.foreseen"
    return f"; it was observed and would have, {count:,} times: {look}" if count else ""


def _stats_lines(told: Stats) -> list[str]:
    from loopguard.audit.events import printable
    from loopguard.audit.query import duration, lasting, when

    outcomes = ", ".join(f"{count:,} {status}" for status, count in told.outcomes.most_common(_MOST))
    refusals = ", ".join(f"{count:,} by {rule}" for rule, count in told.refusals.most_common(_MOST))
    held = ", ".join(f"{count:,} {reason}" for reason, count in told.quarantined.most_common(_MOST))
    now = ", frozen now" if told.frozen_since else ""
    still = f"{lasting(told.stood_still_s)}; freezes: {told.freezes:,}, resumed: {told.resumes:,}{now}"
    asked = f"{told.promoted:,} of {told.promotions_asked:,} that were asked for, {told.rolled_back:,} rolled back"
    rows = [
        ("run", f"{told.run}, {told.types.total():,} records"),
        ("time", f"{when(told.first)} to {when(told.last)}, {duration(told.first, told.last)}"),
        ("frozen", still if told.freezes else "never"),
        ("foreseen", f"{told.foreseen:,} freezes of an observed run" if told.foreseen else ""),
        ("calls", f"{told.calls:,}, {told.calls - told.refused:,} allowed, {told.refused:,} refused{_of(told)}"),
        ("refusals", refusals),
        ("outcomes", f"{outcomes}; {told.contained:,} contained, {told.lost:,} lost" if outcomes else ""),
        ("data", f"{told.admitted:,} records admitted, {sum(told.quarantined.values()):,} quarantined"),
        ("held back", held),
        ("updates", f"{told.updates:,} applied, {told.withheld:,} withheld, {told.skipped:,} skipped"),
        ("promoted", asked),
    ]
    return [printable(f"{label:<9} {text}") for label, text in rows if text]


def _of(told: Stats) -> str:
    return f" ({100 * told.refused / told.calls:.1f} %)" if told.calls else ""


def _rate(told: Stats, count: int) -> str:
    rate = told.per_hour(count)
    return "-" if rate is None else f"{rate:,.1f}"


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


def _check_proof(file: Path, key: list[str]) -> int:
    """Say whether a proof holds, and on whose word; the exit code."""
    from loopguard.audit import keys, proof
    from loopguard.audit.events import printable
    from loopguard.errors import UsageError

    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a proof: {error}") from error
    try:
        proven = proof.check(found, trusted=keys.trusted(key))
    except proof.BrokenProofError as error:
        print(printable(f"BROKEN (30): {error}"))
        return 30
    point = proven.checkpoint
    of = f"record {proven.entry.seq} is among the {point.size} of {point.origin}"
    if proven.signer is None:
        why = "no key that you trust signed the checkpoint" if key else "no key was given"
        print(printable(f"UNPROVEN (20): {of} by that checkpoint; {why}: consistent, authorship unproven"))
    else:
        print(printable(f"PROVEN (0): {of}, signed by {proven.signer}"))
    print(_line(proven.entry))
    return 0 if proven.signer else 20


def _verification_facts(result: Verification) -> dict[str, Any]:
    return {
        "code": result.code,
        "status": result.status,
        "records": result.records,
        "segments": result.segments,
        "head": {"seq": result.head.seq, "hash": result.head.hash},
        "findings": result.findings,
        "notes": result.notes,
        "keys": result.keys,
        "anchors": result.anchors,
        "authorship": result.authorship,
        "streams": [
            {
                "name": one.name,
                "records": one.records,
                "head": {"seq": one.head.seq, "hash": one.head.hash},
                "proven": one.proven,
                "signed": one.signed,
                "pruned": one.pruned,
            }
            for one in result.streams
        ],
    }


def _verification_text(run_dir: Path, result: Verification) -> str:
    """What was found and what was trusted for it, and last of all the head, for a person to note down."""
    from loopguard.audit.events import printable

    segments = f"{result.segments:,} segment{'' if result.segments == 1 else 's'}"
    lines = [
        f"{result.status.upper()} ({result.code}): {result.summary}",
        *(f"finding: {text}" for text in result.findings),
        *(f"note: {text}" for text in result.notes),
        f"authorship: {result.authorship}",
        *(f"trusted key: {printable(key)}" for key in result.keys or ["none"]),
        *(f"trusted anchor: {printable(anchor)}" for anchor in result.anchors or ["none"]),
        f"{result.records:,} records in {segments} are unaltered",
        *(printable(f"stream {one.name}: {one.records:,} records, head {one.head}") for one in result.streams[1:]),
    ]
    if result.code in {10, 20}:
        lines.append("note this head down elsewhere; from then on it can be checked with")
        lines.append(f"  loopguard audit verify {shlex.quote(str(run_dir))} --expect-head {result.head}")
    return "\n".join([*lines, f"head {result.head}"])
