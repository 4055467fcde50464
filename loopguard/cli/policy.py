"""`loopguard policy`: look at guard policy files without starting anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loopguard.policy.findings import Finding

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def policy() -> None:
    """Look at guard policy files."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The guard policy to check.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say everything that is wrong with a guard policy, with lines and columns, or that it is fine.

    loopguard policy check policies/default.yaml

    Exit codes: 0 fine, 1 it loads but something in it is most likely not meant, 2 usage, 3 it does not load.
    """
    # pydantic and the YAML reader load only for this command.
    from loopguard.policy.load import examine

    loaded, findings = examine(file)
    digest = loaded.digest if loaded else None
    if as_json:
        typer.echo(json.dumps({"path": str(file), "digest": digest, "findings": [asdict(each) for each in findings]}))
    else:
        _print(file, digest, findings)
    raise typer.Exit(3 if loaded is None else 1 if findings else 0)


def _print(file: Path, digest: str | None, findings: list[Finding]) -> None:
    """Lints are results; what keeps a policy from loading is an error."""
    for finding in findings:
        typer.echo(str(finding), err=finding.level == "error")
    if digest is not None and not findings:
        typer.echo(f"{file}: fine, digest {digest}")
