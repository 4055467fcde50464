"""A small training run with everything that makes a replay hard, and how two states are compared.

Also imported by the processes that tests start, so nothing of pytest is in here.
"""

import random

import torch

DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))


def same(a, b):
    """Equal to the bit, and in the type of every part."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def _raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Run:
    """Dropout, momentum, a schedule and a shuffled sampler that draws from the global generator."""

    def __init__(self, *, fused=True):
        random.seed(3)
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 8)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.order, self.place = [], 0

    def train(self, updates):
        """The losses of so many updates."""
        return [self.update() for _ in range(updates)]

    def update(self):
        if self.place == len(self.order):
            self.order, self.place = torch.randperm(64).tolist(), 0
        batch = DATA[self.order[self.place : self.place + 8]]
        self.place += 8
        loss = (self.model(batch) - batch).square().mean() * random.uniform(0.9, 1.1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": {"order": self.order, "place": self.place},
            "rng": {"python": random.getstate(), "torch": torch.get_rng_state()},
        }

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        # An optimizer keeps the tensors that it is given; these belong to the snapshot.
        moments = {
            key: {name: value.clone() if torch.is_tensor(value) else value for name, value in of.items()}
            for key, of in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scheduler.load_state_dict(state["scheduler"])
        self.order, self.place = list(state["sampler"]["order"]), state["sampler"]["place"]
        random.setstate(state["rng"]["python"])
        torch.set_rng_state(state["rng"]["torch"])
