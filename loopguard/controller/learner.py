"""What the controller asks of a framework's model, and how it finds the file that knows the framework."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from loopguard.errors import UsageError

INTEGRATIONS = {"torch": "loopguard.integrations.torch"}
"""Which module holds the models of which framework, by the name of the package that their classes come from."""


class Learner(Protocol):
    """What an integration gives the controller: a model in training that moves only when told to."""

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training are the ones that generate."""
        ...

    def readings(self, loss: Any) -> dict[str, float]:
        """The metrics of the update at hand, at least `loss` and `grad_norm`."""
        ...

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step."""
        ...

    def discard(self) -> None:
        """Drop the gradients and move nothing."""
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
    packages = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    for package in packages:
        if package in INTEGRATIONS:
            return importlib.import_module(INTEGRATIONS[package])
    known = ", ".join(sorted(INTEGRATIONS))
    raise UsageError(
        f"attach(model=...) got a {type(model).__name__}; models of these packages can be guarded: {known}"
    )
