"""What is put on a Trainer, and what each of its events means to a guard.

Callbacks of a Trainer are given neither the loss nor the gradient norm before a step, and nothing they do withholds it.
So on the instance these are wrapped: `training_step` gives the losses, `compute_loss` the batches,
`accelerator.clip_grad_norm_` the norm, and `step` of the prepared optimizer is where the update gate is asked.
`contract` holds the list, and probes it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from loopguard.controller.driver import Driver
from loopguard.errors import UsageError
from loopguard.integrations.torch.witness import read
from loopguard.integrations.transformers import contract
from loopguard.integrations.transformers.learner import TrainerLearner
from loopguard.integrations.transformers.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Collection

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.observe import Observer
    from loopguard.types import Decision

logger = logging.getLogger(__name__)

_SPEEDS = ("_runtime", "_per_second", "_model_preparation_time")
"""How the names of what `evaluate` reports beside capabilities end."""


class Attached(TrainerCallback):  # type: ignore[misc]
    """Reads the losses, norms and metrics of a Trainer where they arise. Stays on it for good."""

    def __init__(self, trainer: Any) -> None:
        if getattr(trainer, "_loopguard", None) is not None:
            raise UsageError("this trainer is attached to a guard already: make a new one for another guard")
        contract.require(trainer)
        trainer._loopguard = self
        self.trainer = trainer
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._in_step = False
        patches = Patches()
        patches.wrap(trainer, "train", self._around_train)
        patches.wrap(trainer, "training_step", self._around_training_step)
        patches.wrap(trainer, "compute_loss", self._around_compute_loss)
        patches.wrap(trainer.accelerator, "clip_grad_norm_", self._around_clip)
        trainer.add_callback(self)

    # What subclasses say

    def reported(self) -> tuple[dict[str, float], Collection[str]]:
        """What the trainer reported since the last update beside the loss, and what it had nothing to report of."""
        return {}, ()

    def _around_train(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """All of `train()`."""
        return inner(*args, **kwargs)

    def _batch(self, inputs: Any, num_items_in_batch: Any) -> None:
        """A batch is about to be trained on."""

    # Where readings come from

    def _around_training_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self._in_step = True
        self._norm = None  # an update that was dropped before it was judged has left its own
        try:
            loss = inner(*args, **kwargs)
        finally:
            self._in_step = False
        self._losses.append(loss.detach())
        return loss

    def _around_compute_loss(self, inner: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._in_step:
            self._batch(inputs, kwargs.get("num_items_in_batch"))
        return inner(model, inputs, *args, **kwargs)

    def _around_clip(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        norm = inner(*args, **kwargs)
        if self._norm is None:
            self._norm = norm  # the first one is of the gradients as they came
        return norm

    def _loss(self) -> torch.Tensor:
        """The loss of this update: the sum over its micro-batches, which the trainer has divided already."""
        losses, self._losses = self._losses, []
        if not losses:
            raise UsageError(
                f"{type(self.trainer).__name__} took an optimizer step without training_step, so the guard has no loss"
            )
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _take_norm(self) -> Any:
        norm, self._norm = self._norm, None
        return norm


class Guarded(Attached):
    """Puts a Trainer under a guard: the optimizer steps when the update gate says so."""

    def __init__(self, guard: LoopGuard, trainer: Any, *, config: Mapping[str, Any] | None) -> None:
        contract.refuse_what_steps_elsewhere(trainer)
        super().__init__(trainer)
        self.guard = guard
        self.driver: Driver | None = None
        self._config = config
        self._checkpoint: Path | None = None
        self._on_optimizer = Patches()
        self._keeps = True

    # What subclasses say

    generates = False
    """Whether the weights in training generate what they are trained on."""

    def apply(self) -> None:
        """Install promoted weights where they act. A Trainer that does not generate has no such place."""

    def _settle(self) -> Decision | None:
        """Ask the promotion gate about an evaluation that is over."""
        return self._held().settle(self.apply)

    # Events

    def _around_train(self, inner: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        contract.refuse_trial(kwargs.get("trial", args[0] if args else None))
        self._checkpoint = self._resolve(resume_from_checkpoint)
        try:
            output = inner(resume_from_checkpoint, *args, **kwargs)
            self._finish()
        finally:
            self._let_go()
        return output

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the model: the optimizer has been prepared by now, and a checkpoint loaded."""
        trainer = self.trainer
        contract.require_prepared(trainer)
        self.driver = Driver(self.guard)
        self._losses.clear()
        self._norm = None
        learner = TrainerLearner(
            model=trainer.model,
            optimizer=trainer.optimizer,
            scheduler=trainer.lr_scheduler,
            scaler=getattr(trainer.accelerator, "scaler", None),
            norm=self._take_norm,
            generates=self.generates,
        )
        self._on_optimizer.wrap(trainer.optimizer, "step", self._around_step)
        config = {"training_arguments": arguments_of(args)} if self._config is None else self._config
        self.driver.begin(learner, config=config, checkpoint=self._checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is over."""
        self._settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule has ticked."""
        self._held().ticked()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The weights were measured. With several data sets this comes once for each."""
        if self.driver is not None:
            self.driver.evaluated(panel_of(metrics or {}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What is logged when all is trained: the trainer may load other weights next, which were not measured."""
        if self.driver is not None and "train_runtime" in (logs or {}):
            self._settle()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written a checkpoint. It is remembered first: the gate may undo what is in it."""
        self._saved(args, state)
        decision = self._settle()
        if decision is not None and decision.gate == "promotion" and decision.result != "freeze":
            self._saved(args, state)  # the same weights, and the gates as they are by now

    def _saved(self, args: Any, state: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if checkpoint.is_dir():
            self._held().saved(checkpoint)

    def _around_step(self, inner: Any, closure: Any = None) -> None:
        optimizer = self.trainer.optimizer
        if not optimizer.gradient_state.sync_gradients:
            return
        if closure is not None:
            raise UsageError("the trainer gave optimizer.step() a closure: a guarded step has its gradients already")
        readings, absent = self.reported()
        limit = self.trainer.args.max_grad_norm
        clipped = limit if 0 < limit < math.inf else None
        became = self._held().update(loss=self._loss(), readings=readings, absent=absent, clip_norm=clipped)
        # What accelerate says of a step that its scaler skipped: neither it nor the trainer ticks the schedule then.
        optimizer._is_overflow = became != "applied"
        optimizer._opt_called = True  # the schedule asks, since it knows this optimizer and not the one inside

    def _batch(self, inputs: Any, num_items_in_batch: Any) -> None:
        if not self._keeps:
            return
        try:
            plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
            self._held().cycle.keep({"inputs": plain, "num_items_in_batch": num_items_in_batch})
        except UsageError as error:
            self._keeps = False
            logger.warning("loopguard keeps no batches for a replay of this run: %s", error)

    # Ending

    def _finish(self) -> None:
        """Have the last weights measured, where the guard policy asks for it and nobody has since the last update."""
        driver, trainer = self._held(), self.trainer
        self._settle()
        loaded_others = getattr(trainer.args, "load_best_model_at_end", False)
        if driver.updates and not loaded_others:
            if driver.lacking(driver.means()) and trainer.eval_dataset is not None:
                trainer.evaluate()
            if lacking := driver.lacking(driver.means()):
                logger.warning(
                    "loopguard: the last %d updates are not promoted, since the guard policy's panel names %s, and "
                    "no evaluation of them reported it",
                    driver.updates,
                    ", ".join(lacking),
                )
            else:
                driver.promote(driver.take_panel(), None if self.generates else self.apply)
        driver.end()

    def _let_go(self) -> None:
        self._on_optimizer.undo()
        if self.driver is not None:
            self.driver.release()
            self.driver = None

    def _held(self) -> Driver:
        if self.driver is None:
            raise UsageError("the guard holds no model of this trainer: call trainer.train()")
        return self.driver

    def _resolve(self, resume_from_checkpoint: Any) -> Path | None:
        """The checkpoint that `train(resume_from_checkpoint=...)` will load."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None


class Observed(Attached):
    """Watches a Trainer, and changes nothing."""

    def __init__(self, observer: Observer, trainer: Any) -> None:
        super().__init__(trainer)
        self.observer = observer

    def _around_train(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            self.observer.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say in the log what is trained."""
        self._losses.clear()
        self._norm = None
        self.observer.note_model({"trainer": type(self.trainer).__name__, "training_arguments": arguments_of(args)})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update was applied, unless a gradient scaler found that its gradients do not fit."""
        readings, absent = self.reported()
        loss, norm = self._loss(), self._take_norm()
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            known = {"loss": loss} | ({} if norm is None else {"grad_norm": norm})
            self.observer.see(dict(zip(known, read(known.values()), strict=True)) | readings, absent=absent)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The weights were measured."""
        self.observer.measured(panel_of(metrics or {}))


def arguments_of(args: Any) -> dict[str, Any]:
    """The training arguments as JSON values, of which a number that is not finite is none."""
    known = args.to_sanitized_dict()
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in known.items()
    }


def panel_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What `evaluate` reports of capabilities: numbers, and none of how fast it was."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "epoch" and not name.endswith(_SPEEDS) and isinstance(value, int | float)
    }
