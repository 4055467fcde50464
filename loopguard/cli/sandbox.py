"""`loopguard sandbox`: build the image, try a cell, look at one, measure it, sweep up what dead loops left."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopguard.errors import UsageError
from loopguard.types import ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopguard.sandbox.docker import DockerRuntime
    from loopguard.types import Outcome

app = typer.Typer(help="The sandbox: its engine, its image, its cells, its leftovers.", no_args_is_help=True)

Policy = Annotated[Path | None, typer.Option("--policy", help="Guard policy; the shipped default one if left out.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="Sandbox profile of the policy; needed where it has several.")
]


@app.command()
def build() -> None:
    """Find or install a Docker engine and build the sandbox image. Does nothing where both are there.

    loopguard sandbox build

    Exit codes: 0 engine and image are ready, 5 they cannot be had here (the message says what to do).
    """
    from loopguard.sandbox.base import setup_script

    raise typer.Exit(subprocess.run([setup_script()], check=False).returncode and 5)


@app.command(name="exec")
def exec_(
    code: Annotated[str, typer.Argument(help="The code, or - to read it from standard input.")],
    tool: Annotated[str, typer.Option("--tool", help="What it is written in: python, sh or exec.")] = "python",
    policy: Policy = None,
    profile: ProfileName = None,
    files: Annotated[
        list[str] | None, typer.Option("--file", help="NAME=PATH: a file of yours that the code finds as NAME.")
    ] = None,
    fetch: Annotated[
        list[str] | None, typer.Option("--fetch", help="A file or folder of the call to bring back into --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New or empty folder for what --fetch brings back.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole outcome as one JSON object.")] = False,
) -> None:
    """Run code in a cell, as a loop under this guard policy would, and show what came of it.

    Only the sandbox is tried: neither the rules of the policy nor an audit log have a part in it.

    loopguard sandbox exec 'print(6 * 7)'

    Exit codes: 0 the code ended with 0, 1 it did not (standard error says how), 2 usage, 3 policy, 5 sandbox.
    """
    from loopguard.sandbox import files as names

    if (fetch is None) != (out is None):
        raise UsageError("--fetch and --out belong together: what to bring back, and where to")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: name a new one with --out")
    call = ToolCall(
        id=uuid.uuid4().hex,
        tool=tool,
        code=sys.stdin.read() if code == "-" else code,
        files=dict(_file(each) for each in files or ()),
        fetch=tuple(fetch or ()),
    )
    with _runtime(policy, profile, cells=1) as runtime:
        outcome = runtime.run(call)
    if out is not None:
        names.save(outcome.files, out)
    if as_json:
        print(json.dumps(_facts(outcome)))
    else:
        _show(outcome)
    raise typer.Exit(0 if outcome.ok else 1)


@app.command()
def inspect(policy: Policy = None, profile: ProfileName = None) -> None:
    """Start a cell and print what the engine and the kernel really applied to it, as one JSON object.

    A cell that is not exactly what the policy asks for is refused instead, with the difference.

    loopguard sandbox inspect --policy my-policy.yaml

    Exit codes: 0 it is as asked, 2 usage, 3 policy, 5 it is not, or no cell can be had.
    """
    with _runtime(policy, profile, cells=1) as runtime:
        print(json.dumps(runtime.facts(), indent=1, sort_keys=True))


@app.command()
def bench(
    policy: Policy = None,
    profile: ProfileName = None,
    calls: Annotated[int, typer.Option("--calls", min=1, max=100_000, help="Calls of one client.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure calls of this policy's sandbox on this machine: latency of one client, and calls per second of more.

    loopguard sandbox bench

    Exit codes: 0 measured, 2 usage, 3 policy, 5 sandbox.
    """
    rows = []
    with _runtime(policy, profile) as runtime:
        for tool, code, clients in (("python", "print(1+1)", 1), ("sh", "echo 2", 1), ("python", "print(1+1)", 8)):
            _measure(runtime, tool, code, calls=20, clients=clients)
            rows.append(_measure(runtime, tool, code, calls=calls, clients=clients))
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'tool':8}{'clients':>8}{'p50 ms':>9}{'p95 ms':>9}{'calls/s':>9}")
    for row in rows:
        print(f"{row['tool']:8}{row['clients']:>8}{row['p50_ms']:>9.2f}{row['p95_ms']:>9.2f}{row['calls_per_s']:>9.0f}")


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


