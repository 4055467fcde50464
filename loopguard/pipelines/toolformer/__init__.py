"""A loop in the manner of Toolformer and expert iteration, trained from nothing on the CPU. See docs/toolformer.md.

    from loopguard.pipelines.toolformer import ToolformerOptions, parse_plant, prepare, run

Public names are resolved on first use, so that reading an option loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopguard.pipelines.toolformer.loop import ToolformerResult as ToolformerResult
    from loopguard.pipelines.toolformer.loop import run as run
    from loopguard.pipelines.toolformer.plant import FAULTS as FAULTS
    from loopguard.pipelines.toolformer.plant import Plant as Plant
    from loopguard.pipelines.toolformer.plant import parse_plant as parse_plant
    from loopguard.pipelines.toolformer.settings import ToolformerOptions as ToolformerOptions
    from loopguard.pipelines.toolformer.task import Task as Task
    from loopguard.pipelines.toolformer.task import prepare as prepare

_HOMES = {
    "FAULTS": "plant",
    "Plant": "plant",
    "Task": "task",
    "ToolformerOptions": "settings",
    "ToolformerResult": "loop",
    "parse_plant": "plant",
    "prepare": "task",
    "run": "loop",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
