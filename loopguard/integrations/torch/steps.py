"""The optimizers of one model: one gradient norm, one clipping, one step of all of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from loopguard.errors import UsageError
from loopguard.integrations.torch.veto import Veto, innermost, refuse_steps_elsewhere

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopguard.integrations.torch.witness import Evidence


class Steps:
    """The optimizers of one model, which step together or not at all, each behind its own closed veto.

    With a scaler each of them steps through it. Where the gradients of one overflow none of them steps, since they are
    one update; a loop without a guard would step the others.
    """

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: Any = None) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        for optimizer in self.optimizers:
            refuse_steps_elsewhere(innermost(optimizer))
        self.vetoes = tuple(Veto(optimizer, closed=True) for optimizer in self.optimizers)
        self._unscaled = False
        self._ids: list[int] = []
        self._ordered: list[torch.Tensor] = []

    def let_go(self) -> None:
        """Take the vetoes away: these optimizers are not guarded after all."""
        for veto in self.vetoes:
            veto.remove()

    def parameters(self) -> list[torch.Tensor]:
        """What the optimizers hold, in the order of the model.

        The order decides about the last bit of the norm, and a loop without a guard clips in the model's.
        """
        held = [p for veto in self.vetoes for group in veto.optimizer.param_groups for p in group["params"]]
        ids = [id(p) for p in held]
        # Walking through a model takes longer than all that the guard does besides.
        if ids != self._ids:
            left = dict(zip(ids, held, strict=True))
            ordered = [p for p in self.model.parameters() if left.pop(id(p), None) is not None]
            self._ids, self._ordered = ids, ordered + list(left.values())
        return self._ordered

    def unscale(self) -> bool:
        """Divide the gradients by the scaler's scale, once for each update; whether some do not fit its format."""
        if self.scaler is None:
            return False
        for optimizer in self.optimizers:
            # Private, but there is no other way to learn what the scaler will do; a test pins it.
            if not self.scaler._found_inf_per_device(optimizer):
                self._unscale(optimizer)
        self._unscaled = True
        found = [f for optimizer in self.optimizers for f in self.scaler._found_inf_per_device(optimizer).values()]
        return any(bool(one) for one in found)

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.scaler is not None
        try:
            self.scaler.unscale_(optimizer)
        except AssertionError as error:
            # It has never scaled anything, so the gradients are not its own.
            raise UsageError(
                "the guard was given a scaler that scaled nothing: call scaler.scale(loss).backward()"
            ) from error

    def norm(self) -> torch.Tensor:
        """The total norm of all gradients, still on its device. Raises UsageError where there is none."""
        gradients = [gradient for p in self.parameters() if (gradient := p.grad) is not None]
        if not gradients:
            raise UsageError("no parameter has a gradient: call loss.backward() before cycle.update(loss=loss)")
        if any(gradient.layout is not torch.strided for gradient in gradients):
            raise UsageError("a gradient is sparse, and has no total norm: make the embedding with sparse=False")
        norm = get_total_norm(gradients)
        # Of sharded gradients: every rank takes part.
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def clip(self, norm: torch.Tensor, *, to: float) -> None:
        """Scale the gradients to a norm of at most `to`, as `clip_grad_norm_` does, with the norm that is known."""
        clip_grads_with_norm_(self.parameters(), to, norm)

    def take(self) -> None:
        """Step every optimizer."""
        with ExitStack() as stack:
            for veto in self.vetoes:
                stack.enter_context(veto.opened())
            for optimizer in self.optimizers:
                if self.scaler is None:
                    optimizer.step()
                else:
                    self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
            self._unscaled = False

    def evidence(self) -> list[Evidence | None]:
        """What the steps that were just taken left behind. They were allowed: only a scaler may have withheld one."""
        left = [veto.evidence for veto in self.vetoes]
        return left if self.scaler is not None else [one and one._replace(withheld=0.0) for one in left]

    def pass_over(self) -> None:
        """Gradients do not fit: the scaler lowers its scale, and no optimizer steps, also none whose own would fit."""
        assert self.scaler is not None
        self.scaler.update()
        self._unscaled = False

    def drop(self) -> None:
        """Zero the gradients; a scaler forgets that it saw them, and counts nothing."""
        if self._unscaled and self.scaler is not None:
            # To the scale that it has already: this is the public way to make it forget.
            self.scaler.update(new_scale=self.scaler.get_scale())
            self._unscaled = False
        self.zero()

    def zero(self) -> None:
        """Zero the gradients; in place where a graph may write to them, which is where an optimizer is capturable."""
        for optimizer in self.optimizers:
            in_place = any(group.get("capturable") for group in optimizer.param_groups)
            optimizer.zero_grad(set_to_none=not in_place)
