"""What `loopguard reproduce` needs to stand at a freeze of examples/transformers_trainer.py again.

python examples/transformers_trainer.py runs/mine --plant-fault
loopguard reproduce runs/mine/freezes/f1 -m examples/transformers_replay.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers_trainer import UPDATES, make_trainer


def build(config):
    """Model, optimizer and schedule as the trainer makes them."""
    trainer = make_trainer(tempfile.mkdtemp())
    trainer.create_optimizer_and_scheduler(UPDATES)
    trainer.model.train()
    return {"model": trainer.model, "optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}


def backward(model, batches, at):
    """What `Trainer.training_step` does with the micro-batches of one update."""
    losses = []
    for batch in batches:
        loss = model(**batch["inputs"], num_items_in_batch=batch["num_items_in_batch"]).loss
        loss.backward()
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
