"""What the controller asks of a framework's model, and how it finds the file that knows the framework."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loopguard.errors import UsageError

if TYPE_CHECKING:
    from loopguard.controller.ranks import Peers

INTEGRATIONS = {"torch": "loopguard.integrations.torch"}
"""Which module holds the models of which framework, by the name of the package that their classes come from."""

TRAINERS = {"transformers": "loopguard.integrations.transformers", "trl": "loopguard.integrations.trl"}
"""Which module attaches to the trainers of which framework, which run the loop themselves."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What an update is decided by."""

    values: dict[str, float]
    overflowed: bool = False
    """A gradient scaler found gradients that do not fit. It takes no step, lowers its scale, and that is no fault."""


@dataclass(frozen=True, slots=True)
class Staged:
    """What became of an update that was decided on the device."""

    update: int
    values: dict[str, float]
    withheld: bool
    """Whether the device kept the weights as they were."""


class Learner(Protocol):
    """What an integration gives the controller: a model in training that moves only when told to.

    A learner is asked for an update in one of two ways. As a rule `readings` brings the values to the host, the gate
    decides, and `apply` or `discard` follows. A `late` learner would have to wait for its device there: `stage` lets
    the device itself withhold what lies outside of `limits`, and `collect` brings the values one update later.
    """

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training are the ones that generate."""
        ...

    @property
    def late(self) -> bool:
        """Whether updates are staged on a device and read one update later."""
        ...

    @property
    def ticks(self) -> bool:
        """Whether `apply` also ticks the schedules. Else a framework does, and says so with `Cycle.ticked`."""
        ...

    def readings(self, loss: Any, extra: Mapping[str, Any]) -> Readings:
        """The metrics of the update at hand: `loss`, `grad_norm`, and what the loop reports beside them."""
        ...

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step."""
        ...

    def discard(self) -> None:
        """Drop the gradients and move nothing."""
        ...

    def trouble(self) -> str:
        """A sentence where the last decision was not honoured, else the empty string."""
        ...

    def stage(
        self,
        loss: Any,
        extra: Mapping[str, Any],
        *,
        limits: Mapping[str, tuple[float | None, float | None]],
        update: int,
        latch: bool,
        clip_norm: float | None,
    ) -> None:
        """Take the step unless a value is outside of its limits, without waiting for the device.

        With `latch`, every later step is withheld too until `release`.
        """
        ...

    def collect(self) -> Staged | None:
        """What became of the last staged update; None where nothing is staged. Waits for that update alone."""
        ...

    def release(self) -> None:
        """Let the device step again."""
        ...

    def let_go(self) -> None:
        """Stand aside: the optimizers step again without being asked about."""
        ...

    def measure(self, values: Mapping[str, Any]) -> dict[str, float]:
        """These metrics as floats, before there is a gradient."""
        ...

    def unkeepable(self) -> str:
        """Why no snapshot can hold its state, with the way out, or the empty string. Speaks of this rank alone."""
        ...

    def peers(self) -> Peers | None:
        """The ranks that train this model together; None where there is one. A collective."""
        ...

    def rng(self) -> Any:
        """The state of every random generator, as a snapshot holds it. Cheap enough for every batch."""
        ...

    def set_rng(self, state: Any) -> None:
        """Go back to such a state of the generators."""
        ...

    def reseed(self, salt: str) -> None:
        """Begin anew with every random generator, from where it is now and a salt."""
        ...

    def settings(self) -> dict[str, Any]:
        """What else decides about the bits of a step: threads, precision, devices. JSON values."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def restore(self, state: dict[str, Any], *, actor_too: bool) -> None:
        """Go back to such a state."""
        ...

    def digest(self) -> str:
        """SHA-256 over weights and optimizer state."""
        ...

    def weights_digest(self) -> str:
        """SHA-256 over the weights in training."""
        ...

    def actor_digest(self) -> str:
        """SHA-256 over the weights that generate."""
        ...


class LoopState(Protocol):
    """The loop's own state that must travel with a snapshot: JSON values, tensors, or both."""

    def state_dict(self) -> dict[str, Any]:
        """The state as it is now."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to such a state."""
        ...


def integration_for(model: Any) -> Any:
    """The module whose `learner` can hold this model. Raises UsageError where there is none."""
    return _module_for(model, INTEGRATIONS, "attach(model=...)", "models")


def trainer_integration_for(trainer: Any) -> Any:
    """The module whose `attach` and `observe` know this trainer. Raises UsageError where there is none."""
    return _module_for(trainer, TRAINERS, "attach(trainer)", "trainers")


def _module_for(thing: Any, table: Mapping[str, str], call: str, what: str) -> Any:
    for cls in type(thing).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in table:
            return importlib.import_module(table[package])
    known = ", ".join(sorted(table))
    raise UsageError(f"{call} got a {type(thing).__name__}; {what} of these packages can be guarded: {known}")
