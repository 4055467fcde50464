"""An optimizer's state, put back where it was.

`load_state_dict` gives every tensor a new address, and may keep those of the state that it was given. A CUDA graph goes
on to write to the old ones. So tensors are filled in place wherever the state has the shape that it had.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


@torch.no_grad()
def put_back(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the state that its `state_dict` gave before; `saved` stays as it is.

    State that did not exist then does not exist afterwards.
    """
    live = optimizer.state_dict()
    own_format = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
    if own_format or not _fits(live, saved):
        optimizer.load_state_dict(copy.deepcopy(saved))
        if not own_format:
            _keep_types(optimizer, saved)
        return
    for key, entry in saved["state"].items():
        _fill(live["state"][key], entry)
    for group, entry in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        _fill(group, {key: value for key, value in entry.items() if key != "params"})


def _keep_types(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Undo that torch casts state to the type of its parameter: a copy in full precision would lose its last bits."""
    for group, entry in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, place in zip(group["params"], entry["params"], strict=True):
            for key, value in saved["state"].get(place, {}).items():
                live = optimizer.state[parameter].get(key)
                if isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor) and live.dtype != value.dtype:
                    optimizer.state[parameter][key] = value.detach().clone().to(live.device)


def _fits(live: Any, saved: Any) -> bool:
    """Whether each tensor in one has a tensor of its shape and type in the other."""
    if isinstance(live, dict) and isinstance(saved, dict):
        return live.keys() == saved.keys() and all(_fits(live[key], saved[key]) for key in live)
    if isinstance(live, torch.Tensor) or isinstance(saved, torch.Tensor):
        both = isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor)
        return both and live.shape == saved.shape and live.dtype == saved.dtype
    if isinstance(live, list) and isinstance(saved, list):
        return len(live) == len(saved) and all(map(_fits, live, saved))
    return True


def _fill(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            live[key].copy_(value)
        elif isinstance(value, dict) and isinstance(live[key], dict):
            _fill(live[key], value)
        else:
            live[key] = copy.deepcopy(value)
