"""One rank of an FSDP2 run on the CPU: python sharded_rank.py MODE FOLDER RANK RANKS [DIGEST]. Prints one JSON object.

save       train, save a snapshot, train on
load       build anew, load the snapshot, train on
refused    as save, but rank 1 holds something that a snapshot cannot
ring       train, copy the state to memory, train on, go back, train on, and save what is in memory
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loopguard.errors import LoopGuardError
from loopguard.snapshots import Ring, SnapshotStore, load_sharded, save_sharded

mode, folder, rank, ranks, *rest = sys.argv[1:]
rank, ranks = int(rank), int(ranks)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{mode}-{ranks}", rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 5))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
torch.manual_seed(100 + rank)  # every rank has its own data and its own dropout


def train(updates):
    losses = []
    for _ in range(updates):
        loss = model(torch.randn(4, 7)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def state():
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "rank": rank,
    }


def digest_of_whole(value):
    """Of the tensors as they are on all ranks together, however they are spread."""
    digest = hashlib.sha256()
    for part in (value["model"], *value["optimizer"]["state"].values()):
        for name in sorted(part):
            tensor = part[name].full_tensor() if isinstance(part[name], DTensor) else part[name]
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_memory(root):
    ring, addresses = Ring(), []
    for _ in range(3):
        slot = ring.take(state(), {})
        addresses.append([shard.to_local().data_ptr() for shard in slot.shards().values()])
    ring.approve(slot)
    first, whole = train(4), digest_of_whole(slot.state())
    put_back(slot.state())
    second = train(4)
    try:
        SnapshotStore(root).write(slot)
    except TypeError as error:
        refused = str(error)
    after = digest_of_whole(slot.state())
    loaded = load_sharded(root, save_sharded(root, slot, slot.facts), state())
    return {
        "losses": [first, second],
        "whole": [whole, after, digest_of_whole(loaded)],
        "in_place": addresses[0] == addresses[1] == addresses[2] and len(set(addresses[0])) > 8,
        "refused": refused,
    }


def put_back(kept):
    model.load_state_dict(kept["model"])
    moments = {
        key: {name: value.clone() for name, value in of.items()} for key, of in kept["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**kept["optimizer"], "state": moments})
    torch.set_rng_state(kept["rng"])


def main():
    root = Path(folder) / "snapshots"
    train(3)
    if mode == "save":
        digest = save_sharded(root, state(), {"update": 3})
        return {"digest": digest, "whole": digest_of_whole(state()), "losses": train(4)}
    if mode == "refused":
        save_sharded(root, {**state(), "odd": {1} if rank == 1 else 1}, {})
    if mode == "ring":
        return in_memory(root)
    loaded = load_sharded(root, rest[0], state())
    whole = digest_of_whole(loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    return {"whole": whole, "live": digest_of_whole(state()), "of": loaded["rank"], "losses": train(4)}


try:
    result = main()
except (LoopGuardError, TypeError) as error:
    result = {"error": f"{type(error).__name__}: {error}"}
json.dump(result, sys.stdout)
sys.stdout.flush()
dist.destroy_process_group()
# gloo's thread may still hold the last tensors, and it aborts the process when it lets go of them while Python goes.
os._exit(0)
