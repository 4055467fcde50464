"""What a run works on: the text it is warmed up with, the text it reads, the text it is judged by."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from loopguard.errors import DataFileError, UsageError
from loopguard.pipelines.toolformer import problems
from loopguard.pipelines.toolformer.evaluate import HeldOut, is_implicit
from loopguard.pipelines.toolformer.examples import completion_of
from loopguard.pipelines.toolformer.settings import PRESETS, PRETRAINED_LEARNING_RATE
from loopguard.pipelines.toolformer.text import read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from loopguard.pipelines.toolformer.settings import Settings, ToolformerOptions
    from loopguard.pipelines.toolformer.text import Place, Problem

_GENERATED, _GENERATED_HELD_OUT = 4000, 600
_HELD_OUT_ONE_IN = 10
_SLICE = "held-out"
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The text of a run, sorted by what it is for."""

    settings: Settings
    warmup: tuple[Place, ...]
    """Places with the human calls that the model starts from."""
    pool: tuple[Place, ...]
    """Places without annotations, which the model reads cycle after cycle."""
    lines: tuple[tuple[str, str], ...]
    """Plain lines for training, each with its origin."""
    held_out: HeldOut
    protected: tuple[str, ...]
    """Every spelling of the held-out text that training data must not overlap with."""
    facts: dict[str, Any]
    """What this task was made from. A run directory belongs to one task."""


def prepare(options: ToolformerOptions) -> Task:
    """Read the data and sort it.

    Raises DataFileError for a bad line and UsageError for options that do not fit together; nothing has been written
    by then.
    """
    preset = options.preset or ("gsm8k" if options.data else "generated")
    settings = PRESETS[preset]
    if options.model is not None:
        settings = replace(settings, learning_rate=PRETRAINED_LEARNING_RATE)
    if options.plant is not None and options.plant.cycle > options.cycles:
        raise UsageError(
            f"--plant {options.plant}: the run has cycles 1 to {options.cycles}; plant in one of them or raise --cycles"
        )
    training, evaluation = _texts(options)
    warmed, rest = _split(training, settings.warmup_solutions, seed=options.seed)
    return Task(
        settings=settings,
        warmup=tuple(place for problem in warmed for place in _called(problem)[: settings.warmup_calls]),
        pool=tuple(place for problem in rest for place in problem.places),
        lines=tuple((problem.origin, line) for problem in training for line in problem.lines),
        held_out=_held_out(evaluation, settings),
        protected=tuple(_spellings(evaluation)),
        facts={
            "preset": preset,
            "seed": options.seed,
            "control": options.control,
            "data": _digest(options.data),
            "eval": _digest(options.eval),
            "model": _digest(options.model / "config.json" if options.model else None),
        },
    )


def _texts(options: ToolformerOptions) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems; never the same ones."""
    if options.data is None:
        held_out = problems.generate(_GENERATED_HELD_OUT, seed=-1, name="held-out")
        known = {problem.lines for problem in held_out}
        training = problems.generate(_GENERATED, seed=options.seed)
        generated = [problem for problem in training if problem.lines not in known]
        return generated, held_out if options.eval is None else read(options.eval)
    training = read(options.data)
    if options.eval is not None:
        return training, read(options.eval)
    beside = options.data.with_name("test.jsonl")
    if beside.is_file() and beside.name != options.data.name:
        return training, read(beside)
    kept = [problem for at, problem in enumerate(training) if at % _HELD_OUT_ONE_IN]
    held_out = training[::_HELD_OUT_ONE_IN]
    if not kept or not any(problem.places for problem in held_out):
        raise DataFileError(
            f"{options.data}:1: too short to hold out one problem in {_HELD_OUT_ONE_IN}; "
            "name a held-out file with --eval"
        )
    return kept, held_out


def _split(training: Sequence[Problem], warmup: int, *, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Solutions for the warm-up, and all the others."""
    annotated = [at for at, problem in enumerate(training) if _called(problem)]
    # A small file keeps half of its solutions for the cycles.
    count = min(warmup, max(1, len(annotated) // 2))
    chosen = set(random.Random(f"{seed}/warm-up").sample(annotated, min(count, len(annotated))))
    rest = [problem for at, problem in enumerate(training) if at not in chosen]
    if not chosen or not any(problem.places for problem in rest):
        raise DataFileError("the data hold too few annotated solutions: at least two with `<<...>>` are needed")
    return [training[at] for at in sorted(chosen)], rest


def _called(problem: Problem) -> list[Place]:
    return [place for place in problem.places if place.call is not None]


def _held_out(evaluation: Sequence[Problem], settings: Settings) -> HeldOut:
    """The same places and lines for every run on this file, whatever its seed."""
    places = _slice([place for problem in evaluation for place in problem.places], settings.held_out_places)
    lines = _slice([line for problem in evaluation for line in problem.lines], settings.held_out_lines)
    if not any(is_implicit(place) for place in places):
        raise DataFileError("the held-out text spells out every expression; the panel needs some that are not")
    return HeldOut(places=tuple(places), lines=tuple(lines))


def _slice(items: Sequence[_Item], count: int) -> list[_Item]:
    order = sorted(range(len(items)), key=lambda at: hashlib.sha256(f"{_SLICE}/{at}".encode()).digest())
    return [items[at] for at in order[:count]]


def _spellings(evaluation: Sequence[Problem]) -> Iterator[str]:
    for problem in evaluation:
        yield problem.question
        yield from problem.lines
        for place in problem.places:
            if place.call is not None:
                yield place.before + completion_of(place.call, place.number, place.after)


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
