"""The loop: a model teaches itself where to call a calculator, under a guard.

    cycle 0   warm-up on a few hundred human solutions and on plain lines; evaluate; promote
    cycle n   the actor proposes calls at places without annotations; each call runs in the sandbox; calls are kept that
              compute what the text says and that make what follows likelier; the guard admits them; the model trains;
              evaluate; promote

Only the actor proposes, and only a promotion moves the actor. A cycle follows from the state at the last promotion, the
seed and its own number, so a run that was killed goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

from loopguard.pipelines.progress import Silent
from loopguard.pipelines.toolformer import codec as codecs
from loopguard.pipelines.toolformer import faults
from loopguard.pipelines.toolformer.calls import TOOL, agrees, code_of, printed
from loopguard.pipelines.toolformer.evaluate import evaluate, rows
from loopguard.pipelines.toolformer.examples import Examples, completion_of
from loopguard.pipelines.toolformer.model import Vocabulary, collate, from_folder, from_nothing, trained
from loopguard.pipelines.toolformer.propose import Draft, gains, propose
from loopguard.pipelines.toolformer.state import Memory
from loopguard.pipelines.toolformer.task import Task, prepare
from loopguard.types import Check, Outcome, Provenance, Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopguard.controller import Admitted, Cycle, LoopGuard
    from loopguard.pipelines.progress import Progress
    from loopguard.pipelines.toolformer.codec import Codec
    from loopguard.pipelines.toolformer.evaluate import Item
    from loopguard.pipelines.toolformer.faults import Fault
    from loopguard.pipelines.toolformer.model import Example
    from loopguard.pipelines.toolformer.settings import ToolformerOptions
    from loopguard.pipelines.toolformer.text import Place

_CALLS_AT_ONCE = 256
"""Calls between two ticks of the progress bar."""
_CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolformerResult:
    """What a run came to: one row for each promoted cycle, as JSON values."""

    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A draft that the loop wants to train on."""

    draft: Draft
    outcome: Outcome
    gain: float


def run(
    guard: LoopGuard, options: ToolformerOptions, progress: Progress | None = None, *, task: Task | None = None
) -> ToolformerResult:
    """Run the loop to the end, from wherever the guard's run directory stands.

    Give the `task` of `prepare(options)` to have bad data refused before a guard is opened. Raises LoopFrozen where a
    gate freezes, UsageError and DataFileError for what cannot be run.
    """
    task = task or prepare(options)
    loop = Toolformer(guard, options, task, progress or Silent())
    for cycle in guard.cycles(options.cycles, warmup=True):
        loop.turn(cycle)
    return ToolformerResult(rows=tuple(loop.memory.rows))


