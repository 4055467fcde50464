"""`loopguard run PIPELINE` and `loopguard demo`: the reference loops, guarded."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loopguard.audit.events import Entry
    from loopguard.cli.progress import Shown
    from loopguard.pipelines.toolformer import ToolformerOptions

app = typer.Typer(help="Run a reference loop under guard.", no_args_is_help=True)

_DEMO_CYCLES = 5
_DEMO_PLANT = "label-leak"

_DATA = "GSM8K-style solutions, JSON lines. Without it, LoopGuard's own word problems."
_EVAL = "Held-out text. Without it, test.jsonl beside the data."
_PLANT = "Plant a fault: nan, negative-loss, label-leak, answer-leak, verifier-bug, gain, tool-escape."
_PANEL = ("correct", "implicit", "malformed", "mental", "heldout_loss")
_CONTROL = "Do not train on kept records: shows what the loop itself adds."


@app.callback()
def _group() -> None:
    """Run a reference loop under guard."""


@app.command()
def toolformer(
    data: Annotated[Path | None, typer.Option(metavar="FILE", help=_DATA)] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", metavar="FILE", help=_EVAL)] = None,
    cycles: Annotated[int, typer.Option(min=1, metavar="N", help="How many cycles after the warm-up.")] = 6,
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Gone on with when it holds an unfinished run.")] = Path(
        "runs/toolformer"
    ),
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of policies/toolformer.yaml.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Seeds everything.")] = 0,
    plant: Annotated[str | None, typer.Option(metavar="FAULT@CYCLE", help=_PLANT)] = None,
    model: Annotated[Path | None, typer.Option(metavar="PATH", help="Start from a saved transformers model.")] = None,
    control: Annotated[bool, typer.Option("--control", help=_CONTROL)] = False,
    adopt_policy: Annotated[str | None, typer.Option(metavar="DIGEST", help="Change the policy of a run.")] = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="With --adopt-policy: who loosens it.")] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="With --adopt-policy: why.")] = None,
) -> None:
    """Teach a small model to call a calculator, in the manner of Toolformer, under guard.

    Every call that the model proposes runs in a locked-down container. Run the same command again to go on with an
    interrupted run.

    loopguard run toolformer --data gsm8k/train.jsonl --cycles 6 --seed 1

    Exit codes: 0 all cycles promoted, 2 usage or data, 3 policy, 4 frozen, 5 sandbox, 6 audit log,
    7 run directory busy, 130 interrupted.
    """
    from loopguard.pipelines.toolformer import ToolformerOptions, parse_plant

    options = ToolformerOptions(
        data=data,
        eval=eval_,
        cycles=cycles,
        seed=seed,
        plant=parse_plant(plant) if plant else None,
        model=model,
        control=control,
    )
    _toolformer(options, run_dir=run_dir, policy=policy, adopt_policy=adopt_policy, by=by, reason=reason)


def demo(
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the new run directory goes.")] = Path("runs"),
    seed: Annotated[int, typer.Option(metavar="S", help="Seeds everything.")] = 0,
) -> None:
    """Watch a small model teach itself with real tool calls in containers, and a planted fault be frozen.

    Takes a new run directory each time. After five cycles the labels leak into the model's input, the loss falls as it
    never should, and the update gate freezes the loop before the faulty weights reach the actor.

    loopguard demo

    Exit codes: 0 the planted fault was frozen, 1 it was not, 5 sandbox.
    """
    from loopguard.audit.events import printable
    from loopguard.errors import LoopFrozen
    from loopguard.pipelines.toolformer import ToolformerOptions, parse_plant

    run_dir = runs / time.strftime("demo-%Y%m%d-%H%M%S", time.gmtime())
    while run_dir.exists():
        run_dir = run_dir.with_name(run_dir.name + "b")
    fault_at = _DEMO_CYCLES + 1
    options = ToolformerOptions(cycles=fault_at, seed=seed, plant=parse_plant(f"{_DEMO_PLANT}@{fault_at}"))
    print(
        f"Five honest cycles, then a planted fault in cycle {fault_at}: {_DEMO_PLANT}. This takes about two minutes.",
        file=sys.stderr,
    )
    try:
        _toolformer(options, run_dir=run_dir)
    except LoopFrozen as frozen:
        if _frozen_in(run_dir, frozen.freeze_id) != fault_at:
            raise
        # A reason may quote what a model wrote.
        print("\n" + printable(f"Frozen, as planted: {frozen.reason}"))
        print(f"why       loopguard audit why {run_dir} {frozen.freeze_id}")
        print(f"verify    loopguard audit verify {run_dir}")
        return
    print(f"loopguard: the planted fault was not frozen; see {run_dir}/report.html", file=sys.stderr)
    raise typer.Exit(1)


def _frozen_in(run_dir: Path, freeze: str) -> int | None:
    from loopguard.audit import query

    return next((told.entered.cycle for told in query.freezes(run_dir) if told.id == freeze), None)


def _toolformer(
    options: ToolformerOptions,
    *,
    run_dir: Path,
    policy: Path | None = None,
    adopt_policy: str | None = None,
    by: str | None = None,
    reason: str | None = None,
) -> None:
    from loopguard.controller import LoopGuard
    from loopguard.errors import LoopFrozen
    from loopguard.pipelines import toolformer
    from loopguard.policy.load import shipped

    _need_training()
    task = toolformer.prepare(options)
    with _shown() as shown:
        try:
            with LoopGuard.from_file(
                policy or shipped("toolformer"),
                run_dir=run_dir,
                seed=options.seed,
                command=sys.argv[1:],
                adopt_policy=adopt_policy,
                by=by,
                reason=reason,
                mirror=_mirror(shown),
            ) as guard:
                for sentence in guard.found:
                    shown.say(sentence)
                toolformer.run(guard, options, shown, task=task)
        except LoopFrozen:
            shown.stop()
            _closing(run_dir)
            raise
    _closing(run_dir)


def _need_training() -> None:
    from loopguard.errors import UsageError

    absent = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if absent:
        raise UsageError(f"the reference loops need {', '.join(absent)}: pip install 'loopguard[train]'")


@contextmanager
def _shown() -> Iterator[Shown]:
    """A progress bar where somebody watches, plain lines elsewhere."""
    from loopguard.cli.progress import Bar, Lines

    shown = Bar() if sys.stderr.isatty() else Lines()
    try:
        yield shown
    finally:
        shown.stop()


def _mirror(shown: Shown) -> Callable[[Entry], None]:
    """The operator's view, printed so that it does not tear the progress bar."""
    from loopguard.audit.mirror import Mirror

    return Mirror(shown.stream)


def _closing(run_dir: Path) -> None:
    """The table of cycles, and where the report is."""
    from loopguard.audit import query
    from loopguard.audit.report import write_report

    rows = [
        (
            str(cycle.number),
            str(cycle.calls),
            str(cycle.refused),
            str(cycle.contained),
            "" if cycle.kept is None or cycle.proposed is None else str(cycle.kept),
            str(cycle.quarantined.total()),
            str(cycle.updates),
            *(f"{cycle.panel[name]:.3f}" if name in cycle.panel else "" for name in _PANEL),
            cycle.result,
        )
        for cycle in query.cycles(run_dir)
    ]
    head = ("cycle", "calls", "refused", "contained", "kept", "quarantined", "updates", *_PANEL, "result")
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    for row in (head, *rows):
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    print(f"report: {write_report(run_dir)}")
