"""The generators that a loop draws from: Python's, NumPy's and torch's."""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """Where all of them are now."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tobytes(), *rest)  # asked for with every batch, and a list of it takes long
    return state


def reseed(salt: str) -> None:
    """Begin anew with all of them, from where they are now and a salt.

    Equal states give equal ones, so that ranks which drew the same go on doing so, and those that did not do not.
    """
    now = repr(random.getstate()).encode() + torch.get_rng_state().numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(salt.encode() + b"\0" + now).digest()[:4], "big")
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def set_rng_state(state: dict[str, Any]) -> None:
    """Go back there."""
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy as np

        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])
