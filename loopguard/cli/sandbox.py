"""`loopguard sandbox`: build the image, sweep up what dead loops left."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated

import typer

app = typer.Typer(help="The sandbox: its engine, its image, its leftovers.", no_args_is_help=True)


@app.command()
def build() -> None:
    """Find or install a Docker engine and build the sandbox image. Does nothing where both are there.

    loopguard sandbox build

    Exit codes: 0 engine and image are ready, 5 they cannot be had here (the message says what to do).
    """
    from loopguard.sandbox.base import setup_script

    raise typer.Exit(subprocess.run([setup_script()], check=False).returncode and 5)


@app.command()
def reap(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Remove the cells of loops that are dead. Cells of living loops, and other containers, are not touched.

    loopguard sandbox reap

    Exit codes: 0 done, also when there was nothing to do; 5 no Docker engine answers.
    """
    from loopguard.sandbox.reaper import reap as sweep

    reaped = sweep()
    if as_json:
        print(json.dumps({"reaped": reaped}))
        return
    for name in reaped:
        print(name)
    print(f"{len(reaped)} cells of dead loops removed", file=sys.stderr)
