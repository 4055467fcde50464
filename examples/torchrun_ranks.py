"""Several ranks under guard: the same loop with DDP and with FSDP2.

    torchrun --nproc-per-node 2 examples/torchrun_ranks.py [RUN_DIR] [--spread fsdp2] [--plant-fault] [--observe]

Every rank has its own batches, and the guard its own verdict on each rank; what all of them do is the gravest of these.
With `--plant-fault` the batch of rank 1 in update 30 is not finite. Rank 1 sees it, and both ranks freeze in that very
update, with the weights of before. A rank that freezes ends with 0: torchrun would start it again otherwise.

Needs no Docker, since it calls no tools. With `--observe` it only looks on, and says where it would have frozen.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "torch.yaml"
CYCLES, UPDATES = 3, 20

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/torchrun-ranks")
options.add_argument("--spread", choices=["ddp", "fsdp2"], default="ddp")
options.add_argument("--plant-fault", action="store_true")
options.add_argument("--observe", action="store_true")
options = options.parse_args()

torch.set_num_threads(1)
dist.init_process_group("gloo")  # nccl on GPUs; before the guard, which asks it which rank this is
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
teacher = torch.nn.Linear(16, 4)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
if options.spread == "ddp":
    model = DistributedDataParallel(net)
else:
    model = fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
torch.manual_seed(1 + rank)


def inputs(seed):
    """Sixty-four rows of sixteen numbers, the same for the same seed."""
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))


def batches(cycle):
    """What this rank trains on in a cycle; no two ranks have the same."""
    for number in range(cycle.number * UPDATES, (cycle.number + 1) * UPDATES):
        batch = inputs(number * ranks + rank)
        yield batch * float("inf") if options.plant_fault and (number, rank) == (30, 1) else batch


def loss_of(network, x):
    with torch.no_grad():
        answers = teacher(x).argmax(dim=1)
    return F.cross_entropy(network(x), answers)


def evaluate(network):
    """The panel of the whole evaluation, on every rank."""
    with torch.no_grad():
        return {"heldout_loss": loss_of(network, inputs(-1)).item()}


def digest(network):
    """Of the weights that this rank holds: all under DDP, its shards under FSDP2."""
    if options.spread == "fsdp2":
        network.reshard()  # an evaluation leaves them gathered
    held = [getattr(weight, "_local_tensor", weight).detach().numpy().tobytes() for weight in network.parameters()]
    return hashlib.sha256(b"".join(held)).hexdigest()[:12]


def opened():
    """The guard; or an observer in its place, which withholds nothing and needs neither a guard policy nor Docker."""
    if options.observe:
        return LoopGuard.observe(options.run_dir)
    return LoopGuard.from_file(POLICY, run_dir=options.run_dir)


before = ""
try:
    with opened() as guard:  # on every rank
        guard.attach(model=net, optimizer=optimizer)  # the module itself, rather than its DDP wrapper
        for cycle in guard.cycles(CYCLES, warmup=True):
            for batch in cycle.batches(batches(cycle)):
                loss = loss_of(model, batch)
                cycle.forward(loss=loss)  # the ranks are asked while the gradients are on their way
                loss.backward()
                before = digest(net)
                cycle.update(loss=loss)
            cycle.promote(evaluate(model))
except LoopFrozen as frozen:
    print(f"rank {rank}: {frozen}; weights {'as before' if digest(net) == before else 'moved'}", flush=True)
else:
    print(f"rank {rank}: went through {CYCLES} cycles after the warm-up, weights {digest(net)}", flush=True)

dist.destroy_process_group()  # after the guard is closed: it may still be writing a snapshot
# gloo's thread may still hold the last tensors, and it aborts the process when it lets go of them while Python goes.
os._exit(0)
