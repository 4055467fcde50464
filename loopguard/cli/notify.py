"""`loopguard notify`: try the endpoints of a guard policy, and tell what a run that has ended could not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loopguard.policy.load import LoadedPolicy

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def notify() -> None:
    """Who is told of a freeze: try it, or catch up on it."""


@app.command()
def test(
    target: Annotated[Path, typer.Argument(metavar="RUN|POLICY", help="A run directory, or a guard policy file.")],
) -> None:
    """Tell every endpoint, once, that nothing has happened, and say what each of them answered.

    loopguard notify test policies/mine.yaml

    Exit codes: 0 all of them took it, 1 one did not, 2 nobody to tell, a secret or a program is missing, 3 policy.
    """
    from loopguard.audit.events import printable
    from loopguard.controller.directory import endpoints
    from loopguard.errors import UsageError
    from loopguard.notify import NotToldError, encoded, trial
    from loopguard.policy.load import load

    loaded = _policy_of(target) if target.is_dir() else load(target)
    told = endpoints(loaded.policy)
    if not told:
        raise UsageError(f"{target} tells nobody: the guard policy has no notify section")
    event = trial(target.resolve().name)
    failed = 0
    for endpoint in told:
        facts = endpoint.facts()
        try:
            endpoint.send(event["id"], encoded(event))
            answer = "took it"
        except NotToldError as error:
            failed += 1
            answer = f"did not: {error}"
        print(printable(f"{facts['kind']:<8} {facts['to']} {answer}"))
    raise typer.Exit(1 if failed else 0)


@app.command()
def flush(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory that no process owns.")],
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to go on trying.")] = 30.0,
) -> None:
    """Tell what the log of a run holds and its process could not tell, given up or not.

    A run that is alive does so by itself. What it takes is recorded in the log.

    loopguard notify flush runs/toolformer

    Exit codes: 0 everything is told, 1 something is not, 2 bad usage, 3 policy, 6 audit log, 7 a process owns the run.
    """
    from loopguard.audit.log import AuditLog
    from loopguard.controller.directory import notifier
    from loopguard.errors import UsageError
    from loopguard.state import CONTROLLER, run_facts

    loaded = _policy_of(run_dir)
    telling = notifier(loaded.policy, run_dir)
    if telling is None:
        raise UsageError(f"{run_dir} tells nobody: its guard policy has no notify section")
    run = run_facts(run_dir)["id"]
    with AuditLog.open(run_dir, stream=CONTROLLER, run_id=run, policy=loaded.digest, mirror=telling.heed) as log:
        telling.begin(log, failed_too=True)
        try:
            done = telling.wait(wait_s)
        finally:
            telling.close()
    if done:
        print(f"{run_dir}: everything is told")
        return
    print(f"{run_dir}: not everything is told; loopguard audit show {run_dir} --type notify has the reasons")
    raise typer.Exit(1)


def _policy_of(run_dir: Path) -> LoadedPolicy:
    """The guard policy of a run, out of its directory. Raises UsageError where somebody else could have written it.

    It may name a program to run, and its addresses are signed to with secrets of whoever calls.
    """
    from loopguard.errors import UsageError
    from loopguard.policy.load import load
    from loopguard.state import run_facts

    digest = run_facts(run_dir)["policy"]
    path = run_dir / "policy" / f"{digest}.yaml"
    loaded = load(path)
    if loaded.digest != digest:
        raise UsageError(f"{path} is {loaded.digest[:12]} by what it says: somebody edited the guard policy of the run")
    for place in (run_dir / "run.json", run_dir, path.parent, path):
        held = place.stat()
        if held.st_uid != os.geteuid() or held.st_mode & 0o022:
            raise UsageError(
                f"{place} can be written by others, and the guard policy says what is run: do this as its owner, after "
                f"chmod go-w {place}"
            )
    return loaded
