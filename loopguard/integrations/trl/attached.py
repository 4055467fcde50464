"""What is put on a trainer of TRL, beside what is put on every Trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loopguard.integrations.transformers.attached import Guarded, Observed
from loopguard.integrations.transformers.patches import Patches
from loopguard.integrations.trl import contract
from loopguard.integrations.trl.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.observe import Observer
    from loopguard.types import Decision


class Reporting(Guarded):
    """A trainer of TRL under a guard: its metrics are readings."""

    def __init__(self, guard: LoopGuard, trainer: Any, *, config: Mapping[str, Any] | None) -> None:
        contract.require(trainer)
        super().__init__(guard, trainer, config=config)
        self._metrics = Metrics(trainer, updates_each=updates_of_one_generation(trainer))

    def reported(self) -> tuple[dict[str, float], Collection[str]]:
        """The trainer's metrics since the last update."""
        return self._metrics.take()


class Generating(Reporting):
    """A trainer that generates what it trains on: its weights act, so the promotion gate stands before they do.

    Where the model itself generates, the gate is asked before each generation, and a refusal puts the promoted weights
    back. Where an engine does, the gate is asked before `sync_weights`, and after a refusal the engine keeps the
    weights that it has. Between two promotions (a panel that waits for an evaluation, or `cycle_updates`) the weights
    act as long as no monitor is suspicious; a suspicion is a refusal.
    """

    def __init__(
        self, guard: LoopGuard, trainer: Any, *, config: Mapping[str, Any] | None, cycle_updates: int = 1
    ) -> None:
        self.generates = not contract.uses_engine(trainer)
        super().__init__(guard, trainer, config=config)
        self._cycle_updates = cycle_updates
        self._measuring = False
        """Whether the engine has weights that were given to it for an evaluation."""
        patches = Patches()
        patches.wrap(trainer, "_generate_and_score_completions", self._around_generation)
        if not self.generates:
            patches.wrap(trainer.vllm_generation, "sync_weights", self._around_sync)

    # A refusal or a promotion is for the moment when weights are about to act, not for those of a plain Trainer.

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: evaluations are asked about before the next generation."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written a checkpoint."""
        self._saved(args, state)

    def _settle(self) -> Decision | None:
        """Training is over: ask where all that the panel names is there."""
        driver = self._held()
        if driver.updates and not driver.lacking(driver.means()):
            return driver.promote(driver.take_panel(), None if self.generates else self.apply)
        return None

    def _around_generation(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        # In the middle of an update, whose first micro-batches went through these very weights, they were asked about.
        if self.driver is not None and self.trainer.model.training and not self._losses:
            if self.generates:
                self._ask(None)
            elif self._measuring:
                self.trainer._last_loaded_step = -1  # so that it syncs again, and the gate is asked
        return inner(*args, **kwargs)

    def _around_sync(self, inner: Any, *args: Any, **kwargs: Any) -> None:
        if self.driver is None:
            inner(*args, **kwargs)
            return

        def sync() -> None:
            inner(*args, **kwargs)

        if not self.trainer.model.training:
            self._measuring = self._let_act(sync, purpose="evaluation")
            return
        measured, self._measuring = self._measuring, False
        if not self._ask(sync) and measured:
            self._held().stop("the engine was given these weights for an evaluation, and then they were refused")

    def _ask(self, sync: Any) -> bool:
        """Ask the promotion gate where all that it wants is there; else whether the weights may act meanwhile."""
        driver = self._held()
        if driver.updates >= self._cycle_updates and not driver.lacking(driver.means()):
            return driver.promote(driver.take_panel(), sync).allowed
        return self._let_act(sync, purpose="generation")

    def _let_act(self, sync: Any, *, purpose: str) -> bool:
        driver = self._held()
        denied = driver.may_act()
        if self.generates and denied is not None:
            driver.turn_back()
        if sync is not None:
            driver.synced(denied, purpose=purpose)
            if denied is None:
                sync()
        return denied is None


class Watched(Observed):
    """A trainer of TRL that is watched: its metrics are readings."""

    def __init__(self, observer: Observer, trainer: Any) -> None:
        contract.require(trainer)
        super().__init__(observer, trainer)
        self._metrics = Metrics(trainer, updates_each=updates_of_one_generation(trainer))

    def reported(self) -> tuple[dict[str, float], Collection[str]]:
        """The trainer's metrics since the last update."""
        return self._metrics.take()


def updates_of_one_generation(trainer: Any) -> int:
    """How many updates are made of what was generated at once; 1 for a trainer that does not generate."""
    if not contract.generates(trainer):
        return 1
    batches = int(trainer.args.steps_per_generation * trainer.num_iterations)
    return max(1, math.ceil(batches / int(trainer.args.gradient_accumulation_steps)))
