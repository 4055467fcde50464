"""A controller for self-training loops: quarantined tool calls, gated updates, and an audit log of every freeze.

    from loopguard import LoopGuard

Public names are resolved on first use, so that `import loopguard` loads none of torch, docker or pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopguard.controller import Cycle as Cycle
    from loopguard.controller import LoopGuard as LoopGuard
    from loopguard.controller import Observer as Observer
    from loopguard.errors import LoopFrozen as LoopFrozen
    from loopguard.errors import LoopGuardError as LoopGuardError
    from loopguard.types import Check as Check
    from loopguard.types import Decision as Decision
    from loopguard.types import Outcome as Outcome
    from loopguard.types import Provenance as Provenance
    from loopguard.types import Record as Record

__version__ = "0.1.0"

_HOMES = {
    "Check": "loopguard.types",
    "Cycle": "loopguard.controller",
    "Decision": "loopguard.types",
    "LoopFrozen": "loopguard.errors",
    "LoopGuard": "loopguard.controller",
    "LoopGuardError": "loopguard.errors",
    "Observer": "loopguard.controller",
    "Outcome": "loopguard.types",
    "Provenance": "loopguard.types",
    "Record": "loopguard.types",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loopguard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
