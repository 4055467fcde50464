"""What a run is told (`ToolformerOptions`) and the sizes that follow from it (`Settings`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from loopguard.pipelines.toolformer.plant import Plant


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of the model and of the loop. Lengths are in tokens, weights are relative to the call's own tokens."""

    hidden: int
    feedforward: int
    layers: int
    heads: int
    vocabulary: int

    warmup_solutions: int
    """How many annotated solutions the model is warmed up on before it proposes calls of its own."""
    warmup_calls: int
    """The first so many human calls of each: a long solution teaches no more than a short one."""
    warmup_updates: int
    cycle_updates: int
    batch: int
    plain_share: float
    """Share of a batch that is plain lines; the rest are records with calls."""
    text_weight: float
    """Weight of the text around calls. Below 1, since the loop is about calls and the model is small."""
    learning_rate: float
    """The highest one, which the warm-up begins with."""
    cycle_rate: float
    """The learning rate of the cycles, as a share of that; the second half of the warm-up comes down to it."""

    places: int
    """Places read in each cycle."""
    samples: int
    """Proposals for each of them."""
    temperature: float
    min_gain: float
    """The least that having the result must lower the loss of what follows, in nats per token."""

    before_length: int
    call_length: int
    after_length: int

    held_out_places: int
    held_out_lines: int


GSM8K = Settings(
    hidden=128,
    feedforward=384,
    layers=3,
    heads=4,
    vocabulary=1000,
    warmup_solutions=200,
    warmup_calls=20,
    warmup_updates=300,
    cycle_updates=150,
    batch=48,
    plain_share=0.25,
    text_weight=0.3,
    learning_rate=2e-3,
    cycle_rate=1.0,
    places=1000,
    samples=2,
    temperature=0.8,
    min_gain=0.0,
    before_length=32,
    call_length=18,
    after_length=8,
    held_out_places=400,
    held_out_lines=400,
)
"""Sized for the real thing: GSM8K on two cores in minutes."""

GENERATED = Settings(
    hidden=96,
    feedforward=256,
    layers=2,
    heads=3,
    vocabulary=200,
    warmup_solutions=160,
    warmup_calls=2,
    warmup_updates=250,
    cycle_updates=40,
    batch=32,
    plain_share=0.25,
    text_weight=0.5,
    learning_rate=3e-3,
    cycle_rate=0.4,
    places=300,
    samples=2,
    temperature=1.0,
    min_gain=0.0,
    before_length=32,
    call_length=12,
    after_length=6,
    held_out_places=300,
    held_out_lines=300,
)
"""Sized for a demonstration: generated problems, about half a minute of training."""

PRESETS: dict[Literal["gsm8k", "generated"], Settings] = {"gsm8k": GSM8K, "generated": GENERATED}

PRETRAINED_LEARNING_RATE = 1e-4
"""For a model that has learned before, which a rate meant for starting from nothing would wipe out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolformerOptions:
    """What a person may say about a run."""

    data: Path | None = None
    """A file in the form of GSM8K; None takes generated problems."""
    eval: Path | None = None
    """The held-out text; None takes `test.jsonl` beside the data, or problems that were generated apart."""
    cycles: int = 6
    seed: int = 0
    plant: Plant | None = None
    model: Path | None = None
    """A folder with a pretrained causal language model; None trains a small one from nothing."""
    control: bool = False
    """Do everything, but train on no record that the loop kept."""
    threads: int = 1
    """Torch threads. Models as small as these gain little from more, and with one a run comes out the same anywhere."""
    preset: Literal["gsm8k", "generated"] | None = None
    """None takes the one that fits: `gsm8k` with a data file, else `generated`."""