class Toolformer:
    """The loop of one run. Lives from the start of a process to its end; what has to live longer is in `memory`."""

    def __init__(self, guard: LoopGuard, options: ToolformerOptions, task: Task, progress: Progress) -> None:
        torch.set_num_threads(options.threads)
        _seed_everything(_seed(options.seed, "model"))
        self._guard, self._options, self._task, self._progress = guard, options, task, progress
        progress.phase("getting ready")
        if options.model is not None:
            self._codec, self._model = from_folder(options.model)
        else:
            self._codec = codecs.train((line for _, line in task.lines), vocabulary=task.settings.vocabulary)
            self._model = from_nothing(_vocabulary(self._codec), task.settings)
        self._actor = copy.deepcopy(self._model).requires_grad_(requires_grad=False)
        self._examples = Examples(self._codec, task.settings)
        self.memory = Memory(facts=task.facts)
        optimizer, schedule = trained(self._model, task.settings)
        guard.attach(
            model=self._model,
            optimizer=optimizer,
            scheduler=schedule,
            actor=self._actor,
            loop=self.memory,
            config={
                "settings": asdict(task.settings),
                "vocabulary": asdict(_vocabulary(self._codec)),
                "model": str(options.model) if options.model is not None else None,
                "plant": str(options.plant) if options.plant is not None else None,
            },
        )
        guard.protect(task.protected)

    def turn(self, cycle: Cycle) -> None:
        """One cycle."""
        _seed_everything(_seed(self._options.seed, cycle.number))
        self._author = self._guard.actor_digest
        rng = random.Random(_seed(self._options.seed, f"{cycle.number}/order"))
        fault = faults.planted(self._options.plant, cycle=cycle.number, task=self._task, examples=self._examples)
        tool = _Counted(cycle, self._progress)
        row = self._warm_up(cycle, tool) if cycle.number == 0 else self._gather(cycle, tool, fault, rng)
        self._train(cycle, fault, rng, fresh=row["admitted"] if cycle.number else 0)
        if cycle.discarded:
            return
        panel, items = self._evaluate(cycle, tool)
        panel["refused"] = tool.refused / max(tool.calls, 1)
        self._write_items(cycle, panel, items)
        self.memory.rows.append({"cycle": cycle.number, **row, "calls": tool.calls, "panel": panel})
        decision = cycle.promote(panel, apply=lambda: self._actor.load_state_dict(self._model.state_dict()))
        if decision.allowed:
            self._progress.say(_sentence(self.memory.rows[-1]))
        else:
            # Held: the last promoted actor proposes once more. A freeze has put the table back by itself.
            self._progress.say(f"cycle {cycle.number} not promoted: {decision.reason}")
            if self.memory.rows and self.memory.rows[-1]["cycle"] == cycle.number:
                self.memory.rows.pop()

    # Data

    def _warm_up(self, cycle: Cycle, tool: _Counted) -> dict[str, Any]:
        """Plain lines and human calls; a call is used where the sandbox confirms it."""
        outcomes = tool.map("running the human calls", [code_of(place.call or "") for place in self._task.warmup])
        confirmed = [
            (place, outcome)
            for place, outcome in zip(self._task.warmup, outcomes, strict=True)
            if agrees(printed(outcome), place.number)
        ]
        calls = [
            self._record(cycle, at, place, place.before, place.call or "", outcome, source="human")
            for at, (place, outcome) in enumerate(confirmed)
        ]
        lines = [
            Record(
                id=f"line-{at:06d}",
                prompt="",
                completion=line,
                provenance=Provenance(source="human", origin=origin, cycle=0),
                payload=at,
            )
            for at, (origin, line) in enumerate(self._task.lines)
        ]
        admitted = cycle.admit([*calls, *lines])
        self.memory.lines = [record.payload for record in admitted.records if record.payload is not None]
        self.memory.people = self._remember(admitted)
        return {"proposed": None, "kept": None, "admitted": len(admitted.records), "mean_gain": None}

    def _gather(self, cycle: Cycle, tool: _Counted, fault: Fault, rng: random.Random) -> dict[str, Any]:
        """Propose, run, keep, and let the guard admit."""
        drafts = self._propose(fault, rng)
        codes = fault.codes([code_of(draft.expression or "") for draft in drafts], rng)
        outcomes = tool.map("running calls", codes)
        kept = self._keep(fault, drafts, outcomes)
        records = [
            self._record(
                cycle,
                at,
                k.draft.place,
                k.draft.prompt,
                k.draft.expression or "",
                k.outcome,
                source="model",
                gain=k.gain,
            )
            for at, k in enumerate(kept)
        ]
        admitted = cycle.admit(records, proposed=len(drafts))
        self._remember(admitted)
        return {
            "proposed": len(drafts),
            "kept": len(kept),
            "admitted": len(admitted.records),
            "mean_gain": math.fsum(k.gain for k in kept) / len(kept) if kept else None,
        }

    def _propose(self, fault: Fault, rng: random.Random) -> list[Draft]:
        """Different finished calls of the actor at places drawn for this cycle."""
        settings = self._task.settings
        drawn = rng.sample(self._task.pool, min(settings.places, len(self._task.pool)))
        places = [place for place in drawn for _ in range(settings.samples)]
        self._progress.phase("proposing calls", total=len(places))
        drafts = propose(
            self._actor,
            places,
            codec=self._codec,
            examples=self._examples,
            length=settings.call_length,
            temperature=settings.temperature,
            prompt=fault.prompt,
            advance=self._progress.advance,
        )
        different = {(id(draft.place), draft.expression): draft for draft in drafts if draft.expression is not None}
        return list(different.values())

    def _keep(self, fault: Fault, drafts: Sequence[Draft], outcomes: Sequence[Outcome]) -> list[_Kept]:
        right = [(d, o) for d, o in zip(drafts, outcomes, strict=True) if fault.accepts(d, o)]
        self._progress.phase("weighing results")
        gained = gains(self._actor, [draft for draft, _ in right], codec=self._codec, examples=self._examples)
        return [
            _Kept(draft=draft, outcome=outcome, gain=gain)
            for (draft, outcome), gain in zip(right, gained, strict=True)
            if fault.helps(gain, at_least=self._task.settings.min_gain)
        ]

    def _record(
        self,
        cycle: Cycle,
        at: int,
        place: Place,
        prompt: str,
        expression: str,
        outcome: Outcome,
        *,
        source: Any,
        gain: float | None = None,
    ) -> Record:
        return Record(
            id=f"{cycle.number}-{at:05d}",
            prompt=prompt,
            completion=completion_of(expression, place.number, place.after),
            provenance=Provenance(
                source=source,
                origin=place.origin,
                cycle=cycle.number,
                actor=self._author if source == "model" else None,
                calls=(outcome.call_id,),
            ),
            gain=gain,
            check=Check(tool=TOOL, code=code_of(expression), expected=place.number),
        )

    def _remember(self, admitted: Admitted) -> int:
        calls = [(record.prompt, record.completion) for record in admitted.records if record.payload is None]
        self.memory.calls += calls
        return len(calls)

    # Training

    def _train(self, cycle: Cycle, fault: Fault, rng: random.Random, *, fresh: int) -> None:
        """Updates on batches of records with calls and of plain lines.

        This cycle's records enter one by one while it goes on: all at once they would make a step in the loss, and a
        step in the loss is what a jump monitor is there for.
        """
        settings = self._task.settings
        known = self.memory.calls[: self.memory.people] if self._options.control else self.memory.calls
        calls = [self._examples.call(*call) for call in known]
        fresh = 0 if self._options.control else fresh
        lines = [self._task.lines[at][1] for at in self.memory.lines]
        updates = fault.updates(settings.cycle_updates if cycle.number else settings.warmup_updates)
        plain = round(settings.batch * settings.plain_share)
        self._progress.phase("training", total=updates)
        for update in range(1, updates + 1):
            open_calls = len(calls) - fresh + fresh * update // updates
            batch = [calls[rng.randrange(open_calls)] for _ in range(settings.batch - plain)]
            batch += [self._examples.line(rng.choice(lines)) for _ in range(plain)]
            self._update(cycle, fault, fault.mix(batch, rng, done=(update - 1) / updates), update)
            if cycle.discarded:
                return
            self._progress.advance()

    def _update(self, cycle: Cycle, fault: Fault, examples: list[Example], update: int) -> None:
        self._model.train()
        batch = cycle.keep(collate(examples, pad=self._codec.pad))
        loss = fault.loss(self._model, batch, update=update)
        loss.backward()  # type: ignore[no-untyped-call]
        cycle.update(loss=loss, clip_norm=_CLIP_NORM)

    # Evaluation

    def _evaluate(self, cycle: Cycle, tool: _Counted) -> tuple[dict[str, float], list[Item]]:
        self._progress.phase("evaluating", total=len(self._task.held_out.places))
        return evaluate(
            self._model,
            self._task.held_out,
            codec=self._codec,
            examples=self._examples,
            call_length=self._task.settings.call_length,
            run=lambda codes: tool.map("running held-out calls", codes),
            advance=self._progress.advance,
        )

    def _write_items(self, cycle: Cycle, panel: dict[str, float], items: Sequence[Item]) -> None:
        """Each held-out place of this evaluation, for paired comparisons between cycles."""
        folder = self._guard.run_dir / "eval"
        folder.mkdir(exist_ok=True)
        path = folder / f"cycle-{cycle.number}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"cycle": cycle.number, "panel": panel, "items": rows(items)}, indent=1))
        partial.replace(path)


