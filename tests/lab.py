"""A tiny learner in a run directory, with a real log, real weights and a fake sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopguard.audit import read
from loopguard.controller import LoopGuard
from loopguard.testing import fake_runtimes

torch = pytest.importorskip("torch", reason="attach needs torch")

POLICY = """
apiVersion: loopguard/v1
name: test
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline, refuse_patterns: [import]}
  freeze_above: {refused_share: 0.1, contained_share: 0.1, of_last_calls: 20}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
data:
  sources: [human, model]
  forbidden_in_prompt: ["<<"]
  recheck: {sample: 4, max_wrong_share: 0.25}
  freeze_above: {quarantined_share: 0.5, of_at_least: 2}
updates:
  loss_kind: discrete
  lease: 8
  monitors:
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
    - {kind: jump, metric: loss, min_change: 0.25}
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.2}
freeze: {when_frozen: raise}
"""


class Lab:
    """A tiny learner in a run directory: start it, stop it, start it again."""

    def __init__(self, tmp_path: Path) -> None:
        self.policy = tmp_path / "policy.yaml"
        self.policy.write_text(POLICY)
        self.run_dir = tmp_path / "run"
        self.respond = lambda call: "4"

    def open(self, **options):
        runtimes = fake_runtimes(lambda call: self.respond(call))
        return LoopGuard.from_file(self.policy, run_dir=self.run_dir, runtimes=runtimes, **options)

    def build(self, guard, *, actor=True):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.actor = (
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) if actor else None
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        guard.attach(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, actor=self.actor)
        return guard

    def loss(self, factor=1.0):
        """A loss near `factor`, with a gradient; the batch is drawn from the global generator."""
        x = torch.randn(16, 4)
        return self.model(x).square().mean() * 0.01 + factor

    def update(self, cycle, factor=1.0):
        loss = self.loss(factor)
        loss.backward()
        return cycle.update(loss=loss, clip_norm=1.0)

    def promote(self, cycle, correct=0.5):
        return cycle.promote({"correct": correct}, apply=lambda: self.actor.load_state_dict(self.model.state_dict()))

    def run(self, guard, cycles, updates=6):
        for cycle in guard.cycles(cycles):
            for _ in range(updates):
                self.update(cycle)
            self.promote(cycle)

    def events(self, *types):
        return [entry for entry in read.entries(self.run_dir) if not types or entry.type in types]


def bits(*parts):
    return [tensor.clone() for part in parts for tensor in part.state_dict().values() if torch.is_tensor(tensor)]
