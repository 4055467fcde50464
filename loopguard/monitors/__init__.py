"""Monitors: pure maths that watch one metric each. Floats in, `Signal` out; no clock, no I/O, no torch.

A monitor lives in the file of its name and is found here by the `kind` that a guard policy writes. Add one by writing
the file and one line in `_KINDS`.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from loopguard.monitors.base import Monitor

_KINDS = {
    "bounds": ("loopguard.monitors.bounds", "Bounds"),
    "jump": ("loopguard.monitors.jump", "Jump"),
}

KINDS = tuple(_KINDS)


def build(kind: str, **settings: Any) -> Monitor:
    """The monitor of that kind. Raises KeyError for an unknown kind, ValueError for settings it cannot work with."""
    module, name = _KINDS[kind]
    return cast(Monitor, getattr(importlib.import_module(module), name)(**settings))


__all__ = ["KINDS", "Monitor", "build"]
