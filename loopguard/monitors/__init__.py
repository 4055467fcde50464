"""Monitors: pure maths that watch one metric each. Floats in, `Signal` out; no clock, no I/O, no torch.

A monitor lives in the file of its name and is found here by the `kind` that a guard policy writes. Add one by writing
the file and one line in `_KINDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal, cast

from loopguard.monitors.base import Monitor

_KINDS = {
    "bounds": ("loopguard.monitors.bounds", "Bounds"),
    "jump": ("loopguard.monitors.jump", "Jump"),
    "drift": ("loopguard.monitors.drift", "Drift"),
    "variance": ("loopguard.monitors.variance", "Variance"),
    "eprocess": ("loopguard.monitors.eprocess", "EProcess"),
}

KINDS = tuple(_KINDS)

_GROWS = frozenset({"grad_norm"})
"""Metrics that creep up in healthy runs."""


def build(kind: str, **settings: Any) -> Monitor:
    """The monitor of that kind. Raises KeyError for an unknown kind, ValueError for settings it cannot work with."""
    module, name = _KINDS[kind]
    return cast(Monitor, getattr(importlib.import_module(module), name)(**settings))


def defaults(
    metric: str,
    *,
    good: Literal["down", "up", "none"],
    min: float | None = None,  # noqa: A002 - as in the policy
    max: float | None = None,  # noqa: A002
    problems: int | None = None,
    every: float = 100_000,
) -> list[Monitor]:
    """The monitors that suit a metric of which this much is known, in the order to ask them in.

    `every` is the rate of false alarms of the metric as a whole: a healthy run trips one of these once in so many
    readings, as far as their calibration holds. Raises ValueError for settings they cannot work with.
    """
    watched: list[tuple[str, dict[str, Any]]] = []
    if problems is not None and good != "none":
        watched.append(("eprocess", {"problems": problems, "good": good}))
    else:
        watched += [("jump", {"good": good}), ("variance", {})]
    if good != "none" and metric not in _GROWS:
        watched.append(("drift", {"good": good}))
    share = every * len(watched)
    bounds = build("bounds", metric=metric, min=min, max=max)
    return [bounds, *(build(kind, metric=metric, every=share, **settings) for kind, settings in watched)]


def restore(named: Mapping[str, Monitor], states: Mapping[str, Any]) -> None:
    """Let monitors continue from states under the same names.

    One that has no state there, or one of other settings, starts to learn: so it is where a run is given another
    policy.
    """
    for name, monitor in named.items():
        monitor.rebase()
        if name in states:
            try:
                monitor.load_state_dict(states[name])
            except (KeyError, TypeError, ValueError):
                monitor.rebase()


__all__ = ["KINDS", "Monitor", "build", "defaults", "restore"]
