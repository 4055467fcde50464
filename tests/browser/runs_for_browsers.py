"""Runs whose reports are opened in a browser."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "audit"))

from audit_stories import Loop, open_log

ATTACK = "</title></svg><script>console.error('ran')</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"


def frozen_thrice(run_dir: Path) -> Path:
    """A label leak, the same once more after its resume, and a gain that nobody has looked at yet."""
    loop = Loop(run_dir, updates=48, calls=12)
    with contextlib.closing(loop.log):
        for cycle in range(5):
            loop.honest(cycle)
        for freeze in ("f1", "f2"):
            loop.label_leak(5, freeze)
            loop.resume(freeze)
        loop.honest(5)
        loop.gain(6, "f3")
    return run_dir


def hostile(run_dir: Path) -> Path:
    """Everything that can be text is an attack on the page."""
    with open_log(run_dir) as log:
        log.append("policy.loaded", {"name": ATTACK})
        log.append("cycle.started", {}, cycle=0)
        body = {"call": "c1", "tool": ATTACK, "code_head": ATTACK, "rule": ATTACK, "reason": ATTACK, "result": "deny"}
        log.append("tool.decided", body, cycle=0)
        log.append("update.applied", {"from": 1, "to": 2, "readings": {ATTACK: [1.0, 2.0]}}, cycle=0)
        log.append("promotion.decided", {"result": ATTACK, "panel": {ATTACK: 1.0}}, cycle=0)
        signal = {"metric": ATTACK, "value": ATTACK, "low": 1.0, "high": 2.0}
        body = {"freeze": ATTACK, "gate": ATTACK, "rule": ATTACK, "reason": ATTACK, "signals": [signal], "update": 2}
        log.append("freeze.entered", {**body, "capsule": ATTACK}, cycle=0)
        log.append("note.added", {"by": ATTACK, "text": ATTACK})
    return run_dir
