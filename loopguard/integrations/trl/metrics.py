"""What a trainer of TRL reports beside the loss: rewards, KL, entropy, lengths, failures of tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection


class Metrics:
    """Reads what a trainer has put into `_metrics["train"]` since the last update. Lives as long as the trainer.

    What is reported with each generation alone is `absent` from the updates in between, for as many of them as one
    generation serves; after that it is missing.
    """

    def __init__(self, trainer: Any, *, updates_each: int = 1) -> None:
        self._trainer = trainer
        self._updates_each = updates_each
        self._read: dict[str, tuple[list[float], int]] = {}
        """The list that was read last, and how far. The trainer begins new ones after each log."""
        self._ages: dict[str, int] = {}

    def take(self) -> tuple[dict[str, float], Collection[str]]:
        """The mean of what is new, by name, and the names of what may be absent from this update."""
        fresh = {}
        for name, values in self._trainer._metrics["train"].items():
            seen, end = self._read.get(name, (None, 0))
            new = values[end if seen is values else 0 :]
            self._read[name] = values, len(values)
            if new:
                fresh[name] = float(sum(new) / len(new))
        self._ages = {name: 0 if name in fresh else self._ages.get(name, 0) + 1 for name in {*self._ages, *fresh}}
        return fresh, {name for name, age in self._ages.items() if 0 < age < self._updates_each}
