"""SHA-256 over what a model or an optimizer holds."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def sha256(trees: Iterable[Any]) -> str:
    """Of dicts, lists and tensors: the same for the same keys, shapes, types and bits."""
    digest = hashlib.sha256()
    for tree in trees:
        _feed(digest, tree)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, dict):
        # In the order of the keys: an optimizer that was loaded lists its options in another order than a new one.
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        value = getattr(value, "_local_tensor", value)  # of a sharded tensor what this rank has
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
