"""LoopGuard's own last-good state: what a frozen loop goes back to, and what a killed one goes on from.

A snapshot is a folder with `state.safetensors` (every tensor) and `manifest.json` (everything else, and the tensors'
place in it). Its name is the SHA-256 over both, so that a snapshot cannot change under its name. Nothing is pickled.

    snapshots/
      <digest>/        state.safetensors, manifest.json
      promoted.json    the pointer: which snapshot acts now; replacing it is the commit point of a promotion

Not here: the checkpoints of a framework, which stay where they are, and any decision about when to go back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loopguard.errors import DiskError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"
_POINTER = "promoted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The pointer: the snapshot that acts, the cycle and update that it stands at, and its panel."""

    snapshot: str
    cycle: int
    update: int
    panel: dict[str, float]


class SnapshotStore:
    """The snapshots of one run directory. One store has one writer, the process that owns the run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, state: Any, *, into: Path | None = None) -> str:
        """Make a state durable and give its digest.

        `state` may nest dicts, lists, tuples, strings, numbers, booleans, None, bytes and tensors; dict keys may be
        strings or integers. The folder appears under its name whole or not at all. Raises DiskError where the disk does
        not take it, TypeError for a value of another kind.
        """
        from safetensors.torch import save

        parent = into or self.root
        tensors: dict[str, Any] = {}
        tree = _encode(state, tensors)
        blob = save(tensors)
        manifest = json.dumps({"format": 1, "tree": tree}, sort_keys=True, separators=(",", ":")).encode()
        digest = _digest(blob, manifest)
        final = parent / digest
        partial = parent / f".partial-{digest}"
        with writing(final):
            if final.exists():
                return digest
            partial.mkdir(parents=True, exist_ok=True)
            for name, data in ((_TENSORS, blob), (_MANIFEST, manifest)):
                _write_synced(partial / name, data)
            sync_directory(partial)
            partial.rename(final)
            sync_directory(parent)
        return digest

    def read(self, digest: str, *, of: Path | None = None) -> Any:
        """The state of that name. Raises SnapshotError where it is missing or is not what its name says."""
        from safetensors.torch import load

        folder = (of or self.root) / digest
        try:
            blob, manifest = (folder / _TENSORS).read_bytes(), (folder / _MANIFEST).read_bytes()
        except OSError as error:
            raise SnapshotError(f"{folder}: the snapshot cannot be read: {error.strerror}") from error
        if (found := _digest(blob, manifest)) != digest:
            raise SnapshotError(f"{folder}: the snapshot is not what its name says; its content has digest {found}")
        return _decode(json.loads(manifest)["tree"], load(blob))

    def promote(self, promoted: Promoted) -> None:
        """Point at another snapshot. This is the commit point of a promotion."""
        body = {
            "snapshot": promoted.snapshot,
            "cycle": promoted.cycle,
            "update": promoted.update,
            "panel": promoted.panel,
        }
        replace_durably(self.root / _POINTER, json.dumps(body, sort_keys=True).encode() + b"\n")

    def promoted(self) -> Promoted | None:
        """The pointer, or None before the first promotion. Raises SnapshotError where it cannot be read."""
        path = self.root / _POINTER
        try:
            body = json.loads(path.read_bytes())
            return Promoted(
                snapshot=body["snapshot"], cycle=body["cycle"], update=body["update"], panel=dict(body["panel"])
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{path}: the pointer to the promoted snapshot cannot be read: {error}") from error

    def prune(self, *, keep: set[str]) -> None:
        """Remove every snapshot but those, and what a killed writer left."""
        for folder in self.root.iterdir():
            if folder.is_dir() and folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all, on disk when this returns. Raises DiskError where it cannot."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        _write_synced(partial, data)
        partial.replace(path)
        sync_directory(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the operating system says in here becomes a DiskError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path} could not be written: {error.strerror}. Mend that and run the same command again; "
            f"nothing was lost that had been promoted"
        ) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(blob: bytes, manifest: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(blob).digest() + hashlib.sha256(manifest).digest()).hexdigest()


def _encode(value: Any, tensors: dict[str, Any]) -> Any:
    """JSON for a state; tensors move to `tensors` and leave their name behind.

    Plain dicts with string keys, lists and scalars stand for themselves; all else is an object with one `$` key.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        # In the order of the keys: a restored optimizer has another order, and equal states have one name.
        items = [(key, value[key]) for key in sorted(value, key=repr)]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, tensors) for key, item in items}
        return {"$items": [[_encode(key, tensors), _encode(item, tensors)] for key, item in items]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    return {"$tensor": _put(value, tensors)}


def _put(value: Any, tensors: dict[str, Any]) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a snapshot cannot hold a {type(value).__name__}; give tensors and JSON values")
    name = f"t{len(tensors):06d}"
    # A copy of its own: tied weights share storage, which the file format refuses.
    tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return name


def _decode(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[cast(str, name)]
        case {"$items": items}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in cast(list[Any], items)}
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in cast(list[Any], items))
        case {"$bytes": text}:
            return bytes.fromhex(cast(str, text))
        case _:
            return {key: _decode(item, tensors) for key, item in value.items()}
