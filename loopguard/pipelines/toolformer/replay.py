"""For `loopguard reproduce`: the model and the loss of this loop, from what a capsule holds.

loopguard reproduce runs/toolformer/freezes/f1 --module loopguard.pipelines.toolformer.replay
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.pipelines.toolformer.faults import HONEST, loss_fault
from loopguard.pipelines.toolformer.model import Batch, Vocabulary, from_folder, from_nothing, trained
from loopguard.pipelines.toolformer.plant import parse_plant
from loopguard.pipelines.toolformer.settings import Settings

if TYPE_CHECKING:
    import torch

    from loopguard.reproduce import At


def build(config: dict[str, Any]) -> dict[str, Any]:
    """The model, its optimizer and its schedule, as the loop attaches them."""
    settings = Settings(**config["settings"])
    if config["model"] is not None:
        _, model = from_folder(Path(config["model"]))
    else:
        model = from_nothing(Vocabulary(**config["vocabulary"]), settings)
    optimizer, schedule = trained(model, settings)
    return {"model": model, "optimizer": optimizer, "scheduler": schedule}


def loss(model: torch.nn.Module, batch: dict[str, Any], at: At) -> torch.Tensor:
    """The loss of one batch, with the fault that was planted there."""
    model.train()
    plant = parse_plant(at.config["plant"]) if at.config["plant"] else None
    fault = loss_fault(plant.fault) if plant is not None and plant.cycle == at.cycle else HONEST
    return fault.loss(model, Batch(**batch), update=at.update_in_cycle)