@contextmanager
def _runtime(policy: Path | None, profile: str | None, *, cells: int | None = None) -> Iterator[DockerRuntime]:
    """The sandbox of a profile, started; gone at the end."""
    from dataclasses import replace

    from loopguard.controller.cells import cell_spec
    from loopguard.policy.load import load, shipped
    from loopguard.sandbox.docker import DockerRuntime

    profiles = load(policy or shipped("default")).policy.sandbox.profiles
    if not profiles:
        raise UsageError(f"{policy} lets no tool run and describes no cell: name another guard policy with --policy")
    if profile is None and len(profiles) > 1:
        raise UsageError(f"this policy has several sandbox profiles: name one with --profile: {', '.join(profiles)}")
    if profile is not None and profile not in profiles:
        raise UsageError(f"this policy has no sandbox profile {profile!r}; there are {', '.join(profiles)}")
    spec = cell_spec(profiles[profile or next(iter(profiles))])
    spec = spec if cells is None else replace(spec, cells=cells)
    runtime = DockerRuntime(spec, run_id=f"cli-{os.getpid()}", on_event=lambda *_: None)
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.close()


def _file(told: str) -> tuple[str, bytes]:
    name, equals, path = told.partition("=")
    if not equals:
        raise UsageError(f"--file {told} is not NAME=PATH, such as --file data.csv=/home/me/data.csv")
    try:
        return name, Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--file {told}: {error.strerror}") from error


def _show(outcome: Outcome) -> None:
    """What the code wrote, made harmless for a terminal where this is one; how it ended, where that is worth a word."""
    for data, stream in ((outcome.stdout, sys.stdout), (outcome.stderr, sys.stderr)):
        text = data.decode("utf-8", errors="replace")
        stream.write(_harmless(text) if stream.isatty() else text)
    sys.stdout.flush()
    for name, why in sorted(outcome.not_fetched.items()):
        print(f"loopguard: {_harmless(name)} did not come back: {why}", file=sys.stderr)
    if not outcome.ok:
        how = {"nonzero_exit": f"exit status {outcome.exit_code}", "signal": f"signal {outcome.signal}"}
        print(f"loopguard: the call ended with {how.get(outcome.status, outcome.status)}", file=sys.stderr)


def _harmless(text: str) -> str:
    """Without what a terminal would obey: escape sequences, and characters that turn the direction of writing."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def _facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "exit_code": outcome.exit_code,
        "signal": outcome.signal,
        "stdout": outcome.stdout.decode("utf-8", errors="replace"),
        "stderr": outcome.stderr.decode("utf-8", errors="replace"),
        "stdout_bytes": outcome.stdout_bytes,
        "stderr_bytes": outcome.stderr_bytes,
        "wall_ms": outcome.wall_ms,
        "leftovers": outcome.leftovers,
        "files": sorted(outcome.files),
        "not_fetched": dict(outcome.not_fetched),
    }


def _measure(runtime: DockerRuntime, tool: str, code: str, *, calls: int, clients: int) -> dict[str, Any]:
    times: list[float] = []

    def client(_: int) -> None:
        for _ in range(max(calls // clients, 1)):
            started = time.perf_counter()
            runtime.run(ToolCall(id=uuid.uuid4().hex, tool=tool, code=code))
            times.append((time.perf_counter() - started) * 1e3)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    whole_s = time.perf_counter() - started
    times.sort()
    return {
        "tool": tool,
        "clients": clients,
        "p50_ms": round(statistics.median(times), 3),
        "p95_ms": round(times[int(len(times) * 0.95)], 3),
        "calls_per_s": round(len(times) / whole_s, 1),
    }
