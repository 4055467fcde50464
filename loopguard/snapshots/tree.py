"""A state as JSON and a flat list of tensors, and back.

A state nests dicts, lists, tuples, text, numbers, booleans, None, bytes and tensors. Dataclasses and named tuples of
those become plain dicts, NumPy arrays become tensors, NumPy scalars numbers. Nothing is pickled, so reading a state
runs no code, and anything else is refused with its place.

In the JSON plain dicts with text keys, lists and scalars stand for themselves; all else is an object with one `$` key.
Equal states have equal JSON, whatever the order of their dicts, and floats keep their bits.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from loopguard.snapshots.tensors import names_of_dtypes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_NAN = "7ff8000000000000"
_KINDS = "a state holds dicts, lists, tuples, text, numbers, bytes and tensors"


class Encoded(NamedTuple):
    """A state in two parts."""

    tree: Any
    """JSON values; a tensor is `{"$tensor": its place in the list}`."""
    tensors: list[torch.Tensor]
    """The tensors themselves, not copies. One that occurs twice, such as a tied weight, is in here once."""


def encode(value: Any, *, at: str = "state", shards: dict[str, Any] | None = None) -> Encoded:
    """Take a state apart. `at` is what it is called in the message of an error.

    Sharded tensors (DTensor) go to `shards` by their place where that is given. Raises TypeError for a value of
    another kind, naming its place: `batch.images[3] is a PIL.Image.Image; ...`.
    """
    encoder = _Encoder(at, shards)
    return Encoded(encoder.encode(value), encoder.tensors)


def decode(tree: Any, tensors: Sequence[torch.Tensor], *, shards: Mapping[str, Any] | None = None) -> Any:
    """Put a state together again; the tensors in it are those of the list."""
    if isinstance(tree, list):
        return [decode(item, tensors, shards=shards) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tensor": place}:
            return tensors[cast(int, place)]
        case {"$shard": name}:
            return (shards or {})[cast(str, name)]
        case {"$items": items}:
            return {decode(key, tensors): decode(item, tensors, shards=shards) for key, item in cast(list[Any], items)}
        case {"$tuple": items}:
            return tuple(decode(item, tensors, shards=shards) for item in cast(list[Any], items))
        case {"$bytes": text}:
            return bytes.fromhex(cast(str, text))
        case {"$float": text}:
            return _float(cast(str, text))
        case _:
            return {key: decode(item, tensors, shards=shards) for key, item in tree.items()}


def legible(value: Any) -> Any:
    """JSON for a person to read: plain values as they are, and of anything else its text. Refuses nothing."""
    if isinstance(value, Mapping):
        items = {str(key): legible(item) for key, item in value.items()}
        # What looks like one of ours is spelled out, so that `decode` gives it back.
        return {"$items": [*items.items()]} if any(key.startswith("$") for key in items) else items
    if isinstance(value, list | tuple | set | frozenset):
        return [legible(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return _number(float(value)) if isinstance(value, float) else str(value)


class _Encoder:
    def __init__(self, at: str, shards: dict[str, Any] | None) -> None:
        self.tensors: list[torch.Tensor] = []
        self._shards = shards
        self._at = at
        self._path: list[Any] = []
        self._seen: dict[Any, int] = {}
        # What has not been imported has no values here.
        self._torch = sys.modules.get("torch")
        self._numpy = sys.modules.get("numpy")

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return _number(float(value))
        if isinstance(value, int):
            return int(value)
        if isinstance(value, str):
            return str(value)
        if self._torch is not None and isinstance(value, self._torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list):
            return self._items(value)
        if isinstance(value, tuple):
            if hasattr(value, "_fields"):
                return self._mapping(dict(zip(value._fields, value, strict=True)))
            return {"$tuple": self._items(value)}
        if isinstance(value, bytes):
            return {"$bytes": value.hex()}
        if self._numpy is not None and isinstance(value, self._numpy.generic | self._numpy.ndarray):
            return self._array(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        raise self._unfit(value)

    def _items(self, values: Sequence[Any]) -> list[Any]:
        # The state of Python's generator is a tuple of 625 integers.
        if all(type(value) is int for value in values):
            return list(values)
        encoded = []
        for index, value in enumerate(values):
            self._path.append(index)
            encoded.append(self.encode(value))
            self._path.pop()
        return encoded

    def _mapping(self, values: Mapping[Any, Any]) -> Any:
        # In the order of the keys: a restored optimizer has another order, and equal states have one name.
        encoded = []
        for key in sorted(values, key=repr):
            self._path.append(key)
            encoded.append((key, self.encode(values[key])))
            self._path.pop()
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in encoded):
            return {str(key): item for key, item in encoded}
        return {"$items": [[self._key(key), item] for key, item in encoded]}

    def _key(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return {"$tuple": [self._key(item) for item in key]}
        if key is None or isinstance(key, bool | int | float | str | bytes):
            return self.encode(key)
        raise TypeError(
            f"{self._place()} has a key of type {_type(key)}; keys are text, numbers, bytes or tuples of those"
        )

    def _tensor(self, value: torch.Tensor) -> Any:
        parallel = sys.modules.get("torch.distributed.tensor")
        if parallel is not None and isinstance(value, parallel.DTensor):
            if self._shards is None:
                raise TypeError(f"{self._place()} is a sharded tensor; use save_sharded, on every rank")
            self._shards[self._place()] = value
            return {"$shard": self._place()}
        value = value.detach()
        why = _unstorable(value)
        if why:
            raise TypeError(f"{self._place()} is a tensor {why}; {_KINDS} of plain layout")
        where = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg())
        if value.numel() and where in self._seen:
            return {"$tensor": self._seen[where]}
        self._seen[where] = len(self.tensors)
        self.tensors.append(value)
        return {"$tensor": self._seen[where]}

    def _array(self, value: Any) -> Any:
        if not value.shape:
            return self.encode(value.item())
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{self._place()} is an array of {value.dtype}; {_KINDS}")
        import torch

        # A copy: torch takes no array that is read-only, of another byte order, or that runs backwards.
        return self._tensor(torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True)))

    def _unfit(self, value: Any) -> TypeError:
        return TypeError(f"{self._place()} is a {_type(value)}; {_KINDS}")

    def _place(self) -> str:
        place = self._at
        for key in self._path:
            place += f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
        return place


def _unstorable(value: torch.Tensor) -> str:
    """Why a file cannot hold this tensor, or the empty string."""
    if value.is_quantized:
        return "that is quantized"
    if value.layout != sys.modules["torch"].strided:
        return "of another layout"
    if value.is_meta:
        return "without data (on the meta device)"
    return "" if value.dtype in names_of_dtypes() else f"of {value.dtype}"


def _type(value: object) -> str:
    kind: type = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _number(value: float) -> Any:
    """A float for JSON, which has no word for what is not finite."""
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value).hex()
    return {"$float": repr(value) if math.isinf(value) or bits == _NAN else bits}


def _float(text: str) -> float:
    if text in {"inf", "-inf", "nan"}:
        return float(text)
    return cast(float, struct.unpack(">d", bytes.fromhex(text))[0])
