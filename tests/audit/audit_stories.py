"""Runs made up for the tests of the audit package: written with the real log, on a clock that stands still."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

from loopguard.audit.log import AuditLog
from loopguard.testing import FrozenClock

POLICY = hashlib.sha256(b"a guard policy").hexdigest()
HOSTILE = "print('</script><b onmouseover=alert(1)>&amp;')\x1b[31m\u202e\u2066 # evil\x00"


BEGIN = datetime(2030, 1, 1, 9, tzinfo=UTC)


def clock_at(moment: datetime) -> FrozenClock:
    """A clock of the same start of the machine, so much later."""
    clock = FrozenClock(BEGIN)
    clock.advance(seconds=(moment - BEGIN).total_seconds())
    return clock


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lay_out(run_dir: Path, *, run_id: str = "run-a", policy: str = POLICY) -> None:
    """What the controller puts beside a log."""
    (run_dir / "policy").mkdir(parents=True, exist_ok=True)
    (run_dir / "policy" / f"{policy}.yaml").write_text("apiVersion: loopguard/v1\n")
    (run_dir / "run.json").write_text(json.dumps({"id": run_id, "policy": policy}))


def open_log(run_dir: Path, *, run_id: str = "run-a", clock: FrozenClock | None = None, **options) -> AuditLog:
    lay_out(run_dir, run_id=run_id)
    options.setdefault("reserve_mib", 1)
    return AuditLog.open(run_dir, run_id=run_id, policy=POLICY, clock=clock or FrozenClock(), **options)


def plain_log(run_dir: Path, *, notes: int = 10, **options) -> None:
    """A log of log.opened and so many notes."""
    with open_log(run_dir, **options) as log:
        for number in range(notes):
            log.append("note.added", {"by": "dana", "text": f"note {number}"}, sync=False)


def forget_checkpoints(run_dir: Path, stream: str = "controller") -> None:
    """Leave a log as a process leaves it that died before the first checkpoint, or as a forger who thinks of them."""
    shutil.rmtree(run_dir / "audit" / stream / "checkpoints", ignore_errors=True)


class Loop:
    """A self-training loop as its log tells it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        seed: int = 0,
        updates: int = 80,
        calls: int = 60,
        clock: FrozenClock | None = None,
    ) -> None:
        self.clock = clock or FrozenClock(BEGIN)
        self.log = open_log(run_dir, clock=self.clock)
        self.rng = random.Random(seed)
        self.update = 0
        self.per_cycle = updates
        self.calls = calls
        self.snapshot = ""
        self.panel: dict[str, float] = {}
        self.log.append("policy.loaded", {"name": "toolformer", "digest": POLICY})
        body = {"command": ["loopguard", "run", "toolformer"], "seed": seed, "versions": {}, "goes_on": False}
        self.log.append("run.started", body)

    def tick(self, seconds: float = 0.05) -> None:
        self.clock.advance(seconds=seconds)

    def call(self, cycle: int, number: int, *, denied: bool = False, status: str = "ok") -> None:
        call = f"c{cycle}-{number}"
        code = HOSTILE if number == 3 else f"print({number} * {cycle})"
        body = {"call": call, "tool": "python", "code_sha256": digest(code), "code_head": code[:200]}
        if denied:
            body |= {"result": "deny", "rule": "calculator", "reason": "import is refused"}
            self.log.append("tool.decided", body, cycle=cycle, sync=False)
            return
        body |= {"result": "allow", "rule": "calculator", "reason": "rule calculator"}
        self.log.append("tool.decided", body, cycle=cycle, sync=False)
        self.tick()
        body = {"call": call, "status": status, "exit_code": 0 if status == "ok" else None}
        body |= {"stdout_sha256": digest("4"), "stdout_bytes": 2, "stderr_bytes": 0, "wall_ms": 2.5, "leftovers": 0}
        self.log.append("tool.finished", body, cycle=cycle, sync=False)

    def generate(self, cycle: int) -> None:
        self.log.append("cycle.started", {}, cycle=cycle)
        for number in range(self.calls):
            pick = self.rng.random()
            status = "ok" if pick < 0.9 else "nonzero_exit" if pick < 0.96 else "timeout"
            self.call(cycle, number, denied=self.rng.random() < 0.03, status=status)
        body = {"reason": "overlaps an evaluation text", "count": 3, "records": [f"r{cycle}-{n}" for n in range(3)]}
        self.log.append("data.quarantined", body, cycle=cycle)
        body = {"kept": 41, "proposed": 60, "admitted": 38, "quarantined": 3, "own_share": 0.31, "mean_gain": 0.62}
        body |= {"kept_share": 0.68, "recheck": {"checked": 10, "wrong": 0}, "digest": digest(f"data {cycle}")}
        self.log.append("data.admitted", body, cycle=cycle)

    def loss(self) -> float:
        return 0.6 + 3 * math.exp(-self.update / 220) + self.rng.gauss(0, 0.06)

    def train(self, cycle: int, *, stop_after: int | None = None, fault: float | None = None) -> None:
        left = stop_after or self.per_cycle
        self.log.append("update.leased", {"from": self.update + 1, "to": self.update + left}, cycle=cycle)
        while left:
            size = min(16, left)
            losses = []
            for _ in range(size):
                self.update += 1
                losses.append(self.loss() if fault is None else fault * self.rng.uniform(0.9, 1.1))
                self.tick()
            left -= size
            readings = {"loss": losses, "grad_norm": [0.5 + abs(self.rng.gauss(0, 0.2)) for _ in losses]}
            body = {"from": self.update - size + 1, "to": self.update, "readings": readings}
            self.log.append("update.applied", body, sync=False)

    def promote(self, cycle: int, *, correct: float | None = None) -> None:
        panel = {"correct": min(0.95, 0.28 + 0.05 * cycle + self.rng.gauss(0, 0.01)), "malformed": 0.05 / (cycle + 1)}
        panel |= {"held_out_loss": 3.9 - 0.07 * cycle, "refused": 0.03}
        if correct is not None:
            panel["correct"] = correct
        self.log.append("eval.finished", {"panel": panel}, cycle=cycle)
        snapshot, weights = digest(f"snapshot {cycle} {self.update}"), digest(f"weights {cycle} {self.update}")
        body = {"result": "allow", "rule": "panel", "reason": "every metric is within its range", "panel": panel}
        self.log.append("promotion.decided", {**body, "previous": self.panel or None, "weights": weights}, cycle=cycle)
        self.log.append("promotion.applied", {"actor": weights}, cycle=cycle)
        body = {"snapshot": snapshot, "update": self.update, "promoted": True}
        self.log.append("snapshot.written", body, cycle=cycle)
        self.log.append("cycle.finished", {"result": "promoted"}, cycle=cycle)
        self.snapshot, self.panel = snapshot, panel

    def honest(self, cycle: int) -> None:
        self.generate(cycle)
        self.train(cycle)
        self.promote(cycle)

    def freeze(self, cycle: int, freeze: str, body: dict[str, object]) -> None:
        self.log.epoch += 1
        full = {"freeze": freeze, "epoch": self.log.epoch, "signals": [], "update": None, "restored": None}
        full |= {"capsule": f"freezes/{freeze}", "next": ["read the report", "resume (rolls back and goes on)"], **body}
        self.log.append("freeze.entered", full, cycle=cycle)
        self.log.append("cycle.finished", {"result": "frozen"}, cycle=cycle)

    def label_leak(self, cycle: int, freeze: str = "f1") -> None:
        """A jump downward: five faulty updates are applied, the sixth is withheld, all are undone."""
        self.generate(cycle)
        self.train(cycle, stop_after=32)
        since = self.update + 1
        self.train(cycle, stop_after=5, fault=0.004)
        low = {"metric": "loss", "value": 0.0041, "low": 1.2, "high": 2.03, "score": 11.3, "since": since}
        low |= {"direction": "down", "monitor": "jump", "level": "trip", "reason": "loss fell at once"}
        body = {"update": self.update + 1, "readings": {"loss": 0.0041, "grad_norm": 0.2}, "signals": [low]}
        self.log.append("update.withheld", body, cycle=cycle)
        self.log.append("snapshot.restored", {"snapshot": self.snapshot, "because": f"freeze {freeze}"}, cycle=cycle)
        why = "loss was below what the last 40 updates allow for 5 updates in a row"
        body = {"gate": "update", "rule": "jump(loss)", "reason": why, "signals": [low]}
        self.freeze(cycle, freeze, {**body, "update": self.update + 1, "restored": self.snapshot})
        self.update -= 37

    def resume(self, freeze: str) -> None:
        self.tick(1900)
        body = {
            "freeze": freeze,
            "by": "dana",
            "reason": "labels were shifted; fixed in 3f1c",
            "disposition": "rollback",
        }
        self.log.append("resume.applied", body, actor={"kind": "person", "id": "dana"})

    def gain(self, cycle: int, freeze: str = "f2") -> None:
        """The panel rises too fast; the actor stays."""
        self.generate(cycle)
        self.train(cycle)
        panel = {**self.panel, "correct": self.panel["correct"] + 0.4}
        self.log.append("eval.finished", {"panel": panel}, cycle=cycle)
        why = "correct rose by 0.4; at most 0.2 is allowed in one cycle"
        body = {"result": "freeze", "rule": "panel.correct", "reason": why, "panel": panel}
        self.log.append("promotion.decided", {**body, "previous": self.panel, "weights": digest("w")}, cycle=cycle)
        top = {"metric": "correct", "value": panel["correct"], "low": 0.1, "high": self.panel["correct"] + 0.2}
        top |= {"score": None, "since": None, "direction": "up", "monitor": "panel", "level": "trip", "reason": why}
        self.log.append("snapshot.restored", {"snapshot": self.snapshot, "because": f"freeze {freeze}"}, cycle=cycle)
        body = {"gate": "promotion", "rule": "panel.correct", "reason": why, "signals": [top]}
        self.freeze(cycle, freeze, {**body, "restored": self.snapshot})

    def finish(self) -> None:
        self.log.append("run.finished", {"cycles": 6})
        self.log.close()


def frozen_twice(run_dir: Path, **options) -> None:
    """Four good cycles, a label leak, a resume, one more good cycle, and a gain that nobody has looked at yet."""
    loop = Loop(run_dir, **options)
    with contextlib.closing(loop.log):
        for cycle in range(5):
            loop.honest(cycle)
        loop.label_leak(5)
        loop.resume("f1")
        loop.honest(5)
        loop.gain(6)


def finished(run_dir: Path, *, cycles: int = 3, **options) -> None:
    """Nothing but good cycles."""
    loop = Loop(run_dir, **options)
    for cycle in range(cycles):
        loop.honest(cycle)
    loop.finish()
