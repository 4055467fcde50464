"""TRL: one line puts an SFT, DPO or GRPO trainer under a guard, or has it watched.

    guard.attach(trainer)
    trainer.train()

Covered: what `integrations.transformers` covers, and the metrics that TRL's trainers report beside the loss. Of GRPO
and its kin also who generates: the promotion gate stands before each generation of the model itself, and before
`sync_weights` where an engine generates. Tools, environments and rewards are wrapped when the trainer is made:
`guard.tool`, `guard.wrap_environment`, `guard.wrap_reward`.

Not covered, and refused: trainers that generate in ways of their own (GKD, GOLD, distillation, AsyncGRPO). Not
covered: a `rollout_func` that calls tools by itself, and the reference model of `SyncRefModelCallback`. No vLLM
engine was ever run under it; docs/trl.md says what was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopguard.integrations.transformers.contract import refuse_cycle_updates
from loopguard.integrations.trl.attached import Generating, Reporting, Watched
from loopguard.integrations.trl.contract import generates, refuse_what_generates_otherwise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.observe import Observer


def attach(guard: LoopGuard, trainer: Any, *, config: Mapping[str, Any] | None = None, cycle_updates: int = 1) -> None:
    """Put a trainer under a guard. Raises UsageError for one whose updates cannot be withheld.

    `cycle_updates`: so many updates, at least, before the weights of a trainer that generates are asked to be promoted.
    """
    if generates(trainer):
        Generating(guard, trainer, config=config, cycle_updates=cycle_updates)
    else:
        refuse_what_generates_otherwise(trainer)
        refuse_cycle_updates(trainer, cycle_updates)
        Reporting(guard, trainer, config=config)


def observe(observer: Observer, trainer: Any) -> None:
    """Have a trainer watched. Raises UsageError where what is watched is not there."""
    Watched(observer, trainer)


__all__ = ["attach", "observe"]
