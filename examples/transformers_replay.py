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
    weights, limit = list(trainer.model.parameters()), config["training_arguments"]["max_grad_norm"]
    # A Trainer clips between the backward pass and the step; so does this, after the norm has been read.
    trainer.optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(weights, limit) and None)
    return {"model": trainer.model, "optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}


def backward(model, batches, at):
    """What `Trainer.training_step` does with the micro-batches of one update."""
    losses = []
    for batch in batches:
        loss = model(**batch["inputs"], num_items_in_batch=batch["num_items_in_batch"]).loss
        loss.backward()
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
