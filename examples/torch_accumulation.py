"""Gradient accumulation under guard: eight batches make one update, and the guard decides about the update.

    python examples/torch_accumulation.py [RUN_DIR] [--plant-fault] [--observe]

A batch by itself moves no weight, so nothing is decided about it; it is kept, for whoever replays a freeze. With
`--plant-fault` one batch of the eight that make update 30 has a value that is not a number. The mean of the eight
losses shows it, the update is withheld, and the gradients of the seven good batches go with it.

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
CYCLES, UPDATES, MICRO_BATCHES = 3, 20, 8

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/torch-accumulation")
options.add_argument("--plant-fault", action="store_true")
options.add_argument("--observe", action="store_true")
options = options.parse_args()

torch.manual_seed(0)
teacher = torch.nn.Linear(16, 4)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 10))


def inputs(seed):
    """Sixteen rows of sixteen numbers, the same for the same seed."""
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))


def windows(cycle):
    """The batches of each update of a cycle: eight and eight."""
    for update in range(UPDATES):
        number = cycle.number * UPDATES + update
        window = [inputs(number * MICRO_BATCHES + batch) for batch in range(MICRO_BATCHES)]
        if options.plant_fault and number == 30:
            window[5][3, 7] = float("nan")
        yield window


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


try:
    with opened() as guard:
        guard.attach(model=model, optimizer=optimizer, scheduler=scheduler)
        for cycle in guard.cycles(CYCLES, warmup=True):
            for window in windows(cycle):
                losses = []
                for batch in cycle.batches(window):  # kept, so that a freeze can be replayed
                    loss = loss_of(model, batch)
                    (loss / len(window)).backward()
                    losses.append(loss.detach())
                cycle.update(loss=torch.stack(losses).mean(), clip_norm=1.0)  # once for each optimizer step
            cycle.promote(evaluate(model))
except LoopFrozen as frozen:
    print(frozen)
    print(f"the schedule stands at {scheduler.last_epoch} updates; loopguard audit why {options.run_dir} says more")
    sys.exit(frozen.exit_code)

print(f"went through {CYCLES} cycles after the warm-up; see {options.run_dir}")
