"""The internals of TRL that the integration relies on, beside those of transformers, each with a probe."""

from __future__ import annotations

import inspect
from typing import Any

from loopguard.errors import UsageError
from loopguard.integrations.transformers.contract import Finding

GENERATION = "_generate_and_score_completions"
SYNC = "self.vllm_generation.sync_weights()"

_ACTS = (".generate(", "sync_weights(", "_sync_weight(")
"""How the source of a trainer whose weights act reads."""


def probe() -> list[Finding]:
    """Look at the installed TRL. Raises ImportError where it is not installed."""
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    syncs = inspect.signature(VLLMGeneration.sync_weights).parameters
    source = inspect.getsource(GRPOTrainer)
    return [
        *(
            Finding(
                f"{trainer.__name__}._metrics['train']",
                "self._metrics[mode]" in inspect.getsource(trainer),
                "the metrics beside the loss are read there",
            )
            for trainer in (SFTTrainer, DPOTrainer, GRPOTrainer)
        ),
        Finding(f"GRPOTrainer.{GENERATION}", hasattr(GRPOTrainer, GENERATION), "the gate stands before a generation"),
        Finding("GRPOTrainer calls vllm_generation.sync_weights()", SYNC in source, "the gate stands before a sync"),
        Finding("VLLMGeneration.sync_weights takes no arguments", list(syncs) == ["self"], "it is the promotion"),
        Finding("GRPOTrainer._last_loaded_step", "self._last_loaded_step" in source, "a sync is asked for again by it"),
    ]


def require(trainer: Any) -> None:
    """Raise UsageError where this trainer lacks something that is relied on."""
    missing = [] if hasattr(trainer, "_metrics") else ["_metrics"]
    engine = getattr(trainer, "vllm_generation", None)
    if generates(trainer) and uses_engine(trainer) and not hasattr(engine, "sync_weights"):
        missing.append("vllm_generation.sync_weights")
    if missing:
        raise UsageError(
            f"{type(trainer).__name__} cannot be attached to: it has no {', '.join(missing)}. Run `loopguard doctor`, "
            "and take a release of TRL that LoopGuard was tested with"
        )


def generates(trainer: Any) -> bool:
    """Whether this trainer generates what it trains on, and does so as GRPO does."""
    alike = hasattr(trainer, "num_iterations") and hasattr(trainer.args, "steps_per_generation")
    return alike and hasattr(trainer, GENERATION)


def refuse_what_generates_otherwise(trainer: Any) -> None:
    """Raise UsageError for a trainer of TRL whose weights act where the promotion gate does not stand."""
    for cls in type(trainer).__mro__:
        theirs = cls.__module__.partition(".")[0] == "trl"
        if theirs and any(word in inspect.getsource(cls) for word in _ACTS):
            raise UsageError(
                f"{type(trainer).__name__} cannot be guarded: {cls.__name__} generates what it trains on in a way of "
                "its own, with weights that nobody promoted. LoopGuard.observe(run_dir).attach(trainer) can watch it"
            )


def uses_engine(trainer: Any) -> bool:
    """Whether another process or library generates, which is given the weights."""
    return bool(getattr(trainer, "use_vllm", False))
