"""The internals of transformers and accelerate that the integration relies on: a short list, each with a probe.

Versions are not compared: what is there is looked at. `doctor` prints the findings, `require` refuses to attach where
one is missing, and the tests of this list fail before a user meets a release that changed it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

TRAINER_METHODS = ("train", "training_step", "compute_loss", "evaluate", "add_callback")
EVENTS = (
    "on_train_begin",
    "on_step_begin",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_save",
    "on_log",
)

_ELSEWHERE = {
    "DEEPSPEED": "DeepSpeed's engine steps by itself",
    "MEGATRON_LM": "Megatron-LM steps by itself",
    "XLA": "updates on XLA devices are put together lazily, and cannot be withheld one by one",
}
_OPTIMS_ELSEWHERE = {"lomo": "it updates inside backward()", "layerwise": "it updates inside backward()"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one thing that is relied on is there, and what it is needed for."""

    name: str
    ok: bool
    why: str


def probe() -> list[Finding]:
    """Look at the installed transformers and accelerate. Raises ImportError where they are not installed."""
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback

    return [
        *(_has(Trainer, name, "it is wrapped, or called") for name in TRAINER_METHODS),
        *(_has(TrainerCallback, name, "it tells where the trainer stands") for name in EVENTS),
        _has(accelerate.Accelerator, "clip_grad_norm_", "it gives the gradient norm before clipping"),
        _has(accelerate.Accelerator, "optimizer_step_was_skipped", "the trainer asks it before it ticks the schedule"),
        Finding(
            "AcceleratedOptimizer.step_was_skipped follows _is_overflow",
            _follows_overflow(AcceleratedOptimizer),
            "a withheld update does not tick the schedule",
        ),
        Finding(
            "Trainer.train(resume_from_checkpoint)",
            "resume_from_checkpoint" in _parameters(Trainer, "train"),
            "it says which checkpoint was loaded",
        ),
    ]


def require(trainer: Any) -> None:
    """Raise UsageError where this trainer, or what is installed, lacks something that is relied on."""
    missing = [finding.name for finding in probe() if not finding.ok]
    missing += [f"{type(trainer).__name__}.{name}" for name in TRAINER_METHODS if not hasattr(trainer, name)]
    if not hasattr(getattr(trainer, "accelerator", None), "clip_grad_norm_"):
        missing.append(f"{type(trainer).__name__}.accelerator.clip_grad_norm_")
    if missing:
        raise UsageError(
            f"{type(trainer).__name__} cannot be attached to: {_listed(missing)} is not there in the installed "
            "transformers and accelerate. Run `loopguard doctor`, and take releases that LoopGuard was tested with"
        )


def refuse_what_steps_elsewhere(trainer: Any) -> None:
    """Raise UsageError where an update of this trainer cannot be withheld, or restarts by itself."""
    name, accelerator = type(trainer).__name__, trainer.accelerator
    kind = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
    why = _ELSEWHERE.get(kind)
    if kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        why = "FSDP 1 keeps its weights in flat shards that no snapshot of ours holds; set fsdp_version: 2"
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    why = why or next((f"optim={optim!r}: {text}" for part, text in _OPTIMS_ELSEWHERE.items() if part in optim), None)
    if why:
        raise UsageError(f"{name} cannot be guarded: {why}. LoopGuard.observe(run_dir).attach(trainer) can watch it")
    if trainer.args.auto_find_batch_size:
        raise UsageError(
            f"{name} cannot be guarded with auto_find_batch_size, which trains from the beginning again after updates "
            "were applied: set per_device_train_batch_size"
        )


def refuse_trial(trial: Any) -> None:
    """Raise UsageError for one of several trainings of a hyperparameter search, which have nothing in common."""
    if trial is not None:
        raise UsageError(
            "a guard is of one run, and hyperparameter_search makes many: "
            "search without a guard, and train under one with what was found"
        )


def refuse_cycle_updates(trainer: Any, cycle_updates: int) -> None:
    """Raise UsageError where it was asked for so many updates in a cycle, and evaluations end the cycles."""
    if cycle_updates != 1:
        raise UsageError(
            f"attach(cycle_updates={cycle_updates}): a {type(trainer).__name__} does not generate, and its cycles end "
            "where it evaluates (eval_steps); leave it out"
        )


def require_prepared(trainer: Any) -> None:
    """Raise UsageError where the optimizer is not what accelerate makes of one."""
    optimizer = trainer.optimizer
    lacking = [name for name in ("step_was_skipped", "gradient_state", "_is_overflow") if not hasattr(optimizer, name)]
    if lacking:
        raise UsageError(
            f"{type(trainer).__name__} prepared a {type(optimizer).__name__}, which has no {_listed(lacking)}: "
            "a withheld update would tick the schedule"
        )


def _has(owner: type, name: str, why: str) -> Finding:
    return Finding(f"{owner.__name__}.{name}", hasattr(owner, name), why)


def _parameters(owner: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else []


def _follows_overflow(optimizer: type) -> bool:
    bare: Any = object.__new__(optimizer)
    told = []
    for said in (False, True):
        bare._is_overflow = said
        told.append(bare.step_was_skipped)
    return told == [False, True]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
