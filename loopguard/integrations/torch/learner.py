"""Plain PyTorch: a model, its optimizers, and the only door through which they may step.

Covered: every optimizer whose `step` moves the weights, several of them decided together, LR schedules, a GradScaler,
averaged copies of the weights, module buffers, the RNG of Python, NumPy and torch. On an accelerator `device` keeps the
decision there.

Not covered: optimizers that update inside backward, and frameworks that call `step` themselves; for those `veto` stands
alone. Sparse gradients have no total norm and are refused.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from loopguard.controller.learner import Readings, Staged
from loopguard.errors import UsageError
from loopguard.integrations.torch.buffers import Buffers
from loopguard.integrations.torch.device import LatePath
from loopguard.integrations.torch.digest import sha256
from loopguard.integrations.torch.optimizers import put_back
from loopguard.integrations.torch.ranks import TorchPeers, join, sharded_alone, withheld_anywhere
from loopguard.integrations.torch.rng import reseed, rng_state, set_rng_state
from loopguard.integrations.torch.settings import settings
from loopguard.integrations.torch.steps import Steps
from loopguard.integrations.torch.veto import FUSED_KERNELS_WITH_A_FLAG
from loopguard.integrations.torch.witness import Evidence, judge, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TorchLearner:
    """A model in training, its optimizers and schedulers, and the actor that generates data.

    A learner lives from `attach` to the end of the process. While it lives an attached optimizer steps through `apply`
    or `stage` alone: `optimizer.step()` called by anyone else raises UsageError before a weight moves.

    There are two ways to take an update. `readings`, then `apply` or `discard`: the host has the values before it
    decides. Where `late` is true, `stage`, then `collect` one update later: the device decides, and the host never
    waits for it.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        actor: torch.nn.Module | None,
        scaler: Any = None,
        averages: Sequence[Any] = (),
        late: bool | None = None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.schedulers = tuple(schedulers)
        self.actor = actor
        self.scaler = scaler
        self.averages = tuple(averages)
        self._steps = Steps(model, optimizers, scaler)
        self._buffers = Buffers(model)
        self._norm: torch.Tensor | None = None
        self._overflowed = False
        self._evidence: list[Evidence | None] = []
        self._trouble = ""
        self._late_path = self._choose_path(late=late)

    ticks = True
    """`apply` ticks the schedules as well."""

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training are the ones that generate."""
        return self.actor is None

    @property
    def late(self) -> bool:
        """Whether updates are staged on the device and read one update late."""
        return self._late_path is not None

    def readings(self, loss: Any, extra: Mapping[str, Any] | None = None) -> Readings:
        """The loss, the total gradient norm before clipping, and what else was reported, as floats.

        The device is waited for once. With a scaler the gradients are unscaled first; give the loss as it was before
        scaling. Where they do not fit the scaler's format, `overflowed` is true and there is no `grad_norm`: that is
        the scaler's business, and `apply` lets it take no step. Raises UsageError where there is nothing to apply.
        """
        check_numbers({"loss": loss, **(extra or {})})
        try:
            self._overflowed = self._steps.unscale()
            self._norm = self.total_norm()
            values = {"loss": loss} | ({} if self._overflowed else {"grad_norm": self._norm}) | dict(extra or {})
            numbers = read(values.values())
        except BaseException:
            self._end()  # else a scaler would take the next gradients for unscaled ones
            raise
        return Readings(dict(zip(values, numbers, strict=True)), overflowed=self._overflowed)

    def total_norm(self) -> torch.Tensor:
        """The norm of all gradients, before clipping, on its device. Raises UsageError where there is none."""
        return self._steps.norm()

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step that was decided: clip where asked, step, tick the schedules and averages, zero the gradients.

        On an overflow the scaler takes no step and lowers its scale; schedules and averages do not tick.
        """
        if self._overflowed:
            self._steps.pass_over()
            self._buffers.keep()
            self._end()
            return
        if clip_norm is not None and self._norm is not None:
            self._steps.clip(self._norm, to=clip_norm)
        self._steps.take()
        if self.ticks:
            for scheduler in self.schedulers:
                scheduler.step()
        for average in self.averages:
            average.update_parameters(self.model)
        self._evidence = self._steps.evidence()
        self._buffers.keep()
        self._end()

    def discard(self) -> None:
        """Drop the gradients and what the forward pass wrote into the model's buffers; nothing else moves."""
        self._buffers.put_back()
        self._end()

    def stage(
        self,
        loss: Any,
        extra: Mapping[str, Any] | None = None,
        *,
        limits: Mapping[str, tuple[float | None, float | None]],
        update: int,
        latch: bool,
        clip_norm: float | None,
    ) -> None:
        """Decide on the device and step under that decision. See `LatePath.stage`."""
        path = self._path()
        check_numbers({"loss": loss, **(extra or {})})
        path.stage(loss, extra or {}, limits=limits, update=update, latch=latch, clip_norm=clip_norm)

    def collect(self) -> Staged | None:
        """What became of the update that was staged last; None where nothing is. See `LatePath.collect`."""
        return self._late_path.collect() if self._late_path is not None else None

    def release(self) -> None:
        """Let staged updates through again after one of them latched."""
        if self._late_path is not None:
            self._late_path.release()

    def trouble(self) -> str:
        """What shows that a decision was not honoured, in a sentence; the empty string where all of them were.

        It speaks of the update before the one at hand, so that reading the device for it makes nobody wait.
        """
        evidence, self._evidence = self._evidence, []
        found = [judge(one) for one in evidence]
        if self._late_path is not None:
            found.append(self._late_path.trouble)
        self._trouble = self._trouble or next(filter(None, found), "")
        return self._trouble

    def let_go(self) -> None:
        """Take the vetoes away: the optimizers step again without being asked about."""
        self._steps.let_go()

    def measure(self, values: Mapping[str, Any]) -> dict[str, float]:
        """These metrics as floats, before there is a gradient. The device is waited for once."""
        check_numbers(values)
        return dict(zip(values, read(values.values()), strict=True))

    def unkeepable(self) -> str:
        """Why no snapshot can hold its state: it is sharded, and there is no other rank to hold the rest."""
        return sharded_alone(self)

    def peers(self) -> TorchPeers | None:
        """The ranks of the default process group; None where there is one. A collective."""
        found = join(self)
        if found is not None and self._late_path is not None:
            self._late_path.anywhere = withheld_anywhere
        return found

    def prime(self) -> None:
        """Give every optimizer its state, by a step that moves weights which are about to be loaded."""
        for parameter in self._steps.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for veto in self._steps.vetoes:
            with veto.opened():
                veto.optimizer.step()
            veto.forget()
        self._steps.zero()

    def rng(self) -> dict[str, Any]:
        """The state of every generator."""
        return rng_state()

    def reseed(self, salt: str) -> None:
        """Begin anew with every random generator, from where it is now and a salt."""
        reseed(salt)

    def set_rng(self, state: dict[str, Any]) -> None:
        """Go back to such a state."""
        set_rng_state(state)

    def settings(self) -> dict[str, Any]:
        """What else decides about the bits of a step, as JSON values."""
        return settings(self._steps.parameters())

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and JSON values.

        The tensors are the living ones: write or copy them before the next update.
        """
        return {
            "model": dict(self.model.state_dict()),
            "buffers": self._buffers.unsaved(),
            "optimizers": [veto.optimizer.state_dict() for veto in self._steps.vetoes],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "averages": [dict(average.state_dict()) for average in self.averages],
            "rng": rng_state(),
        }

    def restore(self, state: dict[str, Any], *, actor_too: bool) -> None:
        """Go back to a state. The RNG comes last, since loading the rest may draw from it.

        Tensors of the optimizers are filled in place where they exist, so that graphs which were captured stay valid.
        """
        self._end()
        self.model.load_state_dict(state["model"])
        self._buffers.load_unsaved(state["buffers"])
        for veto, saved in zip(self._steps.vetoes, state["optimizers"], strict=True):
            put_back(veto.optimizer, saved)
            veto.forget()
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(copy.deepcopy(saved))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(copy.deepcopy(saved))
        if actor_too and self.actor is not None:
            self.actor.load_state_dict(state["model"])
        self._buffers.keep()
        self._evidence, self._trouble = [], ""
        if self._late_path is not None:
            self._late_path.forget()
        set_rng_state(state["rng"])

    def digest(self) -> str:
        """SHA-256 over the weights, the buffers and the whole optimizer state."""
        return sha256([self.model.state_dict(), *(veto.optimizer.state_dict() for veto in self._steps.vetoes)])

    def weights_digest(self) -> str:
        """SHA-256 over the weights and buffers in training."""
        return sha256([self.model.state_dict()])

    def actor_digest(self) -> str:
        """SHA-256 over the weights and buffers that generate."""
        return sha256([(self.actor or self.model).state_dict()])

    def _end(self) -> None:
        self._steps.drop()
        self._norm, self._overflowed = None, False

    def _path(self) -> LatePath:
        if self._late_path is None:
            raise UsageError("this learner decides at once: call readings(), then apply() or discard()")
        return self._late_path

    def _choose_path(self, *, late: bool | None) -> LatePath | None:
        parameters = self._steps.parameters()
        devices = {parameter.device for parameter in parameters}
        why_not = [
            *(["a GradScaler counts a withheld update"] if self._steps.scaler is not None else []),
            *(["averages tick on the host"] if self.averages else []),
            *(_no_flag(veto.optimizer) for veto in self._steps.vetoes if veto.path != "flag"),
            *(["parameters are on several devices"] if len(devices) > 1 else []),
        ]
        if late and why_not:
            self._steps.let_go()
            raise UsageError(f"attach(late=True): {why_not[0]}, so updates cannot be decided on the device")
        wanted = any(device.type != "cpu" for device in devices) if late is None else late
        return LatePath(self._steps, self.schedulers, self._buffers) if wanted and not why_not else None


def learner(
    *,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    actor: Any,
    scaler: Any = None,
    averages: Any = (),
    late: bool | None = None,
) -> TorchLearner:
    """Hold these objects. `scheduler`, `optimizer` and `averages` may be one or a list.

    `late` decides on the device and reads one update late; left out, it is so where the parameters are on an
    accelerator and everything here allows it. Raises UsageError where they are not what `attach` can guard.
    """
    if find_spec("safetensors") is None:
        raise UsageError("attach(...) keeps snapshots as safetensors: pip install 'loopguard[train]'")
    optimizers = _several(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise UsageError(f"attach(optimizer=...) got a {type(one).__name__}; give a torch.optim.Optimizer")
    if not optimizers:
        raise UsageError("attach(model=...) also needs optimizer=..., the one that moves its weights")
    for one in _several(scheduler):
        if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError(
                "attach(scheduler=...) got a ReduceLROnPlateau; it needs a metric: tick it where that is known"
            )
        if not all(hasattr(one, name) for name in ("step", "state_dict", "load_state_dict")):
            raise UsageError(f"attach(scheduler=...) got a {type(one).__name__}; give a learning rate scheduler")
    for one in _several(averages):
        if not all(hasattr(one, name) for name in ("update_parameters", "state_dict", "load_state_dict")):
            raise UsageError(
                f"attach(averages=...) got a {type(one).__name__}; give an AveragedModel, or what has its methods"
            )
    held = {id(parameter) for parameter in model.parameters()}
    for one in optimizers:
        if not any(id(parameter) in held for group in one.param_groups for parameter in group["params"]):
            raise UsageError(
                f"attach(optimizer=...): this {type(one).__name__} holds no parameter of the model; make it from "
                "model.parameters(), after the model has been moved, wrapped or sharded"
            )
    if scaler is not None and not all(hasattr(scaler, name) for name in ("unscale_", "step", "update", "is_enabled")):
        raise UsageError(f"attach(scaler=...) got a {type(scaler).__name__}; give a torch.amp.GradScaler")
    if actor is model or actor == "same":
        actor = None
    if actor is not None and not isinstance(actor, torch.nn.Module):
        raise UsageError(f"attach(actor=...) got a {type(actor).__name__}; give the module that generates, or 'same'")
    if actor is not None and actor.state_dict().keys() != model.state_dict().keys():
        raise UsageError("attach(actor=...): the actor has other parameters than the model; it cannot take its weights")
    return TorchLearner(
        model=model,
        optimizers=optimizers,
        schedulers=_several(scheduler),
        actor=actor,
        scaler=scaler,
        averages=_several(averages),
        late=late,
    )


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise UsageError, naming it, for a reading that is no single number."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            fine = value.numel() == 1 and not value.is_complex()
            what = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
        else:
            fine, what = _is_number(value), repr(value)[:60]
        if not fine:
            raise UsageError(f"{name} is {what}; give one number, or a tensor of one real number")


def _is_number(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _no_flag(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    if type(optimizer) in FUSED_KERNELS_WITH_A_FLAG:
        return f"this {name} is not fused (make it with fused=True)"
    return f"{name} has no kernel that can be told on the device"


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
