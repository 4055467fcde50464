"""Plain PyTorch: a model, its optimizers, and the only door through which they may step.

Covered: every optimizer whose `step` moves the weights, several of them decided together, LR schedules, the RNG of
Python, NumPy and torch.

Not covered: optimizers that update inside backward, and frameworks that call `step` themselves.
"""

from __future__ import annotations

import hashlib
import random
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class TorchLearner:
    """A model in training, its optimizers and schedulers, and the actor that generates data.

    A learner lives from `attach` to the end of the process. While it lives an attached optimizer steps through `apply`
    alone: `optimizer.step()` called by anyone else raises UsageError before a weight moves.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        actor: torch.nn.Module | None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.schedulers = tuple(schedulers)
        self.actor = actor
        self._permitted = False
        self._norm: torch.Tensor | None = None
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self._refuse_unless_permitted)

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training are the ones that generate."""
        return self.actor is None

    def readings(self, loss: Any) -> dict[str, float]:
        """The loss and the total gradient norm before clipping, as floats. Reads each from its device once."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if not gradients:
            raise UsageError("no parameter has a gradient: call loss.backward() before cycle.update(loss=loss)")
        self._norm = get_total_norm(gradients)
        value = loss.detach().item() if isinstance(loss, torch.Tensor) else loss
        return {"loss": float(value), "grad_norm": float(self._norm)}

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step that was decided: clip where asked, step, tick the schedules, zero the gradients."""
        if clip_norm is not None and self._norm is not None:
            clip_grads_with_norm_(self._parameters(), clip_norm, self._norm)
        self._permitted = True
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        finally:
            self._permitted = False
        for scheduler in self.schedulers:
            scheduler.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradients; nothing else moves."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and JSON values."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "rng": _rng(),
        }

    def restore(self, state: dict[str, Any], *, actor_too: bool) -> None:
        """Go back to a state; the RNG comes last, since loading the rest may draw from it."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            optimizer.zero_grad(set_to_none=True)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if actor_too and self.actor is not None:
            self.actor.load_state_dict(state["model"])
        _set_rng(state["rng"])

    def digest(self) -> str:
        """SHA-256 over the weights, the buffers and the whole optimizer state."""
        return _sha256([self.model.state_dict(), *(optimizer.state_dict() for optimizer in self.optimizers)])

    def weights_digest(self) -> str:
        """SHA-256 over the weights and buffers in training."""
        return _sha256([self.model.state_dict()])

    def actor_digest(self) -> str:
        """SHA-256 over the weights and buffers that generate."""
        return _sha256([(self.actor or self.model).state_dict()])

    def _parameters(self) -> list[torch.Tensor]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def _refuse_unless_permitted(self, *_: Any) -> None:
        if not self._permitted:
            raise UsageError(
                "this optimizer is attached to a LoopGuard: call cycle.update(loss=loss) instead of optimizer.step()"
            )


def learner(*, model: Any, optimizer: Any, scheduler: Any, actor: Any) -> TorchLearner:
    """Hold these objects. Raises UsageError where they are not what `attach` can guard."""
    if find_spec("safetensors") is None:
        raise UsageError("attach(...) keeps snapshots as safetensors: pip install 'loopguard[train]'")
    optimizers = _several(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise UsageError(f"attach(optimizer=...) got a {type(one).__name__}; give a torch.optim.Optimizer")
    if not optimizers:
        raise UsageError("attach(model=...) also needs optimizer=..., the one that moves its weights")
    if actor is model or actor == "same":
        actor = None
    if actor is not None and not isinstance(actor, torch.nn.Module):
        raise UsageError(f"attach(actor=...) got a {type(actor).__name__}; give the module that generates, or 'same'")
    if actor is not None and actor.state_dict().keys() != model.state_dict().keys():
        raise UsageError("attach(actor=...): the actor has other parameters than the model; it cannot take its weights")
    return TorchLearner(model=model, optimizers=optimizers, schedulers=_several(scheduler), actor=actor)


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _rng() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def _set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy as np

        np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])


def _sha256(trees: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        _feed(digest, tree)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, dict):
        # In the order of the keys: an optimizer that was loaded lists its options in another order than a new one.
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