class _Counted:
    """The calculator of one cycle, with a count of its calls."""

    def __init__(self, cycle: Cycle, progress: Progress) -> None:
        self.calls = 0
        self.refused = 0
        self._tool = cycle.tool(TOOL)
        self._progress = progress

    def map(self, phase: str, codes: Sequence[str]) -> list[Outcome]:
        """Run all of them; outcomes in the order of the codes."""
        self._progress.phase(phase, total=len(codes))
        outcomes: list[Outcome] = []
        for start in range(0, len(codes), _CALLS_AT_ONCE):
            part = self._tool.map(codes[start : start + _CALLS_AT_ONCE])
            outcomes += part
            self._progress.advance(len(part))
        self.calls += len(outcomes)
        self.refused += sum(outcome.status == "denied" for outcome in outcomes)
        return outcomes


def _vocabulary(codec: Codec) -> Vocabulary:
    return Vocabulary(size=len(codec), pad=codec.pad, begin=codec.begin, end=codec.end)


def _seed_everything(seed: int) -> None:
    """Also the generators that this loop does not draw from: they are a part of every snapshot."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _seed(seed: int, what: int | str) -> int:
    """A seed of its own for each use, so that no two of them draw the same numbers."""
    return random.Random(f"loopguard/{seed}/{what}").getrandbits(63)


def _sentence(row: dict[str, Any]) -> str:
    panel = row["panel"]
    kept = "" if row["kept"] is None else f", kept {row['kept']} of {row['proposed']} proposals"
    return (
        f"cycle {row['cycle']} promoted: {panel['correct']:.1%} of held-out calls correct, "
        f"loss {panel['heldout_loss']:.3f}{kept}"
    )
