"""Two optimizers under one guard: Muon trains the matrices, AdamW everything else, and both step or neither does.

    python examples/torch_two_optimizers.py [RUN_DIR] [--plant-fault] [--observe]

With `--plant-fault` the gradient of one bias, which AdamW has, is not a number in update 30, while the loss looks as
good as ever. The norm over the gradients of both optimizers shows it, and the matrices stay as they were as well.

Needs no Docker, since it calls no tools. With `--observe` it only looks on, and says where it would have frozen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "torch.yaml"
CYCLES, UPDATES = 3, 20

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/torch-two-optimizers")
options.add_argument("--plant-fault", action="store_true")
options.add_argument("--observe", action="store_true")
options = options.parse_args()

torch.manual_seed(0)
teacher = torch.nn.Linear(16, 4)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
matrices = [weight for weight in model.parameters() if weight.ndim == 2]
others = [weight for weight in model.parameters() if weight.ndim != 2]
muon = torch.optim.Muon(matrices, lr=2e-3)
adamw = torch.optim.AdamW(others, lr=2e-3)
schedulers = [
    torch.optim.lr_scheduler.LambdaLR(one, lambda update: min(1.0, (update + 1) / 10)) for one in (muon, adamw)
]


def inputs(seed):
    """Sixty-four rows of sixteen numbers, the same for the same seed."""
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))


def loss_of(network, x):
    with torch.no_grad():
        answers = teacher(x).argmax(dim=1)
    return F.cross_entropy(network(x), answers)


def evaluate(network):
    with torch.no_grad():
        return {"heldout_loss": loss_of(network, inputs(-1)).item()}


def opened():
    """The guard; or an observer in its place, which withholds nothing and needs neither a guard policy nor Docker."""
    if options.observe:
        return LoopGuard.observe(options.run_dir)
    return LoopGuard.from_file(POLICY, run_dir=options.run_dir)


before = []
try:
    with opened() as guard:
        guard.attach(model=model, optimizer=[muon, adamw], scheduler=schedulers)
        for cycle in guard.cycles(CYCLES, warmup=True):
            numbers = range(cycle.number * UPDATES, (cycle.number + 1) * UPDATES)
            for number, batch in zip(numbers, cycle.batches(map(inputs, numbers)), strict=True):
                loss = loss_of(model, batch)
                loss.backward()
                if options.plant_fault and number == 30:
                    before = [weight.detach().clone() for weight in model.parameters()]
                    model[2].bias.grad.fill_(float("nan"))
                cycle.update(loss=loss)  # steps both and ticks both, or neither
            cycle.promote(evaluate(model))
except LoopFrozen as frozen:
    print(frozen)
    if before:
        same = [torch.equal(weight, then) for weight, then in zip(model.parameters(), before, strict=True)]
        print(f"weights as before the update: {sum(same)} of {len(same)} tensors")
    sys.exit(frozen.exit_code)

print(f"went through {CYCLES} cycles after the warm-up; see {options.run_dir}")
