"""The model of a Trainer, which ticks its own schedule, clips its own gradients and zeroes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopguard.integrations.torch.learner import TorchLearner
from loopguard.integrations.torch.veto import innermost

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class TrainerLearner(TorchLearner):
    """A learner whose schedule a Trainer ticks, and whose gradient norm it has already taken, before it clipped.

    Lives from the begin of `train()` to its end. Updates are decided by the host: a Trainer reads its loss there in
    each update anyway.
    """

    ticks = False

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        scaler: Any,
        norm: Callable[[], Any],
        generates: bool,
    ) -> None:
        super().__init__(
            model=model,
            optimizers=[innermost(optimizer)],
            schedulers=[scheduler],
            actor=None,
            scaler=scaler,
            late=False,
        )
        self._taken_norm = norm
        self._generates = generates

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training generate."""
        return self._generates

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step. The Trainer has clipped already; `clip_norm` is for the record of what a replay has to do."""
        super().apply(clip_norm=None)

    def total_norm(self) -> torch.Tensor:
        """The norm that the Trainer took before it clipped; where it took none, that of the gradients as they are."""
        taken = self._taken_norm()
        if taken is None:
            return super().total_norm()
        whole: torch.Tensor = taken.full_tensor() if hasattr(taken, "full_tensor") else taken
        return whole
