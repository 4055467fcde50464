"""transformers: one line puts a `Trainer` under a guard, or has it watched.

    guard.attach(trainer)
    trainer.train()

Covered: `Trainer` and its subclasses on one process, DDP or FSDP 2; gradient accumulation, clipping, mixed precision,
every optimizer whose `step` moves the weights, evaluation, checkpoints and resuming from them.

Not covered, and refused: DeepSpeed's and Megatron's own steps, FSDP 1, XLA, LOMO and layer-wise GaLore,
`auto_find_batch_size`. docs/transformers.md has the whole of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopguard.integrations.transformers import contract
from loopguard.integrations.transformers.attached import Guarded, Observed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.observe import Observer


def attach(guard: LoopGuard, trainer: Any, *, config: Mapping[str, Any] | None = None, cycle_updates: int = 1) -> None:
    """Put a trainer under a guard. Raises UsageError for one whose updates cannot be withheld."""
    contract.refuse_cycle_updates(trainer, cycle_updates)
    Guarded(guard, trainer, config=config)


def observe(observer: Observer, trainer: Any) -> None:
    """Have a trainer watched. Raises UsageError where what is watched is not there."""
    Observed(observer, trainer)


__all__ = ["attach", "observe"]
