"""`rollback` and `reproduce`: back to an earlier state, and through a freeze once more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopguard.cli.freeze import By, Reason, RunDir, need_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.reproduce import At, Reproduction

_TO = "Go back to the promotion of this cycle. Without it, to the one before the one that acts."
_MODULE = "A module, or a .py file, with build(config) and loss(model, batch, at). docs/reproduce.md has an example."


def rollback(
    run_dir: RunDir,
    by: By,
    reason: Reason,
    to: Annotated[int | None, typer.Option("--to", metavar="CYCLE", help=_TO)] = None,
) -> None:
    """Let a run go on from an earlier promotion. The decision is written to the audit log under your name.

    Nothing may be at work on the run: stop it first. A frozen run stays frozen until somebody resumes it. What is gone
    back over stays in the log; its snapshot is removed by the next start.

    loopguard rollback runs/toolformer --by dana --reason "cycle 7 was scored with a broken evaluator"

    Exit codes: 0 gone back, 2 usage or nothing to go back to, 6 snapshot or audit log, 7 the run is at work.
    """
    from loopguard.controller.rollback import roll_back

    need_words(by, reason)
    target = roll_back(run_dir, to=to, by=by, reason=reason)
    print(f"{run_dir} goes on from cycle {target.cycle} (update {target.update}) when you start it again")


def reproduce(
    freeze: Annotated[
        Path, typer.Argument(metavar="FREEZE", help="The folder of a freeze, such as runs/toolformer/freezes/f1.")
    ],
    module: Annotated[str, typer.Option("--module", "-m", metavar="NAME", help=_MODULE)],
    pdb: Annotated[bool, typer.Option("--pdb", help="Step into the loss of the update that froze the run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay the updates that led to a freeze, and say whether their losses come out the same to the bit.

    The same bits mean that the cause is in the code, the data or the state that the capsule holds, and waits there for
    you. Other bits mean that something outside had a hand in it: another version, device or number of threads, a race.
    Nothing in the run directory is changed, and the run may be at work.

    loopguard reproduce runs/toolformer/freezes/f1 -m loopguard.pipelines.toolformer.replay

    Exit codes: 0 the same to the bit, 1 not the same, or nothing to replay, 2 usage, 6 the capsule is missing or
    damaged.
    """
    from loopguard import reproduce as replays

    found = replays.load_module(module)
    told = replays.reproduce(freeze, found, forward=_debugger(freeze) if pdb else _plain)
    if as_json:
        print(json.dumps(_facts(told), sort_keys=True))
    else:
        _tell(told)
    raise typer.Exit(0 if told.same else 1)


def _plain(_: At, run: Callable[[], Any]) -> Any:
    return run()


def _debugger(freeze: Path) -> Callable[[At, Callable[[], Any]], Any]:
    """A debugger at the forward pass of the last update, where the freeze came from."""
    import pdb

    from loopguard.errors import InterruptedLoop
    from loopguard.snapshots import read_capsule

    updates = read_capsule(freeze).updates()
    last = updates[-1].update if updates else None

    def forward(at: At, run: Callable[[], Any]) -> Any:
        if at.update != last:
            return run()
        print(
            f"update {at.update} of cycle {at.cycle}, batch {at.batch + 1} of {at.batches}: "
            "`s` steps into the loss, `c` goes on",
            file=sys.stderr,
        )
        came_to = pdb.runcall(run)
        if came_to is None:
            # The debugger was left by `q` or by the end of its input, and with it the loss.
            raise InterruptedLoop("the debugger was left: nothing more is replayed")
        return came_to

    return forward


def _facts(told: Reproduction) -> dict[str, Any]:
    return {
        "freeze": told.freeze,
        "reason": told.reason,
        "same": told.same,
        "state": told.state,
        "notes": list(told.notes),
        "updates": [
            {"update": one.update, "same": one.same, "then": _shown(one.then), "now": _shown(one.now)}
            for one in told.updates
        ],
    }


def _shown(readings: Any) -> dict[str, Any]:
    """Numbers as JSON; those that JSON has no word for as text."""
    return {name: value if abs(value) < float("inf") else str(value) for name, value in readings.items()}


def _tell(told: Reproduction) -> None:
    from loopguard.audit.events import printable

    print(printable(f"freeze    {told.freeze}: {told.reason}"))
    if told.updates:
        first, last = told.updates[0].update, told.updates[-1].update
        print(f"replayed  updates {first}-{last}")
    if (other := told.first_other) is not None:
        then = ", ".join(f"{name} {value!r}" for name, value in other.then.items() if name in other.now)
        now = ", ".join(f"{name} {value!r}" for name, value in other.now.items())
        print(f"readings  OTHER from update {other.update} on")
        print(f"then      {then}")
        print(f"now       {now}")
    elif told.updates:
        print("readings  the same to the bit")
        last_one = told.updates[-1]
        print(f"last      {', '.join(f'{name} {value!r}' for name, value in last_one.now.items())}")
    if told.state != "unknown":
        print(f"weights   {'the same to the bit' if told.state == 'same' else 'OTHER'} after the last of them")
    for note in told.notes:
        print(f"note      {note}")
