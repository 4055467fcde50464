"""A trainer under a guard: a policy that withholds NaN and large losses, a real log, real weights and no container."""

from __future__ import annotations

from pathlib import Path

from loopguard.audit import read
from loopguard.controller import LoopGuard
from loopguard.testing import fake_runtimes

POLICY = """
apiVersion: loopguard/v1
name: trainers
tools:
  rules:
    - {id: python, tool: python, then: run, sandbox: offline}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
data:
  sources: [human, model]
updates:
  loss_kind: %(loss_kind)s
  lease: 8
  monitors: [%(monitors)s]
promotion:
  panel: [%(panel)s]
freeze: {%(freeze)s}
"""

BOUNDS = "{kind: bounds, metric: loss, max: 20}, {kind: bounds, metric: grad_norm, min: 0, max: %s}"
SKIP = "on_trip: skip, skip_at_most: {updates: 4, per: 100}"
EVAL_LOSS = "{metric: eval_loss, good: down, min: 0, max_gain: 5, max_loss: 0.5}"


class TrainerLab:
    """A run directory and a policy for trainers. Open it, close it, open it again."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.run_dir = tmp_path / "run"
        self.policy = tmp_path / "policy.yaml"
        self.respond = lambda call: "4"
        self.write()

    def write(
        self, *, monitors: str = BOUNDS % "1000", panel: str = EVAL_LOSS, freeze: str = "", loss_kind: str = "surrogate"
    ) -> TrainerLab:
        self.policy.write_text(
            POLICY % {"monitors": monitors, "panel": panel, "freeze": freeze, "loss_kind": loss_kind}
        )
        return self

    def open(self, **options):
        return LoopGuard.from_file(
            self.policy, run_dir=self.run_dir, runtimes=fake_runtimes(lambda call: self.respond(call)), **options
        )

    def train(self, trainer, **options):
        """Train under a guard that is closed afterwards."""
        with self.open() as guard:
            guard.attach(trainer)
            trainer.train(**options)
        return trainer

    def events(self, *types):
        return [entry for entry in read.entries(self.run_dir) if not types or entry.type in types]
