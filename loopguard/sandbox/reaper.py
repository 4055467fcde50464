"""Sweep up the cells of dead loops.

A cell ends by itself when its owner does; this is the second line, for owners that were stopped rather than killed and
for containers that ended without being removed. Only containers with LoopGuard's labels are looked at, and of those
only the ones whose owner is surely dead, or whose deadline has passed.
"""

from __future__ import annotations

import time

from loopguard.sandbox import owner


def reap() -> list[str]:
    """Remove what dead owners left; gives the names. Raises SandboxUnavailableError where no engine answers."""
    from loopguard.sandbox.docker import DEADLINE, OWNER
    from loopguard.sandbox.engine import Engine

    removed = []
    with Engine() as engine:
        for container in engine.containers(OWNER):
            labels = container.get("Labels") or {}
            orphan = is_orphan(labels.get(OWNER, ""), labels.get(DEADLINE, ""), now_s=time.time())
            if orphan and engine.remove(container["Id"]):
                # An engine that is taking a container down already has no name for it.
                names = container.get("Names") or [container["Id"][:12]]
                removed.append(str(names[0]).lstrip("/"))
    return removed


def is_orphan(whose: str, deadline: str, *, now_s: float) -> bool:
    """Whether a cell with these labels may be removed by anyone. A deadline that cannot be read has not passed."""
    return owner.is_dead(whose) or (deadline.isdigit() and int(deadline) < now_s)
