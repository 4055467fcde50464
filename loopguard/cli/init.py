"""`loopguard init`: a guard policy to start from, the shipped one or one drafted from a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loopguard.controller.watch import Watch


def init(
    from_run: Annotated[
        Path | None, typer.Option("--from-run", metavar="RUN_DIR", help="Draft it from what this run has shown.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it. Else to standard output.")
    ] = None,
) -> None:
    """Write a guard policy to start from: the default one, or one that suits a run which was observed.

    With --from-run its metrics, monitors and panel are those of the run, and it says where it would have frozen it.
    A file that is there is never overwritten.

    loopguard init --from-run runs/look --out policy.yaml

    Exit codes: 0 written, 2 usage, 6 the audit log of the run does not verify or cannot be read.
    """
    if out is not None and out.exists():
        raise _taken(out)
    text = _default() if from_run is None else _drafted(from_run)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise _taken(out) from None
    print(f"{out}: written; read it, then `loopguard policy check {out}`", file=sys.stderr)


def _taken(out: Path) -> Exception:
    from loopguard.errors import UsageError

    return UsageError(f"{out} is there already, and may be somebody's work: name another --out, or move it away")


def _default() -> str:
    from loopguard.policy.load import shipped

    return shipped("default").read_text(encoding="utf-8")


def _drafted(run_dir: Path) -> str:
    """A policy from the log of a run, also of one that is under way or was killed."""
    from loopguard.audit import read
    from loopguard.controller.watch import TYPES, Watch
    from loopguard.policy.draft import draft
    from loopguard.state import run_facts

    facts = run_facts(run_dir)
    _verified(run_dir)
    watch = Watch.of(read.entries(run_dir, types=TYPES))
    notes = _notes(watch) if facts.get("mode") == "observe" else [_GUARDED]
    return draft(watch.seen, run=str(facts["id"]), notes=notes)


_GUARDED = (
    "That run was guarded: what was withheld is not in its updates, and where this policy would freeze it is open."
)


def _verified(run_dir: Path) -> None:
    """A log that somebody touched is no ground to draft a policy on."""
    from loopguard.audit.verify import TAMPER, verify
    from loopguard.errors import AuditTamperedError

    found = verify(run_dir)
    if found.code >= TAMPER:
        why = next(iter(found.findings), found.summary)
        raise AuditTamperedError(f"the audit log of {run_dir} does not verify ({found.status}): {why}")


def _notes(watch: Watch) -> list[str]:
    """Where this policy would have frozen the run, for the head of the file."""
    if not watch.findings:
        return ["This run it would not have frozen."]
    first = watch.findings[0]
    return [f"This run it would have frozen at update {first.update:,}: {first.reason} ({first.rule})."]
